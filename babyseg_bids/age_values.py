"""Turn the words and numbers that people write for an age into months or gestational weeks."""

import math
import re
from dataclasses import dataclass

DAYS_PER_YEAR = 365.25
DAYS_PER_MONTH = DAYS_PER_YEAR / 12
DAYS = {'day': 1.0, 'week': 7.0, 'month': DAYS_PER_MONTH, 'year': DAYS_PER_YEAR}

_TIME_WORDS = {
    'day': ('d', 'day', 'days', 'dys'),
    'week': ('w', 'week', 'weeks', 'wk', 'wks'),
    'month': ('m', 'mo', 'mon', 'mos', 'month', 'months', 'mth', 'mths'),
    'year': ('a', 'y', 'yo', 'yr', 'yrs', 'year', 'years'),
}
_TIME_OF_WORD = {word: time for time, words in _TIME_WORDS.items() for word in words}
_GESTATIONAL = re.compile(
    r'\b(gestation(al)?|post ?menstrual|menstrual|post ?concept\w*|f(o)?etal|ga|pma|pca|gw|pmw)\b'
)
# "Corrected for gestational age at birth" speaks of an age since birth.
_NOT_AT_SCAN = re.compile(r'birth|born|correct|adjust|chronolog|mother|maternal|onset')
_NUMBER = r'[0-9]+(?:\.[0-9]*)?|\.[0-9]+'


@dataclass(frozen=True)
class Unit:
    """A unit of age: `time` is day, week, month or year.

    `gestational` is true where the count starts before birth (gestational or post-menstrual).
    """

    time: str
    gestational: bool = False

    def __str__(self) -> str:
        return ('gestational ' if self.gestational else '') + self.time + 's'


YEARS = Unit('year')
MONTHS = Unit('month')


@dataclass(frozen=True)
class Amount:
    """A number as written: with a unit if one was written, and the size of its last digit.

    `resolution` has the unit of `value`: 1 for `6`, 0.1 for `6.5`.
    """

    value: float
    resolution: float
    unit: Unit | None = None


@dataclass(frozen=True)
class Span:
    """An age and the interval of true ages that would have been written like this.

    Months since birth, or gestational weeks when `gestational`. The interval is generous: it
    allows for rounding and for counting completed units.
    """

    value: float
    low: float
    high: float
    gestational: bool

    def contradicts(self, other: 'Span', /, *, slack: float = 0.25) -> bool:
        """Whether no true age fits both; ages of different kinds are not compared."""
        if self.gestational != other.gestational:
            return False
        return self.low > other.high + slack or other.low > self.high + slack

    def __str__(self) -> str:
        return f'{self.value:.4g} {"gestational weeks" if self.gestational else "months"}'


def parse_unit(text: str, /) -> Unit | None:
    """The unit that a phrase names, None when it names none or several.

    >>> str(parse_unit('gestational_weeks')), str(parse_unit('Months')), parse_unit('scan')
    ('gestational weeks', 'months', None)
    """
    words = _words(text)
    times = {_TIME_OF_WORD[w] for w in words.split() if w in _TIME_OF_WORD}
    gestational = bool(_GESTATIONAL.search(words)) and not _NOT_AT_SCAN.search(words)
    if gestational and re.search(r'\b(gw|pmw)\b', words):
        times.add('week')
    if len(times) != 1:
        return None
    return Unit(times.pop(), gestational)


def unit_in_description(text: str, /) -> Unit | None:
    """The unit that a column's free-text description names in plain words, if exactly one.

    Single letters do not count here: "a", "d" and "m" are too common in prose.
    """
    words = ' '.join(w for w in _words(text).split() if len(w) > 2 or w in ('ga', 'wk', 'yr'))
    return parse_unit(words)


def is_gestational(text: str, /) -> bool:
    """Whether a phrase speaks of an age counted from before birth."""
    words = _words(text)
    return bool(_GESTATIONAL.search(words)) and not _NOT_AT_SCAN.search(words)


def parse_amount(text: str, /) -> Amount | None:
    """Read one age as written in a cell; None when it is not one number (with a unit or not).

    Understands `6`, `6.5`, `6 months`, `30 gestational_weeks`, `1 year 3 months`, `1y3m`, `006M`
    (DICOM), `P1Y2M` (ISO 8601) and `38+2` (gestational weeks and days). A decimal comma, a range
    and a limit such as `>5` are not guessed at.

    >>> parse_amount('6 years').value, parse_amount('3-4')
    (6.0, None)
    """
    text = text.strip()
    if len(text) > 80:
        return None
    if match := re.fullmatch(r'([0-9]{1,2})\+([0-6])\s*(.*)', text):
        unit = parse_unit(match[3]) if match[3] else None
        if match[3] and (unit is None or unit.time != 'week'):
            return None
        return Amount(int(match[1]) + int(match[2]) / 7, 1 / 7, Unit('week', True))
    if match := re.fullmatch(rf'[+]?({_NUMBER})', text):
        return _amount(match[1], None)
    if match := re.fullmatch(r'P((?:[0-9.]+[YMWD])+)', text):
        text = match[1]
    parts = re.findall(rf'({_NUMBER})([^0-9.,;<>+~/-][^0-9.,;<>+~/]*)', text)
    if not parts or ''.join(a + b for a, b in parts) != text:
        return None
    return _compound([(number, unit) for number, unit in parts])


def _compound(parts: list[tuple[str, str]]) -> Amount | None:
    """Add up `1 year` and `3 months`; None unless each part has a unit of its own, in order."""
    amounts = []
    for number, words in parts:
        amount = _amount(number, parse_unit(words))
        if amount is None or amount.unit is None:
            return None
        amounts.append(amount)
    units = [a.unit for a in amounts if a.unit]
    sizes = [DAYS[u.time] for u in units]
    if sizes != sorted(set(sizes), reverse=True):
        return None
    last = units[-1]
    total = sum(a.value * size for a, size in zip(amounts, sizes, strict=True)) / sizes[-1]
    unit = Unit(last.time, any(u.gestational for u in units))
    return Amount(total, amounts[-1].resolution, unit)


def _amount(number: str, unit: Unit | None) -> Amount | None:
    value = float(number)
    if not math.isfinite(value):
        return None
    decimals = len(number.partition('.')[2])
    return Amount(value, 10.0**-decimals, unit)


def to_span(amount: Amount, unit: Unit, /) -> Span:
    """Months since birth, or gestational weeks, of an amount in `unit`."""
    scale = DAYS[unit.time] / (7.0 if unit.gestational else DAYS_PER_MONTH)
    value = amount.value * scale
    # Half a digit below for rounding, a whole one above for counting completed units only.
    low = max(value - 0.5 * amount.resolution * scale, 0.0)
    return Span(value, low, value + amount.resolution * scale, unit.gestational)


def _words(text: str) -> str:
    """Lower case, with everything but letters and digits turned into single blanks."""
    return ' '.join(re.sub(r'[^a-z0-9]+', ' ', text.lower()[:1000]).split())
