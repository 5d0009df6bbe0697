"""Numbers and names as the pages show them."""

import math
import re
from datetime import UTC, datetime
from typing import Any

from babyseg_bids.labels import Label
from babyseg_bids.morphometry import MISSING, structure_name
from babyseg_bids.qc_flags import Limit
from babyseg_bids.records import Age, Flag

# The parts of Markdown that the methods text uses.
_HEADING = re.compile(r'^#{1,6}\s+')
_ITEM = re.compile(r'^\s*[-*]\s+')

# Units as people write them.
UNITS = {'1': 'ratio', 'percent': '%', 'mm': 'mm', 'mm^2': 'mm²'}

VERDICTS = {
    'severe': 'Look closely: something is probably wrong',
    'warning': 'Look at the flags',
    'info': 'No problem noticed; some remarks',
    'good': 'No problem noticed',
}


def number(value: Any, form: str = '.2f', /) -> str:
    """A number as text; `n/a` where there is none.

    >>> number(1.234), number(None)
    ('1.23', 'n/a')
    """
    if value is None or isinstance(value, str) or not math.isfinite(value):
        return MISSING
    return format(value, form).replace('-', '−')


def millilitres(mm3: Any, /) -> str:
    """A volume in mL with as many decimals as its size deserves.

    >>> millilitres(512345.6), millilitres(345.6)
    ('512.3', '0.346')
    """
    if mm3 is None or not math.isfinite(mm3):
        return MISSING
    value = mm3 / 1000
    return f'{value:.1f}' if value >= 100 else f'{value:.2f}' if value >= 1 else f'{value:.3f}'


def percent(share: Any, /, decimals: int = 1) -> str:
    """A share as percent."""
    if share is None or not math.isfinite(share):
        return MISSING
    return f'{100 * share:.{decimals}f} %'


def span_text(months: list[float], /) -> str:
    """The range of some ages.

    >>> span_text([6.0, 24.0]), span_text([6.0])
    ('6 to 24 months', '6 months')
    """
    if not months:
        return 'unknown'
    first, last = f'{min(months):.3g}', f'{max(months):.3g}'
    return f'{first} to {last} months' if first != last else age_text(Age(months=months[0]))


def age_text(age: Age, /) -> str:
    """Age in words.

    >>> age_text(Age(months=6.0))
    '6 months'
    """
    if age.months is not None:
        return f'{age.months:.3g} month' + ('' if age.months == 1 else 's')
    if age.gestational_weeks is not None:
        return f'{age.gestational_weeks:.3g} gestational weeks'
    return 'unknown'


def duration(seconds: float | None, /) -> str:
    """A time as people say it.

    >>> duration(75)
    '1 min 15 s'
    """
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f'{seconds:.1f} s' if seconds < 10 else f'{seconds:.0f} s'
    minutes, rest = divmod(round(seconds), 60)
    return f'{minutes} min {rest} s'


def sided_name(label: Label, /) -> str:
    """A structure's name with its side: `Left cerebral white matter`."""
    name = structure_name(label.name)
    side = {'L': 'Left', 'R': 'Right'}.get(label.hemisphere)
    return f'{side} {name[0].lower()}{name[1:]}' if side else name


def verdict(flags: list[Flag], /) -> dict[str, str]:
    """The worst of some flags, in words."""
    present = {f.severity for f in flags}
    level = next((s for s in ('severe', 'warning', 'info') if s in present), 'good')
    return {'level': 'good' if level == 'info' else level, 'text': VERDICTS[level]}


def limit_text(limit: Limit, /) -> str:
    """When a measure is flagged, in words."""
    side = 'below' if limit.below else 'above'
    text = f'{side} {limit.warning:g}'
    return text if limit.severe is None else f'{text}, severe {side} {limit.severe:g}'


def markdown_blocks(text: str, /) -> list[tuple[str, str]]:
    """Headings, list items and paragraphs of a Markdown text, as (kind, text)."""
    blocks: list[tuple[str, str]] = []
    lines: list[str] = []
    kind = 'paragraph'

    def close() -> None:
        if lines:
            blocks.append((kind, ' '.join(' '.join(lines).split())))
        lines.clear()

    for line in text.splitlines():
        if not line.strip() or _HEADING.match(line) or _ITEM.match(line):
            close()
            kind = 'paragraph'
        if _HEADING.match(line):
            blocks.append(('heading', _HEADING.sub('', line).strip()))
        elif line.strip():
            if _ITEM.match(line):
                kind = 'item'
            lines.append(_ITEM.sub('', line) if not lines else line)
    close()
    return blocks


def now() -> str:
    """The time of writing, with its zone."""
    return datetime.now(UTC).strftime('%Y-%m-%d %H:%M UTC')
