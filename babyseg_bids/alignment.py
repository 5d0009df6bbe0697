"""Rigid alignment of one scan of a session to another, whatever their contrast and grid.

Both heads are cropped and resampled to a coarse grid. Many starting poses are scored by normalised
mutual information, the best few are refined with ANTs, and the best result is compared with the
alignment that the headers give: the headers win unless the images say otherwise.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np

from babyseg_bids.alignment_similarity import (
    Similarity,
    Volume,
    apply,
    coverage,
    head_volume,
)
from babyseg_bids.registration import affine_of, ants_image, deterministic_ants

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
# Two different brains match in outline only, so that a shift of `PROBE_MM` hardly matters. It took
# 0.11 to 0.17 of the similarity away for brains of other children, and 0.22 to 0.64 for true
# pairs, however degraded. Other children reached a similarity of 1.120, true pairs 1.147 and more.
PROBE_MM = 3.0
MIN_SHARPNESS = 0.18
DOUBTFUL_SIMILARITY = 1.13
# From here on the images alone are proof enough; below, each scan is segmented alone, if a network
# is at hand. Of the voxels of either brain, true pairs had one label in 0.85 to 0.90, different
# children in at most 0.77.
SURE_SHARPNESS = 0.3
MIN_OVERLAP, SURE_OVERLAP = 0.80, 0.84
# A child that lies this far turned between two scans of one session is an error of the header.
MAX_ROTATION_DEG = 60.0
DOUBTFUL_ROTATION_DEG = 40.0

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
    sharpness : float
        Share of the similarity (less 1) that a shift of `PROBE_MM` takes away: high where the
        insides of two heads match, low where their outlines do.
    overlap : float, optional
        Agreement of the two scans' own segmentations, where it was asked for (`with_overlap`).
    doubt : str
        One sentence on why a person should look at it although it is used; else empty.
    """

    matrix: np.ndarray
    status: Status
    similarity: float
    similarity_before: float
    rotation_deg: float
    translation_mm: float
    reason: str
    sharpness: float = 1.0
    overlap: float | None = None
    doubt: str = ''


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


def _refine(ants: Any, fixed: Volume, moving: Volume, start: np.ndarray) -> np.ndarray:
    """Rigid registration with Mattes mutual information, beginning at `start`."""
    with tempfile.TemporaryDirectory(prefix='babyseg-align-') as folder:
        result = ants.registration(
            ants_image(ants, fixed.data, fixed.affine),
            ants_image(ants, moving.data, start @ moving.affine),
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
        pull = affine_of(ants.read_transform(result['fwdtransforms'][0]))
    # Rounding to float32 leaves the rotation slightly off; the nearest orthonormal one is taken.
    left, _, right = np.linalg.svd(pull[:3, :3])
    pull[:3, :3] = left @ right
    return np.linalg.inv(pull) @ start


def _sharpness(similarity: Similarity, matrix: np.ndarray) -> float:
    """Share of the similarity that is lost when the scan is shifted by `PROBE_MM`."""
    peak = similarity(matrix) - 1
    left = []
    for axis, step in product(range(3), (-PROBE_MM, PROBE_MM)):
        moved = matrix.copy()
        moved[axis, 3] += step
        left.append(similarity(moved) - 1)
    return float(1 - np.mean(left) / peak) if peak > 0 else 0.0


def _objection(similarity: float, turn: float) -> str:
    """Why the position that was found cannot be right; empty when it can."""
    if similarity < MIN_SIMILARITY:
        return (
            f'no position makes it resemble the reference (similarity {similarity:.3f}, at least '
            f'{MIN_SIMILARITY:.2f} is needed)'
        )
    if turn > MAX_ROTATION_DEG:
        return f'it would have to be turned by {turn:.0f} degrees, which is not plausible'
    return ''


def _is_outline(similarity: float, sharpness: float) -> bool:
    """Whether two heads match as those of two children do."""
    return similarity < DOUBTFUL_SIMILARITY and sharpness < MIN_SHARPNESS


def _other_brain(similarity: float, sharpness: float, overlap: float | None) -> tuple[str, str]:
    """Why two scans are not of one brain, and why one may doubt that they are; empty if not."""
    if overlap is None:
        if _is_outline(similarity, sharpness):
            return (
                f'it matches in outline only, as another brain would (similarity {similarity:.3f})'
            ), ''
        weak = sharpness < MIN_SHARPNESS
        return '', 'It matches the reference in little but its outline.' if weak else ''
    share = f'{100 * overlap:.0f} % of the brain'
    # Both signs of another brain together weigh more than one.
    if overlap < (SURE_OVERLAP if _is_outline(similarity, sharpness) else MIN_OVERLAP):
        return f'segmented alone, it agrees with the reference in {share} only', ''
    if overlap < SURE_OVERLAP:
        return '', f'Segmented alone, it agrees with the reference in {share} only.'
    return '', ''


def _search(
    fixed: Volume, moving: Volume, similarity: Similarity, /, *, seed: int
) -> tuple[np.ndarray, str]:
    """Best of a few refined starts, and the objection to it; a good one ends the search."""
    starts = sorted(_starts(fixed, moving), key=similarity, reverse=True)
    best, objection = starts[0], ''
    reached: list[np.ndarray] = []
    with deterministic_ants(seed) as ants:
        for start in starts[:REFINED_STARTS]:
            found = _refine(ants, fixed, moving, start)
            best = max(best, start, found, key=similarity)
            value = similarity(best)
            objection = _objection(value, rotation_angle(best))
            again = any(_apart(found, other, moving.centre) < SAME_MM for other in reached)
            sound = not objection and not _is_outline(value, _sharpness(similarity, best))
            if sound or again:
                break
            reached.append(found)
    return best, objection


def _apart(one: np.ndarray, other: np.ndarray, centre: np.ndarray) -> float:
    """Difference of two rigid transforms in mm, for a head at `centre` in the moving world."""
    return rms_displacement(np.linalg.inv(other) @ one, centre)


def align(
    reference: nib.Nifti1Image,
    moving: nib.Nifti1Image,
    /,
    *,
    seed: int = 0,
    threads: int = 1,
    own_overlap: Callable[[np.ndarray], float] | None = None,
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
    own_overlap : function, optional
        Agreement (0..1) of the two scans' own segmentations under a movement; it is asked only
        where the similarity leaves open whether both show one brain.

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
    after, sharpness = similarity(found), _sharpness(similarity, found)
    centre = apply(np.linalg.inv(found), fixed.centre[None])[0]
    shift = float(np.linalg.norm(fixed.centre - centre))
    turn = rotation_angle(found)
    overlap, doubt = None, ''
    if not objection:
        if own_overlap is not None and sharpness < SURE_SHARPNESS:
            overlap = own_overlap(found)
        objection, doubt = _other_brain(after, sharpness, overlap)
        if turn > DOUBTFUL_ROTATION_DEG:
            doubt = f'It had to be turned by {turn:.0f} degrees. {doubt}'.strip()
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
    return Alignment(matrix, status, after, before, turn, shift, reason, sharpness, overlap, doubt)


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
