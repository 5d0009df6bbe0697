"""The options for clusters, and the wish for a job that they may hold."""

import argparse
from dataclasses import dataclass
from typing import Any

from babyseg_bids import messages
from babyseg_bids.cli import options
from babyseg_bids.errors import UsageError

# Options that are about the job and not about what it does, with the number of their values.
OPTIONS = {
    '--submit': 1,
    '--now': 0,
    '--sessions-per-task': 1,
    '--slurm-partition': 1,
    '--slurm-account': 1,
}


@dataclass(frozen=True)
class Submission:
    """A job array that was asked for.

    Attributes
    ----------
    submit : str
        The batch system; `slurm` is the only one.
    now : bool
        Hand the scripts over instead of only writing them.
    sessions_per_task : int
        0 leaves it to babyseg.
    slurm_partition, slurm_account : str, optional
    """

    submit: str
    now: bool = False
    sessions_per_task: int = 0
    slurm_partition: str | None = None
    slurm_account: str | None = None


def add_options(parser: argparse.ArgumentParser, /) -> None:
    """Add the group of options for clusters."""
    group = parser.add_argument_group('clusters')
    group.add_argument(
        '--array-task',
        type=options.array_task,
        metavar='I/N',
        help='do only the share of task I of N, from 1: the same sessions on every node; auto '
        'takes both numbers from Slurm',
    )
    group.add_argument(
        '--submit',
        choices=('slurm',),
        help='run nothing here; write the scripts of a Slurm job array to output_dir/logs/slurm '
        'and show how to submit them',
    )
    group.add_argument('--now', action='store_true', help='with --submit: submit them, too')
    group.add_argument(
        '--sessions-per-task',
        type=options.positive,
        metavar='N',
        help='with --submit: about as many sessions in each task (default: 40, about 10 minutes)',
    )
    group.add_argument('--slurm-partition', metavar='NAME', help='with --submit: the partition')
    group.add_argument('--slurm-account', metavar='NAME', help='with --submit: the account')


def take(given: dict[str, Any], /) -> Submission | None:
    """Take the submission out of what a command line gave.

    Raises
    ------
    UsageError
        When a part of it is there without --submit.
    """
    fields = {option[2:].replace('-', '_'): option for option in OPTIONS}
    found = {name: given.pop(name) for name in fields if name in given}
    if not found:
        return None
    if 'submit' not in found:
        raise UsageError(messages.only_with(fields[next(iter(found))], '--submit slurm'))
    return Submission(**found)
