"""The program `babyseg` as a user meets it: sentences, exit codes, tables, killed workers."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from babyseg_bids import __version__, messages
from babyseg_bids.cli import (
    checks,
    crashes,
    estimate,
    execution,
    participant,
    progress,
    scratch,
    segment,
    tables,
    verdicts,
)
from babyseg_bids.cli.run import main
from babyseg_bids.errors import NoInputError, OutputError, UsageError
from babyseg_bids.outputs import ledger_path
from babyseg_bids.records import Age, Flag, LedgerRow, Scan, SessionInputs
from babyseg_bids.resources import SESSION_GB, Plan
from babyseg_bids.settings import Settings


def babyseg(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own, as a user does."""
    command = [sys.executable, '-m', 'babyseg_bids.cli.run', *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def one_sentence(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The error that a run ended with, which is one line and no traceback."""
    assert done.returncode == code, done.stderr
    assert 'Traceback' not in done.stderr + done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('babyseg: ')
    return last


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset of one subject whose only scan is not an image."""
    root = tmp_path / 'data'
    anat = root / 'sub-01' / 'anat'
    anat.mkdir(parents=True)
    description = {'Name': 'test', 'BIDSVersion': '1.10.0', 'DatasetType': 'raw'}
    (root / 'dataset_description.json').write_text(json.dumps(description))
    (anat / 'sub-01_T1w.nii.gz').write_text('this is not an image')
    return root


def session(subject: str, label: str | None = None, *, scans: int = 0) -> SessionInputs:
    scan = Scan('/x/T1w.nii.gz', 'x/T1w.nii.gz', 'T1w')
    ledger = (LedgerRow('anat/sub-x_T1w.nii.gz', 'T1w', 'rejected', 'it is not a NIfTI file'),)
    return SessionInputs(subject, label, (scan,) * scans, Age(), () if scans else ledger)


# What must not take long, and what is wrong before anything is read.


def test_version_and_help_answer_at_once_and_succeed() -> None:
    before = os.times()
    version, text = babyseg('--version'), babyseg('-h')
    assert (version.returncode, version.stdout.strip()) == (0, f'babyseg {__version__}')
    assert text.returncode == 0
    assert '--participant-label' in text.stdout
    # Processor time of two starts: other programs do not change it as they do wall time.
    after = os.times()
    used = after.children_user + after.children_system
    assert used - before.children_user - before.children_system < 2


def test_the_command_line_imports_nothing_heavy() -> None:
    code = 'import sys, babyseg_bids.cli.run; print(*sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    loaded = {name.split('.')[0] for name in done.stdout.split()}
    heavy = {'numpy', 'nibabel', 'torch', 'nipype', 'bids', 'pandas', 'rich', 'ants', 'matplotlib'}
    assert not loaded & heavy


def test_no_arguments_show_the_usage() -> None:
    assert 'BIDS_DIR OUTPUT_DIR' in one_sentence(babyseg(), 2)


def test_a_wrong_path_is_named(tmp_path: Path) -> None:
    last = one_sentence(babyseg(tmp_path / 'nowhere', tmp_path / 'out', 'participant'), 2)
    assert str(tmp_path / 'nowhere') in last
    assert not (tmp_path / 'out').exists()


def test_a_file_instead_of_a_dataset_is_named(tmp_path: Path) -> None:
    (tmp_path / 'file.nii').touch()
    last = one_sentence(babyseg(tmp_path / 'file.nii', tmp_path / 'out', 'participant'), 2)
    assert 'is a file' in last


def test_a_dataset_without_images_gives_exit_code_3_and_leaves_no_folder(tmp_path: Path) -> None:
    root = tmp_path / 'data'
    root.mkdir()
    (root / 'dataset_description.json').write_text('{"Name": "empty", "BIDSVersion": "1.10.0"}')
    last = one_sentence(babyseg(root, tmp_path / 'out', 'participant'), 3)
    assert str(root) in last
    assert not (tmp_path / 'out').exists()


def test_a_participant_who_does_not_exist_gives_exit_code_3(dataset: Path, tmp_path: Path) -> None:
    done = babyseg(dataset, tmp_path / 'out', 'participant', '--participant-label', '99')
    assert 'sub-01' in one_sentence(done, 3)


def test_a_scan_that_is_not_an_image_is_named_with_the_reason(
    dataset: Path, tmp_path: Path
) -> None:
    done = babyseg(dataset, tmp_path / 'out', 'participant')
    last = one_sentence(done, 3)
    assert 'sub-01_T1w.nii.gz' in last


@pytest.mark.parametrize('where', ['file/out', 'file'])
def test_an_output_folder_that_cannot_be_written_is_named(
    dataset: Path, tmp_path: Path, where: str
) -> None:
    # Permissions do not stop root; a file where a folder should be stops everyone.
    (tmp_path / 'file').touch()
    last = one_sentence(babyseg(dataset, tmp_path / where, 'participant'), 2)
    assert str(tmp_path / where) in last


def test_results_never_go_among_the_raw_data(dataset: Path) -> None:
    for output in (dataset, dataset / 'results', dataset / 'derivatives'):
        with pytest.raises(UsageError, match='derivatives'):
            checks.check_apart(output, dataset)
    checks.check_apart(dataset / 'derivatives' / 'babyseg', dataset)
    checks.check_apart(dataset.parent / 'data-results', dataset)


def test_a_link_to_the_raw_data_is_seen_through(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / 'link').symlink_to(dataset)
    with pytest.raises(UsageError):
        checks.check_apart(tmp_path / 'link' / 'out', dataset)


@pytest.mark.parametrize(
    ('description', 'is_refused'),
    [
        ({'DatasetType': 'raw'}, True),
        ({'Name': 'no type means raw'}, True),
        ({'DatasetType': 'derivative', 'GeneratedBy': [{'Name': 'fMRIPrep'}]}, True),
        ({'DatasetType': 'derivative', 'GeneratedBy': [{'Name': 'babyseg'}]}, False),
    ],
)
def test_a_folder_that_belongs_to_other_data_is_not_written_into(
    tmp_path: Path, description: dict[str, Any], is_refused: bool
) -> None:
    (tmp_path / 'dataset_description.json').write_text(json.dumps(description))
    if is_refused:
        with pytest.raises(UsageError, match='folder of its own'):
            checks.check_ours(tmp_path)
    else:
        checks.check_ours(tmp_path)


def test_the_write_test_leaves_nothing_behind(tmp_path: Path) -> None:
    made = checks.check_writable(tmp_path / 'a' / 'b')
    assert made == [tmp_path / 'a', tmp_path / 'a' / 'b']
    assert list((tmp_path / 'a' / 'b').iterdir()) == []
    checks.remove_empty(made)
    assert list(tmp_path.iterdir()) == []


def test_a_system_folder_that_takes_no_files_is_refused() -> None:
    with pytest.raises(OutputError, match='/proc'):
        checks.check_writable(Path('/proc/babyseg'))


def test_a_missing_file_of_an_option_is_named(dataset: Path, tmp_path: Path) -> None:
    for option in ('--use-plugin', '--model'):
        words = (dataset, tmp_path / 'out', 'participant', option, tmp_path / 'no.yml')
        assert f'{option}: the file' in one_sentence(babyseg(*words), 2)


def test_the_group_level_needs_results_but_no_raw_data(tmp_path: Path) -> None:
    done = babyseg(tmp_path / 'nowhere', tmp_path, 'group')
    assert 'participant level first' in one_sentence(done, 3)


def test_a_bug_becomes_one_sentence_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: Settings) -> int:
        raise KeyError('oops')

    monkeypatch.setattr('babyseg_bids.cli.participant.run_participant', broken)
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    (tmp_path / 'out').mkdir()
    assert main([str(tmp_path), str(tmp_path / 'out'), 'participant']) == 1
    said = capsys.readouterr().err
    (file,) = (tmp_path / 'out' / 'logs').glob('crash-*.txt')
    assert str(file) in said
    assert len(said.splitlines()) == 1
    assert 'KeyError' in file.read_text()


def test_an_interruption_has_its_own_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: Settings) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr('babyseg_bids.cli.participant.run_participant', interrupted)
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    assert main([str(tmp_path), str(tmp_path / 'out'), 'participant']) == 130
    assert 'Interrupted' in capsys.readouterr().err


