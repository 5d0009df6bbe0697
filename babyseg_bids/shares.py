"""Sharing a dataset out over the tasks of a job array: the same shares on every node.

Whole subjects are dealt out, in natural order and weighed by their sessions: a subject's page
shows all its sessions, and copies of an image are looked for among them, so that two tasks must
not have one subject. Neighbours stay together, and what is done already changes nothing, so that
a task that runs again has the sessions that it had before.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from babyseg_bids import messages
from babyseg_bids.errors import UsageError
from babyseg_bids.files import natural_key

# What `--array-task` takes for "as Slurm says".
AUTO = 'auto'
_SLURM = 'SLURM_ARRAY_TASK_'


@dataclass(frozen=True)
class ArrayTask:
    """Task `number`, from 1, of `count`."""

    number: int
    count: int

    def __str__(self) -> str:
        """As it is given to `--array-task`."""
        return f'{self.number}/{self.count}'

    @property
    def folder(self) -> str:
        """Name of the task's own folder among intermediate files."""
        return f'task-{self.number}-of-{self.count}'


def parse_array_task(text: str, environ: Mapping[str, str] = os.environ) -> ArrayTask:
    """The task that `2/8` or `auto` means.

    Raises
    ------
    UsageError
        When it is neither, when there is no such task, or when there is no Slurm array to ask.

    Examples
    --------
    >>> parse_array_task('2/8')
    ArrayTask(number=2, count=8)
    """
    if text == AUTO:
        return _slurm_task(environ)
    match = re.fullmatch(r'([0-9]{1,9})/([0-9]{1,9})', text.strip())
    if not match:
        raise UsageError(messages.bad_array_task(text))
    task = ArrayTask(int(match[1]), int(match[2]))
    if not 1 <= task.number <= task.count:
        raise UsageError(messages.no_such_task(text, task.count))
    return task


def _slurm_task(environ: Mapping[str, str]) -> ArrayTask:
    """The place of this task in its Slurm array, whatever the array's first number and step."""
    numbers = {}
    for name in ('ID', 'COUNT', 'MIN', 'MAX', 'STEP'):
        value = environ.get(f'{_SLURM}{name}', '1' if name == 'STEP' else '')
        if not value.isdecimal():
            # MAX is only a check: without it the numbers are taken to be without gaps.
            if name == 'MAX':
                continue
            raise UsageError(messages.no_slurm_array(f'{_SLURM}{name}'))
        numbers[name] = int(value)
    count, first, step = numbers['COUNT'], numbers['MIN'], max(1, numbers['STEP'])
    last = first + (count - 1) * step
    place, rest = divmod(numbers['ID'] - first, step)
    if rest or not 0 <= place < count or numbers.get('MAX', last) != last:
        raise UsageError(messages.slurm_array_has_gaps(count))
    return ArrayTask(place + 1, count)


def count_sessions(
    bids_dir: Path, /, participants: Sequence[str] = (), sessions: Sequence[str] = ()
) -> dict[str, int]:
    """Sessions with an `anat` folder by subject, in natural order, from names of folders alone.

    One folder is listed a subject and no file is opened, since every task of an array does this.

    Parameters
    ----------
    participants, sessions : sequence of str
        Bare labels; empty for all. A participant who does not exist is there with 0.

    Raises
    ------
    UsageError
        The dataset cannot be listed.
    """
    try:
        subjects = participants or [n[4:] for n in _folders(bids_dir) if n.startswith('sub-')]
        return {
            subject: _sessions_of(bids_dir / f'sub-{subject}', sessions)
            for subject in sorted(set(subjects), key=natural_key)
        }
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(
            messages.bids_dir_unreadable(Path(error.filename or bids_dir), reason)
        ) from error


def share(counts: Mapping[str, int], task: ArrayTask, /) -> tuple[str, ...]:
    """The subjects of one task.

    Parameters
    ----------
    counts : mapping
        What `count_sessions` gave.

    Examples
    --------
    >>> share({'01': 1, '02': 1, '03': 2, '04': 1}, ArrayTask(1, 2))
    ('01', '02')
    >>> share({'01': 1, '02': 1, '03': 2, '04': 1}, ArrayTask(2, 2))
    ('03', '04')
    """
    return tuple(s for s, number in deal(counts, task.count).items() if number == task.number)


def deal(counts: Mapping[str, int], tasks: int, /) -> dict[str, int]:
    """The number of the task of each subject, also of one without any session.

    The sessions of all subjects in a row are cut into equal parts; a subject belongs to the part
    that its middle lies in.
    """
    total = sum(counts.values())
    numbers, before = {}, 0
    for subject, sessions in counts.items():
        part = (2 * before + sessions) * tasks // (2 * total) if total else 0
        numbers[subject] = min(part, tasks - 1) + 1
        before += sessions
    return numbers


def _folders(path: Path) -> list[str]:
    with os.scandir(path) as entries:
        return [entry.name for entry in entries if entry.is_dir()]


def _sessions_of(subject: Path, wanted: Sequence[str]) -> int:
    """Sessions of one subject; a subject without session folders is one if all are wanted."""
    if not subject.is_dir():
        return 0
    folders = _folders(subject)
    names = [n for n in folders if n.startswith('ses-') and (not wanted or n[4:] in wanted)]
    found = sum((subject / name / 'anat').is_dir() for name in names)
    return found + ('anat' in folders and not wanted)
