"""Quality measures of one session, and the flags that they raise.

Every measure is a pure function with its formula in its docstring. A flag points a person to a
session; it never stops a run. All limits stand in `LIMITS`.

The limits were chosen on the silver-standard maps and the skull-stripped scans of 0 to 36 months
that the project is developed on, so that sound ones pass and known faults do not. They are wide
on purpose: an absolute limit made for adults would punish small heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import ndimage

from babyseg_bids.labels import LabelTable, label_table
from babyseg_bids.morphometry import asymmetry_table, brain_volume, voxel_volume
from babyseg_bids.records import Age, Flag, Severity


@dataclass(frozen=True)
class Limit:
    """When a measure raises a flag: beyond `warning`, and more seriously beyond `severe`.

    `below` is true where small values are the bad ones. `severe` may be None: never severe.
    """

    code: str
    warning: float
    severe: float | None = None
    below: bool = False

    def severity(self, value: float | None, /) -> Severity | None:
        """How bad a value is; None when it is fine or unknown.

        >>> Limit('x', 0.1, 0.5).severity(0.2)
        'warning'
        """
        if value is None or not np.isfinite(value):
            return None
        sign = -1 if self.below else 1
        if self.severe is not None and sign * value > sign * self.severe:
            return 'severe'
        return 'warning' if sign * value > sign * self.warning else None


LIMITS: dict[str, Limit] = {
    # Share of lateralised voxels on the wrong side of the midline.
    'left_right_misplaced_share': Limit('left-right-confused', 0.01, 0.05),
    # Cosine between the left-to-right direction of the labels and that of the world.
    'left_right_axis': Limit('left-right-swapped', 0.5, 0.0, below=True),
    # Area of the segmentation in one face of the field of view, mm2.
    'edge_area_mm2': Limit('brain-cut-off', 100.0, 1500.0),
    # Share of brain voxels over the uncertainty threshold, and mean confidence in them.
    'uncertain_share': Limit('uncertain', 0.25, 0.5),
    'mean_confidence': Limit('low-confidence', 0.75, 0.6, below=True),
    # Share of a structure's voxels in its largest piece; the worst structure counts.
    'largest_component_min': Limit('fragmented', 0.8, 0.5, below=True),
    # Asymmetry of the hemispheres and of the worst paired structure, percent either way.
    'hemisphere_asymmetry_percent': Limit('hemispheres-asymmetric', 8.0, 20.0),
    'structure_asymmetry_percent': Limit('structure-asymmetric', 55.0, 100.0),
    'snr_white_matter': Limit('low-signal-to-noise', 4.0, 2.0, below=True),
    'cnr_white_matter_cortex': Limit('low-contrast', 0.3, None, below=True),
}

# Plausible segmented brain volumes in mL, by age from and to (months). They are bounds for
# catching a failed segmentation and not norms: about half the smallest and one and a half times
# the largest brain one meets at that age, because cerebrum-only scans are common.
PLAUSIBLE_VOLUME_ML: tuple[tuple[float, float, float, float], ...] = (
    (0.0, 3.0, 180.0, 900.0),
    (3.0, 12.0, 300.0, 1400.0),
    (12.0, 24.0, 400.0, 1700.0),
    (24.0, float('inf'), 450.0, 2000.0),
)
PLAUSIBLE_VOLUME_ANY_AGE_ML = (20.0, 2000.0)

# Between these ages, myelination makes grey and white matter alike on T1w and T2w: little
# contrast is then anatomy and only worth a remark.
ISOINTENSE_MONTHS = (3.0, 10.0)

# A voxel counts as misplaced when it lies farther than this beyond the midline plane, because
# the interhemispheric fissure is not flat.
MIDLINE_TOLERANCE_MM = 4.0

# Structures below this volume are too small for their asymmetry to be worth a flag, and pieces
# of smaller ones are separated by a voxel of chance.
SMALL_STRUCTURE_MM3 = 500.0

# Ventricles are thin where they narrow and fall into pieces in sound maps.
OFTEN_IN_PIECES = ('ventricle',)

# Infratentorial structures are often cut away with skull stripping or outside the field of view.
OFTEN_ABSENT_TISSUES = ('cerebellum', 'brainstem')
OFTEN_ABSENT = (14, 15)

FACES = (('left', 'right'), ('posterior', 'anterior'), ('inferior', 'superior'))

# More points do not move the midline plane by a noticeable amount.
PLANE_POINTS = 200_000


def _spoken(names: list[str], limit: int = 5) -> str:
    """Join names for a sentence: `a, b and 3 more`."""
    if len(names) > limit:
        return f'{", ".join(names[:limit])} and {len(names) - limit} more'
    return ' and '.join([', '.join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _plain(name: str) -> str:
    """A structure's name as in running text: `left lateral ventricle`."""
    return name.replace('-area', '').replace('-', ' ').lower()


