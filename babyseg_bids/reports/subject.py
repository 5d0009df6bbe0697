"""The page of one child with several sessions: how the volumes develop."""

import csv
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd

from babyseg_bids import __version__
from babyseg_bids.development import DERIVED, DevelopmentalMetrics, development_row
from babyseg_bids.errors import OutputError
from babyseg_bids.labels import TISSUES, label_table
from babyseg_bids.longitudinal import (
    BRAIN,
    GrowthCurve,
    Visit,
    fit_growth_curve,
    group_volumes,
    growth_table,
    spoken_tissue,
    structure_volumes,
    visit_flags,
)
from babyseg_bids.reports import wording as say
from babyseg_bids.reports.charts import Chart, Point, growth_chart
from babyseg_bids.reports.cohort import Outlier, Trend
from babyseg_bids.reports.files import Derivative, collect, render, write_atomic
from babyseg_bids.reports.published import beside_published
from babyseg_bids.reports.side_by_side import aligned_pictures

# Digits of the measures that are no volumes.
FORMATS = {'1': '.3f', 'percent': '+.1f', 'mm': '.2f', 'mm^2': '.0f'}
# No child's cortex is that thick on average, mm: its sulci are closed in the label map.
THICKEST_MM = 5.0
GROUP_TABLE = 'group_desc-babyseg_morph.tsv'


def report_link(record: Derivative, out_dir: Path, /) -> str:
    """Relative address of a session's page; empty when it has none."""
    name = f'{record.name}.html'
    return name if (out_dir / name).is_file() else ''


def session_row(record: Derivative, out_dir: Path, /) -> dict[str, Any]:
    """What tables of sessions show of one of them."""
    brain = group_volumes(record.volumes).get(BRAIN)
    alarming = [f for f in record.flags if f.severity != 'info']
    counts = {s: sum(f.severity == s for f in record.flags) for s in ('severe', 'warning', 'info')}
    rank = counts['severe'] * 10_000 + counts['warning'] * 100 + counts['info']
    scans = record.ledger.get('scans')
    suffixes = [s.get('suffix', '?') for s in scans or () if isinstance(s, dict)]
    return {
        'subject': f'sub-{record.subject}',
        'session': f'ses-{record.session}' if record.session else 'n/a',
        'href': report_link(record, out_dir),
        'age': say.age_text(record.age),
        'months': record.age.months,
        'scans': ' + '.join(suffixes),
        'brain': say.millilitres(brain),
        'flags': ', '.join(f'{n} {s}' for s, n in counts.items() if n) or 'none',
        'rank': rank,
        'hint': '\n'.join(f'{f.severity}: {f.message} ({f.code})' for f in record.flags),
        'level': alarming[0].severity if alarming else ('info' if record.flags else 'good'),
        'note': record.problem,
    }


def growth_charts(
    records: Sequence[Derivative],
    out_dir: Path,
    /,
    names: Sequence[str],
    trends: Mapping[str, Trend] = MappingProxyType({}),
    outliers: Sequence[Outlier] = (),
) -> list[Chart]:
    """Charts of the brain and the tissues against age, from all sessions with an age in months.

    Parameters
    ----------
    names : what to write beside the point of each session
    trends, outliers : the cohort's curves (mm3) by title, and the sessions far from them
    """
    far = {(o.session, o.what): o.text for o in outliers}
    points: dict[str, list[Point]] = {}
    for row, (record, name) in enumerate(zip(records, names, strict=True)):
        if record.age.months is None:
            continue
        flagged = any(f.severity != 'info' for f in record.flags)
        link = report_link(record, out_dir)
        for what, volume in group_volumes(record.volumes).items():
            why = far.get((record.name, what), '')
            age, series = record.age.months, record.subject
            point = Point(age, volume / 1000, series, name, link, flagged, why, row)
            points.setdefault(what, []).append(point)
    charts = []
    # In the order of the table, whichever the first session has.
    titles = [BRAIN, *dict.fromkeys(spoken_tissue(r.tissue) for r in label_table().structures)]
    for what, some in sorted(points.items(), key=lambda item: titles.index(item[0])):
        trend = trends.get(what)
        curve = list(zip(trend.months, trend.values / 1000, strict=True)) if trend else []
        spread = trend.sd if trend else 0.0
        charts.append(growth_chart(what, 'mL', some, 'Age (months)', curve, spread))
    return [chart for chart in charts if chart]


def cohort_curves(path: Path, /) -> dict[str, GrowthCurve]:
    """Curves of the brain and the tissues, fitted to all sessions of a group table.

    Volumes in mm3 by name. Empty where there is no such table yet, or one without ages.
    """
    if not path.is_file():
        return {}
    stamp = path.stat()
    return _fitted(path, stamp.st_mtime_ns, stamp.st_size)


