"""What goes wrong on real machines, done for real: full disks, little memory, hostile files.

Damage inside single images is in `test_preflight`, kills are in `test_kills`.
"""

import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from fault_phantoms import (
    babyseg,
    command,
    differences,
    head,
    said,
    t1w,
    tree,
    write_dataset,
    write_image,
    write_model,
)

from babyseg_bids import messages
from babyseg_bids.cli import crashes, scratch
from babyseg_bids.errors import OutputError
from babyseg_bids.outputs import Names
from babyseg_bids.preflight import check_image
from babyseg_bids.publish import publish_session
from babyseg_bids.records import Age, Scan, SessionInputs
from babyseg_bids.resources import SESSION_GB, memory_limit
from babyseg_bids.settings import Settings

PAGE = 4096
ONE_AT_A_TIME = ('--nprocs', '1', '--mem', '4G')
# More than the parent needs, less than a worker beside it: without a limit they take 580 and 970
# MB of addresses, 130 and 260 MB of memory.
ADDRESSES = 560 * 10**6
GROUP_BYTES = 280 * 2**20
# Root may read and write everything; without these it is held to permissions like everyone.
CAPABILITIES = '-dac_override,-dac_read_search'


@pytest.fixture(scope='module')
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp('model') / 'tiny.safetensors')


class SmallDisk:
    """A file system of a few pages that can grow."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def resize(self, pages: int) -> None:
        options = f'remount,size={pages * PAGE}'
        subprocess.run(['mount', '-o', options, self.path], check=True, capture_output=True)

    def used(self) -> int:
        status = os.statvfs(self.path)
        return status.f_blocks - status.f_bfree

    def leave(self, pages: int) -> None:
        """Let this many pages be free."""
        self.resize(self.used() + pages)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    path = tmp_path / 'disk'
    path.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={PAGE}', 'tmpfs', str(path)]
    if shutil.which('mount') is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('this user may not mount a small file system')
    yield SmallDisk(path)
    subprocess.run(['umount', '--lazy', str(path)], check=True)


# Disks.


def test_a_disk_that_fills_while_results_are_put_in_place_costs_nothing_old(
    disk: SmallDisk, tmp_path: Path
) -> None:
    """Every amount of free space from none to enough, page by page."""
    disk.resize(200)
    scan = Scan('/x/sub-01_T1w.nii.gz', 'sub-01/anat/sub-01_T1w.nii.gz', 'T1w')
    session = SessionInputs('01', None, (scan,), Age())
    names = Names(session)

    def publish(letter: str) -> None:
        image = tmp_path / 'labels'
        image.write_text(letter * 3 * PAGE)
        report = tmp_path / 'report'
        report.write_text(letter * 2 * PAGE)
        files = {
            names.image('desc-aseg_dseg.nii.gz'): image,
            names.image('desc-aseg_dseg.json'): {'Description': letter},
            names.report: report,
        }
        publish_session(session, files, {'letter': letter}, disk.path)

    publish('a')
    before = {p: p.read_bytes() for p in disk.path.rglob('*') if p.is_file()}
    outcomes = []
    for pages in range(1, 20):
        disk.leave(pages)
        try:
            publish('b')
        except OutputError as error:
            assert 'No space left' in str(error)
            assert 'free space' in str(error)
            assert {p: p.read_bytes() for p in disk.path.rglob('*') if p.is_file()} == before
            outcomes.append('refused')
        else:
            outcomes.append('written')
            break
    assert set(outcomes) == {'refused', 'written'}
    assert json.loads((disk.path / names.ledger).read_text())['letter'] == 'b'


def test_runs_on_a_disk_that_is_full_at_each_stage_end_in_a_sentence_and_can_go_on(
    disk: SmallDisk, tmp_path: Path, model: Path
) -> None:
    data = write_dataset(tmp_path / 'data', '01')
    work, output = tmp_path / 'work', disk.path / 'out'
    words = (data, output, 'participant', '--model', model, *ONE_AT_A_TIME)

    # Nothing fits, not even a file that tests it.
    disk.resize(1)
    (disk.path / 'filler').write_bytes(b'x' * PAGE)
    full = babyseg(*words)
    assert full.returncode == 2
    assert 'no space left on device). Free space there' in said(full)

    # The description of the results does not fit.
    disk.leave(4)
    full = babyseg(*words)
    assert full.returncode == 2
    assert 'No space left on device' in said(full)

    # The work folder has no room for what steps write; there is none for a crash report either.
    disk.leave(24)
    full = babyseg(*words)
    assert full.returncode == 1
    assert messages.disk_full(output, output / '.babyseg-work') in said(full)
    assert '1 failed' in said(full)

    # All is computed elsewhere, and the results do not fit.
    shutil.rmtree(output / '.babyseg-work')
    disk.leave(24)
    full = babyseg(*words, '-w', work)
    assert full.returncode == 1
    sentence = 'cannot be written (No space left on device); check permissions and free space'
    assert f'{output}/sub-01' in said(full).partition(sentence)[0]
    assert sentence in said(full)
    assert not list(output.glob('sub-01/anat/*'))

    # With room again, the next run has nothing to repair.
    disk.resize(100_000)
    assert babyseg(*words, '-w', work).returncode == 0
    untroubled = tmp_path / 'untroubled'
    assert babyseg(data, untroubled, *words[2:]).returncode == 0
    assert differences(tree(output), tree(untroubled)) == []


# Memory.


def test_refused_memory_is_explained_with_estimate_and_limit(tmp_path: Path) -> None:
    settings = Settings(tmp_path / 'in', tmp_path / 'out')
    limit = memory_limit()
    sentence = messages.memory_short(SESSION_GB, limit.amount, limit.source)
    for reason in (
        'MemoryError',
        '_ArrayMemoryError: Unable to allocate 1.00 GiB for an array with shape (9,)',
        "RuntimeError: alloc_cpu.cpp:127 DefaultCPUAllocator: can't allocate memory: you tried",
        'ImportError: libtorch_cpu.so: failed to map segment from shared object',
        'ImportError: libx.so: failed to map segment from shared object: Cannot allocate memory',
    ):
        # Free memory, which may be the limit, changes between two looks.
        now = crashes.in_words(reason, settings)
        assert now.partition('limit is')[0] == sentence.partition('limit is')[0]
    assert crashes.in_words('ValueError: x', settings) == 'ValueError: x'


def test_an_address_space_that_is_too_small_is_named_with_the_estimate(
    tmp_path: Path, model: Path
) -> None:
    """`ulimit -v`, as grid engines set it: the network's library does not fit."""
    data = write_dataset(tmp_path / 'data', '01')

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))

    words = (data, tmp_path / 'out', 'participant', '--model', model, '--nprocs', '1')
    run = babyseg(*words, preexec_fn=limited)
    text = said(run)
    assert run.returncode == 1, text
    assert 'ulimit -v' in text
    assert 'session needs about 3 GB' in text
    assert 'limit is 0.5 GB' in text
    again = babyseg(*words)
    assert again.returncode == 0, said(again)


