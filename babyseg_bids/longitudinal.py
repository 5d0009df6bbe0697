"""Growth: how one child's volumes change between sessions, and the curve of a whole cohort."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from operator import itemgetter

import numpy as np
import pandas as pd

from babyseg_bids.labels import LabelTable, label_table
from babyseg_bids.morphometry import structure_name
from babyseg_bids.records import Flag

BRAIN = 'Segmented brain'

# Tissues that do not shrink in the first years. Ventricles do at times.
GROWING_TISSUES = ('white-matter', 'cortex', 'deep-grey', 'cerebellum', 'brainstem')
GROWING_UNTIL_MONTHS = 60.0

# Repeated scans of one child differ by a few percent; a larger loss is not noise.
SHRINKAGE_PERCENT = 5.0

# Two scans of one child at one age cannot differ more than this.
SAME_AGE_PERCENT = 10.0

# No brain doubles in a month after birth; a steeper rise means other anatomy in the scan, such
# as a cerebellum that the earlier scan lacks.
GROWTH_PERCENT_PER_MONTH = 60.0

# A curve needs more sessions than it has coefficients, at different ages.
CURVE_SESSIONS = 8
CURVE_AGES = 4

# Residuals beyond this many robust standard deviations lose weight (Huber, Ann Math Stat 1964).
HUBER = 1.345


@dataclass(frozen=True)
class Visit:
    """One session of a child: its label, age in months, and volumes (mm3) by FreeSurfer number."""

    session: str
    months: float | None
    volumes: Mapping[int, float]


def spoken_tissue(tissue: str, /) -> str:
    """A tissue's name for people.

    >>> spoken_tissue('deep-grey')
    'Deep grey matter'
    """
    names = {'deep-grey': 'Deep grey matter', 'ventricle': 'Ventricles', 'cortex': 'Cortex'}
    return names.get(tissue, tissue.replace('-', ' ').capitalize())


def group_volumes(
    volumes: Mapping[int, float], table: LabelTable | None = None
) -> dict[str, float]:
    """Volumes in mm3 of the whole brain and of each tissue that is present.

    Keys are `BRAIN` and the spoken names of the tissues, in the order of the label table.
    """
    table = table or label_table()
    sums: dict[str, float] = {}
    for row in table.structures:
        if row.index in volumes:
            sums[row.tissue] = sums.get(row.tissue, 0.0) + volumes[row.index]
    total = {BRAIN: sum(sums.values())} if sums else {}
    return total | {spoken_tissue(tissue): value for tissue, value in sums.items()}


def structure_volumes(
    volumes: Mapping[int, float], table: LabelTable | None = None
) -> dict[str, float]:
    """Volumes in mm3 of each structure, left and right added; absent where a side is.

    A structure that is all of its tissue, such as the cortex, is left to `group_volumes`.
    """
    table = table or label_table()
    members = Counter(row.tissue for row in table.structures if row.hemisphere != 'R')
    sums = {}
    for row in table.structures:
        both = {row.index, row.mirror}
        if row.hemisphere != 'R' and members[row.tissue] > 1 and both <= set(volumes):
            sums[structure_name(row.name)] = sum(volumes[i] for i in both)
    return sums


def growth_table(visits: Sequence[Visit], table: LabelTable | None = None) -> pd.DataFrame:
    """Change of each group and structure between one session and the next.

    Sessions are ordered by age; those without an age in months, or of the same age as the one
    before, take no part.

    Returns
    -------
    DataFrame
        structure, from-session, to-session, from-months, to-months, from-mm3, to-mm3,
        change-mm3, change-mm3-per-month, change-percent, change-percent-per-month (percent of the
        earlier volume).
    """
    dated = sorted(((v.months, v) for v in visits if v.months is not None), key=itemgetter(0))
    rows = []
    for (start, before), (end, after) in pairwise(dated):
        months = end - start
        if months <= 0:
            continue
        old = group_volumes(before.volumes, table) | structure_volumes(before.volumes, table)
        new = group_volumes(after.volumes, table) | structure_volumes(after.volumes, table)
        for name in (n for n in old if n in new and old[n] > 0):
            change = new[name] - old[name]
            percent = 100 * change / old[name]
            rows.append(
                {
                    'structure': name,
                    'from-session': before.session,
                    'to-session': after.session,
                    'from-months': start,
                    'to-months': end,
                    'from-mm3': old[name],
                    'to-mm3': new[name],
                    'change-mm3': change,
                    'change-mm3-per-month': change / months,
                    'change-percent': percent,
                    'change-percent-per-month': percent / months,
                }
            )
    columns = ['structure', 'from-session', 'to-session', 'from-months', 'to-months']
    columns += ['from-mm3', 'to-mm3', 'change-mm3', 'change-mm3-per-month', 'change-percent']
    return pd.DataFrame(rows, columns=[*columns, 'change-percent-per-month'])


def growth_flags(growth: pd.DataFrame, /) -> tuple[Flag, ...]:
    """Flags on changes that growth does not explain.

    A growing tissue that loses more than `SHRINKAGE_PERCENT` before `GROWING_UNTIL_MONTHS`, and
    a brain that grows by more than `GROWTH_PERCENT_PER_MONTH` a month.
    """
    growing = {BRAIN, *(spoken_tissue(t) for t in GROWING_TISSUES)}
    flags = []
    for row in growth.to_dict('records'):
        name = row['structure']
        where = f'from {row["from-session"]} to {row["to-session"]}'
        if (
            name in growing
            and row['to-months'] <= GROWING_UNTIL_MONTHS
            and row['change-percent'] < -SHRINKAGE_PERCENT
        ):
            text = (
                f'{name} shrinks by {-row["change-percent"]:.0f} % {where}, at an age when it '
                'grows. Check that both scans show the same child and the same anatomy.'
            )
            flags.append(Flag('shrinks-with-age', 'warning', text))
        if name == BRAIN and row['change-percent-per-month'] > GROWTH_PERCENT_PER_MONTH:
            text = (
                f'{name} grows by {row["change-percent-per-month"]:.0f} % a month {where}. Check '
                'the ages, and that both scans show the same anatomy.'
            )
            flags.append(Flag('grows-too-fast', 'warning', text))
    return tuple(flags)


def visit_flags(visits: Sequence[Visit], table: LabelTable | None = None) -> tuple[Flag, ...]:
    """All flags on the sessions of one child.

    Those of `growth_flags`, and brains that differ by more than `SAME_AGE_PERCENT` of the smaller
    one although the age is the same.
    """
    flags = list(growth_flags(growth_table(visits, table)))
    known = [
        (v.months, v.session, brain)
        for v in visits
        if v.months is not None and (brain := group_volumes(v.volumes, table).get(BRAIN))
    ]
    for (months, first, a), (others, second, b) in combinations(known, 2):
        percent = 100 * abs(a - b) / min(a, b)
        if months == others and percent > SAME_AGE_PERCENT:
            text = (
                f'{first} and {second} have the same age but brains that differ by '
                f'{percent:.0f} %. Check the ages, and that both scans show the same child.'
            )
            flags.append(Flag('same-age-differs', 'warning', text))
    return tuple(flags)


@dataclass(frozen=True)
class GrowthCurve:
    """A cohort's own fitted curve: value = a + b u + c u^2 with u = log(1 + age in months).

    It describes the sessions it was fitted to and is no norm.

    Parameters
    ----------
    coefficients : a, b, c, in the unit of the values
    spread : robust standard deviation of the residuals, in the unit of the values
    months : youngest and oldest age that it was fitted to
    sessions : number of values it was fitted to
    """

    coefficients: tuple[float, float, float]
    spread: float
    months: tuple[float, float]
    sessions: int

    def at(self, months: np.ndarray | float, /) -> np.ndarray:
        """The curve's values; NaN outside the ages that it was fitted to."""
        months = np.asarray(months, float)
        inside = (months >= self.months[0]) & (months <= self.months[1])
        u = np.log1p(np.clip(months, 0, None))
        return np.where(inside, np.polynomial.polynomial.polyval(u, self.coefficients), np.nan)


