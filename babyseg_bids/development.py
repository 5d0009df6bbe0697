"""Measures of one child's development, by session, each with its unit."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd

from babyseg_bids.errors import InputError
from babyseg_bids.labels import LabelTable, label_table
from babyseg_bids.longitudinal import (
    BRAIN,
    Visit,
    group_volumes,
    growth_table,
    spoken_tissue,
    structure_volumes,
    visit_flags,
)
from babyseg_bids.morphometry import asymmetry_index, count_voxels, voxel_volume
from babyseg_bids.records import Flag
from babyseg_bids.surfaces import CortexMeasures, cortex_measures

LabelMap = str | os.PathLike[str] | nib.Nifti1Image

# Column, unit and meaning of what is derived from the volumes and the surfaces.
DERIVED: dict[str, tuple[str, str]] = {
    'White/grey ratio': ('1', 'Cerebral white matter over cortex and deep grey matter'),
    'Ventricle ratio': ('1', 'Ventricles over segmented brain'),
    'Hemisphere asymmetry': ('percent', '100 (L - R) / ((L + R) / 2) of all paired structures'),
    'Cortical surface area': ('mm^2', 'Pial surface of both sides without the medial wall'),
    'White surface area': ('mm^2', 'White surface of both sides without the medial wall'),
    'Mean cortical thickness': ('mm', '2 V / (white + pial area), both sides'),
    'Gyrification index': ('1', 'Pial area over that of the hull; mean of both sides'),
}


@dataclass(frozen=True)
class DevelopmentalMetrics:
    """What `calculate_developmental_metrics` gives.

    Parameters
    ----------
    sessions : DataFrame
        One row a session, indexed by its name and ordered by age; `Age` and one column a measure.
        NaN stands for what cannot be measured.
    growth : DataFrame
        Change of each volume from one session to the next (see `longitudinal.growth_table`):
        mm3, mm3 per month, percent, and percent per month.
    flags : changes that growth does not explain
    units : unit of each column of both tables (`1` for a ratio)
    visits : the volumes (mm3) by FreeSurfer number that all was computed from
    label_maps : the label maps that were given, by session
    """

    sessions: pd.DataFrame
    growth: pd.DataFrame
    flags: tuple[Flag, ...]
    units: dict[str, str]
    visits: tuple[Visit, ...] = ()
    label_maps: Mapping[str, nib.Nifti1Image] = field(default_factory=dict)


def cortex_record(measures: Mapping[str, CortexMeasures], /) -> dict[str, dict[str, Any]]:
    """Surface measures by side as JSON holds them: None for what is not finite."""
    return {
        side: {k: float(v) if np.isfinite(v) else None for k, v in asdict(m).items()}
        for side, m in measures.items()
    }


def _ratio(a: float | None, b: float | None) -> float:
    return a / b if a is not None and b else float('nan')


def _surface_row(cortex: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Measures of both sides; NaN where a side lacks one."""

    def both(name: str) -> np.ndarray:
        values = [cortex.get(side, {}).get(name) for side in ('L', 'R')]
        return np.array([np.nan if v is None else v for v in values], float)

    white, pial = both('white_area_mm2').sum(), both('pial_area_mm2').sum()
    return {
        'Cortical surface area': float(pial),
        'White surface area': float(white),
        'Mean cortical thickness': float(2 * both('volume_mm3').sum() / (white + pial)),
        'Gyrification index': float(both('gyrification_index').mean()),
    }


def development_row(
    volumes: Mapping[int, float],
    cortex: Mapping[str, Mapping[str, Any]] | None = None,
    table: LabelTable | None = None,
) -> dict[str, float]:
    """All measures of a session by column; see `DERIVED` for those that are no volumes.

    Parameters
    ----------
    volumes : mm3 by FreeSurfer number; a structure that is absent has no entry
    cortex : as `cortex_record` gives it
    """
    table = table or label_table()
    groups = group_volumes(volumes, table)
    grey = [groups.get(spoken_tissue(t)) for t in ('cortex', 'deep-grey')]
    both = sum(v for v in grey if v is not None) if None not in grey else None
    pairs = [
        (volumes[r.index], volumes[r.mirror])
        for r in table.structures
        if r.hemisphere == 'L' and {r.index, r.mirror} <= set(volumes)
    ]
    left, right = (sum(p[i] for p in pairs) for i in (0, 1))
    row = groups | structure_volumes(volumes, table)
    row['White/grey ratio'] = _ratio(groups.get(spoken_tissue('white-matter')), both)
    row['Ventricle ratio'] = _ratio(groups.get(spoken_tissue('ventricle')), groups.get(BRAIN))
    row['Hemisphere asymmetry'] = asymmetry_index(left, right)
    return row | (_surface_row(cortex) if cortex else {})


