"""Tasks of a job array: each has its own share, and together they have all."""

import random
from collections import Counter
from pathlib import Path

import pytest
from test_cli import babyseg, complete, judged, one_sentence, out_dir, session

from babyseg_bids import discovery
from babyseg_bids.cli import progress, scratch, verdicts
from babyseg_bids.cli.parser import parse_settings
from babyseg_bids.discovery import find_sessions
from babyseg_bids.errors import NoInputError, UsageError
from babyseg_bids.settings import Settings
from babyseg_bids.shares import ArrayTask, count_sessions, deal, parse_array_task, share

__all__ = ['out_dir']


def image(root: Path, name: str) -> None:
    """A file with the name of a scan; discovery without a look into images needs no more."""
    subject, *rest = name.split('_')
    folder = root / subject / (f'{rest[0]}/anat' if rest[0].startswith('ses-') else 'anat')
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f'{name}.nii.gz').touch()


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Five subjects with nine sessions, one of them without session folders."""
    root = tmp_path / 'data'
    root.mkdir()
    (root / 'dataset_description.json').write_text('{"Name": "test", "BIDSVersion": "1.10.0"}')
    for name in ('01_ses-A', '01_ses-B', '01_ses-C', '2_ses-A', '10', '11_ses-A', '11_ses-B'):
        image(root, f'sub-{name}_T1w')
    for label in 'AB':
        image(root, f'sub-12_ses-{label}_T2w')
    (root / 'sub-12' / 'ses-X' / 'func').mkdir(parents=True)
    (root / 'derivatives' / 'sub-99').mkdir(parents=True)
    return root


# Which task.


@pytest.mark.parametrize(('text', 'number'), [('1/1', 1), (' 2/8', 2), ('08/8', 8)])
def test_a_task_is_a_number_of_all(text: str, number: int) -> None:
    assert parse_array_task(text).number == number


@pytest.mark.parametrize(
    ('text', 'said'),
    [
        ('0/3', 'its tasks are 1 to 3'),
        ('4/3', 'its tasks are 1 to 3'),
        ('0/0', 'there is no task 0/0'),
        ('2', 'such as 2/8'),
        ('a/b', 'such as 2/8'),
        ('-1/3', 'such as 2/8'),
        ('1/3/5', 'such as 2/8'),
        ('', 'such as 2/8'),
    ],
)
def test_what_is_no_task_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_array_task(text)


def slurm(**values: int) -> dict[str, str]:
    return {f'SLURM_ARRAY_TASK_{name}': str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ('environ', 'task'),
    [
        (slurm(ID=3, COUNT=8, MIN=1, MAX=8), ArrayTask(3, 8)),
        (slurm(ID=0, COUNT=8, MIN=0, MAX=7), ArrayTask(1, 8)),
        (slurm(ID=6, COUNT=3, MIN=2, MAX=6, STEP=2), ArrayTask(3, 3)),
        (slurm(ID=3, COUNT=8, MIN=1), ArrayTask(3, 8)),
    ],
)
def test_slurm_is_asked_when_the_user_says_so(environ: dict[str, str], task: ArrayTask) -> None:
    assert parse_array_task('auto', environ) == task


@pytest.mark.parametrize(
    ('environ', 'said'),
    [
        ({}, 'SLURM_ARRAY_TASK_ID is not set'),
        (slurm(ID=3), 'SLURM_ARRAY_TASK_COUNT is not set'),
        (slurm(ID=3, COUNT=8), 'SLURM_ARRAY_TASK_MIN is not set'),
        # --array=1,2,7
        (slurm(ID=2, COUNT=3, MIN=1, MAX=7), 'not evenly spaced'),
        (slurm(ID=7, COUNT=3, MIN=1, MAX=7, STEP=2), 'not evenly spaced'),
    ],
)
def test_an_array_that_cannot_be_counted_is_refused(environ: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_array_task('auto', environ)


def test_nothing_is_shared_unless_the_user_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in slurm(ID=2, COUNT=3, MIN=1, MAX=3).items():
        monkeypatch.setenv(name, value)
    places = ['in', 'out', 'participant']
    assert parse_settings(places).task is None
    settings = parse_settings([*places, '--array_task', 'auto'])
    assert settings.task == ArrayTask(2, 3)
    # What is recorded names the task itself, and says the same in another job.
    assert 'array-task = "2/3"' in settings.to_toml()


# Which sessions.


def test_sessions_are_counted_by_the_names_of_folders(dataset: Path) -> None:
    assert count_sessions(dataset) == {'01': 3, '2': 1, '10': 1, '11': 2, '12': 2}
    assert list(count_sessions(dataset)) == ['01', '2', '10', '11', '12']
    assert count_sessions(dataset, ['11', '77', '11']) == {'11': 2, '77': 0}
    assert count_sessions(dataset, sessions=['B']) == {'01': 1, '2': 0, '10': 0, '11': 1, '12': 1}


@pytest.mark.parametrize('tasks', [1, 2, 3, 5, 9, 40])
def test_the_tasks_together_have_every_session_once(dataset: Path, tasks: int) -> None:
    everything = [s.name for s in find_sessions(dataset, check_images=False)]
    assert len(everything) == 9
    found = [
        s.name
        for number in range(1, tasks + 1)
        for s in find_sessions(dataset, task=ArrayTask(number, tasks), check_images=False)
    ]
    assert found == everything


def test_a_share_looks_at_its_own_subjects_only(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = discovery.list_anat_files

    def listing(root: Path, subjects: tuple[str, ...], **more: Path | None) -> list[str]:
        asked.append(subjects)
        return real(root, subjects, **more)

    monkeypatch.setattr(discovery, 'list_anat_files', listing)
    find_sessions(dataset, task=ArrayTask(3, 3), check_images=False)
    assert asked == [('11', '12')]


def test_random_datasets_are_dealt_out_evenly_and_without_a_gap() -> None:
    seed = random.randrange(2**32)
    print(f'seed {seed}')
    generator = random.Random(seed)
    for _ in range(200):
        counts = {f'{n:03d}': generator.randint(0, 6) for n in range(generator.randint(1, 60))}
        tasks = generator.randint(1, 30)
        numbers = deal(counts, tasks)
        assert list(numbers) == list(counts)
        assert sorted(numbers.values()) == list(numbers.values()), 'neighbours stay together'
        assert set(numbers.values()) <= set(range(1, tasks + 1))
        shares = [share(counts, ArrayTask(n + 1, tasks)) for n in range(tasks)]
        assert [subject for subjects in shares for subject in subjects] == list(counts)
        sizes = Counter(dict.fromkeys(range(1, tasks + 1), 0))
        for subject, number in numbers.items():
            sizes[number] += counts[subject]
        # A subject is not divided, so that a share misses its aim by half a subject at each end.
        aim, largest = sum(counts.values()) / tasks, max(counts.values())
        assert max(abs(size - aim) for size in sizes.values()) <= largest


def test_what_is_done_already_changes_no_share(dataset: Path, tmp_path: Path) -> None:
    task = ArrayTask(2, 3)
    before = find_sessions(dataset, task=task, check_images=False)
    for done in before:
        complete(done, tmp_path / 'out')
    assert find_sessions(dataset, task=task, check_images=False) == before


def test_participants_who_were_asked_for_are_shared_and_none_is_forgotten(dataset: Path) -> None:
    names, absent = [], []
    for number in (1, 2):
        found = find_sessions(
            dataset, participants=['sub-12', '01', '77'], task=ArrayTask(number, 2),
            check_images=False,
        )  # fmt: skip
        names += [s.name for s in found]
        absent += [s.name for s in found if not s.ledger]
    assert names == [
        'sub-01_ses-A', 'sub-01_ses-B', 'sub-01_ses-C', 'sub-12_ses-A', 'sub-12_ses-B', 'sub-77',
    ]  # fmt: skip
    assert absent == ['sub-77']


def test_an_index_of_the_dataset_gives_the_same_shares(dataset: Path, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        task = ArrayTask(number, 3)
        plain = find_sessions(dataset, task=task, check_images=False)
        indexed = find_sessions(
            dataset, task=task, check_images=False, database_dir=tmp_path / 'index'
        )
        assert indexed == plain


def test_a_dataset_in_which_no_task_finds_anything_is_refused_by_each(dataset: Path) -> None:
    with pytest.raises(NoInputError, match='ses-Z'):
        find_sessions(dataset, sessions=['Z'], task=ArrayTask(1, 2))
    with pytest.raises(NoInputError, match='sub-77'):
        find_sessions(dataset, participants=['77'], task=ArrayTask(2, 2))


# A run of a task.


def test_an_empty_share_is_a_success_of_one_sentence(dataset: Path, tmp_path: Path) -> None:
    done = babyseg(dataset, tmp_path / 'out', 'participant', '--array-task', '1/40')
    assert done.returncode == 0
    assert done.stderr.strip() == (
        'Task 1/40 has no sessions: there are fewer subjects than tasks.'
    )


def test_the_group_level_has_no_tasks(tmp_path: Path) -> None:
    done = babyseg(tmp_path, tmp_path, 'group', '--array-task', '1/2')
    assert 'participant level' in one_sentence(done, 2)


def test_a_share_without_usable_images_is_no_failure_of_its_task(out_dir: Path) -> None:
    settings = Settings(out_dir.parent / 'in', out_dir, array_task='1/2')
    sessions = [session('1'), session('2')]
    outcome = judged(sessions, settings)
    assert verdicts.conclude(sessions, outcome, settings, progress.error_console()) == 0
    with pytest.raises(NoInputError):
        alone = settings.replace(array_task=None)
        verdicts.conclude(sessions, outcome, alone, progress.error_console())


def test_tasks_keep_their_intermediate_files_apart(tmp_path: Path) -> None:
    (tmp_path / 'out').mkdir()
    alone = Settings(tmp_path / 'in', tmp_path / 'out')
    first, second = (alone.replace(array_task=f'{n}/2', run_uuid=f'run{n}') for n in (1, 2))
    folders = [scratch.prepare_scratch(settings) for settings in (first, second)]
    assert folders[0].parent == folders[1].parent == alone.scratch
    scratch.release_scratch(first, [], success=True)
    assert not folders[0].exists()
    assert folders[1].is_dir()
    # The second is killed, and begins again as another run.
    again = second.replace(run_uuid='run3', clean_workdir=True)
    (folders[1] / 'old').touch()
    assert scratch.prepare_scratch(again) == folders[1]
    assert list(folders[1].iterdir()) == []
    # A run beside it leaves its files alone.
    scratch.prepare_scratch(alone)
    scratch.release_scratch(alone, [], success=True)
    assert folders[1].is_dir()
    scratch.release_scratch(again, [], success=True)
    # The group level sweeps up.
    with scratch.scratch_folder(alone):
        pass
    assert not alone.scratch.exists()


def test_a_folder_is_emptied_and_not_removed_because_it_may_be_a_mount(tmp_path: Path) -> None:
    settings = Settings(tmp_path, tmp_path / 'out', work_dir=tmp_path / 'work')
    folder = scratch.prepare_scratch(settings)
    number = folder.stat().st_ino
    (folder / 'old').mkdir()
    (folder / 'link').symlink_to(tmp_path)
    scratch.prepare_scratch(settings.replace(clean_workdir=True))
    assert folder.stat().st_ino == number
    assert not (folder / 'old').exists()
    assert tmp_path.is_dir()
