"""Quality measures of one session: pure functions, each with its formula.

Those of the scan itself are in `qc_image`. What is flagged, and from which value on, is said in
`qc_flags` and `data/qc.toml`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from nibabel.affines import voxel_sizes
from scipy import ndimage

from babyseg_bids.labels import LabelTable, label_table
from babyseg_bids.morphometry import asymmetry_table, brain_volume, voxel_volume
from babyseg_bids.qc_flags import SMALL_STRUCTURE_SHARE, judged_shares, session_flags
from babyseg_bids.qc_image import ghost_share, scan_metrics
from babyseg_bids.records import Age, Flag
from babyseg_bids.thinning import thinned_affine, thinning

# A voxel counts as misplaced when it lies farther than this beyond the midline plane, because
# the interhemispheric fissure is not flat.
MIDLINE_TOLERANCE_MM = 4.0

FACES = (('left', 'right'), ('posterior', 'anterior'), ('inferior', 'superior'))

# More points do not move the midline plane by a noticeable amount.
PLANE_POINTS = 200_000


def bounding_box(mask: np.ndarray, /, margin: int = 0) -> tuple[slice, ...]:
    """Smallest box around the true voxels, grown by `margin` voxels within the array."""
    box = []
    for axis in range(mask.ndim):
        others = tuple(a for a in range(mask.ndim) if a != axis)
        hits = np.flatnonzero(mask.any(axis=others))
        if not hits.size:
            return tuple(slice(0, 0) for _ in range(mask.ndim))
        first, last = int(hits[0]), int(hits[-1])
        box.append(slice(max(first - margin, 0), min(last + 1 + margin, mask.shape[axis])))
    return tuple(box)


def crop(affine: np.ndarray, box: tuple[slice, ...], /) -> np.ndarray:
    """The affine of the part of an image that a box cuts out."""
    out = np.array(affine, float)
    out[:3, 3] += out[:3, :3] @ [s.start for s in box]
    return out


def largest_component_shares(labels: np.ndarray, table: LabelTable, /) -> dict[str, float]:
    """Fragmentation: voxels in the largest piece / voxels of the structure, by abbreviation.

    Pieces are 26-connected. Absent structures are left out.
    """
    boxes = ndimage.find_objects(np.clip(labels, 0, None).astype(np.int32))
    touch = np.ones((3, 3, 3), bool)
    shares = {}
    for row in table.structures:
        box = boxes[row.index - 1] if row.index <= len(boxes) else None
        if box is None:
            continue
        pieces, _ = ndimage.label(labels[box] == row.index, touch)
        sizes = np.bincount(pieces.ravel())[1:]
        shares[row.abbreviation] = float(sizes.max() / sizes.sum())
    return shares


def edge_areas(labels: np.ndarray, affine: np.ndarray, /) -> dict[str, float]:
    """Area in mm2 of the segmentation in each face of the field of view, by anatomical name.

    Number of labelled voxels in the outermost plane times the area of a voxel in that plane.
    A brain that is whole inside the image has zero everywhere.
    """
    matrix = np.asarray(affine, float)[:3, :3]
    zooms = np.linalg.norm(matrix, axis=0)
    # Nearest anatomical axis of each voxel axis, each used once.
    order = np.full(3, -1)
    weight = np.abs(matrix / zooms)
    for _ in range(3):
        world, voxel = (int(i) for i in np.unravel_index(np.argmax(weight), weight.shape))
        order[voxel] = world
        weight[world, :] = -1
        weight[:, voxel] = -1
    areas = {}
    for voxel in range(3):
        low, high = FACES[order[voxel]]
        if matrix[order[voxel], voxel] < 0:
            low, high = high, low
        unit = zooms.prod() / zooms[voxel]
        for name, index in ((low, 0), (high, -1)):
            areas[name] = float(np.count_nonzero(labels.take(index, voxel) > 0) * unit)
    return areas


@dataclass(frozen=True)
class SideCheck:
    """What `check_sides` found.

    `axis` is the cosine between the labels' left-to-right direction and the world's, near 1 when
    right is right; NaN when a side is absent. `misplaced` is the share of lateralised voxels on
    the wrong side, `structures` the numbers of those with most of their voxels there.
    """

    axis: float
    misplaced: float
    structures: tuple[int, ...] = ()


def _separating_plane(points: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, float]:
    """Unit normal n and offset d of the plane n.x = d between two clouds of points.

    Fisher's linear discriminant, refitted twice without what lies on the wrong side, so that
    confused voxels do not tilt the plane that is to expose them.
    """
    keep = np.ones(len(points), bool)
    normal, offset = np.array([1.0, 0.0, 0.0]), 0.0
    for _ in range(3):
        a, b = points[keep & ~right], points[keep & right]
        if min(len(a), len(b)) < 10:
            break
        within = np.cov(a.T) + np.cov(b.T) + 1e-6 * np.eye(3)
        normal = np.linalg.solve(within, b.mean(0) - a.mean(0))
        normal /= max(np.linalg.norm(normal), 1e-12)
        offset = float(normal @ (a.mean(0) + b.mean(0)) / 2)
        keep = np.where(right, points @ normal > offset, points @ normal < offset)
    return normal, offset


def check_sides(labels: np.ndarray, affine: np.ndarray, table: LabelTable, /) -> SideCheck:
    """Check that left structures lie on the left, by geometry and not by file metadata.

    A plane is fitted between all left and all right voxels in world coordinates (RAS, mm). Its
    normal must point to the world's right (`axis`). `misplaced` is the number of voxels that lie
    more than `MIDLINE_TOLERANCE_MM` beyond the plane over that of all lateralised voxels.
    """
    lut = np.zeros(int(table.indices.max()) + 1, np.int8)
    for row in table.structures:
        lut[row.index] = {'L': -1, 'R': 1}.get(row.hemisphere, 0)
    known = np.where((labels > 0) & (labels < lut.size), labels, 0)
    voxels = np.argwhere(lut[known] != 0)
    step = max(1, len(voxels) // PLANE_POINTS)
    voxels = voxels[::step]
    numbers = known[tuple(voxels.T)]
    right = lut[numbers] > 0
    if min(right.sum(), (~right).sum()) < 10:
        return SideCheck(float('nan'), float('nan'))
    points = voxels @ np.asarray(affine, float)[:3, :3].T
    normal, offset = _separating_plane(points, right)
    beyond = np.where(right, offset - points @ normal, points @ normal - offset)
    wrong = beyond > MIDLINE_TOLERANCE_MM
    total = np.bincount(numbers, minlength=lut.size)
    off = np.bincount(numbers, weights=wrong, minlength=lut.size)
    mostly = np.flatnonzero((total > 0) & (off > 0.5 * total))
    return SideCheck(float(normal[0]), float(wrong.mean()), tuple(int(i) for i in mostly))


# Structures whose centres tell the front from the back and the top from the bottom of the
# cerebrum, so that scans without cerebellum and brainstem can be checked too. Each pair is (in
# front or above, behind or below); FreeSurfer numbers of the left side.
FRONT_BACK = ((11, 10), (26, 10), (12, 17), (18, 17))
TOP_BOTTOM = ((4, 28), (11, 18), (10, 17), (11, 26))


def mean_direction(
    centres: Mapping[int, np.ndarray], pairs: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Mean unit vector from the second to the first of each pair; NaN with fewer than four.

    Parameters
    ----------
    centres : of the structures, by FreeSurfer number
    pairs : numbers of left structures; those of the right side count, too
    """
    # Other models may lack some of the structures that are looked for.
    table = label_table()
    vectors = []
    for first, second in pairs:
        for a, b in ((first, second), (table[first].mirror, table[second].mirror)):
            if a in centres and b in centres:
                step = centres[a] - centres[b]
                vectors.append(step / max(float(np.linalg.norm(step)), 1e-9))
    # A single displaced structure must not decide.
    if len(vectors) < 4:
        return np.full(3, np.nan)
    mean = np.mean(vectors, axis=0)
    return mean / max(float(np.linalg.norm(mean)), 1e-9)


