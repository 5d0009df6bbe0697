"""How volumes grow over a cohort, and which sessions lie far from that curve."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Fewer sessions do not show how a volume grows.
MIN_SESSIONS = 12
# Share of the range of log(1 + months) that the kernel's standard deviation spans.
BANDWIDTH = 0.12
CURVE_POINTS = 60
# Robust standard deviations from the curve, and the least relative deviation, of an outlier. With
# normal deviations 4 of them are met once in 16,000 values.
OUTLIER_SD = 4.0
OUTLIER_SHARE = 0.10
# From the median absolute deviation to the standard deviation of a normal distribution.
MAD_TO_SD = 1.4826


@dataclass(frozen=True)
class Trend:
    """A cohort's curve: ages in months, values at these ages, and the spread around it.

    `sd` is the robust standard deviation of log(value / curve): about the relative spread.
    """

    months: np.ndarray
    values: np.ndarray
    sd: float

    def at(self, months: np.ndarray | float, /) -> np.ndarray:
        """The curve at some ages, interpolated linearly in log(1 + months)."""
        return np.interp(np.log1p(months), np.log1p(self.months), self.values)


@dataclass(frozen=True)
class Outlier:
    """One value of one session that is far from the cohort's curve."""

    session: str
    what: str
    value: float
    expected: float
    deviation: float

    @property
    def percent(self) -> float:
        """Deviation from the curve in percent of it."""
        return 100 * (self.value / self.expected - 1)

    @property
    def text(self) -> str:
        """`Thalamus 38 % above the cohort's curve (5.1 SD)`."""
        side = 'above' if self.percent > 0 else 'below'
        return (
            f"{self.what} {abs(self.percent):.0f} % {side} the cohort's curve "
            f'({abs(self.deviation):.1f} SD)'
        )


def _local_lines(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray, grid: np.ndarray
) -> np.ndarray:
    """Weighted local linear regression with a Gaussian kernel, at the places of a grid."""
    width = max(BANDWIDTH * float(np.ptp(x)), 1e-6)
    step = x[None] - grid[:, None]
    kernel = weights * np.exp(-0.5 * (step / width) ** 2)
    s0, s1, s2 = kernel.sum(1), (kernel * step).sum(1), (kernel * step**2).sum(1)
    t0, t1 = (kernel * y).sum(1), (kernel * step * y).sum(1)
    ridge = 1e-3 * s0 * width**2
    return (t0 * (s2 + ridge) - t1 * s1) / np.maximum(s0 * (s2 + ridge) - s1**2, 1e-12)


def fit_trend(months: Sequence[float], values: Sequence[float], /) -> Trend | None:
    """A robust smooth curve through values against age; None with too few of them.

    Locally weighted linear regression with bisquare reweighting (LOWESS; Cleveland, J Am Stat
    Assoc 1979) of log(value) on log(1 + months), with a Gaussian kernel.

    Parameters
    ----------
    months, values : same length; values must be positive
    """
    age, value = np.asarray(months, float), np.asarray(values, float)
    good = np.isfinite(age) & np.isfinite(value) & (value > 0) & (age >= 0)
    if good.sum() < MIN_SESSIONS:
        return None
    x, y = np.log1p(age[good]), np.log(value[good])
    grid = np.linspace(x.min(), x.max(), CURVE_POINTS)
    weights = np.ones_like(x)
    for _ in range(4):
        line = _local_lines(x, y, weights, grid)
        rest = y - np.interp(x, grid, line)
        sd = MAD_TO_SD * float(np.median(np.abs(rest)))
        weights = np.clip(1 - (rest / max(6 * sd / MAD_TO_SD, 1e-9)) ** 2, 0, 1) ** 2
    return Trend(np.expm1(grid), np.exp(line), sd)


def find_outliers(
    names: Sequence[str],
    months: Sequence[float | None],
    values: Mapping[str, Sequence[float | None]],
    left_out: frozenset[str] = frozenset(),
) -> tuple[dict[str, Trend], list[Outlier]]:
    """Curves of some measures and the sessions far from them, the farthest first.

    Parameters
    ----------
    names : of the sessions
    months : age of each session, None where unknown
    values : measures by name, one value a session, None where unknown
    left_out : sessions that take no part in the curves but are compared with them

    Returns
    -------
    curves by measure, for measures with at least `MIN_SESSIONS` values; outliers
    """
    age = np.array([np.nan if m is None else m for m in months], float)
    fitting = np.array([n not in left_out for n in names], bool)
    trends, outliers = {}, []
    for what, column in values.items():
        value = np.array([np.nan if v is None else v for v in column], float)
        trend = fit_trend(age[fitting], value[fitting])
        if trend is None:
            continue
        trends[what] = trend
        known = np.flatnonzero(np.isfinite(age) & np.isfinite(value) & (value > 0))
        expected = trend.at(age[known])
        rest = np.log(value[known] / expected)
        far = rest / max(trend.sd, 1e-3)
        odd = (np.abs(far) > OUTLIER_SD) & (np.abs(rest) > math.log1p(OUTLIER_SHARE))
        for i in np.flatnonzero(odd):
            outliers.append(
                Outlier(
                    names[known[i]],
                    what,
                    float(value[known[i]]),
                    float(expected[i]),
                    float(far[i]),
                )
            )
    return trends, sorted(outliers, key=lambda o: -abs(o.deviation))
