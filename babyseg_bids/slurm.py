"""Job scripts for Slurm: how much to ask for, and the text of the scripts.

Pure functions: sessions and settings in, numbers and text out.
"""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from babyseg_bids import __version__, messages
from babyseg_bids.resources import LIGHT_GB, MEMORY_SHARE, SESSION_GB, plan
from babyseg_bids.settings import Settings
from babyseg_bids.shares import deal

# One session of two 1 mm scans, from alignment to report, on `CPUS` processors: 18 to 20 s were
# measured on an idle machine.
SESSION_SECONDS = 30.0
CPUS = 2
# Nodes differ, file systems are slow at times, and a job that is cut off has to wait again.
SAFETY = 4.0
# Shorter jobs keep the scheduler busier than the nodes.
TASK_MINUTES = 10
SESSIONS_PER_TASK = ceil(TASK_MINUTES * 60 / SESSION_SECONDS)
# Slurm's MaxArraySize is 1001 unless an administrator changes it.
MAX_TASKS = 1000
# The group level reads three small files a session: 1000 sessions took 2 s and 0.13 GB on a local
# disk, and a network file system may need much longer to open a file.
GROUP_SECONDS = 0.05
GROUP_MB = 2048
MINUTES_STEP = 5
# Memory that never decides how many sessions run side by side.
PLENTY_GB = 1e6
# Of the two scripts, without their ending.
NAMES = ('babyseg', 'babyseg-group')
# Stands for the task in a command.
TASK = '{task}'


@dataclass(frozen=True)
class Request:
    """What a job asks for; all but `tasks` is for one task."""

    tasks: int
    cpus: int
    mem_mb: int
    minutes: int
    gpus: int = 0

    @property
    def time(self) -> str:
        """Hours, minutes and seconds as Slurm reads them."""
        return f'{self.minutes // 60:02d}:{self.minutes % 60:02d}:00'


@dataclass(frozen=True)
class Place:
    """Where a job runs and what it leaves: absolute paths of the machine that Slurm runs on."""

    folder: str
    logs: str
    partition: str | None = None
    account: str | None = None


def array_request(
    counts: Mapping[str, int], settings: Settings, /, sessions_per_task: int = 0
) -> Request:
    """What each task of the array asks for.

    Parameters
    ----------
    counts : mapping
        Sessions by subject, at least one in all.
    settings : Settings
        Processors and memory given there are asked for as they are.
    sessions_per_task : int
        Wanted by the user, else 0. Subjects are not divided, so that a task may have more.
    """
    wanted = ceil(sum(counts.values()) / (sessions_per_task or SESSIONS_PER_TASK))
    tasks = min(wanted, sum(n > 0 for n in counts.values()), MAX_TASKS)
    sizes: Counter[int] = Counter()
    for subject, number in deal(counts, tasks).items():
        sizes[number] += counts[subject]
    largest = max(sizes.values())
    cpus = settings.nprocs or CPUS
    mem_gb = settings.mem_gb or _memory(cpus, largest, settings)
    seconds = largest * SESSION_SECONDS * SAFETY * max(1.0, CPUS / cpus)
    gpus = int(settings.device.startswith('cuda'))
    return Request(tasks, cpus, ceil(mem_gb * 1024), _minutes(seconds), gpus)


def group_request(sessions: int, /) -> Request:
    """What the job of the group level asks for."""
    return Request(1, 1, GROUP_MB, _minutes(sessions * GROUP_SECONDS * SAFETY))


def _memory(cpus: int, sessions: int, settings: Settings) -> int:
    """Whole GiB for the sessions that this many processors segment side by side.

    So much that one more step finds room beside them, after the share that is left to the system.
    """
    shares = plan(
        cpus, PLENTY_GB, sessions, threads=settings.omp_nthreads, low_mem=settings.low_mem
    )
    return ceil((shares.at_once * SESSION_GB + LIGHT_GB) / MEMORY_SHARE)


def _minutes(seconds: float) -> int:
    """Rounded up, and no less than what makes a job worth its start."""
    return max(TASK_MINUTES, ceil(seconds / 60 / MINUTES_STEP) * MINUTES_STEP)


def array_script(command: Sequence[str], request: Request, place: Place, sessions: int, /) -> str:
    """The script of the job array.

    Parameters
    ----------
    command : sequence of str
        The participant level; the word `TASK` stands for the task.
    """
    files = [shlex.quote(f'{place.logs}/{name}.sbatch') for name in NAMES]
    notes = messages.array_script_notes(__version__, sessions, request.tasks, *files)
    lines = [
        *_directives('babyseg', request, place),
        f'#SBATCH --array=1-{request.tasks}',
        f'#SBATCH --output={_log(place, "babyseg-%A_%a.log")}',
        '',
        f'# {messages.SHARE_NOTE}',
        f'task="${{SLURM_ARRAY_TASK_ID:?{messages.SBATCH_NOTE}}}/{request.tasks}"',
        f'exec {_line(command)}',
    ]
    return _script(notes, lines)


def group_script(command: Sequence[str], request: Request, place: Place, /) -> str:
    """The script of the group level, which waits for the array."""
    lines = [
        *_directives('babyseg-group', request, place),
        f'#SBATCH --output={_log(place, "babyseg-group-%j.log")}',
        '',
        f'exec {_line(command)}',
    ]
    return _script(messages.group_script_notes(__version__), lines)


def _directives(name: str, request: Request, place: Place) -> list[str]:
    options = {
        'job-name': name,
        'nodes': '1',
        'ntasks': '1',
        'cpus-per-task': str(request.cpus),
        'mem': f'{request.mem_mb}M',
        'time': request.time,
        'partition': place.partition,
        'account': place.account,
        'gpus': str(request.gpus) if request.gpus else None,
        'chdir': _quoted(place.folder),
    }
    lines = [f'#SBATCH --{name}={value}' for name, value in options.items() if value is not None]
    # A job that a failing node or a more urgent job ends goes on from where it was.
    return [*lines, '#SBATCH --requeue', '#SBATCH --open-mode=append']


def _log(place: Place, name: str) -> str:
    """Path of a log; Slurm reads %% as a percent sign."""
    return _quoted(f'{place.logs.replace("%", "%%")}/{name}')


def _quoted(path: str) -> str:
    """A path in a line for sbatch, which knows double quotes and the backslash."""
    return '"' + path.replace('\\', '\\\\').replace('"', '\\"') + '"'


def _line(command: Sequence[str]) -> str:
    return ' '.join('"$task"' if word == TASK else shlex.quote(word) for word in command)


def _script(notes: str, lines: Sequence[str]) -> str:
    comments = [f'# {line}'.rstrip() for line in notes.splitlines()]
    return '\n'.join(['#!/bin/bash', *comments, *lines]) + '\n'
