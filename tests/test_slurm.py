"""Job arrays on a real Slurm of one node, which runs on this machine for as long as the test."""

import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pandas as pd
import psutil
import pytest
from test_workflow import head, write

PROGRAMS = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'squeue', 'scontrol', 'scancel', 'sinfo')
# Debian has the daemons where the PATH of ordinary users does not lead.
SEARCH = os.pathsep.join([os.environ.get('PATH', ''), '/usr/sbin', '/sbin'])
START_SECONDS, RUN_SECONDS = 20, 300
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
# Plugins that need no control groups, which containers rarely have.
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
KillWait=5
SlurmdParameters=config_overrides
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=100000
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """The programs of a Slurm that has a folder and ports of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {**os.environ, 'SLURM_CONF': str(folder / 'slurm.conf'), 'PATH': SEARCH}
        self.daemons: list[subprocess.Popen[bytes]] = []

    def run(self, *words: str) -> str:
        """What a program of Slurm says; '' when it fails."""
        done = subprocess.run(
            words, env=self.environ, capture_output=True, text=True, timeout=30, check=False
        )
        return done.stdout.strip()

    def start(self) -> None:
        """Start the three daemons; skip the test where that is not possible."""
        (self.folder / 'munge.key').write_bytes(secrets.token_bytes(1024))
        (self.folder / 'munge.key').chmod(0o600)
        for name in ('state', 'spool'):
            (self.folder / name).mkdir()
        settings = {
            'host': socket.gethostname().partition('.')[0],
            'user': getpass.getuser(),
            'folder': self.folder,
            'controller_port': free_port(),
            'node_port': free_port(),
        }
        (self.folder / 'slurm.conf').write_text(CONFIG.format(**settings))
        names = {'key-file': 'key', 'socket': 'socket', 'pid-file': 'pid', 'log-file': 'log'}
        places = [f'--{name}={self.folder}/munge.{end}' for name, end in names.items()]
        self._daemon('munged', '--foreground', '--force', f'--seed-file={self.folder}/s', *places)
        self._wait(lambda: (self.folder / 'munge.socket').exists(), 'munged')
        self._daemon('slurmctld', '-D', '-i')
        self._wait(lambda: 'unk' in self.run('sinfo', '-h', '-o', '%t'), 'slurmctld')
        self._daemon('slurmd', '-D', '-N', 'node1')
        self._wait(lambda: self.run('sinfo', '-h', '-o', '%t') == 'idle', 'slurmd')

    def _daemon(self, *words: str) -> None:
        with (self.folder / f'{words[0]}.out').open('wb') as out:
            self.daemons.append(
                subprocess.Popen(words, env=self.environ, stdout=out, stderr=subprocess.STDOUT)
            )

    def _wait(self, ready: Callable[[], bool], name: str) -> None:
        end = time.monotonic() + START_SECONDS
        while not ready():
            if self.daemons[-1].poll() is not None or time.monotonic() > end:
                said = (self.folder / f'{name}.out').read_text(errors='replace').splitlines()
                pytest.skip(f'{name} does not start here: {said[-1] if said else "no word"}')
            time.sleep(0.1)

    def stop(self) -> None:
        """End the jobs, then the daemons, and what they may have left."""
        with ExitStack() as stack:
            for daemon in self.daemons:
                stack.callback(end_tree, daemon)
            if len(self.daemons) > 2:
                self.run('scancel', f'--user={getpass.getuser()}')
                end = time.monotonic() + 10
                while self.run('squeue', '-h') and time.monotonic() < end:
                    time.sleep(0.2)

    def jobs(self) -> dict[str, str]:
        """State of each job by `array_task`, or by number for jobs that are no array."""
        lines = self.run('squeue', '-h', '-r', '-t', 'all', '-o', '%i %T').splitlines()
        return dict(line.split() for line in lines)


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def end_tree(daemon: subprocess.Popen[bytes]) -> None:
    """End a process and its children, the steps of jobs among them."""
    try:
        processes = psutil.Process(daemon.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        processes = []
    daemon.terminate()
    try:
        daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
    for process in processes:
        if process.is_running():
            process.kill()


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    missing = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
    if missing:
        pytest.skip(f'Slurm is not installed: no {", ".join(missing)}')
    monkeypatch.setenv('PATH', SEARCH)
    # Short, since the path of a socket must be.
    with tempfile.TemporaryDirectory(prefix='slurm-') as folder:
        cluster = Slurm(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three participants, in a folder with a name that needs quotes everywhere."""
    root = tmp_path / 'three "small" heads, 100 %'
    root.mkdir()
    (root / 'dataset_description.json').write_text('{"Name": "heads", "BIDSVersion": "1.10.0"}')
    for number in (1, 2, 3):
        name = f'sub-{number:02d}/anat/sub-{number:02d}_T1w.nii.gz'
        write(root, name, head((0.1, 0.5, 0.7), seed=number))
    return root