# The whole way, on a small phantom.


def head(path: Path) -> None:
    """Write an ellipsoid of two tissues in a darker shell, 4 mm voxels."""
    points = np.stack(np.meshgrid(*[np.linspace(-1, 1, 40)] * 3, indexing='ij'))
    radius = np.sqrt((points**2 / np.array([0.6, 0.75, 0.55])[:, None, None, None] ** 2).sum(0))
    data = np.select([radius < 0.7, radius < 0.9, radius < 1], [100, 60, 20], 0)
    noise = np.random.default_rng(0).normal(0, 2, data.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image((data + noise).astype(np.float32), np.diag([4, 4, 4, 1])), path)


def test_a_run_segments_what_it_can_and_later_ones_do_only_what_is_left(
    dataset: Path, tmp_path: Path
) -> None:
    head(dataset / 'sub-02' / 'anat' / 'sub-02_T2w.nii.gz')
    words = (dataset, tmp_path / 'out', 'participant', '--mem', '4G')
    first = babyseg(*words)
    assert first.returncode == 0, first.stderr
    assert 'sub-01: no usable image' in first.stderr
    assert '1 segmented, 1 without a usable image' in first.stderr
    anat = tmp_path / 'out' / 'sub-02' / 'anat'
    labels = nib.load(anat / 'sub-02_space-T2w_desc-aseg_dseg.nii.gz')
    scan = nib.load(dataset / 'sub-02' / 'anat' / 'sub-02_T2w.nii.gz')
    assert labels.shape == scan.shape
    assert not (tmp_path / 'out' / '.babyseg-work').exists()
    (recorded,) = (tmp_path / 'out' / 'sub-02' / 'log').glob('*/babyseg.toml')
    assert Settings.from_toml(recorded.read_text()).bids_dir == dataset
    stamp = (anat / 'sub-02_desc-inputs_ledger.json').stat().st_mtime_ns
    (tmp_path / 'out' / 'sub-02.html').unlink()
    again = babyseg(*words, '--reports-only')
    assert again.returncode == 0, again.stderr
    assert '1 with a new report' in again.stderr
    assert 'sub-02' in (tmp_path / 'out' / 'sub-02.html').read_text()
    second = babyseg(*words)
    assert second.returncode == 0
    assert '1 done before' in second.stderr
    assert (anat / 'sub-02_desc-inputs_ledger.json').stat().st_mtime_ns == stamp


