"""The option `--age-months`: one value, a list LABEL=VALUE, or a table."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from babyseg_bids.age_columns import ID_COLUMNS, SESSION_COLUMNS, age_columns, first_column
from babyseg_bids.age_values import MONTHS, parse_amount, to_span
from babyseg_bids.errors import UsageError
from babyseg_bids.records import Age
from babyseg_bids.tables import Table, is_missing, read_table

HOW_TO = (
    'Give one number (6.5), a list (sub-01=6 sub-02_ses-A=9.5) or a TSV file with the columns '
    'participant_id, session_id (when there are sessions) and age_months.'
)


@dataclass(frozen=True)
class AgeOverride:
    """One age from the option; a label that is None stands for all."""

    subject: str | None
    session: str | None
    age: Age


@dataclass(frozen=True)
class AgeOverrides:
    """The ages that the user gave, in the order given."""

    entries: tuple[AgeOverride, ...] = ()

    def find(self, subject: str, session: str | None, /) -> Age | None:
        """The most specific age for a session: subject and session, subject, session, all."""
        for wanted in ((subject, session), (subject, None), (None, session), (None, None)):
            for entry in self.entries:
                if (entry.subject, entry.session) == wanted:
                    return entry.age
        return None

    def unknown_subjects(self, subjects: Sequence[str], /) -> tuple[str, ...]:
        """Labels that were given an age but are not among `subjects`: typing errors, mostly."""
        named = {e.subject for e in self.entries if e.subject is not None}
        return tuple(sorted(named - set(subjects)))


def parse_age_option(text: str | Sequence[str] | None, /) -> AgeOverrides:
    """Read what was given to `--age-months`.

    Parameters
    ----------
    text : str or sequence of str
        A value (`6`, `6.5`, `26 weeks`; months when it names no unit), a list of LABEL=VALUE
        separated by blanks or commas (LABEL: `sub-01`, `01`, `sub-01_ses-A`, `01_A`, or `ses-A`
        for that session of every subject), or the path of a TSV file.

    Raises
    ------
    UsageError
        When it cannot be read; the sentence says which part and what is accepted.
    """
    if text is None:
        return AgeOverrides()
    if isinstance(text, str):
        text = [text]
    items = [t.strip() for t in text if t.strip()]
    if not items:
        return AgeOverrides()
    if len(items) == 1 and '=' not in items[0]:
        only = items[0]
        if only.lower().endswith(('.tsv', '.txt', '.csv')) or Path(only).is_file():
            return _from_table(Path(only))
        return AgeOverrides((AgeOverride(None, None, _age(only, '--age-months')),))
    pairs = [p for item in items for p in re.split(r'[,\s]+(?=[^,\s=]+=)|,', item) if p.strip()]
    return AgeOverrides(_unique([_from_pair(p.strip()) for p in pairs], '--age-months'))


def _from_pair(pair: str) -> AgeOverride:
    label, equals, value = pair.partition('=')
    match = re.fullmatch(
        r'(?:sub-)?(?P<sub>[A-Za-z0-9+]+)(?:[_/](?:ses-)?(?P<ses>[A-Za-z0-9+]+))?', label.strip()
    )
    only_session = re.fullmatch(r'ses-([A-Za-z0-9+]+)', label.strip())
    separated = match is not None and match['sub'] in ('sub', 'ses')
    if not equals or separated or not (match or only_session):
        raise UsageError(f"--age-months: '{pair}' is not LABEL=VALUE. {HOW_TO}")
    age = _age(value, f'--age-months {label.strip()}')
    if only_session:
        return AgeOverride(None, only_session[1], age)
    assert match is not None
    return AgeOverride(match['sub'], match['ses'], age)


def _age(text: str, source: str, *, unit: str = '') -> Age:
    """One age; `unit` is what a table's column says."""
    amount = parse_amount(text)
    if amount is None:
        raise UsageError(f"{source}: '{text.strip()}' is not an age. {HOW_TO}")
    column = age_columns([unit]) if unit else []
    declared = column[0].unit if column else None
    span = to_span(amount, amount.unit or declared or MONTHS)
    if span.gestational:
        return Age(None, span.value, f'{source} ({span})')
    return Age(span.value, None, f'{source} ({span})')


def _from_table(path: Path) -> AgeOverrides:
    if not path.exists():
        raise UsageError(f'--age-months: there is no file {path}. {HOW_TO}')
    table = read_table(path)
    if not table.columns:
        raise UsageError(f'--age-months: {path} cannot be used: {"; ".join(table.problems)}.')
    subject_column = first_column(table.columns, ID_COLUMNS)
    ages = age_columns(table.columns)
    if subject_column is None or not ages:
        lacking = 'participant_id' if subject_column is None else 'age_months'
        found = ', '.join(table.columns)
        raise UsageError(f'--age-months: {path} has no column {lacking} (it has: {found}).')
    return AgeOverrides(_unique(_table_entries(table, subject_column, ages[0].name), str(path)))


def _table_entries(table: Table, subject_column: str, age_column: str) -> list[AgeOverride]:
    session_column = first_column(table.columns, SESSION_COLUMNS)
    entries = []
    for number, row in enumerate(table.rows, start=2):
        subject = row[subject_column].removeprefix('sub-')
        session = row[session_column].removeprefix('ses-') if session_column else ''
        if not subject or is_missing(row[age_column]):
            continue
        source = f'{table.path}, line {number}, column {age_column}'
        age = _age(row[age_column], source, unit=age_column)
        entries.append(AgeOverride(subject, None if is_missing(session) else session, age))
    return entries


def _unique(entries: Sequence[AgeOverride], where: str) -> tuple[AgeOverride, ...]:
    """Refuse two different ages for one label."""
    seen: dict[tuple[str | None, str | None], AgeOverride] = {}
    for entry in entries:
        first = seen.setdefault((entry.subject, entry.session), entry)
        same = (first.age.months, first.age.gestational_weeks) == (
            entry.age.months,
            entry.age.gestational_weeks,
        )
        if not same:
            label = '_'.join(
                p
                for p in (
                    f'sub-{entry.subject}' if entry.subject else '',
                    f'ses-{entry.session}' if entry.session else '',
                )
                if p
            )
            raise UsageError(f'{where}: {label} is given two different ages. Keep one of them.')
    return tuple(seen.values())
