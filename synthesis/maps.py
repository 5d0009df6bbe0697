"""Label maps to draw training images from: reading, cleaning, and one prepared file of all.

A prepared map holds *classes*: every source label that may have an intensity of its own, such as
cerebellar white matter, which the network merges into the cerebellum. Tables turn classes into
network channels and into their mirror images.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from nibabel.processing import resample_to_output
from scipy import ndimage

from babyseg_bids.errors import InputError
from babyseg_bids.labels import MERGED, label_table
from babyseg_bids.synthesis.deformation import integrate

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
CSF, SKULL, MARROW, SCALP, MUSCLE, DURA = 24, 9001, 9002, 9003, 9004, 9005
LAYERS = (SKULL, MARROW, SCALP, MUSCLE, DURA)
_MIRRORED_OUTSIDE = {30: 62, 25: 57, 136: 137, 163: 164}
# A structure's component smaller than this share of the structure is a speck.
SPECK_SHARE = 0.05
# Width of the empty border around a brain without a head, where layers are drawn, mm.
MARGIN = 28
# Fissures up to this width do not count as outside of the brain's hull, mm.
FISSURE = 12.0
# Distances are stored in steps of half a millimetre.
DISTANCE_STEP = 0.5
SULCI_SPACING = 3
# Steps of a millimetre in which the depth of the cortex is stored, and the deviation of the
# Gaussian that smooths it, voxels.
DEPTH_STEPS = 40
_DEPTH_BLUR = 0.7
# Squarings that turn a velocity into its flow; velocities are a few voxels.
FLOW_STEPS = 4
# Border and spacing of the grid on which a map without a shape is deformed, mm.
OWN_BORDER = 20
OWN_SPACING = 4.0
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
class Template:
    """The space in which brains are morphed into each other.

    Parameters
    ----------
    origin : (3,), position of voxel 0, mm
    spacing : mm
    ventricles : (3, *size) float32, mm, velocity that widens the lateral ventricles by about a
        millimetre on each side
    """

    origin: np.ndarray
    spacing: float
    ventricles: np.ndarray


@dataclass(frozen=True)
class Shape:
    """How a map relates to the template.

    Parameters
    ----------
    template : the same object for all maps
    matrix : (4, 4), from template positions to the map's voxels, both mm
    velocity : (3, *size) float32, mm; its flow takes template positions to where the same part
        of this brain lies, before `matrix`
    """

    template: Template
    matrix: np.ndarray
    velocity: np.ndarray

    @cached_property
    def flow(self) -> np.ndarray:
        """Displacement (D, *size) float32 of the velocity's flow, template voxels."""
        velocity = torch.from_numpy(self.velocity) / self.template.spacing
        return integrate(velocity, steps=FLOW_STEPS).numpy()


@dataclass(frozen=True)
class TrainingMap:
    """One prepared label map: 1 mm, RAS axes.

    Parameters
    ----------
    name : file name without extension
    classes : (X, Y, Z) uint8, classes of `class_table`
    distance : (X, Y, Z) int8, signed distance to the brain's hull in half millimetres, negative
        inside, 127 for farther
    has_head : whether `classes` holds what lies around the brain
    age : months, None if the name does not say
    sulci : (3, *coarse) float32 on a grid of `SULCI_SPACING` mm, unit vectors that point out of
        the brain where its surface is folded, faded out elsewhere; None for adults
    shape : see `Shape`; None until it was estimated
    """

    name: str
    classes: np.ndarray
    distance: np.ndarray
    has_head: bool
    age: float | None = None
    sulci: np.ndarray | None = None
    shape: Shape | None = None

    @cached_property
    def brain(self) -> int:
        """Volume of the brain, mm3."""
        table = class_table()
        counts = np.bincount(self.classes.ravel(), minlength=len(table))
        return int(counts[table.channel > 0].sum())

    @cached_property
    def depth(self) -> np.ndarray:
        """Where white matter and cortex meet, and where they may (see `cortical_depth`)."""
        return cortical_depth(self.classes)

    @cached_property
    def placement(self) -> Shape:
        """The shape, or one that says nothing: the map's own space about the brain's middle."""
        if self.shape is not None:
            return self.shape
        dim = self.classes.ndim
        inside = np.argwhere(self.distance <= 0)
        low, high = inside.min(0), inside.max(0)
        matrix = np.eye(dim + 1)
        matrix[:dim, dim] = (low + high) / 2
        half = (high - low) / 2 + OWN_BORDER
        size = [int(n) for n in np.ceil(2 * half / OWN_SPACING) + 1]
        zero = np.zeros((dim, *size), np.float32)
        return Shape(Template(-half.astype(np.float32), OWN_SPACING, zero), matrix, zero)


