"""How far a run is: a live display on a terminal, one line for each finished session elsewhere."""

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from babyseg_bids.cli.crashes import session_of
from babyseg_bids.records import SessionInputs

# Rough shares of a session's time, by the name of the step; every other step counts 1.
STEP_WEIGHTS = {'segment': 20.0, 'align': 8.0, 'report': 3.0}
# A remaining time that is based on less of the work than this misleads.
LEAST_SHARE = 0.05


def duration(seconds: float, /) -> str:
    """`40 s`, `12 min` or `3 h 20 min`."""
    if seconds < 90:
        return f'{max(1, round(seconds))} s'
    minutes = round(seconds / 60)
    if minutes < 90:
        return f'{minutes} min'
    return f'{minutes // 60} h {minutes % 60} min'


def step_weight(step: str, /) -> float:
    """The weight of a step with this full name."""
    name = step.rpartition('.')[2]
    return max([w for key, w in STEP_WEIGHTS.items() if name.startswith(key)], default=1.0)


@dataclass
class SessionState:
    """The steps of one session: which there are, which run and which have ended."""

    weights: dict[str, float]
    running: list[str] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)
    failed_in: str | None = None

    @property
    def is_over(self) -> bool:
        """Nothing of it will run any more."""
        return self.failed_in is not None or self.ended >= set(self.weights)

    @property
    def share(self) -> float:
        """How much of it is done, from 0 to 1."""
        if self.is_over:
            return 1.0
        return sum(self.weights[s] for s in self.ended) / max(sum(self.weights.values()), 1e-9)


class Tracker:
    """Follows the steps of all sessions from what Nipype's status callback tells.

    Parameters
    ----------
    total : int
        Sessions to do, as far as is known.
    """

    def __init__(self, total: int, /) -> None:
        self.total = total
        self.states: dict[str, SessionState] = {}
        self._sessions: Sequence[SessionInputs] = ()
        self._began = self._changed = time.monotonic()

    def begin(
        self, sessions: Sequence[SessionInputs], steps: Iterable[str], /, *, later: int = 0
    ) -> None:
        """Follow more sessions; `later` is how many there may be after these."""
        self.total = len(self.states) + len(sessions) + later
        self._sessions = sessions
        weights: dict[str, dict[str, float]] = {s.name: {} for s in sessions}
        for step in steps:
            session = session_of(step, sessions)
            if session is not None:
                weights[session.name][step] = step_weight(step)
        self.states |= {name: SessionState(w) for name, w in weights.items()}

    def update(self, step: str, status: str, /) -> str | None:
        """Take note of `start`, `end` or `exception`; the session's name when it is over now."""
        session = session_of(step, self._sessions)
        if session is None:
            return None
        state = self.states[session.name]
        if step not in state.weights:
            # Parts of a step that was split up have names of their own.
            return None
        was_over = state.is_over
        if step in state.running:
            state.running.remove(step)
        if status == 'start':
            state.running.append(step)
        elif status == 'exception':
            state.failed_in = step.rpartition('.')[2]
        else:
            state.ended.add(step)
        if status != 'start':
            self._changed = time.monotonic()
        return session.name if state.is_over and not was_over else None

    @property
    def over(self) -> int:
        """Sessions of which nothing will run any more."""
        return sum(s.is_over for s in self.states.values())

    @property
    def failed(self) -> int:
        """Sessions that failed so far."""
        return sum(s.failed_in is not None for s in self.states.values())

    @property
    def share(self) -> float:
        """How much of the run is done, from 0 to 1."""
        return sum(s.share for s in self.states.values()) / max(self.total, 1)

    def remaining(self) -> float | None:
        """Seconds left, None while it is too early to tell."""
        if self.share < LEAST_SHARE:
            return None
        # Between two steps the time runs down instead of growing with each second.
        elapsed = self._changed - self._began
        left = elapsed * (1 - self.share) / self.share
        return max(1.0, left - (time.monotonic() - self._changed))


class Progress:
    """Shows a `Tracker`: use as a context, and give `callback` to Nipype.

    Parameters
    ----------
    console : Console
    live : bool
        One display that changes; else a line for each session that is over.
    """

    def __init__(self, tracker: Tracker, console: Console, /, *, live: bool) -> None:
        self._tracker = tracker
        self._console = console
        self._live = Live(get_renderable=self._render, console=console, transient=True)
        self._is_live = live

    def __enter__(self) -> 'Progress':
        if self._is_live:
            self._live.start()
        else:
            self._console.print(f'Sessions to do: {self._tracker.total}')
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self._is_live:
            self._live.stop()

    def callback(self, node: Any, status: str, _result: Mapping[str, Any] | None = None) -> None:
        """For `status_callback` of a Nipype plugin."""
        name = self._tracker.update(node.fullname, status)
        if name is None:
            return
        state = self._tracker.states[name]
        fate = f'failed (step {state.failed_in})' if state.failed_in else 'done'
        line = f'{time.strftime("%H:%M:%S")} {name}: {fate}'
        if not self._is_live:
            line = f'{line}; {self._counts()}'
        self._console.print(line, highlight=False)

    def _counts(self) -> str:
        total = self._tracker.total
        words = [f'{self._tracker.over} of {total} sessions']
        if self._tracker.failed:
            words.append(f'{self._tracker.failed} failed')
        left = self._tracker.remaining()
        if self._tracker.over < total:
            words.append('estimating the time' if left is None else f'{duration(left)} left')
        return ', '.join(words)

    def _render(self) -> RenderableType:
        row = Table.grid(padding=(0, 2))
        row.add_row(
            ProgressBar(total=1.0, completed=self._tracker.share, width=30),
            Text(self._counts(), style='red' if self._tracker.failed else ''),
        )
        lines = [
            Text(f'  {name}: {", ".join(s.rpartition(".")[2] for s in state.running)}', 'dim')
            for name, state in self._tracker.states.items()
            if state.running
        ]
        return Group(row, *lines)


def error_console() -> Console:
    """Where progress and warnings go: standard error, so that tables can be piped."""
    return Console(stderr=True, soft_wrap=not sys.stderr.isatty(), highlight=False)
