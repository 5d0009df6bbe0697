"""The group level: tables for statistics and one page, from the derivatives alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from babyseg_bids import __version__
from babyseg_bids.errors import NoInputError
from babyseg_bids.labels import label_table
from babyseg_bids.longitudinal import BRAIN, group_volumes, spoken_tissue
from babyseg_bids.records import SEVERITIES, Flag
from babyseg_bids.reports import wording as say
from babyseg_bids.reports.files import Derivative, collect, render, tsv_text, write_atomic
from babyseg_bids.reports.group_tables import (
    morph_dictionary,
    morph_row,
    qc_dictionary,
    qc_row,
)
from babyseg_bids.reports.subject import growth_charts, session_row

STEM = 'group_desc-babyseg'
# Longer lists of sessions are cut in sentences; the table has them all.
LISTED = 12


def _short(names: Sequence[str]) -> str:
    """A list for a sentence."""
    if len(names) > LISTED:
        return f'{", ".join(names[:LISTED])} and {len(names) - LISTED} more'
    return ', '.join(names)


def _row(record: Derivative, out_dir: Path, groups: Sequence[str]) -> dict[str, Any]:
    """A session in the page's table."""
    volumes = group_volumes(record.volumes)
    page = f'sub-{record.subject}.html'
    sure = record.qc.get('mean_confidence')
    return {
        **session_row(record, out_dir),
        'subject_href': page if record.session and (out_dir / page).is_file() else '',
        'volumes': [
            (say.millilitres(volumes.get(g)), f'{volumes[g]:.1f}' if g in volumes else '')
            for g in groups
        ],
        'sure': say.number(sure),
        'sure_exact': f'{sure:.5f}' if isinstance(sure, float) else '',
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


def _page(records: Sequence[Derivative], out_dir: Path) -> str:
    """The group's HTML page."""
    tissues = dict.fromkeys(row.tissue for row in label_table().structures)
    groups = [BRAIN, *(spoken_tissue(t) for t in tissues)]
    undated = [r.name for r in records if r.age.months is None]
    return render(
        'group.html',
        version=__version__,
        made=say.now(),
        facts=_facts(records),
        remarks=_remarks(records),
        charts=growth_charts(records, out_dir, [r.name.removeprefix('sub-') for r in records]),
        undated=_short(undated),
        groups=groups,
        sessions=[_row(r, out_dir, groups) for r in records],
        kinds=_kinds(records),
    )


def write_group(out_dir: Path, /) -> tuple[Path, ...]:
    """Write the group's tables and page from the derivatives in an output folder.

    Files
    -----
    group_desc-babyseg_morph.tsv/.json : volumes, one row a session
    group_desc-babyseg_qc.tsv/.json : quality, one row a session
    group.html : page for people

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
    records = collect(out_dir)
    if not records:
        raise NoInputError(
            f'{out_dir} holds no results of babyseg (looked for '
            'sub-*/[ses-*/]anat/*_desc-babyseg_morph.tsv). Run the participant level first, or '
            'give the folder that it wrote to.'
        )
    table = label_table()
    morph, quality = morph_dictionary(table), qc_dictionary()
    content = {
        f'{STEM}_morph.tsv': tsv_text(list(morph), [morph_row(r, table) for r in records]),
        f'{STEM}_morph.json': json.dumps(morph, indent=2) + '\n',
        f'{STEM}_qc.tsv': tsv_text(list(quality), [qc_row(r) for r in records]),
        f'{STEM}_qc.json': json.dumps(quality, indent=2) + '\n',
        'group.html': _page(records, out_dir),
    }
    for name, text in content.items():
        write_atomic(out_dir / name, text)
    return tuple(out_dir / name for name in content)