def read_label_map(path: Path, /) -> tuple[np.ndarray, np.ndarray]:
    """Source labels (X, Y, Z) int64 in RAS axes at 1 mm, and their (4, 4) affine.

    Maps of another voxel size are resampled, each voxel from its nearest.

    Raises
    ------
    InputError
        If the file cannot be read or is not 3-D.
    """
    try:
        image = nib.as_closest_canonical(nib.squeeze_image(nib.load(path)))
        if image.ndim != 3:
            raise InputError(f'{path} has {image.ndim} dimensions; give 3-D label maps.')
        if not np.allclose(image.header.get_zooms()[:3], 1, atol=0.01):
            image = resample_to_output(image, 1.0, order=0)
        labels = np.asarray(image.dataobj).round().astype(np.int64)
    except (OSError, nib.filebasedimages.ImageFileError, EOFError) as e:
        raise InputError(f'{path} cannot be read as a label map: {e}') from e
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
    """Read, clean and crop one source map (see `TrainingMap`).

    Raises
    ------
    InputError
        If the file cannot be read, or has no structure.
    """
    labels, _ = read_label_map(path)
    name = path.name.split('.')[0]
    months = re.match(r'(\d+)mo$', name)
    # Nobody is younger than a newborn to the physics of the contrasts.
    unborn = re.match(r'GA\d+', name)
    age = float(months[1]) if months else 0.0 if unborn else None
    try:
        return prepare_labels(labels, name=name, age=age)
    except InputError as e:
        raise InputError(f'{path}: {e}') from e


def prepare_labels(labels: np.ndarray, /, *, name: str, age: float | None = None) -> TrainingMap:
    """Clean and crop a map (X, Y, Z) of source labels, 1 mm, RAS axes.

    Parameters
    ----------
    age : months

    Raises
    ------
    InputError
        If no voxel has a label that the network knows.
    """
    table = class_table()
    labels = np.asarray(labels, np.int64)
    has_head = bool((labels > 500).sum() > 0.05 * (labels > 0).sum())
    labels = split_sideless(labels)
    lut = np.zeros(max(int(labels.max()), int(table.numbers.max())) + 1, np.uint8)
    lut[table.numbers] = np.arange(len(table))
    classes = lut[labels]
    if not (table.channel[classes] > 0).any():
        raise InputError('the map holds none of the labels that babyseg knows.')
    margin = 2 if has_head else MARGIN
    classes = remove_specks(_crop(np.pad(classes, margin), margin), table.channel)
    brain = table.channel[classes] > 0
    hull = hull_distance(brain)
    return TrainingMap(
        name,
        np.ascontiguousarray(classes),
        np.clip(np.rint(hull / DISTANCE_STEP), -127, 127).astype(np.int8),
        has_head,
        age=age,
        sulci=None if has_head else sulcal_directions(brain, hull),
    )


