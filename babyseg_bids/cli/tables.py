"""The two tables of a run: what would be done with each image, and what became of each session."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from rich.console import Console
from rich.table import Table
from rich.text import Text

from babyseg_bids import messages
from babyseg_bids.cli.verdicts import Fate, Verdict
from babyseg_bids.discovery import describe_age
from babyseg_bids.records import SessionInputs

# Rich takes 80 columns where there is no terminal, too few for paths and reasons.
FILE_WIDTH = 160
STYLES = {
    messages.DONE: 'green',
    messages.FAILED: 'bold red',
    messages.NO_IMAGE: 'yellow',
    messages.SKIPPED: 'dim',
}


def console() -> Console:
    """Where tables go: standard output."""
    return Console(width=None if sys.stdout.isatty() else FILE_WIDTH, highlight=False)


def plan_table(sessions: Sequence[SessionInputs], fates: Mapping[str, Fate], /) -> Table:
    """One row for each image: its part in the session or why it has none."""
    table = Table(title='What would be done', title_justify='left')
    for column in ('session', 'age', 'state', 'image', 'use', 'reason'):
        table.add_column(column, overflow='fold')
    for session in sessions:
        fate = fates[session.name]
        head = (session.name, describe_age(session.age), Text(fate, STYLES.get(fate, '')))
        for number, row in enumerate(session.ledger):
            style = 'yellow' if row.status == 'rejected' else ''
            table.add_row(
                *(head if number == 0 else ('', '', '')),
                Text(PurePosixPath(row.relative_path).name),
                Text(row.status, style),
                Text(row.reason),
            )
        if not session.ledger:
            table.add_row(*head, '', '', messages.NO_ANATOMICAL)
    return table


def notes(sessions: Sequence[SessionInputs], /, *, everything: bool) -> list[str]:
    """The flags of all sessions, one line each; what all have in common is said once.

    Remarks of severity `info` are only shown when `everything` is.
    """
    lines: dict[str, None] = {}
    common = set(sessions[0].flags).intersection(*(s.flags for s in sessions))
    for session in sessions:
        for flag in session.flags:
            if flag.severity == 'info' and not everything:
                continue
            where = 'dataset' if flag in common and len(sessions) > 1 else session.name
            lines[f'{where}: {flag.severity}: {flag.message}'] = None
    return list(lines)


def verdict_table(verdicts: Sequence[Verdict], /) -> Table:
    """One row for each session that has no results."""
    table = Table(title='Sessions without results', title_justify='left')
    for column in ('session', 'state', 'why'):
        table.add_column(column, overflow='fold')
    for verdict in verdicts:
        state = Text(verdict.fate, STYLES.get(verdict.fate, ''))
        table.add_row(verdict.name, state, Text(verdict.reason))
    return table


def show_verdicts(verdicts: Sequence[Verdict], /) -> None:
    """The table, and below it the crash files, unbroken so that they can be copied."""
    out = console()
    out.print(verdict_table(verdicts))
    for verdict in verdicts:
        if verdict.crash_file is not None:
            print_line(out, f'{verdict.name}: details in {verdict.crash_file}')


def print_line(out: Console, text: str, /) -> None:
    """Print text as it is: brackets are no markup, and long lines are left to the terminal."""
    out.print(text, markup=False, soft_wrap=True)