@pytest.fixture
def control_group() -> Iterator[Path]:
    """A control group of `GROUP_BYTES` without swap, version 1 or 2."""
    own = Path('/proc/self/cgroup').read_text().splitlines() if Path('/proc').is_dir() else []
    parts, limited = [line.split(':', 2) for line in own], False
    places = [Path(f'/sys/fs/cgroup/memory{p[2]}') for p in parts if 'memory' in p[1].split(',')]
    places += [Path(f'/sys/fs/cgroup{p[2]}') for p in parts if p[1] == '']
    for place in places:
        group = place / f'babyseg-test-{os.getpid()}'
        try:
            group.mkdir()
        except OSError:
            continue
        for name in ('memory.limit_in_bytes', 'memory.memsw.limit_in_bytes', 'memory.max'):
            if (group / name).exists():
                (group / name).write_text(str(GROUP_BYTES))
                limited = True
        if (group / 'memory.swap.max').exists():
            (group / 'memory.swap.max').write_text('0')
        if limited:
            yield group
            _remove_group(group)
            return
        group.rmdir()
    pytest.skip('this user may not make a control group with a limit of memory')


def _remove_group(group: Path) -> None:
    """Remove a control group once its last process is gone."""
    for _ in range(300):
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.1)
        else:
            return
    group.rmdir()


