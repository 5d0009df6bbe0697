"""The group level: tables for statistics and one page, from the derivatives alone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from babyseg_bids import __version__
from babyseg_bids.errors import NoInputError
from babyseg_bids.labels import label_table
from babyseg_bids.longitudinal import BRAIN, group_volumes, spoken_tissue, structure_volumes
from babyseg_bids.records import SEVERITIES, Flag
from babyseg_bids.reports import wording as say
from babyseg_bids.reports.annotation import COLUMNS as ANNOTATION
from babyseg_bids.reports.annotation import annotation_row, rank_for_annotation
from babyseg_bids.reports.cohort import MIN_SESSIONS, Outlier, Trend, find_outliers
from babyseg_bids.reports.files import Derivative, collect, render, tsv_text, write_atomic
from babyseg_bids.reports.group_tables import (
    further_measures,
    morph_dictionary,
    morph_row,
    qc_dictionary,
    qc_row,
)
from babyseg_bids.reports.people import (
    RATINGS_FILE,
    Absent,
    Covariates,
    Rating,
    absent_sessions,
    read_covariates,
    read_ratings,
)
from babyseg_bids.reports.subject import growth_charts, report_link, session_row

STEM = 'group_desc-babyseg'
# Longer lists of sessions are cut in sentences; the table has them all.
LISTED = 12
# Rows that are shown before the script has the others in hand.
FIRST_ROWS = 100
OUTLIERS_SHOWN = 200
OTHERS_NAMED = 4
# What was read last time, so that only new and changed sessions are read again.
INDEX = Path('logs') / 'group_index.json.gz'


def _short(names: Sequence[str], limit: int = LISTED) -> str:
    """A list for a sentence."""
    if len(names) > limit:
        return f'{", ".join(names[:limit])} and {len(names) - limit} more'
    return ', '.join(names)


def _row(
    record: Derivative,
    out_dir: Path,
    groups: Sequence[str],
    rating: Rating | None,
    outliers: Sequence[Outlier],
) -> dict[str, Any]:
    """A session in the page's table."""
    volumes = group_volumes(record.volumes)
    page = f'sub-{record.subject}.html'
    sure = record.qc.get('mean_confidence')
    row = session_row(record, out_dir)
    return {
        **row,
        'name': record.name,
        'subject_href': page if record.session and (out_dir / page).is_file() else '',
        'volumes': [
            (say.millilitres(volumes.get(g)), f'{volumes[g]:.1f}' if g in volumes else '')
            for g in groups
        ],
        'sure': say.number(sure),
        'sure_exact': f'{sure:.5f}' if isinstance(sure, float) else '',
        'note': '; '.join([n for n in (row['note'],) if n] + [o.text for o in outliers[:1]]),
        'rating': rating.rating if rating else '',
        'comment': rating.comment if rating else '',
    }


def _facts(records: Sequence[Derivative]) -> list[tuple[str, str, str]]:
    """Term, value and detail of the summary."""
    months = [r.age.months for r in records if r.age.months is not None]
    worst = [
        next((s for s in SEVERITIES if any(f.severity == s for f in r.flags)), '') for r in records
    ]
    models = sorted({str(r.ledger['model']) for r in records if r.ledger.get('model')})
    brains = [b for r in records if (b := group_volumes(r.volumes).get(BRAIN))]
    sizes = (
        f'{say.millilitres(min(brains))} to {say.millilitres(max(brains))} mL' if brains else 'n/a'
    )
    return [
        ('Subjects', str(len({r.subject for r in records})), ''),
        ('Sessions', str(len(records)), f'{sum(bool(r.volumes) for r in records)} with volumes'),
        (
            'Age',
            say.span_text(months),
            f'known for {len(months)} of {len(records)}',
        ),
        ('Segmented brain volume', sizes, ''),
        ('Sessions with severe flags', str(worst.count('severe')), ''),
        ('Sessions with warnings', str(worst.count('warning')), 'and no severe flag'),
        ('Model', ', '.join(models) or 'unknown', f'page by babyseg {__version__}'),
    ]


