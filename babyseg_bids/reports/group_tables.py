"""The group's tables: wide, one row a session, the same columns whatever was found."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from babyseg_bids.labels import Label, LabelTable
from babyseg_bids.longitudinal import spoken_tissue
from babyseg_bids.morphometry import DECIMALS, DESCRIPTIONS, MEASURES
from babyseg_bids.reports.files import Derivative

# Quality measures of the group table, in order, with what they mean. A session's qc.json explains
# itself by the same names; lists and values by structure stay there.
QC_COLUMNS: dict[str, dict[str, str]] = {
    'segmented_brain_volume_mm3': {
        'Description': 'Sum of the soft volumes of all structures',
        'Units': 'mm^3',
    },
    'mean_confidence': {'Description': 'Mean probability of the label given, over the brain'},
    'mean_uncertainty': {'Description': 'Mean of one minus the probability of the label given'},
    'uncertainty_threshold': {'Description': 'A voxel above it counts as uncertain'},
    'uncertain_share': {'Description': 'Share of brain voxels above the uncertainty threshold'},
    **{
        f'snr_{tissue}': {
            'Description': f'Signal to noise in the {tissue.replace("_", " ")}: median / '
            '(sd * sqrt(n / (n - 1)))'
        }
        for tissue in (
            'white_matter',
            'cortex',
            'deep_grey',
            'ventricle',
            'cerebellum',
            'brainstem',
        )
    },
    'cnr_white_matter_cortex': {
        'Description': 'Contrast to noise: |mean difference| / sqrt(sum of variances)'
    },
    'cnr_cortex_ventricle': {
        'Description': 'Contrast to noise: |mean difference| / sqrt(sum of variances)'
    },
    'largest_component_min': {
        'Description': 'Share of its largest connected piece in the most fragmented structure'
    },
    'left_right_axis': {
        'Description': 'Cosine between the left-to-right direction of the labels and the world; '
        'negative when left and right are swapped'
    },
    'anterior_axis': {'Description': 'The same for the back-to-front direction'},
    'superior_axis': {'Description': 'The same for the bottom-to-top direction'},
    'handedness': {
        'Description': 'Triple product of the three directions: 1 in a body, -1 in a mirror'
    },
    'left_right_misplaced_share': {
        'Description': 'Share of left and right labels on the wrong side of the midline'
    },
    'hemisphere_asymmetry_percent': {
        'Description': 'Asymmetry of the hemispheres, 100 (L - R) / ((L + R) / 2)',
        'Units': 'percent',
    },
    'structure_asymmetry_percent': {
        'Description': 'The same of the most asymmetric structure',
        'Units': 'percent',
    },
    'most_asymmetric_structure': {'Description': 'Name of that structure'},
    'edge_area_mm2': {
        'Description': 'Largest area of the brain in a face of the field of view',
        'Units': 'mm^2',
    },
}

KEYS: dict[str, dict[str, str]] = {
    'participant_id': {'Description': 'Participant, with its prefix sub-'},
    'session_id': {'Description': 'Session, with its prefix ses-; n/a in datasets without'},
    'age_months': {'Description': 'Age at scan since birth', 'Units': 'month'},
}
RATING: dict[str, dict[str, Any]] = {
    'rating': {
        'Description': 'What a person decided on the group page',
        'Levels': {
            'accept': 'use the session',
            'review': 'look at it again',
            'exclude': 'do not use it; it takes no part in the curves of the cohort',
        },
    },
}
RUN_COLUMNS: dict[str, dict[str, str]] = {
    'gestational_age_weeks': {
        'Description': 'Gestational or post-menstrual age at scan where no age since birth is '
        'known',
        'Units': 'week',
    },
    'age_source': {'Description': 'Where the age came from'},
    'scans': {'Description': 'Contrasts used, the reference first'},
    'scans_rejected': {'Description': 'Number of images that were considered and not used'},
    'flags_severe': {'Description': 'Number of severe flags'},
    'flags_warning': {'Description': 'Number of warnings'},
    'flags_info': {'Description': 'Number of remarks'},
    'flags': {'Description': 'Codes of the flags'},
    'outliers': {'Description': "Measures far from the cohort's curve against age, and how far"},
    'rating_comment': {'Description': 'What that person wrote'},
    'problem': {'Description': 'What is missing or unreadable in the derivatives'},
    'model': {'Description': 'Name and version of the network'},
    'version': {'Description': 'Version of babyseg'},
    'device': {'Description': 'Device that the network ran on'},
    'seconds': {'Description': 'Processing time', 'Units': 's'},
}


def column_name(measure: str, label: Label, /) -> str:
    """Column of a measure of a structure, fit for R and pandas.

    >>> from babyseg_bids.labels import label_table
    >>> column_name('volume-mm3', label_table()[2])
    'volume_mm3_left_cerebral_white_matter'
    """
    name = label.name.replace('VentralDC', 'Ventral-DC').removesuffix('-area')
    return re.sub(r'\W', '_', f'{measure}_{name}').lower()


def tissue_column(tissue: str, /) -> str:
    """Column of a tissue's total."""
    return f'volume_mm3_tissue_{tissue.replace("-", "_")}'


