"""Reading derivatives and writing pages: nothing here knows how a page looks."""

import csv
import gzip
import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from babyseg_bids import __version__
from babyseg_bids.errors import OutputError
from babyseg_bids.files import natural_key
from babyseg_bids.morphometry import MEASURES, MISSING
from babyseg_bids.records import SEVERITIES, Age, Flag, Severity

MORPH_PATTERN = '*_desc-babyseg_morph.tsv'
LEDGER_PATTERN = '*_desc-inputs_ledger.json'
QC_PATTERN = '*_desc-babyseg_qc.json'
PATTERNS = (LEDGER_PATTERN, MORPH_PATTERN, QC_PATTERN)
# Changes when the content of the index does.
INDEX_VERSION = f'{__version__} 1'
LEDGER_KEPT = ('scans', 'ledger', 'inputs', 'outputs', 'model', 'version', 'device', 'seconds')


def write_atomic(path: str | os.PathLike[str], content: str | bytes, /) -> None:
    """Write a file so that readers see the old or the new one and never half of it.

    Raises
    ------
    OutputError
        The folder cannot be written.
    """
    path = Path(path)
    draft = path.with_name(f'.{path.name}.{uuid.uuid4().hex}.part')
    data = content.encode('utf-8') if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(data)
        draft.replace(path)
    except OSError as error:
        if draft.exists():
            draft.unlink()
        raise OutputError(
            f'Cannot write {path}: {error.strerror or error}. Check the permissions and the free '
            'space of the output folder.'
        ) from error


def tsv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], /) -> str:
    """A TSV; what is missing or None becomes `n/a`, tabs and newlines in values become spaces."""
    lines = ['\t'.join(columns)]
    for row in rows:
        values = (row.get(name) for name in columns)
        cells = [MISSING if v is None or v == '' else ' '.join(str(v).split()) for v in values]
        lines.append('\t'.join(cells))
    return '\n'.join(lines) + '\n'


@cache
def environment() -> Environment:
    """The templates; every value is escaped, so that a hostile name shows as text."""
    return Environment(
        loader=PackageLoader('babyseg_bids', 'data/templates'),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, /, **values: Any) -> str:
    """Fill a template."""
    return environment().get_template(template).render(**values)


def unique_flags(flags: Iterable[Flag], /) -> list[Flag]:
    """Flags without repetition, the most severe first."""
    order = {name: place for place, name in enumerate(SEVERITIES)}
    return sorted(dict.fromkeys(flags), key=lambda f: order.get(f.severity, len(order)))


@dataclass(frozen=True)
class Derivative:
    """One session as its derivatives tell it.

    `measures` maps a column of the morphometry table to {FreeSurfer number: value}; it is empty
    for a session that has no table. `problem` says in words what is missing or unreadable.
    """

    subject: str
    session: str | None
    age: Age = field(default_factory=Age)
    measures: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    qc: Mapping[str, Any] = field(default_factory=dict)
    ledger: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[Flag, ...] = ()
    problem: str = ''

    @property
    def name(self) -> str:
        """File name stem: `sub-01_ses-A`."""
        return f'sub-{self.subject}' + (f'_ses-{self.session}' if self.session else '')

    @property
    def volumes(self) -> Mapping[int, float]:
        """Soft volumes in mm3 by FreeSurfer number."""
        return self.measures.get('volume-mm3', {})


def _read_json(path: Path | None) -> tuple[dict[str, Any], str]:
    """A JSON object and an empty string, or an empty object and what is wrong."""
    if path is None:
        return {}, ''
    try:
        content = json.loads(path.read_text('utf-8'))
    except (OSError, ValueError) as error:
        return {}, f'{path.name} cannot be read ({error})'
    return (content, '') if isinstance(content, dict) else ({}, f'{path.name} is no JSON object')