def test_one_case_without_bids_gives_four_files_and_keeps_existing_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head(tmp_path / 'baby.nii.gz')
    words = [str(tmp_path / 'baby.nii.gz'), '--out', str(tmp_path / 'out'), '--threads', '1']
    assert segment.main(words) == 0
    written = sorted(p.name for p in (tmp_path / 'out').iterdir())
    assert written == [f'baby{end}' for end in sorted(segment.FILES.values())]
    assert segment.main(words) == 2
    assert '--overwrite' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('words', 'code', 'expected'),
    [
        (['no.nii', '--out', 'x'], 2, 'no.nii does not exist'),
        (['text.nii.gz', '--out', 'x'], 1, 'text.nii.gz cannot be used'),
        (['text.nii.gz'], 2, '--out'),
        (['text.nii.gz', '--out', 'x', '--thread', '3'], 2, 'Did you mean --threads?'),
    ],
)
def test_one_case_without_bids_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], code: int, expected: str,
) -> None:  # fmt: skip
    (tmp_path / 'text.nii.gz').write_text('this is not an image')
    monkeypatch.chdir(tmp_path)
    assert segment.main(words) == code
    said = capsys.readouterr().err
    assert expected in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / 'x').exists()


def test_a_percent_sign_in_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    code = (
        'import sys; from pathlib import Path\n'
        'from babyseg_bids.cli.environment import configure_nipype\n'
        'from babyseg_bids.settings import Settings\n'
        "configure_nipype(Settings(Path('in'), Path(sys.argv[1])))\n"
        "from nipype import config; print(config.get('execution', 'crashdump_dir'))"
    )
    run = [sys.executable, '-c', code, str(tmp_path / '100 %j')]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / '100 %j' / 'logs'), done.stderr


