"""`--submit slurm`: write the scripts of a job array, and hand them over when asked to."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from babyseg_bids import messages
from babyseg_bids.cli import checks
from babyseg_bids.cli.participant import check
from babyseg_bids.cli.progress import error_console
from babyseg_bids.cli.submission import OPTIONS, Submission
from babyseg_bids.errors import NoInputError, OutputError, UsageError
from babyseg_bids.settings import Settings
from babyseg_bids.shares import count_sessions
from babyseg_bids.slurm import (
    NAMES,
    TASK,
    Place,
    array_request,
    array_script,
    group_request,
    group_script,
)

# Set by babyseg-wrapper: how the machine outside the container calls it, as JSON.
HOST_VARIABLE = 'BABYSEG_HOST'


@dataclass(frozen=True)
class Host:
    """How a job calls babyseg: program, the user's own words, and the folder they are said in."""

    program: tuple[str, ...]
    words: tuple[str, ...]
    folder: str
    output_dir: str


def run_submit(
    settings: Settings,
    job: Submission,
    argv: Sequence[str],
    environ: Mapping[str, str] = os.environ,
) -> int:
    """Write the scripts into the output folder; submit them or say how; the exit code.

    Raises
    ------
    UsageError, NoInputError, OutputError
        When something is wrong with the arguments, the folders or the batch system.
    """
    if settings.level == 'group':
        raise UsageError(messages.task_of_group('--submit'))
    if settings.array_task:
        raise UsageError(messages.not_together('--submit', '--array-task'))
    out = error_console()
    check(settings, out)
    counts = count_sessions(settings.bids_dir, settings.participants, settings.sessions)
    total = sum(counts.values())
    if not total:
        raise NoInputError(messages.nothing_to_submit(settings.bids_dir))
    host = find_host(settings, argv, environ)
    logs = f'{host.output_dir}/logs/slurm'
    place = Place(host.folder, logs, job.slurm_partition, job.slurm_account)
    request = array_request(counts, settings, job.sessions_per_task)
    words = without_options(host.words, OPTIONS)
    array = [*host.program, '--array-task', TASK, *words]
    scripts = {
        NAMES[0]: array_script(array, request, place, total),
        NAMES[1]: group_script(
            [*host.program, *at_group_level(words)], group_request(total), place
        ),
    }
    _write(scripts, settings.output_dir / 'logs' / 'slurm')
    sentence = messages.submission(
        total, request.tasks, request.cpus, request.mem_mb, request.minutes
    )
    out.print(sentence)
    files = [Path(logs, f'{name}.sbatch') for name in NAMES]
    if job.now:
        out.print(submit(*files))
        return 0
    out.print(messages.how_to_submit(Path(logs)))
    first, second = (shlex.quote(str(f)) for f in files)
    print(f'jobid=$(sbatch --parsable {first})')
    print(f'sbatch --dependency=afterany:"$jobid" {second}')
    return 0


def find_host(settings: Settings, argv: Sequence[str], environ: Mapping[str, str]) -> Host:
    """This installation, or the wrapper outside of the container that this is."""
    if HOST_VARIABLE in environ:
        host: dict[str, Any] = json.loads(environ[HOST_VARIABLE])
        return Host(
            tuple(host['program']), tuple(host['words']), host['folder'], host['output_dir']
        )
    script = Path(sys.executable).with_name('babyseg')
    # -P: a file random.py in the user's folder is not the module random.
    module = (sys.executable, '-P', '-m', 'babyseg_bids.cli.run')
    program = (str(script),) if script.is_file() else module
    return Host(program, tuple(argv), str(Path.cwd()), str(settings.output_dir))


def without_options(words: Sequence[str], options: Mapping[str, int], /) -> list[str]:
    """A command line without some options, whose numbers of values are given."""
    kept: list[str] = []
    skip = 0
    for word in words:
        if skip:
            skip -= 1
            continue
        name, equals, _ = word.partition('=')
        name = name.replace('_', '-')
        if name in options:
            skip = 0 if equals else options[name]
        else:
            kept.append(word)
    return kept


def at_group_level(words: Sequence[str], /) -> list[str]:
    """A command line of the participant level turned into one of the group level.

    The level is the third word or the last; elsewhere only its own name tells it.
    """
    places = [i for i, word in enumerate(words) if word == 'participant']
    best = next((i for i in (2, len(words) - 1) if i in places), places[0])
    return [*words[:best], 'group', *words[best + 1 :]]


def _write(scripts: Mapping[str, str], folder: Path) -> None:
    checks.check_writable(folder)
    for name, text in scripts.items():
        try:
            (folder / f'{name}.sbatch').write_text(text, 'utf-8')
        except OSError as error:
            sentence = messages.output_unwritable(folder, checks.reason(error))
            raise OutputError(sentence) from error


def submit(array: Path, group: Path, /) -> str:
    """Hand both scripts to Slurm; a sentence with the numbers of the jobs.

    Raises
    ------
    UsageError
        When there is no sbatch, or it refuses a script.
    """
    if shutil.which('sbatch') is None:
        raise UsageError(messages.no_sbatch(array.parent))
    first = _sbatch(array)
    second = _sbatch(group, f'--dependency=afterany:{first}', before=first)
    return messages.submitted(first, second)


def _sbatch(script: Path, *options: str, before: str = '') -> str:
    """The number of the new job."""
    command = ['sbatch', '--parsable', *options, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = messages.first_line(done.stderr) or f'exit code {done.returncode}'
        raise UsageError(messages.sbatch_failed(script, reason, before))
    # With several clusters, the name of the one that took the job follows a semicolon.
    return done.stdout.strip().partition(';')[0]