def body_axes(labels: np.ndarray, affine: np.ndarray, table: LabelTable, /) -> dict[str, float]:
    """Check that the labelled brain faces the way the scan's header says.

    `anterior_axis` and `superior_axis` are cosines between a direction of the labels and the
    world's: the mean of unit vectors between the centres of `FRONT_BACK` and of `TOP_BOTTOM`
    structures. `handedness` is the triple product of unit vectors r . (a x s), with r from left
    to right: near 1 in a body and near -1 in a mirror, however the head lies.
    """
    boxes = ndimage.find_objects(np.clip(labels, 0, None).astype(np.int32))
    matrix = np.asarray(affine, float)[:3, :3]
    centres = {}
    for row in table.structures:
        box = boxes[row.index - 1] if row.index <= len(boxes) else None
        if box is not None:
            voxels = np.argwhere(labels[box] == row.index).mean(axis=0)
            centres[row.index] = matrix @ (voxels + [s.start for s in box])
    front = mean_direction(centres, FRONT_BACK)
    top = mean_direction(centres, TOP_BOTTOM)
    top = top - front * (front @ top)
    top = top / max(float(np.linalg.norm(top)), 1e-9)
    lefts = [r.index for r in table.structures if r.hemisphere == 'L']
    across = [
        centres[table[i].mirror] - centres[i]
        for i in lefts
        if {i, table[i].mirror} <= set(centres)
    ]
    side = np.mean(across, axis=0) if across else np.full(3, np.nan)
    side = side / max(float(np.linalg.norm(side)), 1e-9)
    return {
        'anterior_axis': float(front[1]),
        'superior_axis': float(top[2]),
        'handedness': float(side @ np.cross(front, top)),
    }