def _remarks(records: Sequence[Derivative]) -> list[Flag]:
    """What concerns the group: incomplete sessions, mixed models, the same file twice."""
    remarks = []
    broken = [r.name for r in records if r.problem]
    if broken:
        text = (
            f'Incomplete or unreadable: {_short(broken)} (see the notes in the table). Run the '
            'participant level again for them.'
        )
        remarks.append(Flag('incomplete', 'warning', text))
    made_by = {
        (str(r.ledger.get('model')), str(r.ledger.get('version'))) for r in records if r.ledger
    }
    if len(made_by) > 1:
        made = '; '.join(f'model {m}, babyseg {v}' for m, v in sorted(made_by))
        text = f'Sessions were made by different versions ({made}): their volumes may not compare.'
        remarks.append(Flag('mixed-versions', 'warning', text))
    owners: dict[str, list[str]] = {}
    for record in records:
        for item in record.ledger.get('inputs') or ():
            if isinstance(item, dict) and item.get('sha256'):
                owners.setdefault(str(item['sha256']), []).append(record.name)
    twice = {tuple(dict.fromkeys(names)) for names in owners.values()}
    for names in sorted(n for n in twice if len(n) > 1):
        text = f'The same image file belongs to several sessions: {_short(names)}.'
        remarks.append(Flag('same-image', 'warning', text))
    return remarks


def _kinds(records: Sequence[Derivative]) -> list[dict[str, Any]]:
    """Flags by code, the most severe and frequent first."""
    found: dict[str, list[tuple[int, str]]] = {}
    for record in records:
        for flag in record.flags:
            place = SEVERITIES.index(flag.severity)
            found.setdefault(flag.code, []).append((place, record.name))
    rows = []
    for code, hits in found.items():
        names = list(dict.fromkeys(name for _, name in hits))
        rows.append(
            {
                'code': code,
                'level': SEVERITIES[min(place for place, _ in hits)],
                'count': len(names),
                'which': _short(names),
            }
        )
    return sorted(rows, key=lambda r: (SEVERITIES.index(r['level']), -r['count'], r['code']))


def _measured(records: Sequence[Derivative]) -> dict[str, list[float | None]]:
    """What is compared with the cohort's curves: volumes (mm3) of tissues and structures."""
    volumes = [group_volumes(r.volumes) | structure_volumes(r.volumes) for r in records]
    names = dict.fromkeys(name for v in volumes for name in v)
    return {name: [v.get(name) for v in volumes] for name in names}


@dataclass(frozen=True)
class Group:
    """All that is known of a group of sessions."""

    records: Sequence[Derivative]
    ratings: Mapping[str, Rating]
    covariates: Covariates
    trends: Mapping[str, Trend]
    outliers: Sequence[Outlier]
    absent: Sequence[Absent]
    remarks: Sequence[Flag]

    @cached_property
    def outliers_by_session(self) -> dict[str, list[Outlier]]:
        """The outliers of each session that has some."""
        found: dict[str, list[Outlier]] = {}
        for outlier in self.outliers:
            found.setdefault(outlier.session, []).append(outlier)
        return found


def gather(out_dir: Path, bids_dir: Path | None = None) -> Group:
    """Read an output folder and compare its sessions with each other.

    Raises
    ------
    NoInputError
        The folder holds no derivatives of a session.
    """
    records = collect(out_dir, index=out_dir / INDEX)
    if not records:
        raise NoInputError(
            f'{out_dir} holds no results of babyseg (looked for '
            'sub-*/[ses-*/]anat/*_desc-babyseg_morph.tsv). Run the participant level first, or '
            'give the folder that it wrote to.'
        )
    ratings, remarks = read_ratings(out_dir)
    strangers = sorted(set(ratings) - {r.name for r in records})
    if strangers:
        text = f'Ratings of sessions that are not here are not used: {_short(strangers)}.'
        remarks.append(Flag('ratings-file', 'warning', text))
    reserved = list(morph_dictionary(label_table()))
    covariates = read_covariates(out_dir, bids_dir, reserved)
    names = [r.name for r in records]
    excluded = frozenset(n for n in names if n in ratings and ratings[n].rating == 'exclude')
    trends, outliers = find_outliers(
        names, [r.age.months for r in records], _measured(records), excluded
    )
    return Group(
        records,
        ratings,
        covariates,
        trends,
        outliers,
        absent_sessions(out_dir, records, covariates),
        [*_remarks(records), *remarks],
    )