# The work folder.


def settings_in(folder: Path, **changes: Any) -> Settings:
    return Settings(folder / 'in', folder / 'out', **changes)


def test_the_default_work_folder_goes_after_success_and_stays_after_failure(
    tmp_path: Path,
) -> None:
    (tmp_path / 'out').mkdir()
    settings = settings_in(tmp_path)
    folder = scratch.prepare_scratch(settings)
    (folder / 'cache').mkdir()
    scratch.release_scratch(settings, [], success=False)
    assert folder.is_dir()
    scratch.prepare_scratch(settings)
    scratch.release_scratch(settings, [], success=True)
    assert not folder.exists()


def test_a_run_that_ends_leaves_the_files_of_one_that_goes_on(tmp_path: Path) -> None:
    first, second = settings_in(tmp_path), settings_in(tmp_path)
    folder = scratch.prepare_scratch(first)
    scratch.prepare_scratch(second)
    for name in ('one', 'two'):
        (folder / name).mkdir()
    scratch.release_scratch(first, [folder / 'one'], success=True)
    assert not (folder / 'one').exists()
    assert (folder / 'two').is_dir()
    scratch.release_scratch(second, [folder / 'two'], success=True)
    assert not folder.exists()


def test_a_work_folder_of_the_users_own_is_kept(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, work_dir=tmp_path / 'work')
    scratch.prepare_scratch(settings)
    scratch.release_scratch(settings, [], success=True)
    assert (tmp_path / 'work').is_dir()


def test_cleaning_deletes_only_what_babyseg_made(tmp_path: Path) -> None:
    mine, theirs = tmp_path / 'mine', tmp_path / 'theirs'
    theirs.mkdir()
    (theirs / 'thesis.txt').touch()
    with pytest.raises(UsageError, match='nothing was deleted'):
        scratch.prepare_scratch(settings_in(tmp_path, work_dir=theirs, clean_workdir=True))
    assert (theirs / 'thesis.txt').exists()
    scratch.prepare_scratch(settings_in(tmp_path, work_dir=mine))
    (mine / 'old').touch()
    scratch.prepare_scratch(settings_in(tmp_path, work_dir=mine, clean_workdir=True))
    assert not (mine / 'old').exists()


# What became of each session.


