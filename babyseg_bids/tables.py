"""Read the tables and JSON files of a dataset as they are: nothing is guessed, nothing raises.

BIDS tables are read as text. `pandas` would turn the session `01` into the number 1 and `n/a`
into not-a-number, and would stop at the first ragged row.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from babyseg_bids.files import file_problem

# No participants.tsv of a real study comes near this size; something else has its name.
MAX_BYTES = 64 * 1024 * 1024
# The last two are what pandas and Excel write for a missing value.
MISSING = frozenset({'', 'n/a', 'na', 'none', 'null', '-', '.', '?', 'unknown', 'nan', '#n/a'})


@dataclass(frozen=True)
class Table:
    """A tab-separated table as text.

    `problems` are sentences in lower case without the file's name: why the table or a part of it
    could not be read. `rows` have a value for every column, '' where a row is too short.
    """

    path: Path
    columns: tuple[str, ...] = ()
    rows: tuple[dict[str, str], ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class JsonFile:
    """The object of a JSON file, empty when it could not be read; `problem` says why."""

    path: Path
    content: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def is_missing(value: str | None, /) -> bool:
    """Whether a cell holds no value (`n/a` is BIDS' way to say so)."""
    return value is None or value.strip().lower() in MISSING


def read_table(path: Path, /) -> Table:
    """Read a TSV file as text, with what is wrong with it beside it."""
    text, problem = _read_text(path)
    if text is None:
        return Table(path, problems=(str(problem),))
    problems = [problem] if problem else []
    # Not str.splitlines: it also splits at separators that may stand inside a cell.
    lines = [ln for ln in re.split(r'\r\n|\n|\r', text.replace('\0', '')) if ln.strip()]
    if not lines:
        return Table(path, problems=('it holds no table',))
    columns = tuple(_clean(c) for c in lines[0].split('\t'))
    if len(columns) == 1 and re.search(r'[,;]', columns[0]):
        return Table(path, problems=('its columns are not separated by tabs: save it as TSV',))
    if len(set(columns)) < len(columns):
        problems.append('two of its columns have the same name; the first is used')
    rows, ragged = [], 0
    for line in lines[1:]:
        cells = [_clean(c) for c in line.split('\t')]
        ragged += len(cells) != len(columns)
        cells += [''] * (len(columns) - len(cells))
        # Built backwards, so that the first of two columns with one name wins.
        rows.append(dict(reversed(list(zip(columns, cells, strict=False)))))
    if ragged:
        problems.append(f'{ragged} of its rows have another number of cells than the header')
    return Table(path, columns, tuple(rows), tuple(problems))


def read_json(path: Path, /) -> JsonFile:
    """Read a JSON object. A file that is absent is an empty object without a problem."""
    if not path.exists() and not path.is_symlink():
        return JsonFile(path)
    text, problem = _read_text(path)
    if text is None:
        return JsonFile(path, problem=problem)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as e:
        return JsonFile(path, problem=f'it is not valid JSON ({e})')
    if not isinstance(content, dict):
        return JsonFile(path, problem='it holds no JSON object')
    return JsonFile(path, content, problem)


def _clean(cell: str) -> str:
    """A cell without blanks and without the quotes that spreadsheets put around text."""
    cell = cell.strip()
    if len(cell) > 1 and cell[0] == cell[-1] == '"':
        cell = cell[1:-1].strip()
    return cell


def _read_text(path: Path) -> tuple[str | None, str | None]:
    """Text and problem; the text is None when there is none."""
    problem = file_problem(path)
    if problem:
        return None, problem
    try:
        if path.stat().st_size > MAX_BYTES:
            return None, 'it is far too large to be a table of a dataset'
        raw = path.read_bytes()
    except OSError as e:
        return None, f'it could not be read ({e.strerror or e})'
    encoding = 'utf-16' if raw[:2] in (b'\xff\xfe', b'\xfe\xff') else 'utf-8-sig'
    try:
        return raw.decode(encoding), None
    except UnicodeDecodeError:
        # Latin-1 takes every byte; numbers and identifiers come out right.
        return raw.decode('latin-1'), 'it is not in UTF-8; it was read as Latin-1'
