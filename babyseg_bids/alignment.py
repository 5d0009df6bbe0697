"""Rigid alignment of one scan of a session to another, whatever their contrast and grid.

Both heads are cropped and resampled to a coarse grid. Many starting poses are scored by normalised
mutual information, the best few are refined with ANTs, and the best result is compared with the
alignment that the headers give: the headers win unless the images say otherwise.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np

from babyseg_bids.alignment_similarity import (
    WORKING_MM,
    Similarity,
    Volume,
    apply,
    coverage,
    head_volume,
)

# Radius in mm of the sphere over which the difference of two transforms is averaged; a head is
# about 40 mm (preterm) to 75 mm (five years) in radius.
HEAD_RADIUS_MM = 60.0
# Starting rotations, degrees about each axis; scanners rarely store a head further off than this.
START_ANGLES = (-30.0, 0.0, 30.0)
REFINED_STARTS = 3
# Two starts that end this close have found the same optimum: a third would find it, too.
SAME_MM = 2.0
# The headers stand when registration moves the head by less than this, or improves the similarity
# (less 1) by a smaller factor. Pairs of infant templates on one grid moved by 0.24 to 0.27 mm and
# gained 2 to 2.5 %, the same image twice 0.02 to 0.08 mm; 0.5 mm of true shift costs 8 %.
IDENTITY_MM = 0.5
IDENTITY_GAIN = 1.03
# Refused below: noise reached 1.004, a brain upside down 1.042, the least similar true pair (5 mm
# slices, noise, bias fields) 1.147.
MIN_SIMILARITY = 1.05
# Two different brains match in outline only, so that a shift of `PROBE_MM` hardly matters. The
# share of the similarity left after it was 0.86 to 0.89 for brains of other children, and 0.36 to
# 0.78 for true pairs, however degraded. Only pairs of low similarity are doubted at all: other
# children reached 1.120, true pairs 1.147 and more.
PROBE_MM = 3.0
MAX_BLUNTNESS = 0.82
DOUBTFUL_SIMILARITY = 1.13
# A child that lies this far turned between two scans of one session is an error of the header.
MAX_ROTATION_DEG = 60.0

Status = Literal['identity', 'rigid', 'refused']


@dataclass(frozen=True)
class Alignment:
    """How one scan lies relative to the reference.

    Attributes
    ----------
    matrix : (4, 4) float64 array
        Moving world to reference world, RAS mm; the identity matrix when `status` is not `rigid`.
    status : {'identity', 'rigid', 'refused'}
        `identity`: the headers already align the two as well as registration does.
    similarity, similarity_before : float
        Normalised mutual information (Studholme 1999; 1 is none, 2 is a perfect match) with the
        best transform and with the headers alone.
    rotation_deg, translation_mm : float
        Size of the found movement, the translation measured at the centre of the head. They are
        kept when the transform is refused, so that the reader sees what was refused.
    reason : str
        One sentence.
    """

    matrix: np.ndarray
    status: Status
    similarity: float
    similarity_before: float
    rotation_deg: float
    translation_mm: float
    reason: str


def rms_displacement(matrix: np.ndarray, centre: np.ndarray, /) -> float:
    """Root mean square displacement over a head-sized sphere at `centre`, mm (Jenkinson 1999)."""
    change = matrix[:3, :3] - np.eye(3)
    shift = matrix[:3, 3] + change @ centre
    spread = HEAD_RADIUS_MM**2 / 5 * np.trace(change.T @ change)
    return float(np.sqrt(spread + shift @ shift))


def rotation_angle(matrix: np.ndarray, /) -> float:
    """Angle in degrees of the rotation in a rigid 4x4 matrix."""
    cosine = (np.trace(matrix[:3, :3]) - 1) / 2
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def rotation_matrix(degrees: Sequence[float], centre: np.ndarray, /) -> np.ndarray:
    """Rigid 4x4 matrix that turns about x, then y, then z through the point `centre`."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        c, s = np.cos(angle), np.sin(angle)
        i, j = [(1, 2), (2, 0), (0, 1)][axis]
        step = np.eye(3)
        step[i, i], step[i, j], step[j, i], step[j, j] = c, -s, s, c
        turn = step @ turn
    matrix = np.eye(4)
    matrix[:3, :3] = turn
    matrix[:3, 3] = centre - turn @ centre
    return matrix