@pytest.fixture
def out_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a session is done when it has a ledger, whatever is in it."""

    def is_done(session: SessionInputs, out_dir: Path, _: Settings) -> bool:
        return verdicts.stamp(session, out_dir) > 0

    fake = SimpleNamespace(is_done=is_done)
    monkeypatch.setitem(sys.modules, 'babyseg_bids.outputs', fake)
    (tmp_path / 'out').mkdir()
    return tmp_path / 'out'


def complete(session: SessionInputs, out_dir: Path) -> None:
    """Write what is written last."""
    folder = out_dir.joinpath(*session.name.split('_'), 'anat')
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f'{session.name}_desc-inputs_ledger.json').write_text('{}')


def judged(
    sessions: list[SessionInputs], settings: Settings, before: dict[str, int] | None = None
) -> list[verdicts.Verdict]:
    fates: dict[str, verdicts.Fate] = {
        s.name: 'to do' if s.scans else 'no usable image' for s in sessions
    }
    stamps = {s.name: 0 for s in sessions} | (before or {})
    return verdicts.judge(sessions, fates, stamps, settings)


def concluded(sessions: list[SessionInputs], settings: Settings) -> int:
    console = progress.error_console()
    return verdicts.conclude(sessions, judged(sessions, settings), settings, console)


def test_a_session_with_its_files_is_done_and_one_without_has_failed(out_dir: Path) -> None:
    sessions = [session('1', scans=1), session('2', 'A', scans=1)]
    settings = settings_in(out_dir.parent)
    complete(sessions[1], out_dir)
    assert [v.fate for v in judged(sessions, settings)] == ['failed', 'done']
    assert concluded(sessions, settings) == 1
    complete(sessions[0], out_dir)
    assert concluded(sessions, settings) == 0


def test_old_files_do_not_hide_that_an_overwriting_run_failed(out_dir: Path) -> None:
    one = session('1', scans=1)
    complete(one, out_dir)
    before = {one.name: verdicts.stamp(one, out_dir)}
    (verdict,) = judged([one], settings_in(out_dir.parent, overwrite=True), before)
    assert verdict.fate == 'failed'


def test_a_failure_is_explained_by_the_first_crash_of_this_run(
    out_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = session('01', scans=1)
    settings = settings_in(out_dir.parent)
    day = int(settings.run_uuid.split('-')[0])
    later = OURS.replace('AlignmentError: The', 'AlignmentError: Later, the')
    for run, when, text in (
        ('an-older-run', day + 1, OURS.replace('fit', 'exist')),
        (settings.run_uuid, day + 1, OURS),
        (settings.run_uuid, day + 2, later),
    ):
        folder = out_dir / 'sub-01' / 'log' / run
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f'crash-{when}-120000-me-align-x.txt').write_text(text)
    (verdict,) = judged([one], settings)
    assert verdict.reason == 'The scans do not fit: look at them. (step align)'
    assert concluded([one], settings) == 1
    assert str(verdict.crash_file) in capsys.readouterr().out


def test_sessions_without_images_do_not_fail_a_run_that_has_others(out_dir: Path) -> None:
    sessions = [session('1', scans=1), session('2')]
    complete(sessions[0], out_dir)
    assert concluded(sessions, settings_in(out_dir.parent)) == 0


def test_a_participant_asked_for_by_name_who_has_nothing_fails_the_run(out_dir: Path) -> None:
    sessions = [session('1', scans=1), SessionInputs('99', None, (), Age())]
    complete(sessions[0], out_dir)
    assert concluded(sessions, settings_in(out_dir.parent)) == 0
    assert concluded(sessions, settings_in(out_dir.parent, participants=('1', '99'))) == 1


def test_without_one_usable_image_there_was_no_input(out_dir: Path) -> None:
    with pytest.raises(NoInputError, match='not a NIfTI'):
        concluded([session('1'), session('2')], settings_in(out_dir.parent))


def test_the_plan_shows_every_image_with_its_use_and_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = (
        LedgerRow('sub-1/anat/sub-1_run-2_T1w.nii.gz', 'T1w', 'reference', 'the finest'),
        LedgerRow('sub-1/anat/sub-1_run-1_T1w.nii.gz', 'T1w', 'rejected', 'it is [bold] empty'),
    )
    one = SessionInputs('1', None, (), Age(6.5), rows, (Flag('x', 'warning', 'odd [age]'),))
    fates: dict[str, verdicts.Fate] = {'sub-1': 'to do', 'sub-2': 'no usable image'}
    console = tables.console()
    console.print(tables.plan_table([one, SessionInputs('2', None, (), Age())], fates))
    for line in tables.notes([one], everything=False):
        tables.print_line(console, line)
    said = capsys.readouterr().out
    for text in ('sub-1_run-2_T1w.nii.gz', 'reference', 'the finest', '6.5 months', 'rejected',
                 'it is [bold] empty', 'odd [age]', messages.NO_ANATOMICAL):  # fmt: skip
        assert text in said


def test_the_estimate_follows_sessions_memory_and_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / 'T1w.nii.gz'
    nib.save(nib.Nifti1Image(np.zeros((100, 100, 100), np.int16), np.eye(4)), path)
    scan = Scan(str(path), 'x/T1w.nii.gz', 'T1w')
    to_do = [SessionInputs(str(n), None, (scan,), Age()) for n in range(5)]
    settings, shares = settings_in(tmp_path), Plan(threads=2, at_once=2, processors=4, workers=3)
    first = estimate.estimate(to_do, [], settings, shares)
    assert (first.sessions, first.known, first.memory_gb) == (5, 0, 2 * SESSION_GB)
    # Two at a time: three rounds.
    assert first.seconds == 3 * first.each
    assert first.disk_bytes == 5 * (estimate.PAGE_BYTES + 1e6 * estimate.VOXEL_BYTES)
    done = [session('8', scans=1), session('9', scans=1), session('10', scans=1)]
    for one, content in zip(done, ('{"seconds": 40}', '{"seconds": 60}', '{'), strict=True):
        complete(one, tmp_path / 'out')
        ledger_path(one, tmp_path / 'out').write_text(content)
    later = estimate.estimate(to_do, done, settings, shares)
    assert (later.known, later.each, later.seconds) == (2, 50, 150)


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    dataset: Path, tmp_path: Path
) -> None:
    head(dataset / 'sub-02' / 'anat' / 'sub-02_T2w.nii.gz')
    done = babyseg(dataset, tmp_path / 'out', 'participant', '--dry-run', '--age-months', '02=3')
    assert done.returncode == 0, done.stderr
    for text in ('3 months', 'sub-02_T2w.nii.gz', 'sub-01_T1w.nii.gz', 'Estimate for 1 to do',
                 'Sessions: 1 to do, 0 done before, 1 no usable image.'):  # fmt: skip
        assert text in done.stdout
    assert not (tmp_path / 'out').exists()


def test_sessions_run_in_batches_until_one_fails_and_none_is_forgotten(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is left out: what a batch was given, and what is said of the rest."""
    for subject in ('02', '03', '04'):
        head(dataset / f'sub-{subject}' / 'anat' / f'sub-{subject}_T1w.nii.gz')
    seen: list[tuple[list[str], int]] = []

    def run(_: object, sessions: list[SessionInputs], *, later: int) -> bool:
        seen.append(([s.name for s in sessions], later))
        return len(seen) < 2

    monkeypatch.setattr('babyseg_bids.cli.segmenter.Segmenter.segment', run)
    monkeypatch.setattr(participant, 'BATCH', 2)
    assert participant.run_participant(Settings(dataset, tmp_path / 'out', mem_gb=4.0)) == 1
    assert seen == [(['sub-02'], 2), (['sub-03', 'sub-04'], 0)]
    seen.clear()
    monkeypatch.setattr(participant, 'BATCH', 1)
    sessions, fates, _ = participant._segment_all(
        participant.find(Settings(dataset, tmp_path / 'out')),
        Settings(dataset, tmp_path / 'out', mem_gb=4.0),
        progress.error_console(),
    )
    # The second batch failed: the third session was not run, and has not been forgotten.
    assert [names for names, _ in seen] == [['sub-02'], ['sub-03']]
    assert [s.name for s in sessions] == ['sub-01', 'sub-02', 'sub-03', 'sub-04']
    assert fates['sub-04'] == messages.TO_DO


