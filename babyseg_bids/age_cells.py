"""Read one cell of a table as an age, with the unit that the table declares."""

from dataclasses import dataclass

from babyseg_bids.age_columns import AgeColumn, Declaration
from babyseg_bids.age_values import (
    DAYS_PER_YEAR,
    YEARS,
    Amount,
    Span,
    Unit,
    parse_amount,
    to_span,
)
from babyseg_bids.records import Flag

# From this value on, a number without a unit is more likely to be months than BIDS' years.
SUSPICIOUS_YEARS = 3
# Nobody is older, and no pregnancy is longer.
MAX_MONTHS = 120 * 12
MAX_GESTATIONAL_WEEKS = 45 + 10 * DAYS_PER_YEAR / 7


@dataclass(frozen=True)
class AgeReading:
    """One age found in the dataset. `where` names file, row and column; `unit` how it was read."""

    span: Span
    where: str
    unit: str

    @property
    def source(self) -> str:
        """Where the value came from, in words."""
        return f'{self.where}, {self.unit}'

    def __str__(self) -> str:
        return f'{self.span} ({self.where})'


def read_cell(
    cell: str, column: AgeColumn, declared: Declaration, *, where: str, json_name: str
) -> tuple[AgeReading | None, list[Flag]]:
    """Read one cell.

    The unit is what the sidecar's `Units` say, else a suffix of the column's name or of the value,
    else the one unit that the sidecar's `Description` names, else year, as BIDS has it. Whatever
    contradicts it is flagged.

    Parameters
    ----------
    cell : str
        The text, not missing.
    column : AgeColumn
        The column it stands in.
    declared : Declaration
        What the sidecar says of the column.
    where : str
        File, row and column in words.
    json_name : str
        The sidecar's path, for messages.
    """
    amount = parse_amount(cell)
    if amount is None or amount.value < 0:
        message = f"'{cell[:40]}' in {where} is not an age. Correct it or give --age-months."
        return None, [Flag('age-unreadable', 'warning', message)]
    unit, how, flags = _choose_unit(amount, column, declared, where=where, json_name=json_name)
    if unit is None:
        return None, flags
    span = to_span(_in_unit(amount, unit), unit)
    if span.value > (MAX_GESTATIONAL_WEEKS if span.gestational else MAX_MONTHS):
        message = f"'{cell[:40]}' in {where} would be {span}, which cannot be. It was not used."
        return None, [*flags, Flag('age-unreadable', 'warning', message)]
    return AgeReading(span, where, how), flags


def _in_unit(amount: Amount, unit: Unit) -> Amount:
    """The amount as a plain number of `unit`, which overrules the unit written beside it."""
    return Amount(amount.value, amount.resolution, unit)


def _choose_unit(
    amount: Amount, column: AgeColumn, declared: Declaration, *, where: str, json_name: str
) -> tuple[Unit | None, str, list[Flag]]:
    """The unit, how it was known, and flags; the unit is None when it cannot be known."""
    sources: list[tuple[Unit | None, str]] = [
        (declared.units, f"'Units': '{declared.units_text}' in {json_name}"),
        (column.unit, f"the name of the column '{column.name}'"),
        (amount.unit, 'the unit written with the value'),
        (declared.description, f"its 'Description': '{_short(declared.description_text)}'"),
    ]
    known = [(unit, name) for unit, name in sources if unit is not None]
    flags = []
    if declared.units_text and declared.units is None:
        message = f"{json_name}: the Units '{declared.units_text}' of the age are no unit of time."
        flags.append(Flag('age-units-unreadable', 'warning', message))
        if not known:
            message = f'The age in {where} was not used: its unit is not known.'
            return None, '', [*flags, Flag('age-unreadable', 'warning', message)]
    if not known:
        return YEARS, 'in years (the BIDS default)', flags + _default_flags(amount, where)
    unit, name = known[0]
    for other, other_name in known[1:]:
        if not _same_unit(unit, other):
            message = (
                f'{where}: {name} says {unit}, but {other_name} says {other}. '
                f'The value was read in {unit}; correct whichever is wrong.'
            )
            flags.append(Flag('age-units-contradict', 'warning', message))
    return unit, f'in {unit}', flags


def _same_unit(a: Unit, b: Unit) -> bool:
    """Whether two declarations agree; plain weeks agree with gestational weeks."""
    return a.time == b.time and (a.gestational == b.gestational or a.time in ('day', 'week'))


def _default_flags(amount: Amount, where: str) -> list[Flag]:
    if amount.value < SUSPICIOUS_YEARS:
        return []
    message = (
        f'{where} has the value {amount.value:g} without a unit and was read as years, as BIDS '
        "says. If it is in months, write 'Units': 'month' into the table's JSON file."
    )
    return [Flag('age-unit-default', 'warning', message)]


def _short(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + '…'