def test_a_worker_that_the_system_kills_for_memory_is_named_with_estimate_and_limit(
    tmp_path: Path, model: Path, control_group: Path
) -> None:
    data = write_dataset(tmp_path / 'data', '01')
    enter = 'echo $$ > "$0"/cgroup.procs && exec "$@"'
    words = command(data, tmp_path / 'out', 'participant', '--model', model, '--nprocs', '1')
    run = subprocess.run(
        ['sh', '-c', enter, str(control_group), *words], capture_output=True, text=True
    )
    assert run.returncode == 1, said(run)
    assert messages.memory_kill(SESSION_GB, GROUP_BYTES / 2**30, 'control group') in said(run)
    assert '1 failed' in said(run)


# Many at once.


def test_eight_processes_share_one_output_folder(tmp_path: Path, model: Path) -> None:
    subjects = [f'{n:02d}' for n in range(1, 9)]
    data = write_dataset(tmp_path / 'data', *subjects)
    output = tmp_path / 'out'
    fixed = (data, output, 'participant', '--model', model, '--no-report', *ONE_AT_A_TIME)
    environ = {k: v for k, v in os.environ.items() if k != 'HOME'}
    running = [
        subprocess.Popen(
            command(*fixed, '--participant-label', subject),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ,
        )
        for subject in subjects
    ]  # fmt: skip
    printed = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * 8, printed
    for subject in subjects:
        ledger = output / f'sub-{subject}/anat/sub-{subject}_desc-inputs_ledger.json'
        for name in json.loads(ledger.read_text())['outputs']:
            assert (output / name).is_file()
    assert json.loads((output / 'dataset_description.json').read_text())['Name']
    # No drafts, no work folder: the last to end has tidied up.
    assert [p.name for p in output.rglob('.*')] == ['.bidsignore']


def test_a_work_folder_that_a_killed_run_left_is_taken_away_by_the_next_one(
    tmp_path: Path,
) -> None:
    (tmp_path / 'out').mkdir()
    killed, alive, last = (Settings(tmp_path / 'in', tmp_path / 'out') for _ in range(3))
    folder = scratch.prepare_scratch(alive)
    # As after SIGKILL: the file is there, and nobody holds its lock.
    (folder / scratch.RUNS / killed.run_uuid).touch()
    scratch.prepare_scratch(last)
    scratch.release_scratch(last, [], success=True)
    assert folder.is_dir()
    scratch.release_scratch(alive, [], success=True)
    assert list((tmp_path / 'out').iterdir()) == []


# A dataset that nobody cleaned, read by a user who may do little.


def as_ordinary_user(words: list[str]) -> list[str]:
    """The command under the permissions of files, which root is not held to."""
    if os.geteuid() != 0:
        return words
    if shutil.which('setpriv') is None:
        pytest.skip('without setpriv, root can read and write everything')
    return ['setpriv', f'--bounding-set={CAPABILITIES}', *words]


# Refuses the internet, and writes down each program that is started.
WATCHER = """
import os
import sys

def _watch(event, arguments):
    if event in ('socket.connect', 'socket.bind', 'socket.sendto'):
        if isinstance(arguments[1], tuple):
            raise OSError(101, 'Network is unreachable')
    elif event in ('socket.getaddrinfo', 'socket.gethostbyname'):
        raise OSError(101, 'Network is unreachable')
    elif event in ('subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn'):
        with open(os.environ['STARTED'], 'a') as file:
            print(event, arguments[:2], file=file)

sys.addaudithook(_watch)
"""
EVIL = '$(touch pwned)`touch pwned`;touch pwned;\'"&|<img src=x onerror=alert(1)>%s{{7*7}}'
# Subject, what is wrong with its only scan, and a part of the reason that must be told.
REASONS = {
    'unreadable': 'not allowed to read it',
    'truncated': 'truncated',
    'empty': 'zero bytes',
    'nan': 'NaN',
    'zeros': 'all of its voxels are zero',
    'series': 'series of volumes',
    'flat': 'not a 3-D image',
    'metres': 'metres',
    'micrometres': 'micrometres',
    'size': 'truncated',
    'loop': 'leads back to itself',
}
GOOD = ('good', 'thick')