def hull_distance(brain: np.ndarray, /) -> np.ndarray:
    """Signed distance (X, Y, Z) float32 in voxels to a brain whose fissures are filled.

    The skull bridges what separates the hemispheres and what lies above the cerebellum. It is
    smooth, so that half the resolution does; `brain` (X, Y, Z) bool, distances inside it are
    negative.
    """
    padded = np.pad(brain, [(0, n % 2) for n in brain.shape])
    x, y, z = (n // 2 for n in padded.shape)
    coarse = padded.reshape(x, 2, y, 2, z, 2).any((1, 3, 5))
    reach = FISSURE / 2
    near = ndimage.distance_transform_edt(~coarse) <= reach
    hull = (ndimage.distance_transform_edt(near) > reach) | coarse
    outside = ndimage.distance_transform_edt(~hull)
    inside = ndimage.distance_transform_edt(hull)
    # Voxel centres next to the border are half a voxel away from it.
    signed = torch.from_numpy(2 * np.where(hull, 0.5 - inside, outside - 0.5)).float()
    fine = torch.nn.functional.interpolate(
        signed[None, None], scale_factor=2, mode='trilinear', align_corners=False
    )[0, 0]
    return fine[tuple(slice(n) for n in brain.shape)].numpy()


def sulcal_directions(brain: np.ndarray, hull: np.ndarray, /) -> np.ndarray:
    """Vectors (3, *coarse) along which the folds of a brain get deeper or shallower.

    Parameters
    ----------
    brain : (X, Y, Z) bool
    hull : (X, Y, Z), signed distance to its hull, mm

    Returns
    -------
    Outward unit vectors times the local share of sulci, 0 to 1, every `SULCI_SPACING` voxels.
    """
    sulci = ndimage.gaussian_filter(((hull < 0) & ~brain).astype(np.float32), 3)
    sulci = np.minimum(sulci / max(float(sulci.max()) / 2, 1e-6), 1)
    smooth = ndimage.gaussian_filter(hull, 4)
    every = (slice(None, None, SULCI_SPACING),) * brain.ndim
    out = np.stack([g[every] for g in np.gradient(smooth)])
    out /= np.maximum(np.linalg.norm(out, axis=0), 1e-3)
    return (out * sulci[every]).astype(np.float32)


def cortical_depth(classes: np.ndarray, /) -> np.ndarray:
    """How far each voxel of cortex is from white matter, and the other way round.

    Parameters
    ----------
    classes : (X, Y, Z) uint8, classes of `class_table`

    Returns
    -------
    (X, Y, Z) int8, distance to the border in `DEPTH_STEPS` of a millimetre, positive in cortex and
    negative in white matter; 127 in the outer half of the cortex, -128 in all else
    """
    table = class_table()
    white, cortex = (np.isin(classes, table.tissue(t)) for t in ('white-matter', 'cortex'))
    out = np.full(classes.shape, -128, np.int8)
    found = ndimage.find_objects((white | cortex).astype(np.uint8))
    if not white.any() or not cortex.any():
        return out
    box = tuple(slice(max(0, s.start - 2), s.stop + 2) for s in found[0])
    white, cortex = white[box], cortex[box]
    to_white = ndimage.distance_transform_edt(~white)
    to_cortex = ndimage.distance_transform_edt(~cortex)
    to_others = ndimage.distance_transform_edt(white | cortex)
    # Smoothed where it is defined, or the border would move in whole voxels.
    signed = np.where(cortex, to_white - 0.5, 0.5 - to_cortex)
    known = (white | cortex).astype(np.float64)
    weight = ndimage.gaussian_filter(known, _DEPTH_BLUR)
    smooth = ndimage.gaussian_filter(signed * known, _DEPTH_BLUR) / np.maximum(weight, 1e-6)
    steps = np.clip(np.rint(DEPTH_STEPS * smooth), -127, 126)
    steps[cortex & (to_others <= to_white)] = 127
    steps[~(white | cortex)] = -128
    out[box] = steps
    return out


def _crop(classes: np.ndarray, margin: int) -> np.ndarray:
    box = ndimage.find_objects((classes > 0).astype(np.uint8))[0]
    return classes[tuple(slice(s.start - margin, s.stop + margin) for s in box)]


def save_maps(path: Path, maps: Iterable[TrainingMap]) -> None:
    """Write prepared maps to one compressed file, which needs no image library to be read."""
    arrays = {_NUMBERS: class_table().numbers}
    template = None
    for m in maps:
        key = f'{m.name}/{"head" if m.has_head else "brain"}'
        arrays[f'{key}/classes'] = m.classes
        arrays[f'{key}/distance'] = m.distance
        if m.age is not None:
            arrays[f'{key}/age'] = np.array(m.age)
        if m.sulci is not None:
            # In steps that the eye cannot see, so that the many zeros compress.
            arrays[f'{key}/sulci'] = np.rint(m.sulci * 100).astype(np.int8)
        if m.shape is not None:
            template = m.shape.template
            arrays[f'{key}/matrix'] = m.shape.matrix
            arrays[f'{key}/velocity'] = m.shape.velocity.astype(np.float16)
    if template is not None:
        for name in ('origin', 'spacing', 'ventricles'):
            arrays[f'template/{name}'] = np.asarray(getattr(template, name), np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'{path.name}.tmp.npz')
    np.savez_compressed(temporary, **arrays)
    temporary.replace(path)


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
    template = None
    if 'template/origin' in keys:
        template = Template(
            keys.pop('template/origin'),
            float(keys.pop('template/spacing')),
            keys.pop('template/ventricles'),
        )
    maps = []
    for key in [k.removesuffix('/classes') for k in keys if k.endswith('/classes')]:
        name, kind = key.split('/')
        if name in exclude:
            continue
        shape = None
        if template is not None and f'{key}/matrix' in keys:
            velocity = keys[f'{key}/velocity'].astype(np.float32)
            shape = Shape(template, keys[f'{key}/matrix'], velocity)
        age, sulci = keys.get(f'{key}/age'), keys.get(f'{key}/sulci')
        maps.append(
            TrainingMap(
                name,
                keys[f'{key}/classes'],
                keys[f'{key}/distance'],
                kind == 'head',
                age=None if age is None else float(age),
                sulci=None if sulci is None else sulci.astype(np.float32) / 100,
                shape=shape,
            )
        )
    return maps
