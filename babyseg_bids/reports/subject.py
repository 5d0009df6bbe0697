"""The page of one child with several sessions: how the volumes develop."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from babyseg_bids import __version__
from babyseg_bids.longitudinal import (
    BRAIN,
    Visit,
    group_volumes,
    growth_table,
    structure_volumes,
    visit_flags,
)
from babyseg_bids.reports import wording as say
from babyseg_bids.reports.charts import Chart, Point, growth_chart
from babyseg_bids.reports.cohort import Outlier, Trend
from babyseg_bids.reports.files import Derivative, collect, render, write_atomic


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
        'hint': '\n'.join(f'{f.severity}: {f.message}' for f in record.flags),
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
    for what, some in points.items():
        trend = trends.get(what)
        curve = list(zip(trend.months, trend.values / 1000, strict=True)) if trend else []
        spread = trend.sd if trend else 0.0
        charts.append(growth_chart(what, 'mL', some, 'Age (months)', curve, spread))
    return [chart for chart in charts if chart]


def _visits(records: Sequence[Derivative]) -> list[Visit]:
    return [
        Visit(f'ses-{r.session}' if r.session else r.name, r.age.months, r.volumes)
        for r in records
        if r.volumes
    ]


def _growth_rows(records: Sequence[Derivative]) -> list[dict[str, Any]]:
    rows = []
    for row in growth_table(_visits(records)).to_dict('records'):
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


def _structure_rows(records: Sequence[Derivative]) -> list[tuple[str, list[str]]]:
    columns = [group_volumes(r.volumes) | structure_volumes(r.volumes) for r in records]
    names = list(dict.fromkeys(name for column in columns for name in column))
    return [(name, [say.millilitres(c.get(name)) for c in columns]) for name in names]


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
    months = [r.age.months for r in records if r.age.months is not None]
    undated = [f'ses-{r.session}' for r in records if r.age.months is None]
    page = render(
        'subject.html',
        subject=subject,
        version=__version__,
        made=say.now(),
        span=say.span_text(months) if months else '',
        sessions=[session_row(r, out_dir) for r in records],
        flags=visit_flags(_visits(records)),
        charts=growth_charts(records, out_dir, [f'ses-{r.session}' for r in records]),
        undated=', '.join(undated),
        growth=_growth_rows(records),
        structures=_structure_rows(records),
    )
    path = out_dir / f'sub-{subject}.html'
    write_atomic(path, page)
    return path
