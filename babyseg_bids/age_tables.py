"""Find the rows of scans.tsv, sessions.tsv and participants.tsv that speak of one session."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from babyseg_bids.age_cells import AgeReading, read_cell
from babyseg_bids.age_columns import (
    ID_COLUMNS,
    SESSION_COLUMNS,
    AgeColumn,
    age_columns,
    declaration,
    first_column,
)
from babyseg_bids.files import natural_key
from babyseg_bids.records import Flag
from babyseg_bids.tables import JsonFile, Table, is_missing, read_json, read_table

Rows = tuple[list['Row'], list[Flag]]


@dataclass(frozen=True)
class Row:
    """One row of a table with the ages it may hold.

    `table` and `sidecar_name` are paths relative to the dataset; `key` is the text that made the
    row match; `sidecar` describes the columns.
    """

    table: str
    key: str
    cells: dict[str, str]
    age_columns: tuple[AgeColumn, ...]
    sidecar: dict[str, Any] = field(default_factory=dict)
    sidecar_name: str = ''


def same_label(cell: str, label: str, prefix: str, /) -> bool:
    """Whether a cell names `label`, with or without the prefix `sub-` or `ses-`."""
    return cell.strip().removeprefix(prefix) == label


def same_number(cell: str, label: str, prefix: str, /) -> bool:
    """Whether both are one number but for leading zeros or a `.0`, as spreadsheets leave it."""
    cell = cell.strip().removeprefix(prefix).removesuffix('.0')
    both_numbers = cell.isdecimal() and label.isdecimal()
    return both_numbers and cell.lstrip('0') == label.lstrip('0')


def read_row(row: Row, /) -> tuple[list[AgeReading], list[Flag]]:
    """All ages of one row, best column first."""
    readings, flags = [], []
    for column in row.age_columns:
        cell = row.cells.get(column.name, '')
        if is_missing(cell):
            continue
        where = f'{row.table}, row {row.key}, column {column.name}'
        declared = declaration(row.sidecar.get(column.name))
        reading, new = read_cell(cell, column, declared, where=where, json_name=row.sidecar_name)
        flags += new
        readings += [reading] if reading else []
    return readings, flags


class DatasetTables:
    """The tables of one dataset, each read once and only when somebody asks.

    Parameters
    ----------
    root : Path
        The dataset's folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._tops: dict[str, JsonFile] = {}

    # --- scans.tsv -------------------------------------------------------------------------

    def scans_rows(self, subject: str, session: str | None, images: Sequence[str], /) -> Rows:
        """Rows of the session's scans.tsv that name one of `images`, in the order of `images`."""
        folders = [self._session_folder(subject, session)]
        if session is not None:
            folders.append(PurePosixPath(f'sub-{subject}'))
        rows: list[Row] = []
        flags: list[Flag] = []
        for folder in folders:
            for path in self._listed(folder, 'scans.tsv'):
                more, new = self._rows_for_images(path, images, folder)
                rows += more
                flags += new
        return rows, flags

    def stray_rows(self, subject: str, session: str | None, images: Sequence[str], /) -> Rows:
        """Rows for `images` in tables that lie in the `anat` folder, where BIDS has none."""
        folder = self._session_folder(subject, session)
        rows: list[Row] = []
        flags: list[Flag] = []
        kinds = ('scans.tsv', 'sessions.tsv', 'participants.tsv')
        for path in self._listed(folder / 'anat', *kinds):
            message = (
                f'{self._name(path)} lies in an anat folder, where BIDS does not look for it. '
                'It was only compared with the tables at their right place; move or delete it.'
            )
            flags.append(Flag('table-stray', 'info', message))
            more, new = self._rows_for_images(path, images, folder, stray=True)
            rows += more
            flags += new
        return rows, flags

    def _rows_for_images(
        self, path: Path, images: Sequence[str], folder: PurePosixPath, *, stray: bool = False
    ) -> Rows:
        table = read_table(path)
        name = self._name(path)
        flags = self._table_flags(table)
        ages = age_columns(table.columns)
        file_column = first_column(table.columns, ('filename', 'file_name', 'file', 'scan'))
        if file_column is None:
            if table.columns and not stray:
                message = f"{name} has no column 'filename'; it could not be used."
                flags.append(Flag('table-unreadable', 'warning', message))
            return [], flags
        matched: dict[str, list[Row]] = {}
        inexact: list[str] = []
        unmatched: list[Row] = []
        sidecar, sidecar_name = self._sidecar(path)
        for cells in table.rows:
            entry = cells[file_column].replace('\\', '/').removeprefix('./')
            row = Row(name, entry, cells, tuple(ages), sidecar, sidecar_name)
            image = _named_image(entry, images)
            if image is None:
                unmatched.append(row)
                continue
            expected = PurePosixPath(image).relative_to(folder).as_posix()
            if entry != expected and not stray:
                inexact.append(f'{entry} (should be {expected})')
            matched.setdefault(image, []).append(row)
        flags += self._unmatched(unmatched, folder)
        if inexact:
            message = (
                f'{name} names {_some(inexact)}: paths are relative to the folder of the '
                'table. The image was recognised by its file name.'
            )
            flags.append(Flag('scans-path', 'info', message))
        return [row for image in images for row in matched.get(image, [])], flags

    def _unmatched(self, rows: Sequence[Row], folder: PurePosixPath) -> list[Flag]:
        """Flags for the rows of one scans.tsv that name none of the session's images."""
        session = '_'.join(folder.parts)
        foreign, missing, ages = [], [], []
        for row in rows:
            path = PurePosixPath(row.key)
            if path.name.startswith('sub-') and not path.name.startswith(f'{session}_'):
                readings, _ = read_row(row)
                ages += readings
                foreign.append(path.name)
            elif (
                path.parts[:-1] in ((), ('anat',))
                and '.nii' in path.name
                and not self._exists(folder / 'anat' / path.name)
            ):
                missing.append(row.key)
        flags = []
        if foreign:
            message = f'{rows[0].table} names {_some(foreign)}: not an image of this session.'
            if ages:
                value = 'VALUE' if ages[0].span.gestational else f'{ages[0].span.value:.4g}'
                said = ', '.join(dict.fromkeys(str(a.span) for a in ages[:3]))
                message += (
                    f' The age that stands there, {said}, was not used. If it is the age of this '
                    f'session, give --age-months {session}={value}; better, correct the table.'
                )
            flags.append(Flag('scans-foreign-file', 'warning', message))
        if missing:
            message = f'{rows[0].table} names {_some(missing)}, which does not exist.'
            flags.append(Flag('scans-missing-file', 'info', message))
        return flags

    # --- sessions.tsv ----------------------------------------------------------------------

    def session_rows(self, subject: str, session: str | None, /) -> Rows:
        """Rows of the subject's sessions.tsv for a session."""
        rows: list[Row] = []
        flags: list[Flag] = []
        if session is None:
            return rows, flags
        for path in self._listed(PurePosixPath(f'sub-{subject}'), 'sessions.tsv'):
            table = read_table(path)
            flags += self._table_flags(table)
            column = first_column(table.columns, SESSION_COLUMNS)
            if column is None:
                if table.columns:
                    message = f"{self._name(path)} has no column 'session_id'; it was not used."
                    flags.append(Flag('table-unreadable', 'warning', message))
                continue
            found, new = self._select(table.rows, column, session, 'ses-', path)
            flags += new
            rows += [self._row(path, table, cells[column], cells) for cells in found]
        return rows, flags

    # --- participants.tsv ------------------------------------------------------------------

    def participant_rows(self, subject: str, session: str | None, n_sessions: int, /) -> Rows:
        """Rows of participants.tsv that hold for one session of a subject."""
        table = self._participants
        path = table.path
        id_column = first_column(table.columns, ID_COLUMNS)
        if id_column is None:
            return [], []
        found, flags = self._participant(subject)
        session_column = first_column(table.columns, SESSION_COLUMNS)
        if session_column is not None and session is not None:
            with_session = [c for c in found if not is_missing(c[session_column])]
            if with_session:
                chosen, new = self._select(with_session, session_column, session, 'ses-', path)
                flags += new
                return [
                    self._row(path, table, f'{c[id_column]} {c[session_column]}', c)
                    for c in chosen
                ], flags
        rows = [self._row(path, table, c[id_column], c) for c in found]
        if n_sessions > 1:
            said = [
                f'{c.name} {r.cells[c.name]}'
                for r in rows
                for c in r.age_columns
                if not is_missing(r.cells[c.name])
            ]
            if said:
                message = (
                    f'{self._name(path)} gives one age ({", ".join(said[:3])}) for sub-{subject}, '
                    f'who has {n_sessions} sessions. It was not used, since babies grow: add a '
                    'sessions.tsv with an age for each session, or give --age-months.'
                )
                flags.append(Flag('age-one-for-many-sessions', 'warning', message))
            return [], flags
        return rows, flags

    def dataset_flags(self) -> list[Flag]:
        """What is wrong with participants.tsv as a whole."""
        table = self._participants
        flags = self._table_flags(table)
        if table.columns and first_column(table.columns, ID_COLUMNS) is None:
            message = f"{self._name(table.path)} has no column 'participant_id'; it was not used."
            flags.append(Flag('table-unreadable', 'warning', message))
        return flags

    @cached_property
    def _participants(self) -> Table:
        path = self.root / 'participants.tsv'
        # A dangling link is a finding, an absent table is none.
        return read_table(path) if self._exists_path(path) else Table(path)

    @cached_property
    def _participant_index(self) -> dict[str, list[dict[str, str]]]:
        """Rows by bare label; there may be thousands, and each session asks."""
        column = first_column(self._participants.columns, ID_COLUMNS)
        index: dict[str, list[dict[str, str]]] = {}
        for cells in self._participants.rows:
            index.setdefault(str(cells.get(column or '')).removeprefix('sub-'), []).append(cells)
        return index

    def _participant(self, subject: str) -> tuple[list[dict[str, str]], list[Flag]]:
        exact = self._participant_index.get(subject)
        if exact is not None:
            return exact, []
        if not subject.isdecimal():
            return [], []
        column = str(first_column(self._participants.columns, ID_COLUMNS))
        rows = [
            c
            for label, cells in self._participant_index.items()
            if same_number(label, subject, '')
            for c in cells
        ]
        return self._inexact(rows, column, subject, 'sub-', self._participants.path)

    # --- matching --------------------------------------------------------------------------

    def _select(
        self,
        rows: Iterable[dict[str, str]],
        column: str,
        label: str,
        prefix: str,
        path: Path,
    ) -> tuple[list[dict[str, str]], list[Flag]]:
        """Rows whose `column` names `label`; failing that, the one that is the same number."""
        rows = list(rows)
        exact = [c for c in rows if same_label(c[column], label, prefix)]
        if exact:
            return exact, []
        return self._inexact(
            [c for c in rows if same_number(c[column], label, prefix)], column, label, prefix, path
        )

    def _inexact(
        self, rows: list[dict[str, str]], column: str, label: str, prefix: str, path: Path
    ) -> tuple[list[dict[str, str]], list[Flag]]:
        """Accept rows that match as numbers when they all have one spelling."""
        if not rows:
            return [], []
        written = sorted({c[column] for c in rows})
        message = f'{self._name(path)} writes {", ".join(written)} for {prefix}{label}.'
        if len(written) > 1:
            message += ' Which one is meant cannot be told; neither was used.'
            return [], [Flag('table-label', 'warning', message)]
        return rows, [Flag('table-label', 'info', message + ' It was taken for the same.')]

    def _row(self, path: Path, table: Table, key: str, cells: dict[str, str]) -> Row:
        sidecar, sidecar_name = self._sidecar(path)
        return Row(
            self._name(path), key, cells, tuple(age_columns(table.columns)), sidecar, sidecar_name
        )

    # --- files -----------------------------------------------------------------------------

    def _sidecar(self, path: Path) -> tuple[dict[str, Any], str]:
        """The JSON description of a table: its own file first, then those of the folders above.

        BIDS calls this inheritance: `scans.json` at the top describes every scans.tsv.
        """
        kind = path.stem.rpartition('_')[2]
        names = [path.with_suffix('.json')]
        folder = path.parent
        while folder != self.root:
            folder = folder.parent
            if folder != self.root:
                names.append(folder / f'{folder.name}_{kind}.json')
            names.append(folder / f'{kind}.json')
        merged: dict[str, Any] = {}
        used = ''
        for name in names:
            content = (self._top(kind) if name.parent == self.root else read_json(name)).content
            used = used or (self._name(name) if content else '')
            merged = {**content, **merged}
        return merged, used

    def _top(self, kind: str) -> JsonFile:
        """The description at the top of the dataset, which every session asks for."""
        if kind not in self._tops:
            self._tops[kind] = read_json(self.root / f'{kind}.json')
        return self._tops[kind]

    def _table_flags(self, table: Table) -> list[Flag]:
        """The problems of a table and of its own sidecar."""
        name = self._name(table.path)
        severity = 'info' if table.columns else 'warning'
        flags = [
            Flag('table-unreadable', severity, f'{name}: {problem}.')  # type: ignore[arg-type]
            for problem in table.problems
        ]
        sidecar = table.path.with_suffix('.json')
        problem = read_json(sidecar).problem
        if problem:
            message = f'{self._name(sidecar)}: {problem}.'
            flags.append(Flag('table-unreadable', 'warning', message))
        return flags

    def _session_folder(self, subject: str, session: str | None) -> PurePosixPath:
        folder = PurePosixPath(f'sub-{subject}')
        return folder / f'ses-{session}' if session is not None else folder

    def _listed(self, folder: PurePosixPath, *endings: str) -> list[Path]:
        """Files of one folder in natural order, hidden ones left out; none if it is unreadable."""
        try:
            names = os.listdir(self.root / folder)  # noqa: PTH208 - every session asks this.
        except OSError:
            return []
        found = [n for n in names if n.endswith(endings) and not n.startswith('.')]
        return [self.root / folder / name for name in sorted(found, key=natural_key)]

    def _exists(self, relative: PurePosixPath) -> bool:
        return self._exists_path(self.root / relative)

    @staticmethod
    def _exists_path(path: Path) -> bool:
        """Whether there is an entry of this name, be it a dangling link."""
        try:
            return path.exists() or path.is_symlink()
        except (OSError, ValueError):
            return False

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def _named_image(entry: str, images: Sequence[str]) -> str | None:
    """The image that a row of scans.tsv names: by its file name, with or without `.gz`."""
    name = PurePosixPath(entry).name.removesuffix('.gz')
    for image in images:
        if PurePosixPath(image).name.removesuffix('.gz') == name:
            return image
    return None


def _some(items: Sequence[str], limit: int = 3) -> str:
    """The first few of a list in words."""
    more = f' and {len(items) - limit} more' if len(items) > limit else ''
    return ', '.join(items[:limit]) + more