def _uncertainty_metrics(
    labels: np.ndarray, uncertainty: np.ndarray, threshold: float, table: LabelTable
) -> dict[str, Any]:
    """Share of voxels over the threshold, in the brain and by structure; mean uncertainty."""
    size = int(table.indices.max()) + 1
    brain = (labels > 0) & (labels < size)
    numbers = labels[brain].astype(np.int64)
    values = np.nan_to_num(uncertainty[brain].astype(np.float64))
    count = np.bincount(numbers, minlength=size)
    over = np.bincount(numbers, weights=values > threshold, minlength=size)
    shares = {
        row.abbreviation: float(over[row.index] / count[row.index])
        for row in table.structures
        if count[row.index]
    }
    return {
        'uncertainty_threshold': float(threshold),
        'uncertain_share': float((values > threshold).mean()) if values.size else float('nan'),
        'mean_uncertainty': float(values.mean()) if values.size else float('nan'),
        'uncertain_share_by_structure': shares,
        'structure_uncertain_max': max(
            (
                shares[row.abbreviation]
                for row in table.structures
                if count[row.index] > SMALL_STRUCTURE_SHARE * len(values)
            ),
            default=float('nan'),
        ),
    }


def _asymmetry_metrics(morph: pd.DataFrame, table: LabelTable) -> dict[str, Any]:
    """Asymmetry index (see `morphometry.asymmetry_index`) of the hemispheres and the structures.

    The hemispheres are the sums of all left and of all right structures. The worst structure is
    the one with the largest index among those of at least `SMALL_STRUCTURE_SHARE` of the brain.
    """
    pairs = asymmetry_table(morph, table)
    left, right = pairs['left-mm3'].sum(), pairs['right-mm3'].sum()
    total = left + right
    whole = 200 * (left - right) / total if total > 0 else float('nan')
    small = SMALL_STRUCTURE_SHARE * brain_volume(morph)
    # Ventricles of healthy children differ a lot between the sides.
    ventricles = [row.index for row in table.structures if row.tissue == 'ventricle']
    fair = pairs[
        (pairs[['left-mm3', 'right-mm3']].max(axis=1) >= small)
        & ~pairs['left-index'].isin(ventricles)
        & pairs['asymmetry-percent'].notna()
    ]
    worst = float('nan')
    name = None
    if len(fair):
        row = fair.loc[fair['asymmetry-percent'].abs().idxmax()]
        worst, name = float(row['asymmetry-percent']), str(row['structure'])
    return {
        'hemisphere_asymmetry_percent': float(whole),
        'structure_asymmetry_percent': worst,
        'most_asymmetric_structure': name,
    }


def _confidence(morph: pd.DataFrame) -> float:
    """Mean confidence over the brain's voxels: structures weighted by their hard volume."""
    known = morph.dropna(subset=['mean-confidence', 'voxel-volume-mm3'])
    if known.empty:
        return float('nan')
    return float(np.average(known['mean-confidence'], weights=known['voxel-volume-mm3']))


def _jsonable(value: Any) -> Any:
    """Plain Python numbers; what is not finite becomes None, as JSON has no NaN."""
    if isinstance(value, Mapping):
        return {k: _jsonable(v) for k, v in value.items()}
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value