def unit_of(column: str, /) -> str:
    """Unit of a column of either table of `DevelopmentalMetrics`; empty for text.

    >>> unit_of('change-mm3-per-month'), unit_of('Thalamus'), unit_of('Ventricle ratio')
    ('mm^3/month', 'mm^3', '1')
    """
    known = {
        'Age': 'month',
        'from-months': 'month',
        'to-months': 'month',
        'change-mm3-per-month': 'mm^3/month',
        'change-percent': 'percent',
        'change-percent-per-month': 'percent/month',
        **dict.fromkeys(('structure', 'from-session', 'to-session'), ''),
        **{name: unit for name, (unit, _) in DERIVED.items()},
    }
    return known.get(column, 'mm^3')


def _load(session: str, given: LabelMap) -> nib.Nifti1Image:
    image: Any
    if isinstance(given, nib.Nifti1Image):
        image = given
    else:
        try:
            image = nib.load(given)
        except (OSError, nib.filebasedimages.ImageFileError) as error:
            raise InputError(
                f'The label map {given} of {session} cannot be read ({error}); give a NIfTI file.'
            ) from error
    if len(image.shape) != 3:
        raise InputError(
            f'The label map of {session} has the shape {image.shape}; give a 3-D image.'
        )
    return image


def calculate_developmental_metrics(
    segmentations: Mapping[str, LabelMap],
    ages_months: Mapping[str, float | None],
    *,
    volumes: Mapping[str, pd.DataFrame] | None = None,
    surfaces: bool = True,
) -> DevelopmentalMetrics:
    """Measure the development of one child from the label maps of its sessions.

    Parameters
    ----------
    segmentations : mapping
        Label map (FreeSurfer numbers; a path or an image) by the session's name.
    ages_months : mapping
        Age at scan in months since birth by the session's name; None or absent where unknown.
    volumes : mapping, optional
        Tables of `morphometry.morphometry_table` by the session's name, whose soft volumes are
        then used. Without one, a structure's volume is its number of voxels times their size.
    surfaces : bool
        Whether to measure the cortical surfaces, which takes some seconds a session.

    Returns
    -------
    DevelopmentalMetrics
        Volumes (mm3), growth rates (mm3 and percent per month), ratio of white to grey matter and
        of ventricles to brain, asymmetry (percent), cortical surface areas (mm2), mean thickness
        (mm) and gyrification index; all with their units.

    Raises
    ------
    InputError
        If there is no label map, or one cannot be read or is not 3-D.

    Examples
    --------
    >>> metrics = calculate_developmental_metrics(                     # doctest: +SKIP
    ...     {'ses-A': 'a_dseg.nii.gz', 'ses-B': 'b_dseg.nii.gz'}, {'ses-A': 3, 'ses-B': 9})
    >>> metrics.sessions['Mean cortical thickness'], metrics.units     # doctest: +SKIP
    """
    if not segmentations:
        raise InputError('There is no label map to measure; give at least one session.')
    table = label_table()
    visits, rows = [], {}
    images = {session: _load(session, given) for session, given in segmentations.items()}
    for session, image in images.items():
        labels = np.asarray(image.dataobj)
        if volumes and session in volumes:
            known = volumes[session].dropna(subset=['volume-mm3'])
            measured = dict(zip(known['index'], known['volume-mm3'], strict=True))
        else:
            unit = voxel_volume(image.affine)
            measured = {k: n * unit for k, n in count_voxels(labels, table).items() if n}
        cortex = cortex_record(cortex_measures(labels, image.affine)) if surfaces else None
        months = ages_months.get(session)
        visits.append(Visit(session, months, measured))
        rows[session] = {'Age': np.nan if months is None else float(months)}
        rows[session] |= development_row(measured, cortex, table)
    frame = pd.DataFrame.from_dict(rows, orient='index').sort_values('Age', kind='stable')
    frame.index.name = 'session'
    growth = growth_table(visits, table)
    return DevelopmentalMetrics(
        sessions=frame,
        growth=growth,
        flags=visit_flags(visits, table),
        units={c: unit_of(c) for c in [*frame.columns, *growth.columns]},
        visits=tuple(visits),
        label_maps=images,
    )