@cache
def _fitted(path: Path, *_: int) -> dict[str, GrowthCurve]:
    names = {'segmented_brain_volume_mm3': BRAIN}
    names |= {f'volume_mm3_tissue_{t.replace("-", "_")}': spoken_tissue(t) for t in TISSUES}
    try:
        table = pd.read_csv(path, sep='\t', usecols=lambda c: c in {'age_months', *names})
    except (OSError, ValueError, csv.Error):
        # A table that somebody edited must not stop a session's page.
        return {}
    if 'age_months' not in table:
        return {}
    months = pd.to_numeric(table['age_months'], errors='coerce')
    found = {
        name: fit_growth_curve(months, pd.to_numeric(table[column], errors='coerce'))
        for column, name in names.items()
        if column in table
    }
    return {name: curve for name, curve in found.items() if curve}


def drawn_curve(curve: GrowthCurve, first: float, last: float, /) -> list[tuple[float, float]]:
    """Points (months, mL) of a curve between two ages, where it is defined."""
    months = np.linspace(first, last, 40)
    values = curve.at(months) / 1000
    return [(float(m), float(v)) for m, v in zip(months, values, strict=True) if np.isfinite(v)]


def _visit(record: Derivative) -> Visit:
    name = f'ses-{record.session}' if record.session else record.name
    return Visit(name, record.age.months, record.volumes)