def _starts(fixed: Volume, moving: Volume) -> Iterator[np.ndarray]:
    """Starting poses: as the headers say and centre on centre, each turned in many ways."""
    for centred in (False, True):
        shift = np.eye(4)
        if centred:
            shift[:3, 3] = fixed.centre - moving.centre
        pivot = apply(shift, moving.centre[None])[0]
        for degrees in product(START_ANGLES, repeat=3):
            yield rotation_matrix(degrees, pivot) @ shift


@contextmanager
def _deterministic(seed: int) -> Iterator[Any]:
    """ANTs, with sampling that `seed` fixes for as long as the block lasts."""
    variable = 'ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS'
    # ANTsPy seeds numpy's global generator, which is not ours to change.
    before, state = os.environ.get(variable), np.random.get_state()  # noqa: NPY002
    os.environ[variable] = '1'
    import ants

    # 0 means "take the clock" to ITK.
    ants.config.set_ants_deterministic(True, seed_value=seed + 1)
    try:
        yield ants
    finally:
        ants.config.set_ants_deterministic(False, seed_value=None)
        np.random.set_state(state)  # noqa: NPY002
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


# ITK's world axes point left and back where nibabel's point right and front.
_FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])


def _ants_image(ants: Any, volume: Volume, matrix: np.ndarray) -> Any:
    """`volume` as an ANTs image that the rigid `matrix` has moved."""
    affine = _FLIP @ matrix @ volume.affine
    return ants.from_numpy(
        volume.data,
        origin=affine[:3, 3].tolist(),
        spacing=[WORKING_MM] * 3,
        direction=affine[:3, :3] / WORKING_MM,
    )


def _refine(ants: Any, fixed: Volume, moving: Volume, start: np.ndarray) -> np.ndarray:
    """Rigid registration with Mattes mutual information, beginning at `start`."""
    with tempfile.TemporaryDirectory(prefix='babyseg-align-') as folder:
        result = ants.registration(
            _ants_image(ants, fixed, np.eye(4)),
            _ants_image(ants, moving, start),
            type_of_transform='Rigid',
            initial_transform='Identity',
            outprefix=f'{folder}/',
            aff_metric='mattes',
            aff_sampling=32,
            aff_random_sampling_rate=0.1,
            aff_iterations=(100, 30),
            aff_shrink_factors=(2, 1),
            aff_smoothing_sigmas=(1, 0),
        )
        found = ants.read_transform(result['fwdtransforms'][0])
    values, centre = np.array(found.parameters), np.array(found.fixed_parameters)
    pull = np.eye(4)
    # Rounding to float32 leaves the rotation slightly off; the nearest orthonormal one is taken.
    left, _, right = np.linalg.svd(values[:9].reshape(3, 3))
    pull[:3, :3] = left @ right
    pull[:3, 3] = values[9:] + centre - pull[:3, :3] @ centre
    return np.linalg.inv(_FLIP @ pull @ _FLIP) @ start


def _bluntness(similarity: Similarity, matrix: np.ndarray) -> float:
    """Share of the similarity that is left when the scan is shifted by `PROBE_MM`."""
    peak = similarity(matrix) - 1
    left = []
    for axis, step in product(range(3), (-PROBE_MM, PROBE_MM)):
        moved = matrix.copy()
        moved[axis, 3] += step
        left.append(similarity(moved) - 1)
    return float(np.mean(left) / peak) if peak > 0 else 1.0