def babyseg(*words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name('babyseg')), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    return done


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + RUN_SECONDS
    while not condition():
        assert time.monotonic() < end, f'waited in vain for {what}'
        time.sleep(0.2)


def files_of(folder: Path) -> set[str]:
    """Relative paths of the results; runs have names of their own, and Slurm its logs."""
    paths = [p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file()]
    return {re.sub(r'/log/[^/]+/', '/log/RUN/', p) for p in paths if 'logs/slurm/' not in p}


@pytest.mark.slurm
def test_an_array_with_a_task_that_was_killed_gives_what_a_local_run_gives(
    slurm: Slurm, dataset: Path
) -> None:
    here, there = dataset.parent / 'local', dataset.parent / 'from the cluster, 100 %'
    said = babyseg(
        dataset.name, there.name, 'participant', '--nprocs', 1, '--submit', 'slurm', '--now',
        '--sessions-per-task', 1, cwd=dataset.parent, env=slurm.environ,
    ).stderr  # fmt: skip
    array, group = re.findall(r'array (\d+), and job (\d+)', said)[0]
    logs = there / 'logs' / 'slurm'
    victim = f'{array}_2'
    log = logs / f'babyseg-{victim}.log'
    wait_for(lambda: log.exists() and 'Sessions to do' in log.read_text(), 'the second task')
    assert slurm.jobs()[victim] == 'RUNNING'
    slurm.run('scontrol', 'requeue', victim)
    wait_for(lambda: slurm.jobs()[victim] == 'PENDING', 'the second task to be queued again')
    assert slurm.jobs()[group] == 'PENDING'
    # Slurm would wait for two minutes.
    slurm.run('scontrol', 'update', f'jobid={victim}', 'StartTime=now')

    # Meanwhile, the same here.
    babyseg(dataset, here, 'participant', '--nprocs', 1)
    babyseg(dataset, here, 'group')

    active = {'PENDING', 'CONFIGURING', 'RUNNING', 'COMPLETING', 'REQUEUED'}
    wait_for(lambda: not active & set(slurm.jobs().values()), 'all jobs')
    expected = {f'{array}_{n}': 'COMPLETED' for n in (1, 2, 3)} | {group: 'COMPLETED'}
    assert slurm.jobs() == expected, [p.read_text() for p in logs.glob('*.log')]
    assert 'REQUEUE' in log.read_text()
    assert '1 segmented' in log.read_text()

    assert files_of(there) == files_of(here)
    labels = sorted(here.glob('sub-*/anat/*_dseg.nii.gz'))
    assert len(labels) == 3
    for path in [*labels, here / 'group_desc-babyseg_morph.tsv']:
        assert (there / path.relative_to(here)).read_bytes() == path.read_bytes(), path.name
    # How long a session took is all that may differ.
    tables = [pd.read_csv(o / 'group_desc-babyseg_qc.tsv', sep='\t') for o in (here, there)]
    pd.testing.assert_frame_equal(*(t.drop(columns='seconds') for t in tables))