def write_bad_scans(root: Path) -> None:
    rng = np.random.default_rng(1)
    for subject in ('good', 'unreadable', 'truncated', 'empty', 'size'):
        write_image(t1w(root, subject), head(len(subject)))
    t1w(root, 'unreadable').chmod(0)
    t1w(root, 'truncated').write_bytes(t1w(root, 'truncated').read_bytes()[:-500])
    t1w(root, 'empty').write_bytes(b'')
    write_image(t1w(root, 'nan'), np.full((20, 20, 20), np.nan, np.float32))
    write_image(t1w(root, 'zeros'), np.zeros((20, 20, 20), np.int16))
    write_image(t1w(root, 'series'), rng.integers(0, 99, (20, 20, 20, 3)).astype(np.int16))
    flat = nib.Nifti1Image(rng.integers(0, 99, (20, 20)).astype(np.int16), np.eye(4))
    t1w(root, 'flat').parent.mkdir(parents=True)
    flat.to_filename(t1w(root, 'flat'))
    write_image(t1w(root, 'metres'), head(1), (0.006, 0.006, 0.006))
    write_image(t1w(root, 'micrometres'), head(2), (6000.0, 6000.0, 6000.0))
    big = nib.load(t1w(root, 'size'))
    raw = bytearray(big.header.binaryblock) + bytes(4) + big.get_fdata().astype('i2').tobytes()
    raw[42:48] = np.array([60, 60, 60], '<i2').tobytes()
    t1w(root, 'size').unlink()
    t1w(root, 'size').with_suffix('').write_bytes(raw)
    t1w(root, 'loop').parent.mkdir(parents=True)
    t1w(root, 'loop').symlink_to('sub-loop_T1w.nii.gz')
    # 1 x 1 x 12 mm.
    thick = np.repeat(np.repeat(head(3), 6, 0), 6, 1)[:, :, ::2]
    write_image(t1w(root, 'thick'), thick, (1.0, 1.0, 12.0))


def write_hostile_names(root: Path) -> None:
    anat = root / 'sub-good' / 'anat'
    for name in (f'sub-good_acq-{EVIL}_T1w.nii.gz', f'sub-good_T1w{EVIL}.nii.gz'):
        write_image(anat / 'sub-good_T1w.nii.gz', head(4)).rename(anat / name)
    write_image(anat / 'sub-good_T1w.nii.gz', head(4))
    write_image(root / f'sub-{EVIL}' / 'anat' / f'sub-{EVIL}_T1w.nii.gz', head(5))
    write_image(root / 'sub-..' / 'anat' / 'sub-.._T1w.nii.gz', head(6))
    rows = [
        'participant_id\tage\tsex',
        f'sub-good\t7 {EVIL}\t=cmd|"/C calc"!A1',
        '../../../etc/passwd\t3\t<script>alert(1)</script>',
        f'sub-{EVIL}\t{EVIL}\t{EVIL}',
    ]
    (root / 'participants.tsv').write_text('\n'.join(rows) + '\n')
    scans = f'filename\tage\n../../../../etc/passwd\t3\nanat/sub-good_T1w.nii.gz\t{EVIL}\n'
    (root / 'sub-good' / 'sub-good_scans.tsv').write_text(scans)


def everything(root: Path) -> dict[str, tuple[int, int, int]]:
    """Mode, size and time of change of all that lies under a folder."""
    found = {}
    for path in [root, *root.rglob('*')]:
        status = path.lstat()
        found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


@pytest.fixture(scope='module')
def hardship(
    tmp_path_factory: pytest.TempPathFactory, model: Path
) -> Iterator[tuple[subprocess.CompletedProcess[str], Path]]:
    """One run over all of it: read-only inputs, a HOME that cannot be made, no network."""
    folder = tmp_path_factory.mktemp('hardship') / 'dänische Köpfe 脳 (a b)'
    data = write_dataset(folder / 'ro' / f'data {EVIL}')
    write_bad_scans(data)
    write_hostile_names(data)
    (folder / 'site').mkdir()
    (folder / 'site' / 'sitecustomize.py').write_text(WATCHER)
    (folder / 'here').mkdir()
    inner = [data, *(p for p in data.rglob('*') if not p.is_symlink())]
    for path in inner:
        path.chmod(path.stat().st_mode & ~0o222)
    before = everything(folder / 'ro')
    words = (data, folder / 'out', 'participant', '--model', model, *ONE_AT_A_TIME)
    run = subprocess.run(
        as_ordinary_user(command(*words)),
        capture_output=True,
        text=True,
        cwd=folder / 'here',
        env={
            **os.environ,
            'HOME': str(data / 'home'),
            'PYTHONPATH': str(folder / 'site'),
            'STARTED': str(folder / 'started.txt'),
        },
    )
    assert everything(folder / 'ro') == before
    yield run, folder
    for path in inner:
        path.chmod(0o755)


