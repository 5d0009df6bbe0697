"""`--submit slurm`: what is asked for, the scripts, and a stand-in for sbatch."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import babyseg, one_sentence

from babyseg_bids.cli import submission
from babyseg_bids.cli.parser import build_parser, parse_command, parse_settings
from babyseg_bids.cli.submit import at_group_level, without_options
from babyseg_bids.errors import UsageError
from babyseg_bids.resources import plan
from babyseg_bids.settings import Settings
from babyseg_bids.shares import ArrayTask, share
from babyseg_bids.slurm import Request, array_request, group_request

HERE = Settings(Path('/in'), Path('/out'))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three subjects with four sessions."""
    root = tmp_path / "the children's data, é"
    for name in ('sub-01/ses-A', 'sub-01/ses-B', 'sub-02/ses-A', 'sub-03/ses-A'):
        (root / name / 'anat').mkdir(parents=True)
    (root / 'dataset_description.json').write_text('{"Name": "test", "BIDSVersion": "1.10.0"}')
    return root


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!{sys.executable}\n{text}')
    path.chmod(0o755)
    return path


def scripts(out: Path) -> tuple[str, str]:
    folder = out / 'logs' / 'slurm'
    return tuple((folder / f'{n}.sbatch').read_text() for n in ('babyseg', 'babyseg-group'))


def directives(script: str) -> dict[str, str]:
    """What sbatch reads: lines before the first command."""
    lines = re.findall(r'^#SBATCH --([\w-]+)=?(.*)$', script, flags=re.MULTILINE)
    return {name: value for name, value in lines}  # noqa: C416