def _outlier_row(record: Derivative, outliers: Sequence[Outlier], out_dir: Path) -> dict[str, Any]:
    """A session's farthest value, and the names of its others."""
    first = outliers[0]
    return {
        'name': record.name,
        'href': report_link(record, out_dir),
        'age': say.age_text(record.age),
        'what': first.what,
        'value': say.millilitres(first.value),
        'expected': say.millilitres(first.expected),
        'percent': say.number(first.percent, '+.0f'),
        'deviation': say.number(first.deviation, '+.1f'),
        'others': _short([o.what for o in outliers[1:]], OTHERS_NAMED),
    }


def _page(group: Group, out_dir: Path) -> str:
    """The group's HTML page."""
    records = group.records
    tissues = dict.fromkeys(row.tissue for row in label_table().structures)
    groups = [BRAIN, *(spoken_tissue(t) for t in tissues)]
    undated = [r.name for r in records if r.age.months is None]
    by_name = {r.name: r for r in records}
    far = group.outliers_by_session
    names = list(far)[:OUTLIERS_SHOWN]
    labels = [r.name.removeprefix('sub-') for r in records]
    return render(
        'group.html',
        version=__version__,
        made=say.now(),
        facts=_facts(records),
        remarks=group.remarks,
        charts=growth_charts(records, out_dir, labels, group.trends, group.outliers),
        fitted=bool(group.trends),
        needed=MIN_SESSIONS,
        undated=_short(undated),
        groups=groups,
        sessions=[
            _row(r, out_dir, groups, group.ratings.get(r.name), far.get(r.name, ()))
            for r in records
        ],
        first=FIRST_ROWS,
        outliers=[_outlier_row(by_name[name], far[name], out_dir) for name in names],
        more_outliers=max(len(far) - OUTLIERS_SHOWN, 0),
        absent=group.absent,
        ratings_file=RATINGS_FILE,
        kinds=_kinds(records),
    )


def write_group(out_dir: Path, /, bids_dir: Path | None = None) -> tuple[Path, ...]:
    """Write the group's tables and page from the derivatives in an output folder.

    Files
    -----
    group_desc-babyseg_morph.tsv/.json : volumes, one row a session
    group_desc-babyseg_qc.tsv/.json : quality, one row a session
    group_desc-babyseg_annotation.tsv/.json : which sessions to correct by hand first
    group.html : page for people

    Parameters
    ----------
    out_dir : the output folder of babyseg
    bids_dir : the dataset; only looked at for a participants.tsv that the output folder lacks

    Returns
    -------
    Paths of the files written

    Raises
    ------
    NoInputError
        The folder holds no derivatives of a session.
    OutputError
        A file cannot be written.
    """
    out_dir = Path(out_dir)
    group = gather(out_dir, bids_dir)
    table = label_table()
    further = further_measures(group.records)
    morph = morph_dictionary(table, group.covariates.columns)
    quality = qc_dictionary(further)
    volumes, measures = [], []
    for record in group.records:
        rating = group.ratings.get(record.name)
        rated = {'rating': rating.rating} if rating else {}
        noted = {'rating_comment': rating.comment} if rating else {}
        far = group.outliers_by_session.get(record.name, ())
        noted['outliers'] = ', '.join(f'{o.what} {o.percent:+.0f} %' for o in far)
        volumes.append(morph_row(record, table, {**group.covariates.of(record), **rated}))
        measures.append(qc_row(record, {**rated, **noted}, further))
    useful = [
        r
        for r in group.records
        if r.volumes
        and not (r.name in group.ratings and group.ratings[r.name].rating == 'exclude')
    ]
    ranking = [annotation_row(n, c) for n, c in enumerate(rank_for_annotation(useful), 1)]
    content = {
        f'{STEM}_morph.tsv': tsv_text(list(morph), volumes),
        f'{STEM}_morph.json': json.dumps(morph, indent=2) + '\n',
        f'{STEM}_qc.tsv': tsv_text(list(quality), measures),
        f'{STEM}_qc.json': json.dumps(quality, indent=2) + '\n',
        f'{STEM}_annotation.tsv': tsv_text(list(ANNOTATION), ranking),
        f'{STEM}_annotation.json': json.dumps(ANNOTATION, indent=2) + '\n',
        'group.html': _page(group, out_dir),
    }
    for name, text in content.items():
        write_atomic(out_dir / name, text)
    return tuple(out_dir / name for name in content)