def test_a_dataset_full_of_faults_gives_what_can_be_had(
    hardship: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    run, folder = hardship
    text = said(run)
    assert run.returncode == 0, text
    done = {p.name.split('_')[0] for p in folder.glob('out/sub-*/anat/*_ledger.json')}
    assert done == {f'sub-{s}' for s in GOOD}
    verdicts = {}
    for path in folder.glob('out/sub-*/log/*/verdicts.json'):
        verdicts |= {v['name']: v['reason'] for v in json.loads(path.read_text())}
    for subject, reason in REASONS.items():
        assert reason in verdicts[f'sub-{subject}']
        assert f'sub-{subject}' in text
    assert f'{len(GOOD)} segmented, {len(verdicts)} without a usable image' in text


def test_thick_slices_are_segmented_on_their_own_grid(
    hardship: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    _, folder = hardship
    (labels,) = folder.glob('out/sub-thick/anat/*_desc-aseg_dseg.nii.gz')
    assert nib.load(labels).shape == (120, 120, 10)
    np.testing.assert_allclose(nib.load(labels).header.get_zooms(), (1, 1, 12))


def test_hostile_names_and_tables_are_text_and_nothing_else(
    hardship: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    _, folder = hardship
    assert [p for p in folder.rglob('*pwned*') if p.name == 'pwned'] == []
    # Everything that was written is in the output folder.
    assert {p.name for p in folder.iterdir()} - {'started.txt'} == {'ro', 'site', 'here', 'out'}
    assert list((folder / 'here').iterdir()) == []
    for page in folder.glob('out/*.html'):
        assert '<img src=x' not in page.read_text()
        assert '<script>alert' not in page.read_text()
    started = folder / 'started.txt'
    assert 'pwned' not in (started.read_text() if started.exists() else '')


# Sizes.


def test_a_large_scan_is_looked_at_in_pieces(tmp_path: Path) -> None:
    """1 GB at 0.2 mm, most of it a hole in the file: memory stays at a few slices."""
    shape = (800, 800, 800)
    path = tmp_path / 'sub-01_T1w.nii'
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.int16)
    header.set_sform(np.diag([0.2, 0.2, 0.2, 1.0]), 1)
    block = np.random.default_rng(0).integers(1, 900, shape[:2]).astype(np.int16)
    with path.open('wb') as file:
        file.write(header.binaryblock + bytes(4))
        file.truncate(352 + 2 * int(np.prod(shape)))
        for plane in range(100, 700, 100):
            file.seek(352 + 2 * plane * block.size)
            file.write(block.tobytes(order='F'))
    code = (
        'import resource, sys; from babyseg_bids.preflight import check_image\n'
        'before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
        'found = check_image(sys.argv[1])\n'
        'after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
        'print(found.ok, found.zooms, (after - before) // 1024)'
    )
    words = [command()[0], '-c', code, str(path)]
    done = subprocess.run(words, capture_output=True, text=True)
    verdict, *zooms, megabytes = done.stdout.replace('(', '').replace(')', '').split()
    assert verdict == 'True', done.stderr
    assert ' '.join(zooms) == '0.2, 0.2, 0.2'
    assert int(megabytes) < 300


LARGE = os.environ.get('BABYSEG_LARGE')


@pytest.mark.skipif(not LARGE, reason='takes minutes and 12 GB; BABYSEG_LARGE=1 runs it')
def test_a_scan_of_1_gb_is_segmented_on_its_own_grid(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / 'data')
    small = head(size=100)
    large = np.repeat(np.repeat(np.repeat(small, 8, 0), 8, 1), 8, 2)
    write_image(t1w(data, '01').with_suffix(''), large, (0.2, 0.2, 0.2))
    run = babyseg(data, tmp_path / 'out', 'participant', '--no-report')
    assert run.returncode == 0, said(run)
    (labels,) = tmp_path.glob('out/sub-01/anat/*_desc-aseg_dseg.nii.gz')
    assert nib.load(labels).shape == large.shape
    assert check_image(t1w(data, '01').with_suffix('')).ok