def bounding_box(mask: np.ndarray, /, margin: int = 0) -> tuple[slice, ...]:
    """Smallest box around the true voxels, grown by `margin` voxels within the array."""
    box = []
    for axis in range(mask.ndim):
        others = tuple(a for a in range(mask.ndim) if a != axis)
        hits = np.flatnonzero(mask.any(axis=others))
        if not hits.size:
            return tuple(slice(0, 0) for _ in range(mask.ndim))
        box.append(slice(max(hits[0] - margin, 0), hits[-1] + 1 + margin))
    return tuple(box)


def crop(affine: np.ndarray, box: tuple[slice, ...], /) -> np.ndarray:
    """The affine of the part of an image that a box cuts out."""
    out = np.array(affine, float)
    out[:3, 3] += out[:3, :3] @ [s.start for s in box]
    return out


def signal_to_noise(values: np.ndarray, /) -> float:
    """Signal to noise inside one tissue: median / (sd * sqrt(n / (n - 1))).

    The formula of MRIQC (Esteban et al., PLoS ONE 2017) with the spread of the tissue itself,
    because skull-stripped scans have no air to measure noise in. NaN below 30 voxels.
    """
    n = values.size
    if n < 30:
        return float('nan')
    spread = float(values.std()) * np.sqrt(n / (n - 1))
    return float(np.median(values)) / spread if spread > 0 else float('nan')


def contrast_to_noise(a: np.ndarray, b: np.ndarray, /) -> float:
    """Contrast of two tissues: |mean(a) - mean(b)| / sqrt(var(a) + var(b)).

    After Magnotta and Friedman (J Digit Imaging 2006), without the air term.
    """
    if min(a.size, b.size) < 30:
        return float('nan')
    spread = np.sqrt(a.var(dtype=np.float64) + b.var(dtype=np.float64))
    gap = abs(a.mean(dtype=np.float64) - b.mean(dtype=np.float64))
    return float(gap / spread) if spread > 0 else float('nan')


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
        world, voxel = np.unravel_index(np.argmax(weight), weight.shape)
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


def _image_metrics(labels: np.ndarray, image: np.ndarray, table: LabelTable) -> dict[str, float]:
    """Signal and contrast by tissue (see `signal_to_noise`, `contrast_to_noise`)."""
    metrics, values = {}, {}
    for tissue in dict.fromkeys(row.tissue for row in table.structures):
        numbers = [row.index for row in table.structures if row.tissue == tissue]
        values[tissue] = np.asarray(image[np.isin(labels, numbers)], np.float64)
        metrics[f'snr_{tissue.replace("-", "_")}'] = signal_to_noise(values[tissue])
    for a, b in (('white-matter', 'cortex'), ('cortex', 'ventricle')):
        name = f'cnr_{a}_{b}'.replace('-', '_')
        metrics[name] = contrast_to_noise(values[a], values[b])
    return metrics


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
    }


def _asymmetry_metrics(morph: pd.DataFrame, table: LabelTable) -> dict[str, Any]:
    """Asymmetry index (see `morphometry.asymmetry_index`) of the hemispheres and the structures.

    The hemispheres are the sums of all left and of all right structures. The worst structure is
    the one with the largest index among those of at least `SMALL_STRUCTURE_MM3`.
    """
    pairs = asymmetry_table(morph, table)
    left, right = pairs['left-mm3'].sum(), pairs['right-mm3'].sum()
    total = left + right
    whole = 200 * (left - right) / total if total > 0 else float('nan')
    # Ventricles of healthy children differ a lot between the sides.
    ventricles = [row.index for row in table.structures if row.tissue == 'ventricle']
    fair = pairs[
        (pairs[['left-mm3', 'right-mm3']].max(axis=1) >= SMALL_STRUCTURE_MM3)
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
) -> dict[str, Any]:
    """All measures of a session, JSON-ready; None stands for what cannot be measured."""
    table = table or label_table()
    labels = np.asarray(labels)
    edges = edge_areas(labels, affine)
    box = bounding_box(labels > 0)
    # All that follows depends on the brain alone, and images may be far larger than it.
    labels, image, affine = labels[box], np.asarray(image)[box], crop(affine, box)
    metrics: dict[str, Any] = {
        'segmented_brain_volume_mm3': brain_volume(morph),
        'voxel_volume_mm3': voxel_volume(affine),
        'missing_structures': [n for n, v in zip(*_names(morph), strict=True) if np.isnan(v)],
        'mean_confidence': _confidence(morph),
    }
    if labels.size:
        metrics |= _image_metrics(labels, image, table)
        if uncertainty is not None:
            cropped = np.asarray(uncertainty)[box]
            metrics |= _uncertainty_metrics(labels, cropped, uncertainty_threshold, table)
        shares = largest_component_shares(labels, table)
        metrics['largest_component_share'] = shares
        metrics['largest_component_min'] = min(
            _judged(shares, morph, table).values(), default=None
        )
        sides = check_sides(labels, affine, table)
        metrics['left_right_axis'] = sides.axis
        metrics['left_right_misplaced_share'] = sides.misplaced
        metrics['left_right_misplaced_structures'] = [table[i].name for i in sides.structures]
    metrics |= _asymmetry_metrics(morph, table)
    metrics['edge_area_mm2'] = max(edges.values())
    metrics['edge_area_mm2_by_face'] = edges
    return _jsonable(metrics)


