"""How alike two scans of any contrast are in a given position, on coarse copies of the heads."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import nibabel as nib
import numpy as np
from scipy import ndimage

from babyseg_bids.errors import AlignmentError

# Edge length in mm of the voxels that the registration works on.
WORKING_MM = 2.0
# Nothing lower than this below the top of the head takes part: the neck bends, the skull does not.
HEAD_HEIGHT_MM = 200.0
MARGIN_MM = 10.0
# Points at which the similarity is measured, and the least share of them that must lie in the
# field of view of the moving scan.
POINTS = 40_000
MIN_OVERLAP = 0.25
# Points that are looked up together, so that what is computed of them stays in the cache; they are
# sorted for the same reason.
_AT_ONCE = 8192
# Bins of each scan's intensities.
BINS = 32


@dataclass(frozen=True)
class Volume:
    """A cropped scan: `data` in 0..1, voxel-to-world `affine`, head `mask`, `centre` in mm."""

    data: np.ndarray
    affine: np.ndarray
    mask: np.ndarray
    centre: np.ndarray


def normalised_mutual_information(counts: np.ndarray, /) -> float:
    """(H(a) + H(b)) / H(a, b) of a joint histogram (N, M) (Studholme et al. 1999)."""
    if not counts.any():
        return 1.0
    joint = counts / counts.sum()

    def entropy(p: np.ndarray) -> float:
        p = p[p > 0]
        return float(-(p * np.log(p)).sum())

    together = entropy(joint)
    if together == 0:
        return 1.0
    return (entropy(joint.sum(0)) + entropy(joint.sum(1))) / together


class _Binned:
    """The bins of a volume (X, Y, Z) with values in 0..1, interpolated linearly.

    Beyond its border it fades to zero. About twice as fast as scipy's interpolation.
    """

    def __init__(self, data: np.ndarray) -> None:
        # Just below the number of bins, so that the whole part of a value is its bin.
        data = np.pad((BINS - 1e-3) * data.astype(np.float32), 1)
        self._values = data.ravel()
        self._last = np.nextafter(np.array(data.shape, np.float32) - 1, 0)[:, None]
        self._strides = np.array(data.strides)[:, None] // data.itemsize
        self._corners = np.array(list(product((0, 1), repeat=3))) @ self._strides

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """The bins (N,) int64 at places (3, N) float32, in voxels."""
        places = np.clip(places + 1, 0, self._last)
        low = places.astype(np.intp)
        places -= low
        voxels = (low * self._strides).sum(0)
        values = self._values.take(self._corners + voxels).reshape(2, 2, 2, -1)
        for share in places:
            values = values[0] + (values[1] - values[0]) * share
        return values.astype(np.int64)


def apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Transform points, (N, 3) to (N, 3)."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def _without_border(data: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut off outer planes that are all zero."""
    box = ndimage.find_objects((data != 0).astype(np.uint8))
    if not box:
        return data, affine
    step = np.eye(4)
    step[:3, 3] = [s.start for s in box[0]]
    return data[box[0]], affine @ step