def _read_measures(path: Path | None) -> tuple[dict[str, dict[int, float]], str]:
    """The numbers of a morphometry table by column, or what is wrong with it."""
    if path is None:
        return {}, 'no volumes table'
    columns: dict[str, dict[int, float]] = {name: {} for name in MEASURES}
    try:
        with path.open(encoding='utf-8', newline='') as stream:
            for row in csv.DictReader(stream, delimiter='\t'):
                for name in MEASURES:
                    if row[name] != MISSING:
                        columns[name][int(row['index'])] = float(row[name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {}, f'{path.name} cannot be read ({type(error).__name__}: {error})'
    return columns, ''


def _as_flags(content: Any) -> list[Flag]:
    """Flags out of JSON; entries of another shape are shown as they are."""
    flags = []
    for item in content if isinstance(content, list) else ():
        if isinstance(item, dict):
            severity = item.get('severity')
            text = str(item.get('message') or item.get('code') or item)
            known: Severity = next((s for s in SEVERITIES if s == severity), 'warning')
            flags.append(Flag(str(item.get('code', 'unknown')), known, text))
        else:
            flags.append(Flag(str(item), 'warning', str(item)))
    return flags


def _as_age(content: Any) -> Age:
    """Age out of a ledger; unknown when it has none."""
    if not isinstance(content, dict):
        return Age()
    numbers = {}
    for name in ('months', 'gestational_weeks'):
        value = content.get(name)
        numbers[name] = float(value) if isinstance(value, (int, float)) else None
    return Age(source=str(content.get('source') or 'unknown'), **numbers)


def _one(files: list[Path], space: str | None = None) -> Path | None:
    """The file to read where there may be several: that of the reference's space first."""
    chosen = [f for f in files if space and f'_space-{space}_' in f.name]
    return min(chosen or files, default=None)


def _session_files(folder: Path, stem: str) -> dict[str, list[os.DirEntry[str]]]:
    """The records in a session's folder by the end of their names."""
    found: dict[str, list[os.DirEntry[str]]] = {p: [] for p in PATTERNS}
    with os.scandir(folder) as entries:
        for entry in entries:
            for pattern, some in found.items():
                if entry.name.endswith(pattern[1:]) and entry.name.startswith(f'{stem}_'):
                    some.append(entry)
    return found


def read_session(
    folder: Path, /, subject: str, session: str | None, index: 'Index | None' = None
) -> Derivative | None:
    """Read a session's `anat` folder; None where it holds nothing of a session.

    Parameters
    ----------
    index : of what was read before; a session whose files have not changed is taken from it
    """
    stem = f'sub-{subject}' + (f'_ses-{session}' if session else '')
    entries = _session_files(folder, stem)
    if not entries[LEDGER_PATTERN] and not entries[MORPH_PATTERN]:
        return None
    stamp = ''
    if index is not None:
        stats = ((e.name, e.stat()) for some in entries.values() for e in some)
        stamp = ' '.join(sorted(f'{n}:{s.st_size}:{s.st_mtime_ns}' for n, s in stats))
        known = index.get(stem, stamp)
        if known is not None:
            return known
    paths = {pattern: [Path(e.path) for e in some] for pattern, some in entries.items()}
    record = _read_files(paths, subject, session)
    if index is not None:
        index.put(record, stamp)
    return record


def _read_files(paths: Mapping[str, list[Path]], subject: str, session: str | None) -> Derivative:
    """Read a session from its record files by pattern."""
    ledger_path = _one(paths[LEDGER_PATTERN])
    ledger, problem = _read_json(ledger_path)
    scans = ledger.get('scans')
    first = scans[0] if isinstance(scans, list) and scans else None
    space = first.get('suffix') if isinstance(first, dict) else None
    morph_path = _one(paths[MORPH_PATTERN], space)
    measures, trouble = _read_measures(morph_path)
    qc, qc_trouble = _read_json(_one(paths[QC_PATTERN]))
    flags = unique_flags([*_as_flags(ledger.get('flags')), *_as_flags(qc.get('flags'))])
    if ledger_path is None:
        problem = 'no ledger: the session was not completed'
    problems = [p for p in (problem, trouble, qc_trouble) if p]
    return Derivative(
        subject=subject,
        session=session,
        age=_as_age(ledger.get('age')),
        measures=measures,
        qc=qc,
        ledger=ledger,
        flags=tuple(flags),
        problem='; '.join(problems),
    )


class Index:
    """What was read of each session, kept in a file between runs of the group level.

    An index of another version, or one that cannot be read, counts as empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.used: dict[str, Any] = {}
        self.fresh = 0
        try:
            content = json.loads(gzip.decompress(path.read_bytes()))
            self.known = content['sessions'] if content['version'] == INDEX_VERSION else {}
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            self.known = {}

    def get(self, name: str, stamp: str) -> Derivative | None:
        """A session as it was read, if its files are still the same."""
        entry = self.known.get(name)
        if entry is None or entry['stamp'] != stamp:
            return None
        self.used[name] = entry
        values = entry['record']
        return Derivative(
            subject=values['subject'],
            session=values['session'],
            age=Age(**values['age']),
            # JSON has text as keys.
            measures={
                column: dict(zip(values['indices'][column], numbers, strict=True))
                for column, numbers in values['measures'].items()
            },
            qc=values['qc'],
            ledger=values['ledger'],
            flags=tuple(Flag(*f) for f in values['flags']),
            problem=values['problem'],
        )

    def put(self, record: Derivative, stamp: str) -> None:
        """Remember a session. Of its ledger only what the group level shows is kept."""
        self.fresh += 1
        ledger = {k: record.ledger[k] for k in LEDGER_KEPT if k in record.ledger}
        ledger['outputs'] = [
            o for o in ledger.get('outputs') or () if str(o).endswith('_dseg.nii.gz')
        ]
        values = {
            'subject': record.subject,
            'session': record.session,
            'age': asdict(record.age),
            'indices': {c: list(v) for c, v in record.measures.items()},
            'measures': {c: list(v.values()) for c, v in record.measures.items()},
            'qc': {k: v for k, v in record.qc.items() if not isinstance(v, (dict, list))},
            'ledger': ledger,
            'flags': [[f.code, f.severity, f.message] for f in record.flags],
            'problem': record.problem,
        }
        self.used[record.name] = {'stamp': stamp, 'record': values}

    def save(self) -> None:
        """Write what was used, unless nothing has changed."""
        if self.fresh or len(self.used) != len(self.known):
            content = {'version': INDEX_VERSION, 'sessions': self.used}
            text = json.dumps(content, separators=(',', ':'))
            write_atomic(self.path, gzip.compress(text.encode(), 1, mtime=0))


def collect(
    out_dir: Path, /, subject: str | None = None, index: Path | None = None
) -> list[Derivative]:
    """All sessions of an output folder (or of one subject), in natural order.

    Parameters
    ----------
    index : file that remembers what was read, so that the next call reads what is new
    """
    known = Index(index) if index else None
    found = []
    for folder in sorted(out_dir.glob(f'sub-{subject or "*"}'), key=lambda p: natural_key(p.name)):
        name = folder.name.removeprefix('sub-')
        places: list[tuple[Path, str | None]] = [(folder / 'anat', None)]
        sessions = sorted(folder.glob('ses-*'), key=lambda p: natural_key(p.name))
        places += [(p / 'anat', p.name.removeprefix('ses-')) for p in sessions]
        for place, session in places:
            if place.is_dir():
                record = read_session(place, name, session, known)
                found += [record] if record else []
    if known:
        known.save()
    return found