def _names(morph: pd.DataFrame) -> tuple[list[str], list[float]]:
    """Names of the structures, and their hard volumes."""
    return list(morph['name']), list(morph['voxel-volume-mm3'])


def _judged(shares: dict[str, float], morph: pd.DataFrame, table: LabelTable) -> dict[str, float]:
    """The shares of the structures whose fragmentation means something."""
    volume = dict(zip(morph['abbreviation'], morph['voxel-volume-mm3'], strict=True))
    tissue = {row.abbreviation: row.tissue for row in table.structures}
    return {
        name: share
        for name, share in shares.items()
        if volume[name] >= SMALL_STRUCTURE_MM3 and tissue[name] not in OFTEN_IN_PIECES
    }


def _side_flags(m: Mapping[str, Any]) -> list[Flag]:
    """Flags on left and right."""
    axis = LIMITS['left_right_axis'].severity(m.get('left_right_axis'))
    if axis:
        text = (
            'Left and right are swapped: structures labelled left lie on the right. Check the '
            "orientation in the scan's header before using any left or right value."
            if axis == 'severe'
            else 'The line from left to right structures is far from the left-right axis of the '
            'scan; check the orientation in its header.'
        )
        return [Flag('left-right-swapped', axis, text)]
    share = m.get('left_right_misplaced_share')
    severity = LIMITS['left_right_misplaced_share'].severity(share)
    wrong = [_plain(n) for n in m.get('left_right_misplaced_structures') or ()]
    if wrong and not severity:
        severity = 'warning'
    if not severity:
        return []
    text = f'{share:.1%} of the left and right labels lie on the wrong side of the midline'
    text += f', among them most of the {_spoken(wrong)}' if wrong else ''
    text += '. Look at the pictures before using left and right volumes.'
    return [Flag('left-right-confused', severity, text)]


def _volume_flags(m: Mapping[str, Any], age: Age) -> list[Flag]:
    """A segmented brain volume that no child of that age has."""
    value = m.get('segmented_brain_volume_mm3')
    if value is None:
        return []
    low, high = PLAUSIBLE_VOLUME_ANY_AGE_ML
    when = ''
    if age.months is not None:
        for start, end, *bounds in PLAUSIBLE_VOLUME_ML:
            if start <= age.months < end:
                low, high = bounds
                when = f' at {age.months:.3g} months'
    if low <= value / 1000 <= high:
        return []
    text = (
        f'The segmented brain volume of {value / 1000:.0f} mL is outside the plausible range of '
        f'{low:.0f} to {high:.0f} mL{when}. Check the voxel size, the age and the pictures.'
    )
    return [Flag('implausible-volume', 'severe', text)]


def _missing_flags(m: Mapping[str, Any], table: LabelTable) -> list[Flag]:
    """Structures without a voxel: a remark where scans often lack them, else a warning."""
    usual, unusual = [], []
    missing = set(m.get('missing_structures') or ())
    for row in table.structures:
        if row.name not in missing:
            continue
        both = row.mirror == row.index or table[row.mirror].name in missing
        often = row.tissue in OFTEN_ABSENT_TISSUES or row.index in OFTEN_ABSENT
        (usual if often and both else unusual).append(_plain(row.name))
    flags = []
    if unusual:
        text = f'Not found: {_spoken(unusual)}. Their volumes are n/a; look at the pictures.'
        flags.append(Flag('structures-missing', 'warning', text))
    if usual:
        text = (
            f'Not found: {_spoken(usual)}. This is expected when the scan shows the cerebrum '
            'only; brain volumes then do not compare with those of complete scans.'
        )
        flags.append(Flag('structures-not-in-scan', 'info', text))
    return flags


