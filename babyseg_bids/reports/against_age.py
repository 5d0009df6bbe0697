"""A session's volumes against age: bounds of the plausible, and the cohort's own curve."""

from dataclasses import dataclass
from pathlib import Path

from babyseg_bids.longitudinal import GrowthCurve, group_volumes
from babyseg_bids.qc_flags import PLAUSIBLE_VOLUME
from babyseg_bids.reports import wording as say
from babyseg_bids.reports.charts import Chart, Point, growth_chart
from babyseg_bids.reports.subject import GROUP_TABLE, cohort_curves, drawn_curve


@dataclass(frozen=True)
class AgainstAge:
    """What the page of a session shows.

    `bounds` says which brain volumes are plausible at that age. `rows` has name, volume (mL), the
    curve's value (mL), the difference in percent and in standard deviations. `sessions` is how
    many the curve was fitted to, 0 without a curve.
    """

    bounds: str
    rows: tuple[tuple[str, str, str, str, str], ...] = ()
    charts: tuple[Chart, ...] = ()
    sessions: int = 0


def group_table_of(labels: Path, /) -> Path | None:
    """The group table of the output folder in which a label map lies; None without one.

    A session's page is first written before its results are published, and then without it.
    """
    tables = (folder / GROUP_TABLE for folder in list(Path(labels).resolve().parents)[:4])
    return next((table for table in tables if table.is_file()), None)


def _row(name: str, volume: float, curve: GrowthCurve, months: float) -> tuple[str, ...] | None:
    expected = float(curve.at(months))
    # Outside the cohort's ages, the curve is not defined.
    if not expected > 0:
        return None
    far = (volume - expected) / curve.spread if curve.spread > 0 else float('nan')
    return (
        name,
        say.millilitres(volume),
        say.millilitres(expected),
        say.number(100 * (volume / expected - 1), '+.0f'),
        say.number(far, '+.1f'),
    )


def against_age(
    volumes: dict[int, float], months: float | None, table: Path | None, name: str, /
) -> AgainstAge | None:
    """Compare a session with the plausible and with its cohort; None without an age.

    Parameters
    ----------
    volumes : mm3 by FreeSurfer number
    table : the group table, or None
    name : of the session, for the point in the charts
    """
    if months is None:
        return None
    low, high = PLAUSIBLE_VOLUME.at(months)
    bounds = f'{low:.0f} to {high:.0f} mL'
    curves = cohort_curves(table) if table else {}
    rows, charts = [], []
    for what, volume in group_volumes(volumes).items():
        curve = curves.get(what)
        row = _row(what, volume, curve, months) if curve else None
        if curve is None or row is None:
            continue
        rows.append(row)
        point = Point(months, volume / 1000, 'child', name)
        line = drawn_curve(curve, *curve.months)
        charts.append(growth_chart(what, 'mL', [point], 'Age (months)', line, whole_curve=True))
    sessions = max((c.sessions for c in curves.values()), default=0) if rows else 0
    return AgainstAge(bounds, tuple(rows), tuple(c for c in charts if c), sessions)
