"""babyseg-wrapper with a real podman, and a tiny image that says what it was given."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest

from babyseg_bids import wrapper

IMAGE = 'babyseg-stand-in:test'
# What the image holds beside the program below.
PROGRAMS = ('sh', 'id', 'ls', 'touch', 'sleep')
# Speaks in lines of a name and a value; ends with the number that follows --random-seed.
PROGRAM = """\
#!/bin/sh
echo "user $(id -u):$(id -g)"
echo "home $HOME"
echo "cpus $SLURM_CPUS_PER_TASK"
echo "secret $SECRET"
echo "network $(ls /sys/class/net)"
echo "scans $(ls /data)"
for place in / /data /inputs/ages /out /work /tmp; do
    touch "$place/left" 2>/dev/null && echo "writable $place"
done
echo "words $*"
trap 'exit 77' TERM
case $* in *wait*) echo ready; sleep 60 & wait ;; esac
case $* in *--random-seed*) exit "${*##*--random-seed }" ;; esac
"""
PODMAN_SECONDS = 120


def write_image(path: Path) -> None:
    """A root file system of a shell, a few programs of this machine and their libraries."""
    files = {'bin/babyseg': PROGRAM.encode()}
    for name in PROGRAMS:
        program = shutil.which(name)
        assert program is not None
        files[f'bin/{name}'] = Path(program).read_bytes()
        listed = subprocess.run(['ldd', program], capture_output=True, text=True, check=True)
        for library in re.findall(r'(/\S+) \(0x', listed.stdout):
            files[library.lstrip('/')] = Path(library).read_bytes()
    with tarfile.open(path, 'w') as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            archive.addfile(entry, BytesIO(content))
        for name in ('tmp', 'data', 'out', 'work', 'inputs', 'proc', 'sys', 'dev', 'etc'):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)


def write_settings(folder: Path) -> dict[str, str]:
    """Settings of podman under which its images and its state lie in one folder; as variables."""
    storage = ['[storage]', 'driver = "vfs"']
    storage += [f'{name} = "{folder / name}"' for name in ('graphroot', 'runroot')]
    engine = ['[engine]', 'cgroup_manager = "cgroupfs"', 'events_logger = "none"']
    # Where containers are nested, limits cannot be raised, and only runc starts.
    limits = ['[containers]', 'default_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]']
    engine += ['runtime = "runc"'] if shutil.which('runc') else []
    (folder / 'storage.conf').write_text('\n'.join([*storage, '']))
    (folder / 'containers.conf').write_text('\n'.join([*limits, *engine, '']))
    return {
        'CONTAINERS_STORAGE_CONF': str(folder / 'storage.conf'),
        'CONTAINERS_CONF': str(folder / 'containers.conf'),
    }


@pytest.fixture(scope='module')
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a podman that has the image."""
    if shutil.which('podman') is None:
        pytest.skip('podman is not installed')
    folder = tmp_path_factory.mktemp('podman')
    environ = {**os.environ, **write_settings(folder)}
    write_image(folder / 'image.tar')

    def run(*words: str) -> None:
        done = subprocess.run(
            ['podman', *words], env=environ, capture_output=True, text=True,
            timeout=PODMAN_SECONDS, check=False,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f'podman does not work here: {done.stderr.strip().splitlines()[-1:]}')

    change = 'ENTRYPOINT ["/bin/babyseg"]'
    run(
        'import', '--change', change, '--change', 'ENV PATH=/bin', str(folder / 'image.tar'), IMAGE
    )
    run('run', '--rm', '--network', 'none', '--entrypoint', '/bin/sh', IMAGE, '-c', 'exit 0')
    yield environ
    # Layers belong to the numbers that podman gave them.
    subprocess.run(
        ['podman', 'rmi', '--force', IMAGE], env=environ, capture_output=True, check=False
    )


def command(folder: Path, *words: str) -> list[str]:
    """The wrapper's command line, with a dataset in a folder that needs quotes."""
    data = folder / 'a "dataset", 1:2'
    (data / 'sub-01').mkdir(parents=True, exist_ok=True)
    start = [sys.executable, wrapper.__file__, str(data), str(folder / 'out'), 'participant']
    return [*start, '--engine', 'podman', '--image', IMAGE, *words]


@pytest.mark.podman
def test_the_container_has_what_it_needs_and_nothing_else(
    podman: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / 'my ages.tsv').write_text('participant_id\tage\n')
    words = command(
        tmp_path, '-w', str(tmp_path / 'work'), '--age-months', str(tmp_path / 'my ages.tsv'),
        '--random-seed', '7',
    )  # fmt: skip
    environ = {**podman, 'SLURM_CPUS_PER_TASK': '3', 'SECRET': 'of the host'}
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False)
    said = [line.partition(' ')[::2] for line in done.stdout.splitlines()]
    assert done.returncode == 7, done.stderr
    assert dict(said) | {'writable': ''} == {
        'user': f'{os.getuid()}:{os.getgid()}',
        'home': '/tmp',
        'cpus': '3',
        'secret': '',
        'network': 'lo',
        'scans': 'sub-01',
        'writable': '',
        'words': '/data /out participant --work-dir /work '
        '--age-months /inputs/ages/my ages.tsv --random-seed 7',
    }
    assert [value for name, value in said if name == 'writable'] == ['/out', '/work', '/tmp']
    assert (tmp_path / 'out' / 'left').stat().st_uid == os.getuid()
    assert (tmp_path / 'work' / 'left').exists()


@pytest.mark.podman
def test_a_signal_ends_the_container_with_the_answer_of_the_program(
    podman: dict[str, str], tmp_path: Path
) -> None:
    words = command(tmp_path, '--participant-label', 'wait')
    with subprocess.Popen(words, env=podman, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert 'ready\n' in iter(process.stdout.readline, '')
        # On a busy machine podman passes signals on only some time after the first words.
        time.sleep(15)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PODMAN_SECONDS) == 77


@pytest.mark.podman
def test_an_image_that_is_not_there_is_named(podman: dict[str, str], tmp_path: Path) -> None:
    words = command(tmp_path, '--image', 'nowhere:1')
    done = subprocess.run(words, env=podman, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert 'The image nowhere:1 is not on this machine' in done.stderr