def _shape_flags(m: Mapping[str, Any], morph: pd.DataFrame, table: LabelTable) -> list[Flag]:
    """Flags on cut-off brains, fragments and asymmetry."""
    flags = []
    severity = LIMITS['edge_area_mm2'].severity(m.get('edge_area_mm2'))
    if severity:
        limit = LIMITS['edge_area_mm2'].warning
        faces = [k for k, v in m['edge_area_mm2_by_face'].items() if v > limit]
        text = (
            f'The brain touches the edge of the image ({_spoken(faces)}, up to '
            f'{m["edge_area_mm2"]:.0f} mm²): it is probably cut off, and volumes are too small.'
        )
        flags.append(Flag('brain-cut-off', severity, text))
    severity = LIMITS['largest_component_min'].severity(m.get('largest_component_min'))
    if severity:
        judged = _judged(m['largest_component_share'], morph, table)
        limit = LIMITS['largest_component_min'].warning
        names = [_plain(r.name) for r in table.structures if judged.get(r.abbreviation, 1) < limit]
        text = f'In several pieces: {_spoken(names)}. Check the pictures for stray labels.'
        flags.append(Flag('fragmented', severity, text))
    value = m.get('hemisphere_asymmetry_percent')
    severity = LIMITS['hemisphere_asymmetry_percent'].severity(abs(value or 0))
    if severity:
        larger = 'left' if value > 0 else 'right'
        text = f'The {larger} hemisphere is {abs(value):.0f} % larger than the other.'
        flags.append(Flag('hemispheres-asymmetric', severity, text))
    value = m.get('structure_asymmetry_percent')
    severity = LIMITS['structure_asymmetry_percent'].severity(abs(value or 0))
    if severity:
        larger = 'left' if value > 0 else 'right'
        name = _plain(m['most_asymmetric_structure'])
        text = f'The {larger} {name} is {abs(value):.0f} % larger than the one on the other side.'
        flags.append(Flag('structure-asymmetric', severity, text))
    return flags


def _image_flags(m: Mapping[str, Any], age: Age) -> list[Flag]:
    """Flags on signal, contrast and the network's own doubt."""
    flags = []
    value = m.get('snr_white_matter')
    severity = LIMITS['snr_white_matter'].severity(value)
    if severity:
        text = (
            f'Grey values inside the white matter vary a lot (signal to noise {value:.1f}): the '
            'scan is noisy or uneven, or the labels do not sit on the anatomy.'
        )
        flags.append(Flag('low-signal-to-noise', severity, text))
    value = m.get('cnr_white_matter_cortex')
    severity = LIMITS['cnr_white_matter_cortex'].severity(value)
    if severity:
        low, high = ISOINTENSE_MONTHS
        months = age.months
        expected = months is not None and low <= months <= high
        text = f'White matter and cortex hardly differ in grey value (contrast {value:.2f}).'
        if expected:
            text += ' This is normal at this age; the border between them is less certain.'
        flags.append(Flag('low-contrast', 'info' if expected else severity, text))
    value = m.get('uncertain_share')
    severity = LIMITS['uncertain_share'].severity(value)
    if severity:
        text = f'The network is unsure about {value:.0%} of the brain; look at the pictures.'
        flags.append(Flag('uncertain', severity, text))
    value = m.get('mean_confidence')
    severity = LIMITS['mean_confidence'].severity(value)
    if severity:
        text = f'The mean confidence is only {value:.2f}; look at the pictures.'
        flags.append(Flag('low-confidence', severity, text))
    return flags


def session_flags(
    metrics: Mapping[str, Any],
    morph: pd.DataFrame,
    age: Age,
    table: LabelTable | None = None,
) -> tuple[Flag, ...]:
    """The flags that the measures of a session raise."""
    table = table or label_table()
    if metrics.get('segmented_brain_volume_mm3') is None:
        text = 'No brain was found in the scan. Check that it shows a brain, and its orientation.'
        return (Flag('empty-segmentation', 'severe', text),)
    return (
        *_side_flags(metrics),
        *_volume_flags(metrics, age),
        *_shape_flags(metrics, morph, table),
        *_missing_flags(metrics, table),
        *_image_flags(metrics, age),
    )


def session_qc(
    labels: np.ndarray,
    uncertainty: np.ndarray | None,
    image: np.ndarray,
    affine: np.ndarray,
    morph: pd.DataFrame,
    age: Age,
    uncertainty_threshold: float = 0.3,
    table: LabelTable | None = None,
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

    Returns
    -------
    metrics, flags
        JSON-ready measures (see `session_metrics`), and the flags that they raise.
    """
    metrics = session_metrics(
        labels, uncertainty, image, affine, morph, uncertainty_threshold, table
    )
    return metrics, session_flags(metrics, morph, age, table)
