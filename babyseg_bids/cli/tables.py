"""The two tables of a run: what would be done with each image, and what became of each session."""

import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

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


def plan_table(sessions: Sequence[SessionInputs], fates: dict[str, Fate], /) -> Table:
    """One row for each image: its part in the session or why it has none."""
    table = Table(title='What would be done', title_justify='left')
    for column in ('session', 'age', 'state', 'image', 'use', 'reason'):
        table.add_column(column, overflow='fold')
    for session in sessions:
        fate = fates[session.name]
        head = [
            Text(session.name),
            Text(describe_age(session.age)),
            Text(fate, STYLES.get(fate, '')),
        ]
        rows = session.ledger or (None,)
        for number, row in enumerate(rows):
            cells = head if number == 0 else [Text()] * len(head)
            if row is None:
                table.add_row(*cells, Text(), Text(), Text(messages.NO_ANATOMICAL))
                continue
            style = 'yellow' if row.status == 'rejected' else ''
            name = PurePosixPath(row.relative_path).name
            table.add_row(*cells, Text(name), Text(row.status, style), Text(row.reason))
        for flag in session.flags:
            head = [Text()] * 4
            table.add_row(*head, Text(flag.severity, 'yellow'), Text(flag.message))
        table.add_section()
    return table


def verdict_table(verdicts: Sequence[Verdict], /, *, base: Path) -> Table:
    """One row for each session that is not simply done; crash files are relative to `base`."""
    table = Table(title='Sessions without results', title_justify='left')
    for column in ('session', 'state', 'why', 'crash file'):
        table.add_column(column, overflow='fold')
    for verdict in verdicts:
        file = verdict.crash_file
        if file is not None and base in file.parents:
            file = file.relative_to(base)
        table.add_row(
            Text(verdict.name),
            Text(verdict.fate, STYLES.get(verdict.fate, '')),
            Text(verdict.reason),
            Text(str(file or '')),
        )
    return table
