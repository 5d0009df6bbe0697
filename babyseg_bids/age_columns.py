"""Find the columns of a table that hold an age at scan, and the unit that they declare."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from babyseg_bids.age_values import DAYS, Unit, is_gestational, parse_unit, unit_in_description

ID_COLUMNS = ('participant_id', 'subject_id', 'subject', 'participant', 'sub', 'id')
SESSION_COLUMNS = ('session_id', 'session', 'ses')

# A column is an age at scan only when each of its words is one of these: `mother_age`,
# `age_at_diagnosis` and `bone_age` must not be taken for one.
_AGE_WORDS = frozenset({
    'age', 'ages', 'at', 'in', 'of', 'the', 'scan', 'scans', 'scanning', 'mri', 'mr', 'session',
    'visit', 'acquisition', 'acq', 'imaging', 'exam', 'child', 'infant', 'baby', 'participant',
    'subject', 'postnatal', 'chronological', 'actual', 'exact', 'gestational', 'gestation',
    'postmenstrual', 'post', 'menstrual', 'postconceptional', 'conceptional', 'pma', 'day', 'days',
    'd', 'week', 'weeks', 'wk', 'wks', 'w', 'month', 'months', 'mo', 'mos', 'm', 'year', 'years',
    'yr', 'yrs', 'y',
})  # fmt: skip


@dataclass(frozen=True)
class AgeColumn:
    """A column with ages; `unit` is what its name says (`age_weeks`), None if it says nothing."""

    name: str
    unit: Unit | None


def age_columns(names: Sequence[str], /) -> list[AgeColumn]:
    """The columns that hold an age at scan, best first.

    One whose name says its unit comes before one whose name does not, a finer unit before a
    coarser one, then their order in the table. `gestational_age` alone is the age at birth in
    most studies and the age at scan in some; it is not taken.

    >>> [c.name for c in age_columns(['age', 'mother_age', 'age_months'])]
    ['age_months', 'age']
    """
    found = []
    for name in names:
        words = re.sub(r'(?<=[a-z])(?=[A-Z])|[^A-Za-z]+', ' ', name).lower().split()
        if not words or not set(words) <= _AGE_WORDS or not {'age', 'ages', 'pma'} & set(words):
            continue
        if 'gestational' in words and not {'scan', 'mri', 'session'} & set(words):
            continue
        unit = parse_unit(' '.join(words))
        if unit is None and is_gestational(' '.join(words)):
            # Nobody counts these in anything but weeks.
            unit = Unit('week', gestational=True)
        found.append(AgeColumn(name, unit))
    return sorted(found, key=lambda c: DAYS[c.unit.time] if c.unit else max(DAYS.values()) + 1)


def first_column(names: Iterable[str], wanted: Sequence[str], /) -> str | None:
    """The first of the `wanted` columns that a table has; capitals do not matter."""
    lower: dict[str, str] = {}
    for name in names:
        lower.setdefault(name.lower(), name)
    return next((lower[w] for w in wanted if w in lower), None)


@dataclass(frozen=True)
class Declaration:
    """What a table's JSON sidecar says of one column."""

    units_text: str = ''
    units: Unit | None = None
    description_text: str = ''
    description: Unit | None = None


def declaration(entry: Any, /) -> Declaration:
    """Read the entry of a column in a sidecar; anything that is no object declares nothing."""
    if not isinstance(entry, dict):
        return Declaration()
    # The key is `Units`; real sidecars also have `units` and `Unit`.
    by_key = {str(k).lower(): v for k, v in entry.items()}
    units = by_key.get('units', by_key.get('unit'))
    description = by_key.get('description')
    units_text = units.strip() if isinstance(units, str) else ''
    description_text = description.strip() if isinstance(description, str) else ''
    unit = parse_unit(units_text)
    if unit and unit.time in ('day', 'week') and is_gestational(description_text):
        # dHCP: Units "weeks", Description "post-menstrual age at scan".
        unit = Unit(unit.time, gestational=True)
    return Declaration(units_text, unit, description_text, unit_in_description(description_text))
