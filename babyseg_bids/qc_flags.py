"""Which quality measures raise a flag, and what the flag says.

A flag points a person to a session; it never stops a run. All limits stand in `data/qc.toml`.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd

from babyseg_bids.labels import LabelTable, label_table
from babyseg_bids.records import Age, Flag, Severity


@dataclass(frozen=True)
class Limit:
    """When a measure raises a flag: beyond `warning`, and more seriously beyond `severe`.

    `below` is true where small values are the bad ones. `severe` may be None: never severe.
    Between the ages `expected_months`, the value is normal anatomy and only worth a remark.
    """

    code: str
    warning: float
    severe: float | None = None
    below: bool = False
    expected_months: tuple[float, float] | None = None

    def severity(self, value: float | None, /, months: float | None = None) -> Severity | None:
        """How bad a value is at an age; None when it is fine or unknown.

        >>> Limit('x', 0.1, 0.5).severity(0.2)
        'warning'
        """
        if value is None or not np.isfinite(value):
            return None
        sign = -1 if self.below else 1
        if not sign * value > sign * self.warning:
            return None
        if self.expected(months):
            return 'info'
        severe = self.severe is not None and sign * value > sign * self.severe
        return 'severe' if severe else 'warning'

    def expected(self, months: float | None, /) -> bool:
        """Whether a value beyond the limits is normal at an age."""
        if self.expected_months is None or months is None:
            return False
        low, high = self.expected_months
        return low <= months <= high


@dataclass(frozen=True)
class VolumeBounds:
    """Plausible brain volumes in mL at some ages in months, and at an unknown age."""

    months: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    any_age: tuple[float, float]

    def at(self, months: float | None, /) -> tuple[float, float]:
        """The bounds at an age, interpolated linearly."""
        if months is None:
            return self.any_age
        low, high = (float(np.interp(months, self.months, v)) for v in (self.low, self.high))
        return low, high


@cache
def _settings() -> dict[str, Any]:
    """The content of `data/qc.toml`."""
    return tomllib.loads(files('babyseg_bids').joinpath('data/qc.toml').read_text('utf-8'))


def _tuples(table: Mapping[str, Any]) -> dict[str, Any]:
    """TOML's lists as tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}


LIMITS: dict[str, Limit] = {
    name: Limit(**_tuples(limit)) for name, limit in _settings()['limits'].items()
}
PLAUSIBLE_VOLUME = VolumeBounds(**_tuples(_settings()['brain_volume_ml']))

# Structures below this share of the brain are too small for their asymmetry to be worth a flag,
# and pieces of smaller ones are separated by a voxel of chance.
SMALL_STRUCTURE_SHARE: float = _settings()['small_structure_share']

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
    small = SMALL_STRUCTURE_SHARE * morph['voxel-volume-mm3'].sum()
    tissue = {row.abbreviation: row.tissue for row in table.structures}
    return {
        name: share
        for name, share in shares.items()
        if volume[name] >= small and tissue[name] not in OFTEN_IN_PIECES
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
    low, high = PLAUSIBLE_VOLUME.at(age.months)
    when = '' if age.months is None else f' at {age.months:.3g} months'
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
    severity = LIMITS['edge_share'].severity(m.get('edge_share'))
    flat = LIMITS['flat_cut_share'].severity(m.get('flat_cut_share'))
    if severity:
        limit = m['edge_area_mm2'] * LIMITS['edge_share'].warning / m['edge_share']
        faces = [k for k, v in m['edge_area_mm2_by_face'].items() if v > limit]
        text = (
            f'The brain touches the edge of the image ({_spoken(faces)}, up to '
            f'{m["edge_area_mm2"]:.0f} mm²): it is probably cut off, and volumes are too small.'
        )
        flags.append(Flag('brain-cut-off', severity, text))
    elif flat:
        text = (
            f'The brain ends in a plane of {100 * m["flat_cut_share"]:.0f} % of its cross-'
            'section: a part of the scan is probably missing, and volumes are too small.'
        )
        flags.append(Flag('brain-cut-off', flat, text))
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


# What a flag on one measure says: the value goes into `{}`.
SENTENCES = {
    'snr_white_matter': 'Grey values inside the white matter vary a lot (signal to noise {:.1f}): '
    'the scan is noisy or uneven, or the labels do not sit on the anatomy.',
    'cnr_white_matter_cortex': 'White matter and cortex hardly differ in grey value (contrast '
    '{:.2f}).',
    'noise_percent': 'The scan is noisy ({:.0f} % of the white matter); small structures are less '
    'certain.',
    'bias_field_percent': 'The scan is uneven: its smooth intensity field spans {:.0f} %.',
    'stripe_ratio': 'Fine stripes run across the scan ({:.1f} times as much fine variation along '
    'one axis as along another): look for motion or thick, resampled slices.',
    'ghost_share': 'The air around the head shows a ghost of {:.2f} times the brain; look for '
    'motion.',
    'voxel_max_mm': 'Voxels are up to {:.1f} mm long; small structures and the cortex are '
    'approximate.',
    'uncertain_share': 'The network is unsure about {:.0%} of the brain; look at the pictures.',
    'mean_confidence': 'The mean confidence is only {:.2f}; look at the pictures.',
    'scan_agreement_min': "The session's scans disagree: segmented alone, one overlaps with the "
    'others by only {:.2f} (Dice). Check that all show the same child, and their orientation.',
    'predicted_dice_mean': 'The predicted accuracy is only {:.2f} (Dice); look at the pictures.',
}
NORMAL_AT_THIS_AGE = {
    'cnr_white_matter_cortex': ' This is normal at this age; the border between them is less '
    'certain.',
    'bias_field_percent': ' Myelination alone can do this at this age.',
}


def _image_flags(m: Mapping[str, Any], age: Age, table: LabelTable) -> list[Flag]:
    """Flags on the scan and on the network's own doubt."""
    flags = []
    for key, sentence in SENTENCES.items():
        limit = LIMITS[key]
        severity = limit.severity(m.get(key), age.months)
        if severity:
            text = sentence.format(m[key])
            if limit.expected(age.months):
                text += NORMAL_AT_THIS_AGE[key]
            flags.append(Flag(limit.code, severity, text))
    limit = LIMITS['structure_uncertain_max']
    severity = limit.severity(m.get('structure_uncertain_max'))
    if severity:
        shares = m['uncertain_share_by_structure']
        names = [
            _plain(r.name)
            for r in table.structures
            if shares.get(r.abbreviation, 0) > limit.warning
        ]
        text = f'The network is unsure about most of the {_spoken(names)}; look at the pictures.'
        flags.append(Flag(limit.code, severity, text))
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
        *_image_flags(metrics, age, table),
    )
