"""Growth charts as SVG inside the page: they scale, follow dark mode and need no script."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 42
# More written names than this hide each other; the pointer then shows them.
NAMED_POINTS = 24
# More points than this are drawn as one path: as elements of their own they would slow the page.
LINKED_POINTS = 300
# Height of a line of names, and width of a letter, in the chart's units.
LINE, LETTER = 11, 5.4


Scale = Callable[[float], float]


@dataclass(frozen=True)
class Point:
    """One session in a chart. Points with the same `series` are joined by a line."""

    x: float
    y: float
    series: str
    name: str
    href: str = ''
    flagged: bool = False
    # Why the point is far from the curve, and the number of its row in the table of sessions.
    outlier: str = ''
    row: int = 0


@dataclass(frozen=True)
class Mark:
    """A point in the chart's own units, with the place of its name (None: not written)."""

    x: float
    y: float
    point: Point
    label: tuple[float, float, str] | None = None


@dataclass(frozen=True)
class Chart:
    """All that the template draws."""

    title: str
    unit: str
    x_title: str
    summary: str
    marks: tuple[Mark, ...]
    lines: tuple[str, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    width: int = WIDTH
    height: int = HEIGHT
    frame: tuple[int, int, int, int] = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)
    # The cohort's curve, and the band of twice its spread.
    curve: str = ''
    band: str = ''

    @property
    def crowded(self) -> bool:
        """Whether the points are drawn as paths."""
        return len(self.marks) > LINKED_POINTS

    @property
    def dots(self) -> list[tuple[str, str, str]]:
        """Paths of the points: class, path data, and the table rows of the points in order."""
        kinds: dict[str, list[Mark]] = {'dots': [], 'dots flagged': [], 'dots outlier': []}
        for mark in self.marks:
            point = mark.point
            kind = ' outlier' if point.outlier else ' flagged' if point.flagged else ''
            kinds[f'dots{kind}'].append(mark)
        return [
            (
                kind,
                ''.join(f'M{m.x:g} {m.y:g}h0' for m in marks),
                ' '.join(str(m.point.row) for m in marks),
            )
            for kind, marks in kinds.items()
            if marks
        ]


def ticks(low: float, high: float, /, number: int = 5) -> list[float]:
    """Round values that span a range.

    >>> ticks(0, 23)
    [0.0, 5.0, 10.0, 15.0, 20.0, 25.0]
    """
    span = max(high - low, 1e-9 * max(abs(high), 1.0))
    raw = span / number
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def _scale(
    values: Sequence[float], start: float, end: float
) -> tuple[list[float], Callable[[float], float]]:
    """Ticks for some values, and the function from value to place."""
    low, high = min(values), max(values)
    room = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    marks = ticks(max(low - room, 0.0 if low >= 0 else low - room), high + room)
    span = marks[-1] - marks[0]
    return marks, lambda v: start + (v - marks[0]) / span * (end - start)


def _label_place(
    x: float, y: float, text: str, taken: list[tuple[float, float, float, float]]
) -> tuple[float, float, str] | None:
    """A free place for a name beside its point; None where there is none."""
    width = LETTER * len(text)
    for dx, dy, anchor in ((7, 3, 'start'), (-7, 3, 'end'), (0, -8, 'middle'), (0, 15, 'middle')):
        left = x + dx - {'start': 0, 'end': width, 'middle': width / 2}[anchor]
        box = (left, y + dy - LINE + 2, left + width, y + dy + 2)
        inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
        free = all(box[2] < t[0] or box[0] > t[2] or box[3] < t[1] or box[1] > t[3] for t in taken)
        if inside and free:
            taken.append(box)
            return (round(x + dx, 1), round(y + dy, 1), anchor)
    return None


def growth_chart(
    title: str,
    unit: str,
    points: Sequence[Point],
    x_title: str,
    curve: Sequence[tuple[float, float]] = (),
    spread: float = 0.0,
    whole_curve: bool = False,
) -> Chart | None:
    """Lay out a chart of values against age; None without points.

    Parameters
    ----------
    curve : (age, value) of the cohort's curve
    spread : of log(value / curve); the band is twice it, and there is none without it
    whole_curve : whether the axes reach as far as the curve, and not only as the points
    """
    if not points:
        return None
    points = sorted(points, key=lambda p: (p.series, p.x, p.name))
    reached = [*((p.x, p.y) for p in points), *(curve if whole_curve else ())]
    x_marks, x_place = _scale([x for x, _ in reached], LEFT, WIDTH - RIGHT)
    y_marks, y_place = _scale([y for _, y in reached], HEIGHT - BOTTOM, TOP)

    def line_of(pairs: Sequence[tuple[float, float]]) -> str:
        kept = [(x, min(max(y, y_marks[0]), y_marks[-1])) for x, y in pairs]
        return ' '.join(f'{x_place(x):.1f},{y_place(y):.1f}' for x, y in kept)

    above = [(x, y * math.exp(2 * spread)) for x, y in curve]
    below = [(x, y * math.exp(-2 * spread)) for x, y in reversed(curve)]
    places = [(round(x_place(p.x), 1), round(y_place(p.y), 1)) for p in points]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    marks = []
    for (x, y), point in zip(places, points, strict=True):
        named = len(points) <= NAMED_POINTS
        label = _label_place(x, y, point.name, taken) if named else None
        marks.append(Mark(x, y, point, label))
    series: dict[str, list[Mark]] = {}
    for mark in marks:
        series.setdefault(mark.point.series, []).append(mark)
    lines = [' '.join(f'{m.x},{m.y}' for m in s) for s in series.values() if len(s) > 1]
    low, high = min(p.y for p in points), max(p.y for p in points)
    return Chart(
        title=title,
        unit=unit,
        x_title=x_title,
        summary=f'{title} against age: {len(points)} sessions, {low:.4g} to {high:.4g} {unit}.',
        marks=tuple(marks),
        lines=tuple(lines),
        x_ticks=tuple((round(x_place(v), 1), f'{v:g}') for v in x_marks),
        y_ticks=tuple((round(y_place(v), 1), f'{v:g}') for v in y_marks),
        curve=line_of(curve),
        band=line_of([*above, *below]) if spread else '',
    )