# Crashes and progress.

OURS = """Node: babyseg_wf.sub_01_wf.align
Working directory: /w

Node inputs:

x = 1
Traceback (most recent call last):
  File "multiproc.py", line 66, in run_node
    result["result"] = node.run(updatehash=updatehash)
nipype.pipeline.engine.nodes.NodeExecutionError: Exception raised while executing Node align.

Traceback:
\tTraceback (most recent call last):
\t  File "core.py", line 401, in run
\t    runtime = self._run_interface(runtime)
\tbabyseg_bids.errors.AlignmentError: The scans do not fit: look at them.


When creating this crashfile, the results file corresponding
to the node could not be found.
"""


def test_the_sentence_of_our_own_errors_stands_for_itself(tmp_path: Path) -> None:
    crash = crashes.parse_crash(OURS, tmp_path)
    assert crash.reason == 'The scans do not fit: look at them.'
    assert crash.name == 'align'


@pytest.mark.parametrize(
    ('last', 'reason'),
    [
        ('ValueError: bad: shape\n\tmore: lines', 'ValueError: bad: shape'),
        ('MemoryError', 'MemoryError'),
        ('torch.cuda.OutOfMemoryError: CUDA out of memory.',
         'OutOfMemoryError: CUDA out of memory.'),
    ],
)  # fmt: skip
def test_other_errors_keep_their_name(last: str, reason: str) -> None:
    ours = 'babyseg_bids.errors.AlignmentError: The scans do not fit: look at them.'
    assert crashes.crash_reason(OURS.replace(ours, last)) == reason


