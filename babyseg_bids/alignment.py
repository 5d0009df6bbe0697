"""Rigid alignment of one scan of a session to another, whatever their contrast and grid.

Both heads are cropped and resampled to a coarse grid. The position in which they are most alike
(`alignment_search`) is compared with the one that the headers give: the headers win unless the
images say otherwise.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np

from babyseg_bids.alignment_search import QUICK_POINTS, SAME_MM, mirrored_similarity, search
from babyseg_bids.alignment_similarity import Similarity, apply, head_volume
from babyseg_bids.rigid import rms_displacement, rotation_angle

# The headers stand when registration moves the head by less than this, or improves the similarity
# (less 1) by a smaller factor. Pairs of infant templates on one grid moved by 0.24 to 0.27 mm and
# gained 2 to 2.5 %, the same image twice 0.02 to 0.08 mm; 0.5 mm of true shift costs 8 %.
IDENTITY_MM = 0.5
IDENTITY_GAIN = 1.03
# Refused below: noise reached 1.004, a brain upside down 1.042, the least similar true pair (5 mm
# slices, noise, bias fields) 1.147.
MIN_SIMILARITY = 1.05
# Two different brains match in outline only, so that a shift of `PROBE_MM` hardly matters. It took
# 0.07 to 0.21 of the similarity away for brains of other children, and 0.34 to 0.62 for true
# pairs. Other children reached a similarity of 1.143, true pairs 1.147 and more.
PROBE_MM = 3.0
MIN_SHARPNESS = 0.25
DOUBTFUL_SIMILARITY = 1.16
# From here on the images alone are proof enough; below, each scan is segmented alone, if a network
# is at hand. Of the voxels of either brain, true pairs had one label in 0.85 to 0.90, different
# children in at most 0.77.
SURE_SHARPNESS = 0.3
MIN_OVERLAP, SURE_OVERLAP = 0.80, 0.84
# One of two scans has its sides exchanged when they match so much better in the mirror (similarity
# less 1, as a ratio). Six true pairs reached 0.40 to 0.68, the same pairs with one scan mirrored
# 1.38 to 2.52. None of 100 displaced true pairs exceeded it.
MIRROR_GAIN = 1.15
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
    mirrored : bool
        One of the two scans has its left and right exchanged; the transform is refused.
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
    mirrored: bool = False


def used_scans(alignments: Iterable[Alignment], /) -> list[bool]:
    """Whether each scan is used: the reference, then those that were aligned to it."""
    return [True, *(a.status != 'refused' for a in alignments)]


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


def align(
    reference: nib.Nifti1Image,
    moving: nib.Nifti1Image,
    /,
    *,
    seed: int = 0,
    own_overlap: Callable[[np.ndarray], float] | None = None,
) -> Alignment:
    """Find the rigid movement that brings `moving` onto `reference`.

    Parameters
    ----------
    reference, moving : Nifti1Image
        Two 3-D scans of one child, of any contrast, resolution, orientation and field of view.
    seed : int
        The same seed gives the same result, bit for bit.
    own_overlap : function, optional
        Agreement (0..1) of the two scans' own segmentations under a movement; it is asked only
        where the similarity leaves open whether both show one brain.

    Raises
    ------
    AlignmentError
        When one of the images holds nothing but background.
    """
    fixed, other = head_volume(reference, 'reference'), head_volume(moving, 'other')
    similarity = Similarity(fixed, other, moving, seed=seed)
    before = similarity(np.eye(4))
    quick = Similarity(fixed, other, moving, seed=seed + 1, points=QUICK_POINTS)
    found, apart = search(fixed, other, similarity, quick)
    after, sharpness = similarity(found), _sharpness(similarity, found)
    centre = apply(np.linalg.inv(found), fixed.centre[None])[0]
    shift = float(np.linalg.norm(fixed.centre - centre))
    turn = rotation_angle(found)
    stays = (
        rms_displacement(found, centre) < IDENTITY_MM or after - 1 < (before - 1) * IDENTITY_GAIN
    )
    objection = _objection(after, turn)
    if not (objection or stays or apart < SAME_MM):
        objection = f'searched again from nearby, it came to lie {apart:.1f} mm elsewhere'
    overlap, doubt, mirrored = None, '', False
    if not objection:
        mirror = mirrored_similarity(fixed, other, similarity, quick, found)
        mirrored = mirror - 1 > MIRROR_GAIN * (after - 1)
        if mirrored:
            objection = (
                'it matches the reference far better with left and right exchanged (similarity '
                f'{mirror:.3f} against {after:.3f}), so that the sides of one of the two are wrong'
            )
    if not objection:
        if own_overlap is not None and sharpness < SURE_SHARPNESS:
            overlap = own_overlap(found)
        objection, doubt = _other_brain(after, sharpness, overlap)
        if turn > DOUBTFUL_ROTATION_DEG:
            doubt = f'It had to be turned by {turn:.0f} degrees. {doubt}'.strip()
    status: Status
    if objection:
        matrix, status, reason = np.eye(4), 'refused', f'Left out: {objection}.'
    elif stays:
        matrix, status = np.eye(4), 'identity'
        reason = 'The headers already align it as well as registration does.'
        after = before
    else:
        matrix, status = found, 'rigid'
        reason = f'Moved by {shift:.1f} mm and turned by {turn:.1f} degrees.'
    return Alignment(
        matrix,
        status,
        after,
        before,
        turn,
        shift,
        reason,
        sharpness,
        overlap,
        doubt,
        mirrored,
    )


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
