"""Growth as it was published, beside that of a child.

`data/published_growth.tsv` holds single numbers from the abstracts of the articles that it names.
They are means of other children, measured with other methods and other borders of the
structures: context for a reader, and no limits for flags.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from babyseg_bids.reports import wording as say

# A child's sessions cover a published span when they lie this close to its ends, months.
NEAR_MONTHS = 1.5


@dataclass(frozen=True)
class PublishedGrowth:
    """Mean change of a measure between two ages.

    `column` is the child's measure that comes closest, as `development.development_row` names it.
    """

    measure: str
    column: str
    months: tuple[float, float]
    percent: float
    children: str
    source: str
    url: str


@cache
def published_growth() -> tuple[PublishedGrowth, ...]:
    """All published changes, in the order of the file."""
    text = files('babyseg_bids').joinpath('data/published_growth.tsv').read_text('utf-8')
    return tuple(
        PublishedGrowth(
            row['measure'],
            row['column'],
            (float(row['from_months']), float(row['to_months'])),
            float(row['change_percent']),
            row['children'],
            row['source'],
            row['url'],
        )
        for row in csv.DictReader(text.splitlines(), delimiter='\t')
    )


def beside_published(
    months: Sequence[float | None], rows: Sequence[Mapping[str, float]], /
) -> list[dict[str, str]]:
    """The published changes that overlap a child's ages, with the child's own where it has one.

    Parameters
    ----------
    months : age of each session
    rows : measures of each session, by column

    Returns
    -------
    measure, span, percent, own (percent, or why there is none), children, source, url
    """
    known = [m for m in months if m is not None]
    if len(set(known)) < 2:
        return []
    found = []
    for growth in published_growth():
        first, last = growth.months
        if max(known) <= first or min(known) >= last:
            continue
        ends = []
        for wanted in growth.months:
            at = [
                (abs(m - wanted), row[growth.column])
                for m, row in zip(months, rows, strict=True)
                if m is not None and row.get(growth.column, 0) > 0
            ]
            near = min(at, default=(NEAR_MONTHS + 1, 0.0))
            ends.append(near[1] if near[0] <= NEAR_MONTHS else None)
        start, end = ends
        own = 'no sessions at both ages'
        if start is not None and end is not None:
            own = say.number(100 * (end / start - 1), '+.0f')
        found.append(
            {
                'measure': growth.measure,
                'span': f'{first:g} to {last:g} months',
                'percent': say.number(growth.percent, '+.0f'),
                'own': own,
                'children': growth.children,
                'source': growth.source,
                'url': growth.url,
            }
        )
    return found