def session_metrics(
    labels: np.ndarray,
    uncertainty: np.ndarray | None,
    image: np.ndarray,
    affine: np.ndarray,
    morph: pd.DataFrame,
    uncertainty_threshold: float = 0.3,
    table: LabelTable | None = None,
    *,
    agreement: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """All measures of a session, JSON-ready; None stands for what cannot be measured.

    Grids of 0.3 mm and finer are thinned first (see `thinning`).

    Parameters as in `session_qc`.
    """
    table = table or label_table()
    labels = np.asarray(labels)
    image = np.asarray(image)
    edges = edge_areas(labels, affine)
    zooms, unit = voxel_sizes(affine), voxel_volume(affine)
    steps = thinning(affine)
    labels, image, affine = labels[steps], image[steps], thinned_affine(affine, steps)
    ghosts = ghost_share(image, labels > 0)
    box = bounding_box(labels > 0)
    # All that follows depends on the brain alone, and images may be far larger than it.
    labels, image, affine = labels[box], image[box], crop(affine, box)
    metrics: dict[str, Any] = {
        'segmented_brain_volume_mm3': brain_volume(morph),
        'voxel_volume_mm3': unit,
        'missing_structures': [n for n, v in zip(*_names(morph), strict=True) if np.isnan(v)],
        'mean_confidence': _confidence(morph),
    }
    if labels.size:
        metrics |= scan_metrics(labels, image, affine, table)
        metrics['voxel_min_mm'], metrics['voxel_max_mm'] = float(zooms.min()), float(zooms.max())
        if uncertainty is not None:
            cropped = np.asarray(uncertainty)[steps][box]
            metrics |= _uncertainty_metrics(labels, cropped, uncertainty_threshold, table)
        shares = largest_component_shares(labels, table)
        metrics['largest_component_share'] = shares
        metrics['largest_component_min'] = min(
            judged_shares(shares, morph, table).values(), default=None
        )
        sides = check_sides(labels, affine, table)
        metrics |= body_axes(labels, affine, table)
        metrics['left_right_axis'] = sides.axis
        metrics['left_right_misplaced_share'] = sides.misplaced
        metrics['left_right_misplaced_structures'] = [table[i].name for i in sides.structures]
    metrics |= _asymmetry_metrics(morph, table)
    metrics['edge_area_mm2'] = max(edges.values())
    metrics['edge_area_mm2_by_face'] = edges
    # A surface grows with the volume to the power of two thirds.
    hard = float(np.count_nonzero(labels)) * voxel_volume(affine)
    metrics['edge_share'] = max(edges.values()) / hard ** (2 / 3) if hard else float('nan')
    metrics['ghost_share'] = ghosts
    if agreement:
        metrics['scan_agreement'] = dict(agreement)
        metrics['scan_agreement_min'] = min(agreement.values())
    predicted = dict(zip(morph['abbreviation'], morph['predicted-dice'], strict=True))
    metrics['predicted_dice'] = {k: v for k, v in predicted.items() if np.isfinite(v)}
    metrics['predicted_dice_mean'] = float(morph['predicted-dice'].mean())
    return _jsonable(metrics)


def _names(morph: pd.DataFrame) -> tuple[list[str], list[float]]:
    """Names of the structures, and their hard volumes."""
    return list(morph['name']), list(morph['voxel-volume-mm3'])


def session_qc(
    labels: np.ndarray,
    uncertainty: np.ndarray | None,
    image: np.ndarray,
    affine: np.ndarray,
    morph: pd.DataFrame,
    age: Age,
    uncertainty_threshold: float = 0.3,
    table: LabelTable | None = None,
    *,
    agreement: Mapping[str, float] | None = None,
) -> tuple[dict[str, Any], tuple[Flag, ...]]:
    """Measure the quality of a session's scan and segmentation.

    Parameters
    ----------
    labels, uncertainty, image : (X, Y, Z) ndarray
        Label map (FreeSurfer numbers), uncertainty from 0 to 1, and the reference scan.
    affine : (4, 4) ndarray
        Voxel to world, RAS mm.
    morph : DataFrame
        From `morphometry.morphometry_table`.
    age : Age
        Some limits depend on it.
    uncertainty_threshold : float
        A voxel above it counts as uncertain.
    agreement : mapping, optional
        Of the scans segmented alone, by their names (see `qc_image.scan_agreement`).

    Returns
    -------
    metrics, flags
        JSON-ready measures (see `session_metrics`), and the flags that they raise.
    """
    metrics = session_metrics(
        labels,
        uncertainty,
        image,
        affine,
        morph,
        uncertainty_threshold,
        table,
        agreement=agreement,
    )
    return metrics, session_flags(metrics, morph, age, table)