def keys(record: Derivative, /) -> dict[str, Any]:
    """What identifies a row."""
    months = record.age.months
    return {
        'participant_id': f'sub-{record.subject}',
        'session_id': f'ses-{record.session}' if record.session else None,
        'age_months': None if months is None else f'{months:.4g}',
    }


def morph_dictionary(
    table: LabelTable, covariates: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
) -> dict[str, dict[str, Any]]:
    """All columns of the volumes table in order, with their descriptions.

    Parameters
    ----------
    covariates : columns of the participants' table, which follow the session's name
    """
    columns: dict[str, dict[str, Any]] = {**KEYS, **RATING}
    columns |= {name: dict(about) for name, about in covariates.items()}
    columns['segmented_brain_volume_mm3'] = QC_COLUMNS['segmented_brain_volume_mm3']
    for tissue in dict.fromkeys(row.tissue for row in table.structures):
        text = f'{spoken_tissue(tissue)}: sum of the soft volumes of its structures'
        columns[tissue_column(tissue)] = {'Description': text, 'Units': 'mm^3'}
    for measure in MEASURES:
        for row in table.structures:
            about = DESCRIPTIONS[measure]
            text = f'{row.name} (label {row.index}). {about["Description"]}'
            columns[column_name(measure, row)] = {**about, 'Description': text}
    return columns


def morph_row(
    record: Derivative, table: LabelTable, /, more: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """One session's volumes by column; what was not found has no entry.

    Parameters
    ----------
    more : the session's rating and covariates
    """
    row = {**keys(record), **more}
    volumes = record.volumes
    if volumes:
        row['segmented_brain_volume_mm3'] = f'{sum(volumes.values()):.3f}'
    tissues: dict[str, float] = {}
    for label in table.structures:
        if label.index in volumes:
            tissues[label.tissue] = tissues.get(label.tissue, 0.0) + volumes[label.index]
    row |= {tissue_column(t): f'{v:.3f}' for t, v in tissues.items()}
    for measure in MEASURES:
        values = record.measures.get(measure, {})
        for label in table.structures:
            if label.index in values:
                text = f'{values[label.index]:.{DECIMALS[measure]}f}'
                row[column_name(measure, label)] = text
    return row


def further_measures(records: Sequence[Derivative], /) -> list[str]:
    """Single numbers and words in the quality records beyond `QC_COLUMNS`, in order of name."""
    names = {k for r in records for k, v in r.qc.items() if isinstance(v, (int, float, str))}
    return sorted(names - set(QC_COLUMNS))


def qc_dictionary(further: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """All columns of the quality table in order, with their descriptions."""
    more = {k: {'Description': f"{k} as in the session's quality record"} for k in further}
    return {**KEYS, **RATING, **RUN_COLUMNS, **QC_COLUMNS, **more}


def _plain(value: Any) -> Any:
    return f'{value:.6g}' if isinstance(value, float) else value


def qc_row(
    record: Derivative,
    /,
    more: Mapping[str, Any] = MappingProxyType({}),
    further: Sequence[str] = (),
) -> dict[str, Any]:
    """One session's quality by column.

    Parameters
    ----------
    more : the session's rating and what is far from the cohort's curves
    further : measures of the quality records beyond `QC_COLUMNS`
    """
    ledger = record.ledger
    scans = [s for s in ledger.get('scans') or () if isinstance(s, dict)]
    fates: Sequence[Any] = ledger.get('ledger') or ()
    severities = [f.severity for f in record.flags]
    weeks = record.age.gestational_weeks
    return {
        **keys(record),
        'gestational_age_weeks': None if weeks is None else f'{weeks:.4g}',
        'age_source': record.age.source,
        'scans': '+'.join(str(s.get('suffix', '?')) for s in scans),
        'scans_rejected': sum(
            isinstance(f, dict) and f.get('status') == 'rejected' for f in fates
        ),
        **{f'flags_{s}': severities.count(s) for s in ('severe', 'warning', 'info')},
        'flags': ','.join(dict.fromkeys(f.code for f in record.flags)),
        'problem': record.problem,
        **{k: _plain(ledger.get(k)) for k in ('model', 'version', 'device', 'seconds')},
        **{k: _plain(record.qc.get(k)) for k in (*QC_COLUMNS, *further)},
        **more,
    }
