"""Which quality measures raise a flag, and what the flag says.

A flag points a person to a session; it never stops a run. All limits stand in `LIMITS`.

The limits were chosen on the silver-standard maps and the skull-stripped scans of 0 to 36 months
that the project is developed on, so that sound ones pass and known faults do not. They are wide
on purpose: an absolute limit made for adults would punish small heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from babyseg_bids.labels import LabelTable, label_table
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
    # Cosines between directions of the labelled brain and those of the world.
    'anterior_axis': Limit('unexpected-orientation', 0.5, 0.0, below=True),
    'superior_axis': Limit('unexpected-orientation', 0.5, 0.0, below=True),
    # Handedness of the labels: 1 as in a body, -1 as in a mirror.
    'handedness': Limit('mirrored', 0.5, 0.0, below=True),
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

# Structures below this volume are too small for their asymmetry to be worth a flag, and pieces
# of smaller ones are separated by a voxel of chance.
SMALL_STRUCTURE_MM3 = 500.0

# Ventricles are thin where they narrow and fall into pieces in sound maps.
OFTEN_IN_PIECES = ('ventricle',)

# Infratentorial structures are often cut away with skull stripping or outside the field of view.
OFTEN_ABSENT_TISSUES = ('cerebellum', 'brainstem')
OFTEN_ABSENT = (15,)


def _spoken(names: list[str], limit: int = 5) -> str:
    """Join names for a sentence: `a, b and 3 more`."""
    if len(names) > limit:
        return f'{", ".join(names[:limit])} and {len(names) - limit} more'
    return ' and '.join([', '.join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _plain(name: str) -> str:
    """A structure's name as in running text: `left lateral ventricle`."""
    return name.replace('-area', '').replace('-', ' ').lower()


def judged_shares(
    shares: dict[str, float], morph: pd.DataFrame, table: LabelTable
) -> dict[str, float]:
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
    share = m.get('left_right_misplaced_share') or 0.0
    severity = LIMITS['left_right_misplaced_share'].severity(share)
    wrong = [_plain(n) for n in m.get('left_right_misplaced_structures') or ()]
    if wrong and not severity:
        severity = 'warning'
    if not severity:
        return []
    text = f'{100 * share:.1f} % of the left and right labels lie on the wrong side of the midline'
    text += f', among them most of the {_spoken(wrong)}' if wrong else ''
    text += '. Look at the pictures before using left and right volumes.'
    return [Flag('left-right-confused', severity, text)]


def _orientation_flags(m: Mapping[str, Any]) -> list[Flag]:
    """Flags on a head that lies otherwise than the header says, and on mirrored labels."""
    flags = []
    found = {k: LIMITS[k].severity(m.get(k)) for k in ('anterior_axis', 'superior_axis')}
    for key, turned in (('anterior_axis', 'backwards'), ('superior_axis', 'upside down')):
        severity = found[key]
        if severity:
            how = turned if severity == 'severe' else 'in an unusual direction'
            text = (
                f"By its labels, the brain lies {how} in the scan's coordinates: the orientation "
                'in the header is probably wrong. Correct the header before using left and right.'
            )
            flags.append(Flag('unexpected-orientation', severity, text))
    severity = LIMITS['handedness'].severity(m.get('handedness'))
    if severity:
        text = (
            'The labels do not fit a body: with its front and top where the labels put them, left '
            'and right are exchanged or unclear. Do not use left and right volumes.'
        )
        flags.append(Flag('mirrored', severity, text))
    return flags


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
    usual: list[str] = []
    unusual: list[str] = []
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
        judged = judged_shares(m['largest_component_share'], morph, table)
        limit = LIMITS['largest_component_min'].warning
        names = [_plain(r.name) for r in table.structures if judged.get(r.abbreviation, 1) < limit]
        text = f'In several pieces: {_spoken(names)}. Check the pictures for stray labels.'
        flags.append(Flag('fragmented', severity, text))
    value = m.get('hemisphere_asymmetry_percent') or 0.0
    severity = LIMITS['hemisphere_asymmetry_percent'].severity(abs(value))
    if severity:
        larger = 'left' if value > 0 else 'right'
        text = f'The {larger} hemisphere is {abs(value):.0f} % larger than the other.'
        flags.append(Flag('hemispheres-asymmetric', severity, text))
    value = m.get('structure_asymmetry_percent') or 0.0
    severity = LIMITS['structure_asymmetry_percent'].severity(abs(value))
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
    value = m.get('uncertain_share') or 0.0
    severity = LIMITS['uncertain_share'].severity(value)
    if severity:
        text = (
            f'The network is unsure about {100 * value:.0f} % of the brain; look at the pictures.'
        )
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
        *_orientation_flags(metrics),
        *_volume_flags(metrics, age),
        *_shape_flags(metrics, morph, table),
        *_missing_flags(metrics, table),
        *_image_flags(metrics, age),
    )