def fit_growth_curve(months: Sequence[float], values: Sequence[float], /) -> GrowthCurve | None:
    """Fit a cohort's curve so that few outliers do not bend it.

    Huber's M-estimator by iteratively reweighted least squares; the scale is the median absolute
    residual over 0.6745, anew in each of at most 50 rounds.

    Parameters
    ----------
    months, values : sequences of one length
        Ages since birth and values of the sessions. What is not finite takes no part.

    Returns
    -------
    The curve; None with fewer than `CURVE_SESSIONS` sessions or `CURVE_AGES` ages.
    """
    x, y = np.asarray(months, float), np.asarray(values, float)
    known = np.isfinite(x) & np.isfinite(y) & (x >= 0)
    x, y = x[known], y[known]
    if len(x) < CURVE_SESSIONS or len(np.unique(x)) < CURVE_AGES:
        return None
    design = np.vander(np.log1p(x), 3, increasing=True)
    weights = np.ones(len(x))
    beta = np.zeros(3)
    spread = 0.0
    for _ in range(50):
        root = np.sqrt(weights)
        new = np.linalg.lstsq(design * root[:, None], y * root, rcond=None)[0]
        rest = np.abs(y - design @ new)
        spread = float(np.median(rest)) / 0.6745
        weights = np.minimum(1, HUBER * spread / np.maximum(rest, 1e-12)) if spread else weights
        done = np.allclose(new, beta, rtol=1e-8, atol=0)
        beta = new
        if done:
            break
    a, b, c = (float(v) for v in beta)
    return GrowthCurve((a, b, c), spread, (float(x.min()), float(x.max())), len(x))
