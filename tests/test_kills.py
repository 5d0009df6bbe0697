"""SIGKILL at random moments, and what the next run makes of what was left.

`BABYSEG_KILLS=20` sets how many moments are tried of each kind of process, `BABYSEG_SEED` repeats
those of an earlier run.
"""

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from fault_phantoms import (
    babyseg,
    command,
    differences,
    said,
    tree,
    write_dataset,
    write_model,
)

KILLS = int(os.environ.get('BABYSEG_KILLS', '3'))
SEED = int(os.environ.get('BABYSEG_SEED') or random.SystemRandom().randrange(10**6))
SUBJECTS = ('01', '02')
# Two workers side by side.
OPTIONS = ('--nprocs', '2', '--omp-nthreads', '1', '--mem', '8G')
# Seconds for processes to end that were told to, or whose parent is gone.
PATIENCE = 120


class Undisturbed(NamedTuple):
    """A run that nothing happened to: its arguments, its files, and its length in seconds."""

    dataset: Path
    model: Path
    files: dict[str, bytes]
    seconds: float

    def words(self, output: Path) -> tuple[str | Path, ...]:
        """The command line of the same run into another folder."""
        return (self.dataset, output, 'participant', '--model', self.model, *OPTIONS)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp('undisturbed')
    dataset = write_dataset(folder / 'data', *SUBJECTS)
    run = Undisturbed(dataset, write_model(folder / 'tiny.safetensors'), {}, 0.0)
    process = start(run, folder / 'out')
    began = time.monotonic()
    assert process.wait(PATIENCE * 10) == 0, log(folder / 'out')
    return run._replace(files=tree(folder / 'out'), seconds=time.monotonic() - began)


def start(run: Undisturbed, output: Path) -> subprocess.Popen[str]:
    """Start a run and return when it has made its output folder."""
    with output.with_suffix('.log').open('w') as file:
        process = subprocess.Popen(
            command(*run.words(output)), stdout=file, stderr=file, text=True
        )
    while not output.exists() and process.poll() is None:
        time.sleep(0.02)
    return process


def log(output: Path) -> str:
    return ' '.join(re.sub('[│┃]', ' ', output.with_suffix('.log').read_text()).split())


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that do a run's steps: not its server of processes, nor its tracker."""
    found = []
    try:
        for child in psutil.Process(process.pid).children(recursive=True):
            if child.ppid() != process.pid or 'spawn_main' in ' '.join(child.cmdline()):
                found.append(child)
    except psutil.NoSuchProcess:
        return found
    return found


def assert_nothing_is_half_there(output: Path, whole: dict[str, bytes]) -> None:
    """Whatever has its final name has its final content."""
    there = {n: c for n, c in tree(output).items() if not re.search(r'(^|/)\.babyseg-', n)}
    half = [n for n in differences(there, whole) if n in there and '/.' not in f'/{n}']
    assert half == []


def assert_resumed(run: Undisturbed, output: Path) -> None:
    again = babyseg(*run.words(output))
    assert again.returncode == 0, said(again)
    assert differences(tree(output), run.files) == []


def done(output: Path) -> set[str]:
    return {p.name.split('_')[0] for p in output.glob('sub-*/anat/*_ledger.json')}


def moments() -> list[float]:
    """Shares of a run after which something is killed; names of tests must not depend on them."""
    rng = random.Random(SEED)
    return [rng.random() for _ in range(KILLS)]


@pytest.mark.parametrize('number', range(KILLS))
def test_after_a_kill_of_the_whole_run_the_next_one_completes_it(
    undisturbed: Undisturbed, tmp_path: Path, number: int
) -> None:
    moment = moments()[number]
    print(f'BABYSEG_SEED={SEED}, moment {moment:.3f} of {undisturbed.seconds:.1f} s')
    output = tmp_path / 'out'
    process = start(undisturbed, output)
    time.sleep(moment * undisturbed.seconds)
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    process.kill()
    assert process.wait(PATIENCE) in (0, -signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=PATIENCE)
    assert alive == []
    print(f'done by then: {sorted(done(output))}')
    assert_nothing_is_half_there(output, undisturbed.files)
    assert_resumed(undisturbed, output)


@pytest.mark.parametrize('number', range(KILLS))
def test_a_killed_worker_is_reported_truly_and_its_session_done_again(
    undisturbed: Undisturbed, tmp_path: Path, number: int
) -> None:
    moment = moments()[number]
    print(f'BABYSEG_SEED={SEED}, moment {moment:.3f} of {undisturbed.seconds:.1f} s')
    output = tmp_path / 'out'
    process = start(undisturbed, output)
    time.sleep(moment * undisturbed.seconds)
    while not (found := workers(process)) and process.poll() is None:
        time.sleep(0.02)
    if found:
        random.Random(moment).choice(found).send_signal(signal.SIGKILL)
    code = process.wait(PATIENCE * 10)
    text = log(output)
    print(code, text)
    # The exit code, the table and the files tell the same.
    failed = {f'sub-{s}' for s in SUBJECTS} - done(output)
    assert code == (1 if failed else 0)
    assert 'Traceback' not in text
    assert (f'{len(failed)} failed' in text) == bool(failed)
    if failed:
        assert 'The system killed the process' in text
        assert 'a session needs about 3 GB' in text
    assert_nothing_is_half_there(output, undisturbed.files)
    assert_resumed(undisturbed, output)