def test_the_cause_is_told_and_not_that_a_step_left_no_results() -> None:
    text = """Traceback (most recent call last):
  File "tools.py", line 1, in savepkl
OSError: [Errno 28] No space left on device

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "nodes.py", line 2, in result
FileNotFoundError: /w/measure/result_measure.pklz
"""
    assert crashes.crash_reason(text) == 'OSError: [Errno 28] No space left on device'


def test_steps_belong_to_the_session_with_the_longest_matching_name() -> None:
    sessions = [session('1'), session('1', 'A'), session('10'), session('1', 'AB')]
    names = {
        'babyseg_wf.sub_1_wf.segment': 'sub-1',
        'babyseg_wf.sub_1_ses_A_wf.segment': 'sub-1_ses-A',
        'babyseg_wf.sub_10_wf.inner.segment': 'sub-10',
        'babyseg_wf.session_sub_1_ses_AB_wf.align': 'sub-1_ses-AB',
    }
    found = {step: getattr(crashes.session_of(step, sessions), 'name', None) for step in names}
    assert found == names
    assert crashes.session_of('babyseg_wf.dataset', sessions) is None


def test_a_session_is_over_when_all_its_steps_are_or_one_failed() -> None:
    steps = [f'babyseg_wf.sub_{s}_wf.{n}' for s in '12' for n in ('align', 'segment', 'write')]
    tracker = progress.Tracker(2)
    tracker.begin([session('1'), session('2')], steps)
    assert tracker.remaining() is None
    assert [tracker.update(s, 'end') for s in steps[:3]] == [None, None, 'sub-1']
    assert tracker.share == pytest.approx(0.5)
    assert tracker.update(steps[3], 'start') is None
    assert tracker.update(steps[3], 'exception') == 'sub-2'
    # Nipype reports the end of some failed steps, too.
    assert tracker.update(steps[3], 'end') is None
    assert (tracker.over, tracker.failed) == (2, 1)


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [(0.2, '1 s'), (40, '40 s'), (720, '12 min'), (12000, '3 h 20 min')],
)
def test_durations_are_written_as_people_say_them(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


# Plugins and the share of the machine.


@pytest.mark.parametrize(
    'text',
    ['plugin: SLURM\nplugin_args: {n: 4}', '{"plugin": "SLURM", "plugin_args": {"n": 4}}'],
)
def test_a_plugin_file_is_yaml_or_json(tmp_path: Path, text: str) -> None:
    (tmp_path / 'plugin.yml').write_text(text)
    assert execution.read_plugin(tmp_path / 'plugin.yml') == ('SLURM', {'n': 4})


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('plugin_args: {}', 'no key plugin'),
        ('plugin: [', 'cannot be used'),
        ('plugin: SLURM\nargs: {}', 'unknown key args'),
        ('plugin: SLURM\nplugin_args: 4', 'not a mapping'),
    ],
)
def test_a_bad_plugin_file_is_named_with_its_fault(
    tmp_path: Path, text: str, expected: str
) -> None:
    (tmp_path / 'plugin.yml').write_text(text)
    with pytest.raises(UsageError, match=expected) as caught:
        execution.read_plugin(tmp_path / 'plugin.yml')
    assert 'plugin.yml' in str(caught.value)