def _objection(similarity: Similarity, matrix: np.ndarray) -> str:
    """Why `matrix` cannot be trusted; empty when it can."""
    value, turn = similarity(matrix), rotation_angle(matrix)
    if value < MIN_SIMILARITY:
        return (
            f'no position makes it resemble the reference (similarity {value:.3f}, at least '
            f'{MIN_SIMILARITY:.2f} is needed)'
        )
    if turn > MAX_ROTATION_DEG:
        return f'it would have to be turned by {turn:.0f} degrees, which is not plausible'
    if value < DOUBTFUL_SIMILARITY and _bluntness(similarity, matrix) > MAX_BLUNTNESS:
        return f'it matches in outline only, as another brain would (similarity {value:.3f})'
    return ''


def _search(
    fixed: Volume, moving: Volume, similarity: Similarity, /, *, seed: int
) -> tuple[np.ndarray, str]:
    """Best of a few refined starts, and the objection to it; a good one ends the search."""
    starts = sorted(_starts(fixed, moving), key=similarity, reverse=True)
    best, objection = starts[0], ''
    reached: list[np.ndarray] = []
    with _deterministic(seed) as ants:
        for start in starts[:REFINED_STARTS]:
            found = _refine(ants, fixed, moving, start)
            best = max(best, start, found, key=similarity)
            objection = _objection(similarity, best)
            again = any(_apart(found, other, moving.centre) < SAME_MM for other in reached)
            if not objection or again:
                break
            reached.append(found)
    return best, objection


def _apart(one: np.ndarray, other: np.ndarray, centre: np.ndarray) -> float:
    """Difference of two rigid transforms in mm, for a head at `centre` in the moving world."""
    return rms_displacement(np.linalg.inv(other) @ one, centre)


def align(
    reference: nib.Nifti1Image, moving: nib.Nifti1Image, /, *, seed: int = 0, threads: int = 1
) -> Alignment:
    """Find the rigid movement that brings `moving` onto `reference`.

    Parameters
    ----------
    reference, moving : Nifti1Image
        Two 3-D scans of one child, of any contrast, resolution, orientation and field of view.
    seed : int
        The same seed gives the same result, bit for bit.
    threads : int
        Accepted for symmetry with the other steps. ANTs repeats itself only with one thread, and
        a pair takes a few seconds.

    Raises
    ------
    AlignmentError
        When one of the images holds nothing but background.
    """
    del threads
    fixed, other = head_volume(reference, 'reference'), head_volume(moving, 'other')
    similarity = Similarity(fixed, other, coverage(moving), seed=seed)
    before = similarity(np.eye(4))
    found, objection = _search(fixed, other, similarity, seed=seed)
    after = similarity(found)
    centre = apply(np.linalg.inv(found), fixed.centre[None])[0]
    shift = float(np.linalg.norm(fixed.centre - centre))
    turn = rotation_angle(found)
    status: Status
    if objection:
        matrix, status, reason = np.eye(4), 'refused', f'Left out: {objection}.'
    elif rms_displacement(found, centre) < IDENTITY_MM or after - 1 < (before - 1) * IDENTITY_GAIN:
        matrix, status = np.eye(4), 'identity'
        reason = 'The headers already align it as well as registration does.'
        after = before
    else:
        matrix, status = found, 'rigid'
        reason = f'Moved by {shift:.1f} mm and turned by {turn:.1f} degrees.'
    return Alignment(matrix, status, after, before, turn, shift, reason)


def write_transform(matrix: np.ndarray, path: Path | str, /) -> None:
    """Write a movement as an ITK text transform that resamples the moving image.

    Parameters
    ----------
    matrix : (4, 4) array
        Moving world to reference world, RAS mm. ITK stores the opposite, the map of points from
        the reference to the moving image: `from-T2w_to-T1w` takes the matrix T2w to T1w, and
        `antsApplyTransforms -r T1w -i T2w -t FILE` then resamples the T2w image onto the T1w one.
    """
    from nitransforms.linear import Affine

    Affine(np.linalg.inv(matrix)).to_filename(str(path), fmt='itk')
