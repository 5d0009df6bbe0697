"""Label maps to draw training images from: reading, cleaning, and one prepared file of all.

A prepared map holds *classes*: every source label that may have an intensity of its own, such as
cerebellar white matter, which the network merges into the cerebellum. Tables turn classes into
network channels and into their mirror images.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from babyseg_bids.errors import InputError
from babyseg_bids.labels import MERGED, label_table

# Vermis (172) and white-matter hypointensities (77) have no side in the sources; here each half
# gets a number of its own, by the nearer of these left and right neighbours.
VERMIS_LEFT, VERMIS_RIGHT = 1172, 2172
LESION_LEFT, LESION_RIGHT = 1077, 2077
SIDELESS = {
    172: ((7, 8), (46, 47), VERMIS_LEFT, VERMIS_RIGHT),
    77: ((2,), (41,), LESION_LEFT, LESION_RIGHT),
}
# Source labels outside the 27 structures that have an intensity of their own. 24 is CSF,
# 30/62 vessels, 85 optic chiasm; 5xx and the rest are tissues around the adults' brains.
OUTSIDE = (24, 25, 30, 57, 62, 72, 85, 136, 137, 163, 164, 502, *range(506, 517), 530)
# Classes that are drawn around brains that come without a head.
CSF, SKULL, MARROW, SCALP, MUSCLE = 24, 9001, 9002, 9003, 9004
LAYERS = (SKULL, MARROW, SCALP, MUSCLE)
_MIRRORED_OUTSIDE = {30: 62, 25: 57, 136: 137, 163: 164}
# A structure's component smaller than this share of the structure is a speck.
SPECK_SHARE = 0.05
# Width of the empty border around a brain without a head, where layers are drawn, mm.
MARGIN = 28
_NUMBERS = 'class-numbers'


@dataclass(frozen=True)
class ClassTable:
    """All classes of the prepared maps, in the order of their numbers 0..N-1.

    `numbers` are the source labels, `channel` the network's channels, `mirror` the class on the
    other side; all (N,).
    """

    numbers: np.ndarray
    channel: np.ndarray
    mirror: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def of(self, *numbers: int) -> list[int]:
        """Classes of the given source labels."""
        return [int(np.flatnonzero(self.numbers == n)[0]) for n in numbers]

    def tissue(self, tissue: str) -> list[int]:
        """Classes whose network label belongs to a tissue of the label table."""
        rows = label_table().rows
        return [c for c in range(len(self)) if rows[self.channel[c]].tissue == tissue]


def class_table() -> ClassTable:
    """The classes of all sources: 28 labels, their finer parts, and what lies outside."""
    table = label_table()
    merged = {
        **MERGED,
        VERMIS_LEFT: 8,
        VERMIS_RIGHT: 47,
        LESION_LEFT: 2,
        LESION_RIGHT: 41,
    }
    numbers = np.array([*table.indices, *merged, *OUTSIDE, *LAYERS], np.int64)
    channel = table.channels(np.array([merged.get(n, n) for n in numbers.tolist()]))
    channel[len(table) + len(merged) :] = 0
    pairs = {r.index: r.mirror for r in table.rows}
    pairs |= {5: 44, 31: 63, 7: 46, **_MIRRORED_OUTSIDE}
    pairs |= {VERMIS_LEFT: VERMIS_RIGHT, LESION_LEFT: LESION_RIGHT}
    pairs |= {b: a for a, b in pairs.items()}
    position = {n: i for i, n in enumerate(numbers.tolist())}
    mirror = np.array([position[pairs.get(n, n)] for n in numbers.tolist()])
    return ClassTable(numbers, channel.astype(np.int64), mirror)


@dataclass(frozen=True)
class TrainingMap:
    """One prepared label map: 1 mm, RAS axes.

    Parameters
    ----------
    name : file name without extension
    classes : (X, Y, Z) uint8, classes of `class_table`
    distance : (X, Y, Z) uint8, distance to the brain in mm, 0 inside it, 255 for farther
    has_head : whether `classes` holds what lies around the brain
    """

    name: str
    classes: np.ndarray
    distance: np.ndarray
    has_head: bool


def read_label_map(path: Path, /) -> tuple[np.ndarray, np.ndarray]:
    """Source labels (X, Y, Z) int64 in RAS axes and the matching (4, 4) affine of a map.

    Raises
    ------
    InputError
        If the file cannot be read, or its voxels are not 1 mm.
    """
    try:
        image = nib.as_closest_canonical(nib.load(path))
        labels = np.asarray(image.dataobj).round().astype(np.int64)
    except (OSError, nib.filebasedimages.ImageFileError, EOFError) as e:
        raise InputError(f'{path} cannot be read as a label map: {e}') from e
    if not np.allclose(image.header.get_zooms()[:3], 1, atol=0.01):
        raise InputError(
            f'{path} has voxels of {image.header.get_zooms()[:3]} mm; give 1 mm maps.'
        )
    return labels, image.affine


def split_sideless(labels: np.ndarray, /) -> np.ndarray:
    """Give each voxel of a label without a side the side of the nearer neighbour structure.

    Parameters and result are source labels (X, Y, Z); see `SIDELESS`.
    """
    out = labels.copy()
    for number, (left, right, new_left, new_right) in SIDELESS.items():
        where = labels == number
        if where.any():
            to_left = ndimage.distance_transform_edt(~np.isin(labels, left))
            to_right = ndimage.distance_transform_edt(~np.isin(labels, right))
            out[where] = np.where((to_left <= to_right)[where], new_left, new_right)
    return out


def remove_specks(classes: np.ndarray, channel: np.ndarray, /) -> np.ndarray:
    """Reassign small stray components of each structure to the nearest other label.

    Parameters
    ----------
    classes : (X, Y, Z) uint8
    channel : (N,), network channel of each class

    Returns
    -------
    (X, Y, Z) uint8
    """
    targets = channel[classes]
    stray = np.zeros(classes.shape, bool)
    for c, box in enumerate(ndimage.find_objects(targets), start=1):
        if box is None:
            continue
        components, count = ndimage.label(targets[box] == c)
        if count > 1:
            sizes = np.bincount(components.ravel())
            small = sizes < SPECK_SHARE * sizes[1:].sum()
            small[0] = False
            stray[box] |= small[components]
    if not stray.any():
        return classes
    nearest = ndimage.distance_transform_edt(stray, return_distances=False, return_indices=True)
    return classes[tuple(nearest)]


def prepare_map(path: Path, /) -> TrainingMap:
    """Read, clean and crop one source map (see `TrainingMap`)."""
    table = class_table()
    labels, _ = read_label_map(path)
    has_head = bool((labels > 500).sum() > 0.05 * (labels > 0).sum())
    labels = split_sideless(labels)
    lut = np.zeros(max(int(labels.max()), int(table.numbers.max())) + 1, np.uint8)
    lut[table.numbers] = np.arange(len(table))
    classes = lut[labels]
    brain = table.channel[classes] > 0
    if not brain.any():
        raise InputError(f'{path} holds none of the labels that babyseg knows.')
    margin = 2 if has_head else MARGIN
    classes = remove_specks(_crop(np.pad(classes, margin), margin), table.channel)
    distance = ndimage.distance_transform_edt(table.channel[classes] == 0)
    return TrainingMap(
        path.name.split('.')[0],
        np.ascontiguousarray(classes),
        np.ascontiguousarray(np.clip(np.ceil(distance), 0, 255).astype(np.uint8)),
        has_head,
    )


def _crop(classes: np.ndarray, margin: int) -> np.ndarray:
    box = ndimage.find_objects((classes > 0).astype(np.uint8))[0]
    return classes[tuple(slice(s.start - margin, s.stop + margin) for s in box)]


def save_maps(path: Path, maps: Iterable[TrainingMap]) -> None:
    """Write prepared maps to one compressed file, which needs no image library to be read."""
    arrays = {_NUMBERS: class_table().numbers}
    for m in maps:
        kind = 'head' if m.has_head else 'brain'
        arrays[f'{m.name}/{kind}/classes'] = m.classes
        arrays[f'{m.name}/{kind}/distance'] = m.distance
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)


def load_maps(path: Path, /, *, exclude: Sequence[str] = ()) -> list[TrainingMap]:
    """Read the maps that `save_maps` wrote, leaving out those named in `exclude`."""
    if not path.exists():
        raise InputError(f'{path} does not exist; write it with `babyseg-train prepare`.')
    with np.load(path) as arrays:
        keys: dict[str, np.ndarray] = {k: arrays[k] for k in arrays.files}
    if not np.array_equal(keys.pop(_NUMBERS, ()), class_table().numbers):
        raise InputError(
            f'{path} was prepared for other classes; write it again with `babyseg-train prepare`.'
        )
    maps = []
    for key in keys:
        name, kind, what = key.split('/')
        if what == 'classes' and name not in exclude:
            distance = keys[f'{name}/{kind}/distance']
            maps.append(TrainingMap(name, keys[key], distance, kind == 'head'))
    return maps