def test_a_plugin_that_nipype_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='Did you mean SLURM'):
        execution.check_plugin('SLRUM', tmp_path)


def test_what_the_user_gives_goes_before_what_the_machine_has(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, nprocs=16, mem_gb=60.0)
    decided, shares, cpus, memory = execution.decide_resources(settings, 100)
    assert (decided.nprocs, decided.mem_gb, decided.omp_nthreads) == (16, 60, shares.threads)
    assert (cpus.source, memory.source) == ('--nprocs', '--mem')
    own = execution.decide_resources(settings_in(tmp_path), 100)[0]
    assert own.nprocs >= 1
    assert own.mem_gb > 0


# The pool of workers.


def step_that_may_be_killed(name: str, folder: str) -> str:
    """Nipype copies the source of this function, so that it finds no imports of this module."""
    from os import getpid, kill
    from pathlib import Path
    from time import sleep

    (Path(folder) / f'{name}-{getpid()}').touch()
    # Both have begun before one is killed, or a slow start would hide the other's second try.
    while len(list(Path(folder).iterdir())) < 2:
        sleep(0.05)
    if name == 'victim':
        kill(getpid(), 9)
    sleep(1)
    return name


def test_a_killed_worker_costs_its_own_session_only(tmp_path: Path) -> None:
    """One step is killed by the system while another runs: that one gets a second try."""
    script = tmp_path / 'run.py'
    script.write_text(POOL_SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, 'PYTHONPATH': str(Path(__file__).parent)},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report['statuses'] == {'sub_1': 'exception', 'sub_2': 'end'}
    (crash,) = report['crashes']
    assert crash['step'] == 'babyseg_wf.sub_1_wf.segment'
    assert crash['reason'] == messages.memory_kill(3.0, 1.5, 'control group')


POOL_SCRIPT = """
import json
import os
import sys
from pathlib import Path

os.environ['NO_ET'] = '1'

if __name__ == '__main__':
    import nipype.pipeline.engine as pe
    from nipype.interfaces.utility import Function
    from test_cli import step_that_may_be_killed

    from babyseg_bids.cli import crashes, environment, execution
    from babyseg_bids.resources import Limit, Plan
    from babyseg_bids.settings import Settings

    folder = Path(sys.argv[1])
    (folder / 'marks').mkdir()
    settings = Settings(folder / 'in', folder / 'out', nprocs=2, mem_gb=8.0)
    environment.configure_nipype(settings)
    workflow = pe.Workflow('babyseg_wf', base_dir=str(folder / 'work'))
    for number, name in ((1, 'victim'), (2, 'bystander')):
        part = pe.Workflow(f'sub_{number}_wf')
        step = pe.Node(
            Function(['name', 'folder'], ['out'], function=step_that_may_be_killed), 'segment'
        )
        step.inputs.trait_set(name=name, folder=str(folder / 'marks'))
        part.add_nodes([step])
        workflow.add_nodes([part])
    statuses = {}

    def note(node, status, _result=None):
        statuses[node.fullname.split('.')[1].removesuffix('_wf')] = status

    limit = Limit(1.5, 'control group')
    execution.run_workflow(workflow, settings, Plan(1, 2, 2, 2), limit, 3.0, note)
    found = [{'step': c.step, 'reason': c.reason} for c in crashes.read_crashes(settings)]
    print(json.dumps({'statuses': statuses, 'crashes': found}))
"""