def _reduce(data: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average blocks of voxels until they are nearly, but not over, `WORKING_MM` long."""
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    factors = np.maximum(1, np.floor(WORKING_MM / zooms + 1e-3)).astype(int)
    factors = np.minimum(factors, data.shape)
    blocks = [n // f for n, f in zip(data.shape, factors, strict=True)]
    data = data[tuple(slice(0, b * f) for b, f in zip(blocks, factors, strict=True))]
    shape = [n for pair in zip(blocks, factors, strict=True) for n in pair]
    data = data.reshape(shape).mean(axis=(1, 3, 5), dtype=np.float32)
    step = np.diag([*factors, 1.0])
    step[:3, 3] = (factors - 1) / 2
    return data, affine @ step


def _threshold(values: np.ndarray) -> float:
    """The threshold that best parts `values` into two classes (Otsu 1979)."""
    counts, edges = np.histogram(values, 128)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    total = np.cumsum(counts * centres)
    with np.errstate(divide='ignore', invalid='ignore'):
        gap = total / below - (total[-1] - total) / above
        between = np.nan_to_num(below * above * gap**2)
    return float(edges[1:][between.argmax()])


def _head_mask(data: np.ndarray, stripped: bool) -> np.ndarray:
    """Largest connected part of the image that is not background, its holes filled."""
    if stripped:
        mask = data > 0
    else:
        # Half of Otsu's threshold keeps dark tissue; air in an unmasked scan lies well below.
        top = np.quantile(data, 0.99)
        smooth = ndimage.gaussian_filter(np.minimum(data, top), 1)
        mask = smooth > 0.5 * _threshold(smooth)
    parts, count = ndimage.label(mask)
    if count == 0:
        return np.zeros(data.shape, bool)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return ndimage.binary_fill_holes(parts == sizes.argmax())


def head_volume(image: nib.Nifti1Image, what: str, /) -> Volume:
    """Crop to the head and resample to `WORKING_MM` along the world's axes.

    ITK refuses sheared matrices; a grid along the world's axes has none.

    Parameters
    ----------
    what : `reference` or `other`, for the error's sentence

    Raises
    ------
    AlignmentError
        When there is nothing but background.
    """
    data, affine = np.asanyarray(image.dataobj, dtype=np.float32), image.affine
    # A masked image has nothing but head in it.
    stripped = bool((data == 0).mean() > 0.3)
    data, affine = _reduce(*_without_border(data, affine))
    # Some scans have an offset, or a background below zero.
    data = np.maximum(data - np.quantile(data, 0.01), 0)
    mask = _head_mask(data, stripped)
    found = np.argwhere(mask)
    if not len(found):
        raise AlignmentError(
            f'The {what} image holds nothing but background, so it cannot be aligned. '
            'Look at it in a viewer and leave it out.'
        )
    world = apply(affine, found)
    low, high = world.min(0), world.max(0)
    low[2] = max(low[2], high[2] - HEAD_HEIGHT_MM)
    low, high = low - MARGIN_MM, high + MARGIN_MM
    shape = np.ceil((high - low) / WORKING_MM).astype(int) + 1
    grid = np.diag([WORKING_MM] * 3 + [1.0])
    grid[:3, 3] = low
    pull = np.linalg.inv(affine) @ grid
    head = world[world[:, 2] >= low[2] + MARGIN_MM]
    top = max(np.quantile(data[mask], 0.99), np.finfo(np.float32).tiny)
    data = np.minimum(data / top, 1)
    out = ndimage.affine_transform(data, pull, output_shape=tuple(shape), order=1)
    mask = mask.astype(np.float32)
    inside = ndimage.affine_transform(mask, pull, output_shape=tuple(shape), order=1)
    return Volume(out, grid, inside > 0.5, head.mean(0))


class Similarity:
    """Normalised mutual information of two volumes as a function of the rigid transform.

    It is measured at random points in and around the head of the reference. On a grid, a transform
    that maps voxels onto voxels is not blurred by interpolation and scores too well.

    Parameters
    ----------
    moving : cropped from `image`, the other scan, whose field of view alone counts
    """

    def __init__(
        self,
        fixed: Volume,
        moving: Volume,
        image: nib.Nifti1Image,
        /,
        *,
        seed: int,
        points: int = POINTS,
    ) -> None:
        rng = np.random.default_rng(seed)
        near = ndimage.binary_dilation(fixed.mask, iterations=3)
        chosen = np.argwhere(near)
        chosen = chosen[np.sort(rng.permutation(len(chosen))[:points])]
        voxels = chosen + rng.uniform(-0.5, 0.5, chosen.shape)
        # Voxels of the reference are small numbers, for which float32 is exact enough.
        homogeneous = np.column_stack([voxels, np.ones(len(voxels))]).T.astype(np.float32)
        cuts = range(_AT_ONCE, len(voxels), _AT_ONCE)
        self._points = [np.ascontiguousarray(p) for p in np.split(homogeneous, cuts, axis=1)]
        fixed_bins = _Binned(fixed.data)
        self._bins = [BINS * fixed_bins(p[:3]) for p in self._points]
        self._to_world = fixed.affine
        self._moving = _Binned(moving.data)
        # Voxels of the cropped scan, then places of the field of view, whose borders are -1 and 1.
        borders = _to_unit(np.full(3, -0.5), np.array(image.shape[:3]) - 0.5)
        self._from_world = np.concatenate(
            [
                np.linalg.inv(moving.affine)[:3],
                (borders @ np.linalg.inv(image.affine))[:3],
            ]
        )

    def __call__(self, matrix: np.ndarray) -> float:
        """Similarity when `matrix` maps the moving world to the reference world."""
        pull = self._from_world @ np.linalg.inv(matrix) @ self._to_world
        pull = pull.astype(np.float32)
        counts = np.zeros(BINS * BINS + 1, np.int64)
        for points, bins in zip(self._points, self._bins, strict=True):
            places = pull @ points
            seen = np.abs(places[3:]).max(0) <= 1
            joint = bins + self._moving(places[:3])
            # Points that are not seen are counted behind all the others.
            joint[~seen] = BINS * BINS
            counts += np.bincount(joint, minlength=len(counts))
        if counts[:-1].sum() < MIN_OVERLAP * counts.sum():
            return 1.0
        return normalised_mutual_information(counts[:-1].reshape(BINS, BINS))


def _to_unit(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The matrix (4, 4) that takes a box to the cube from -1 to 1."""
    scale = 2 / (high - low)
    matrix = np.diag([*scale, 1.0])
    matrix[:3, 3] = -1 - scale * low
    return matrix


def coverage(image: nib.Nifti1Image) -> Callable[[np.ndarray], np.ndarray]:
    """A function that tells which world points lie in the field of view of `image`."""
    inverse, last = np.linalg.inv(image.affine), np.array(image.shape[:3]) - 0.5

    def covered(points: np.ndarray) -> np.ndarray:
        voxels = apply(inverse, points)
        return np.all((voxels >= -0.5) & (voxels <= last), axis=1)

    return covered