def _growth_rows(growth: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for row in growth.to_dict('records'):
        volumes = [say.millilitres(row[f'{k}-mm3']) for k in ('from', 'to')]
        changes = [
            say.number(row['change-mm3'] / 1000, '+.2f'),
            say.number(row['change-mm3-per-month'] / 1000, '+.2f'),
            say.number(row['change-percent'], '+.1f'),
            say.number(row['change-percent-per-month'], '+.1f'),
        ]
        rows.append(
            {
                'name': row['structure'],
                'start': row['from-session'],
                'end': row['to-session'],
                'numbers': volumes + changes,
            }
        )
    return rows


def _structure_rows(visits: Sequence[Visit]) -> list[tuple[str, list[str]]]:
    columns = [group_volumes(v.volumes) | structure_volumes(v.volumes) for v in visits]
    names = list(dict.fromkeys(name for column in columns for name in column))
    return [(name, [say.millilitres(c.get(name)) for c in columns]) for name in names]


def _measure_rows(rows: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """The measures that are no volumes, with their units, for the sessions in order."""
    return [
        {
            'name': name,
            'unit': say.UNITS[unit],
            'about': about,
            'values': [say.number(row.get(name), FORMATS[unit]) for row in rows],
        }
        for name, (unit, about) in DERIVED.items()
    ]


def _unresolved(visits: Sequence[Visit], rows: Sequence[Mapping[str, float]]) -> str:
    """The sessions whose label map closes the sulci."""
    thick = [row.get('Mean cortical thickness', 0.0) for row in rows]
    return ', '.join(v.session for v, t in zip(visits, thick, strict=True) if t > THICKEST_MM)


def _trajectories(
    visits: Sequence[Visit],
    rows: Sequence[Mapping[str, float]],
    links: Sequence[tuple[str, bool]],
    curves: Mapping[str, GrowthCurve],
) -> tuple[list[Chart], list[Chart]]:
    """Charts of brain, tissues and derived measures, and those of each structure."""
    points: dict[str, list[Point]] = {}
    for visit, row, (href, flagged) in zip(visits, rows, links, strict=True):
        if visit.months is None:
            continue
        for name, value in row.items():
            if np.isfinite(value):
                y = value if name in DERIVED else value / 1000
                point = Point(visit.months, y, 'child', visit.session, href, flagged)
                points.setdefault(name, []).append(point)
    structures = {name for v in visits for name in structure_volumes(v.volumes)}
    charts: tuple[list[Chart], list[Chart]] = ([], [])
    # A measure that the first session lacks keeps its place: volumes first.
    order = [name for r in rows for name in r if name not in DERIVED]
    for name in dict.fromkeys([*order, *DERIVED]):
        if name not in points:
            continue
        found = points[name]
        ages = [p.x for p in found]
        unit = say.UNITS[DERIVED[name][0]] if name in DERIVED else 'mL'
        curve = curves.get(name)
        chart = growth_chart(
            name,
            unit,
            found,
            'Age (months)',
            drawn_curve(curve, min(ages), max(ages)) if curve else (),
        )
        if chart:
            charts[name in structures].append(chart)
    return charts


def _label_map(record: Derivative, out_dir: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """The published label map of a session; None where there is none or it cannot be read."""
    parts = [p for p in record.name.split('_') if p]
    files = sorted(out_dir.joinpath(*parts, 'anat').glob(f'{record.name}_*desc-aseg_dseg.nii.gz'))
    try:
        image = nib.load(files[0]) if files else None
        return None if image is None else (np.asarray(image.dataobj), image.affine)
    except (OSError, EOFError, nib.filebasedimages.ImageFileError):
        return None


def _pictures(
    names: Sequence[str], maps: Sequence[tuple[np.ndarray, np.ndarray] | None]
) -> list[tuple[str, str]]:
    """Name and picture of the sessions that have a label map."""
    known = [(name, m) for name, m in zip(names, maps, strict=True) if m is not None]
    drawn = aligned_pictures([m for _, m in known])
    return [(name, d) for (name, _), d in zip(known, drawn, strict=True) if d]


def write_subject_report(out_dir: Path, subject: str, /) -> Path | None:
    """Write `sub-<subject>.html` from the derivatives of a subject's sessions.

    Parameters
    ----------
    out_dir : the output folder of babyseg
    subject : label without `sub-`

    Returns
    -------
    Path of the page; None, and nothing is written, where the subject has fewer than two sessions.

    Raises
    ------
    OutputError
        The page cannot be written.
    """
    out_dir = Path(out_dir)
    subject = subject.removeprefix('sub-')
    records = [r for r in collect(out_dir, subject) if r.session]
    if len(records) < 2:
        return None
    records.sort(key=lambda r: (r.age.months is None, r.age.months or 0.0))
    visits = [_visit(r) for r in records]
    rows = [development_row(r.volumes, r.qc.get('cortex')) for r in records]
    links = [
        (report_link(r, out_dir), any(f.severity != 'info' for f in r.flags)) for r in records
    ]
    path = out_dir / f'sub-{subject}.html'
    _write(
        path,
        f'sub-{subject}',
        visits,
        rows,
        links,
        sessions=[session_row(r, out_dir) for r in records],
        pictures=_pictures([v.session for v in visits], [_label_map(r, out_dir) for r in records]),
        curves=cohort_curves(out_dir / GROUP_TABLE),
        flags=visit_flags([v for v in visits if v.volumes]),
    )
    return path


def _write(
    path: Path,
    title: str,
    visits: Sequence[Visit],
    rows: Sequence[Mapping[str, float]],
    links: Sequence[tuple[str, bool]],
    /,
    *,
    curves: Mapping[str, GrowthCurve],
    **values: Any,
) -> None:
    """Fill the page of a child."""
    months = [v.months for v in visits if v.months is not None]
    charts, structure_charts = _trajectories(visits, rows, links, curves)
    page = render(
        'subject.html',
        title=title,
        version=__version__,
        made=say.now(),
        span=say.span_text(months) if months else '',
        charts=charts,
        structure_charts=structure_charts,
        curve_sessions=max((c.sessions for c in curves.values()), default=0),
        undated=', '.join(v.session for v in visits if v.months is None),
        growth=_growth_rows(growth_table([v for v in visits if v.volumes])),
        measures=_measure_rows(rows),
        published=beside_published([v.months for v in visits], rows),
        unresolved=_unresolved(visits, rows),
        thickest=f'{THICKEST_MM:g}',
        structures=_structure_rows(visits),
        **values,
    )
    write_atomic(path, page)


def generate_development_report(
    metrics: DevelopmentalMetrics,
    path: str | os.PathLike[str],
    *,
    title: str = 'Child',
    curves: Mapping[str, GrowthCurve] | None = None,
) -> Path:
    """Write the page of a child's development from `calculate_developmental_metrics`.

    Parameters
    ----------
    metrics : DevelopmentalMetrics
        Measures of one child's sessions.
    path : path of the HTML file, which needs nothing else beside it
    title : what to call the child
    curves : mapping, optional
        Curves of a cohort (see `longitudinal.fit_growth_curve`), volumes in mm3, by the name of
        the column of `metrics.sessions`. They are drawn and named as the cohort's own.

    Returns
    -------
    The path.

    Raises
    ------
    OutputError
        The page cannot be written, or its name does not end in `.html`.
    """
    path = Path(path)
    if path.suffix != '.html':
        raise OutputError(f'{path} is no page; give a name that ends in .html.')
    by_name = {v.session: v for v in metrics.visits}
    visits = [by_name[name] for name in metrics.sessions.index]
    rows = [
        {k: v for k, v in row.items() if k != 'Age'} for row in metrics.sessions.to_dict('records')
    ]
    images = [metrics.label_maps.get(v.session) for v in visits]
    maps = [None if i is None else (np.asarray(i.dataobj), i.affine) for i in images]
    sessions = [
        {
            'session': v.session,
            'href': '',
            'age': say.number(v.months, '.3g') + (' months' if v.months is not None else ''),
            'scans': 'n/a',
            'brain': say.millilitres(group_volumes(v.volumes).get(BRAIN)),
            'flags': 'n/a',
            'level': 'info',
            'hint': '',
            'note': '',
        }
        for v in visits
    ]
    _write(
        path,
        title,
        visits,
        rows,
        [('', False)] * len(visits),
        sessions=sessions,
        pictures=_pictures([v.session for v in visits], maps),
        curves=curves or {},
        flags=metrics.flags,
    )
    return path