def program(script: str, task: int | None = None) -> list[str]:
    """The words that the last line runs, as bash reads them."""
    script = re.sub(r'^exec ', 'printf "%s\\\\0" ', script, flags=re.MULTILINE)
    environ = {**os.environ, **({'SLURM_ARRAY_TASK_ID': str(task)} if task else {})}
    done = subprocess.run(['bash', '-c', script], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split('\0')[:-1]


# What is asked for.


def test_a_task_has_work_for_about_ten_minutes() -> None:
    counts = {f'{n:03d}': 1 for n in range(400)}
    request = array_request(counts, HERE)
    assert request.tasks == 20
    # 20 sessions of 30 s, four times as long if need be.
    assert (request.minutes, request.time) == (40, '00:40:00')


def test_memory_is_enough_for_what_babyseg_then_does_with_it() -> None:
    for cpus in (1, 2, 4, 8, 16):
        request = array_request({'1': 500}, HERE.replace(nprocs=cpus))
        shares = plan(cpus, request.mem_mb / 1024 * 0.9, 500)
        assert shares.at_once == plan(cpus, 1000, 500).at_once
        assert shares.workers == min(cpus, shares.at_once + 1)
    assert array_request({'1': 500}, HERE).mem_mb == 5 * 1024


def test_what_the_user_says_of_the_machine_is_asked_for() -> None:
    settings = HERE.replace(nprocs=6, mem_gb=10.5, device='cuda:0')
    assert array_request({'1': 1}, settings) == Request(1, 6, 10752, 10, gpus=1)
    assert array_request({'1': 1}, HERE.replace(device='auto')).gpus == 0


def test_one_processor_gets_twice_the_time() -> None:
    counts = {f'{n}': 1 for n in range(20)}
    assert array_request(counts, HERE.replace(nprocs=1)).minutes == 80
    assert array_request(counts, HERE.replace(nprocs=8)).minutes == 40


def test_an_array_has_no_more_tasks_than_subjects_and_than_slurm_allows() -> None:
    assert array_request({'1': 90, '2': 10, '3': 0}, HERE, 5).tasks == 2
    many = {f'{n:06d}': 1 for n in range(100_000)}
    request = array_request(many, HERE, 1)
    assert request.tasks == 1000
    assert request.minutes == 200


def test_time_is_for_the_task_that_has_most() -> None:
    counts = {'1': 1, '2': 100, '3': 1}
    request = array_request(counts, HERE, 40)
    sizes = [
        sum(counts[s] for s in share(counts, ArrayTask(n + 1, request.tasks)))
        for n in range(request.tasks)
    ]
    assert max(sizes) >= 100
    assert request.minutes == 2 * max(sizes)


def test_the_group_level_asks_for_little() -> None:
    assert group_request(3).minutes == 10
    assert group_request(10_000).minutes < 60


# The command line.


def test_a_submission_is_no_setting_of_a_run() -> None:
    settings, job = parse_command(
        ['in', 'out', 'participant', '--submit', 'slurm', '--now', '--slurm_account=lab']
    )
    assert job == submission.Submission('slurm', now=True, slurm_account='lab')
    assert 'slurm' not in settings.to_toml()
    assert parse_command(['in', 'out', 'participant'])[1] is None


def test_the_number_of_values_of_each_option_is_known() -> None:
    table = build_parser()._option_string_actions
    for option, values in submission.OPTIONS.items():
        assert values == (0 if table[option].nargs == 0 else 1), option


@pytest.mark.parametrize(
    'option', ['--now', '--sessions-per-task=3', '--slurm-account=x', '--slurm-partition=x']
)
def test_parts_of_a_submission_mean_nothing_alone(option: str) -> None:
    with pytest.raises(UsageError, match='together with --submit slurm'):
        parse_settings(['in', 'out', 'participant', option])


@pytest.mark.parametrize('key', ['submit = "slurm"', 'now = true', 'slurm-account = "x"'])
def test_a_settings_file_submits_nothing(tmp_path: Path, key: str) -> None:
    (tmp_path / 'x.toml').write_text(f'{key}\n')
    with pytest.raises(UsageError, match='unknown key'):
        parse_settings(['in', 'out', 'participant', f'--config-file={tmp_path / "x.toml"}'])


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        (['group', '--submit', 'slurm'], 'participant level'),
        (['participant', '--submit', 'slurm', '--array-task', '1/2'], 'cannot be given together'),
        (['participant', '--submit', 'sge'], 'slurm'),
        (['participant', '--submit', 'slurm', '--sessions-per-task', '0'], 'at least 1'),
        (['participant', '--submit', 'slurm', '--model', 'no/such.file'], 'does not exist'),
    ],
)
def test_what_cannot_be_submitted_is_refused(
    dataset: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    assert said in one_sentence(babyseg(dataset, tmp_path / 'out', *words), 2)
    assert not (tmp_path / 'out').exists()


def test_labels_that_match_nothing_are_not_submitted(dataset: Path, tmp_path: Path) -> None:
    words = ('participant', '--submit', 'slurm', '--participant-label', '77')
    assert 'nothing to submit' in one_sentence(babyseg(dataset, tmp_path / 'out', *words), 3)
    assert not (tmp_path / 'out').exists()


def test_options_of_the_submission_are_left_out_of_the_jobs() -> None:
    words = [
        'in', 'out', 'participant', '--submit', 'slurm', '--now', '-v', '--slurm_partition=gpu',
        '--model', 'x', '--sessions-per-task', '3',
    ]  # fmt: skip
    kept = without_options(words, submission.OPTIONS)
    assert kept == ['in', 'out', 'participant', '-v', '--model', 'x']


@pytest.mark.parametrize(
    ('words', 'place'),
    [
        ('in out participant -v', 2),
        ('--participant-label participant in out participant', 4),
        ('in out participant --participant-label participant', 2),
        ('-w work in out participant --nprocs 2', 4),
    ],
)
def test_the_group_job_is_the_same_command_at_another_level(words: str, place: int) -> None:
    changed = at_group_level(words.split())
    assert [i for i, w in enumerate(changed) if w == 'group'] == [place]
    assert len(changed) == len(words.split())


# The scripts.


def test_scripts_are_written_and_only_the_commands_are_printed(
    dataset: Path, tmp_path: Path
) -> None:
    words = (
        dataset.name, "it's out", 'participant', '--submit', 'slurm', '--sessions-per-task', '2',
        '--slurm-partition', 'long', '--slurm-account=lab', '--participant-label', '01', 'sub-03',
        '--bids-filter-file', '{"t1w": {"run": null}}', '-w', 'a b$(c)',
    )  # fmt: skip
    done = babyseg(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "it's out"
    array, group = scripts(out)
    logs = f'{out}/logs/slurm'
    assert directives(array) == {
        'job-name': 'babyseg', 'nodes': '1', 'ntasks': '1', 'cpus-per-task': '2', 'mem': '5120M',
        'time': '00:10:00', 'partition': 'long', 'account': 'lab', 'chdir': f'"{tmp_path}"',
        'requeue': '', 'open-mode': 'append', 'array': '1-2',
        'output': f'"{logs}/babyseg-%A_%a.log"',
    }  # fmt: skip
    own = directives(group)
    assert (own['cpus-per-task'], own['output']) == ('1', f'"{logs}/babyseg-group-%j.log"')
    script = str(Path(sys.executable).with_name('babyseg'))
    rest = [*words[10:]]
    expected = [script, '--array-task', '2/2', *words[:3], *rest]
    assert program(array, task=2) == expected
    assert program(group) == [script, *words[:2], 'group', *rest]
    # And what was written means the same to babyseg.
    settings = parse_settings(expected[1:])
    assert (settings.array_task, settings.participants) == ('2/2', ('01', '03'))

    files = [shlex.quote(f'{logs}/{name}.sbatch') for name in ('babyseg', 'babyseg-group')]
    assert done.stdout.splitlines() == [
        f'jobid=$(sbatch --parsable {files[0]})',
        f'sbatch --dependency=afterany:"$jobid" {files[1]}',
    ]
    assert 'in 2 tasks' in done.stderr
    assert not list(out.glob('sub-*'))


def test_a_script_that_is_run_without_sbatch_says_so(dataset: Path, tmp_path: Path) -> None:
    babyseg(dataset, tmp_path / 'out', 'participant', '--submit', 'slurm')
    script = tmp_path / 'out' / 'logs' / 'slurm' / 'babyseg.sbatch'
    environ = {k: v for k, v in os.environ.items() if not k.startswith('SLURM_')}
    done = subprocess.run(['bash', script], env=environ, capture_output=True, text=True)
    assert done.returncode != 0
    assert 'submit this script with sbatch' in done.stderr


def test_a_gpu_is_asked_for_when_the_user_asks(dataset: Path, tmp_path: Path) -> None:
    babyseg(dataset, tmp_path / 'out', 'participant', '--submit', 'slurm', '--device', 'cuda')
    array, group = scripts(tmp_path / 'out')
    assert directives(array)['gpus'] == '1'
    assert 'gpus' not in directives(group)


SBATCH = """\
import json, os, sys
with open(os.environ['RECORD'], 'a') as file:
    print(json.dumps(sys.argv[1:]), file=file)
if os.environ.get('REFUSE', 'nothing') in sys.argv[-1]:
    sys.exit('sbatch: error: Batch job submission failed: Invalid account')
print('41;cluster' if len(sys.argv) == 3 else '42')
"""


def submit_now(dataset: Path, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, 'PATH': f'{folder / "bin"}:/usr/bin:/bin', **environ}
    words = (dataset, folder / 'out', 'participant', '--submit', 'slurm', '--now')
    return babyseg(*words, env={**environ, 'RECORD': str(folder / 'record')})


def test_both_jobs_are_submitted_and_the_second_waits(dataset: Path, tmp_path: Path) -> None:
    executable(tmp_path / 'bin' / 'sbatch', SBATCH)
    done = submit_now(dataset, tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'job array 41, and job 42' in done.stderr
    logs = tmp_path / 'out' / 'logs' / 'slurm'
    calls = [json.loads(line) for line in (tmp_path / 'record').read_text().splitlines()]
    assert calls == [
        ['--parsable', f'{logs}/babyseg.sbatch'],
        ['--parsable', '--dependency=afterany:41', f'{logs}/babyseg-group.sbatch'],
    ]


def test_what_sbatch_refuses_is_told_in_its_words(dataset: Path, tmp_path: Path) -> None:
    executable(tmp_path / 'bin' / 'sbatch', SBATCH)
    last = one_sentence(submit_now(dataset, tmp_path, REFUSE='babyseg.sbatch'), 2)
    assert 'Invalid account' in last
    last = one_sentence(submit_now(dataset, tmp_path, REFUSE='group.sbatch'), 2)
    assert 'Job 41 was submitted' in last


def test_without_slurm_the_scripts_are_there_all_the_same(dataset: Path, tmp_path: Path) -> None:
    # The folder of sbatch may be that of bash, so that no PATH of the system will do.
    last = one_sentence(submit_now(dataset, tmp_path, PATH=str(tmp_path)), 2)
    assert 'there is no sbatch' in last
    assert str(tmp_path / 'out' / 'logs' / 'slurm') in last
    assert scripts(tmp_path / 'out')
