"""babyseg-wrapper, with stand-ins for the container programs that record what they are given."""

import ast
import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from babyseg_bids import wrapper
from babyseg_bids.cli.parser import build_parser
from babyseg_bids.cli.submit import HOST_VARIABLE
from babyseg_bids.wrapper import FLAGS, OWN, SEVERAL, SINGLE, Option, parse

# Answers as ANSWERS says, and can run babyseg itself with the paths of this machine.
ENGINE = """\
import json, os, signal, subprocess, sys, time
words = sys.argv[1:]
answers = json.loads(os.environ.get('ANSWERS', '{}'))
what = 'image' if words[0] == 'image' else words[0]
with open(os.environ['RECORD'], 'a') as file:
    environ = {k: v for k, v in os.environ.items() if 'ENV_' in k}
    call = {'words': [os.path.basename(sys.argv[0]), *words], 'env': environ}
    print(json.dumps(call), file=file)
code, said, printed = answers.get(what, [0, '', ''])
if code == 'wait':
    signal.signal(getattr(signal, said), lambda *_: sys.exit(77))
    print('ready', flush=True)
    time.sleep(30)
if code == 'babyseg':
    mounts, environ = {}, dict(os.environ)
    for name, value in zip(words, words[1:]):
        if name == '--mount':
            _, source, target, *_ = (field.partition('=')[2] for field in value.split(','))
            mounts[target] = source
        if name == '--env':
            environ[value.partition('=')[0]] = value.partition('=')[2]
    inside = words[words.index('babyseg:test') + 1:]
    for target, source in mounts.items():
        inside = [source + w[len(target):] if w.startswith(target) else w for w in inside]
    os.execve(said, [said, *inside], environ)
sys.stderr.write(said)
sys.stdout.write(printed)
sys.exit(code)
"""


class Place:
    """A machine with some container programs, a dataset, and a record of what was run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / 'bin'
        self.bin.mkdir()
        self.record = folder / 'record'
        self.data = folder / 'the "raw" data é'
        self.data.mkdir()

    def install(self, *names: str, text: str = ENGINE) -> None:
        for name in names:
            (self.bin / name).write_text(f'#!{sys.executable}\n{text}')
            (self.bin / name).chmod(0o755)

    def environ(self, answers: dict[str, list[Any]] | None = None, **more: str) -> dict[str, str]:
        known = {k: v for k, v in os.environ.items() if not k.startswith(('BABYSEG', 'SLURM'))}
        known.pop('TEMPLATEFLOW_HOME', None)
        return known | {
            'PATH': str(self.bin),
            'RECORD': str(self.record),
            'ANSWERS': json.dumps(answers or {}),
            **more,
        }

    def run(
        self, *words: str | Path, answers: dict[str, list[Any]] | None = None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the file alone, as after copying it, in another folder."""
        command = [sys.executable, wrapper.__file__, *map(str, words)]
        return subprocess.run(
            command, cwd=self.folder, env=self.environ(answers, **more), capture_output=True,
            text=True, timeout=60,
        )  # fmt: skip

    def calls(self) -> list[list[str]]:
        if not self.record.exists():
            return []
        return [json.loads(line)['words'] for line in self.record.read_text().splitlines()]

    def started(self, *words: str | Path, **more: Any) -> list[str]:
        """The command of the container, which is the last that is run."""
        done = self.run(self.data, 'out', 'participant', *words, **more)
        assert done.returncode == 0, done.stderr
        return self.calls()[-1]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def values(command: list[str], option: str) -> list[str]:
    """All values of an option that may be repeated."""
    return [b for a, b in pairwise(command) if a == option]


def mounts(command: list[str]) -> dict[str, tuple[str, bool]]:
    """Source of each mount and whether it is writable, by its target, as docker reads them."""
    found = {}
    for line in csv.reader(values(command, '--mount'), strict=True):
        assert line[0] == 'type=bind'
        fields = dict(field.partition('=')[::2] for field in line[1:])
        found[fields['target']] = (fields['source'], 'readonly' not in fields)
    return found


def one_sentence(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, done.stderr
    assert 'Traceback' not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('babyseg-wrapper: ')
    return last


# The file itself.


def test_the_file_needs_nothing_but_an_old_python() -> None:
    tree = ast.parse(Path(wrapper.__file__).read_text('utf-8'), feature_version=(3, 8))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or '' for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.partition('.')[0] for name in names} <= set(sys.stdlib_module_names)


def test_help_and_version_need_no_engine(place: Place) -> None:
    shown = place.run('--help')
    assert shown.returncode == 0
    assert all(option in shown.stdout for option in (*OWN, '--show-command'))
    assert place.run('--version').stdout == f'babyseg-wrapper {wrapper.VERSION}\n'


def test_its_table_of_options_is_that_of_babyseg() -> None:
    own = {*OWN, '--show-command'}
    kinds: dict[str, set[str]] = {'flags': set(), 'single': set(), 'several': set()}
    for name, action in build_parser()._option_string_actions.items():
        kind = {0: 'flags', '+': 'several', None: 'single'}[action.nargs]
        if name.startswith('--'):
            kinds[kind].add(name)
        elif name in wrapper.SHORT:
            assert wrapper.SHORT[name] in action.option_strings
        else:
            assert kind == 'flags', name
    assert kinds['flags'] == set(FLAGS) - own
    assert kinds['several'] == set(SEVERAL)
    assert kinds['single'] == set(SINGLE)


# The command line.


@pytest.mark.parametrize(
    'words',
    [
        'in out participant --participant-label 01 02 -w work --low-mem',
        '-w work --low-mem in out participant --participant-label 01 02',
        '--low-mem -w work --participant_label 01 02 in out participant',
        'in out -w=work participant --low-mem --participant-label 01 02',
        'in -wwork out --low-mem participant --participant-label 01 02',
    ],
)
def test_folders_are_found_wherever_they_stand(words: str) -> None:
    found, options = parse(words.split())
    assert found == ['in', 'out', 'participant']
    read = {o.name: o.values for o in options}
    assert read['--participant-label'] == ['01', '02']
    assert read['--work-dir'][0].lstrip('=') == 'work'
    assert read['--low-mem'] == []


@pytest.mark.parametrize('words', ['', 'in', 'in out', 'in out both', 'my data out participant'])
def test_an_incomplete_command_line_is_explained(place: Place, words: str) -> None:
    place.install('docker')
    assert 'BIDS_DIR OUT_DIR participant' in one_sentence(place.run(*words.split()), 2)
    assert place.calls() == []


def test_a_value_that_begins_with_a_digit_is_no_option() -> None:
    _, options = parse(['in', 'out', 'group', '--random-seed', '-1', '--model=a=b', '-vv'])
    assert options == [
        Option('--random-seed', ['-1'], ['--random-seed', '-1']),
        Option('--model', ['a=b'], ['--model=a=b']),
        Option('-vv', [], ['-vv']),
    ]


def test_options_of_a_newer_babyseg_are_passed_with_their_values() -> None:
    _, options = parse(['in', 'out', 'group', '--new', 'a', 'b', '--newer=c', '-v'])
    assert [o.words for o in options] == [['--new', 'a', 'b'], ['--newer=c'], ['-v']]


def test_an_option_without_its_value_is_explained(place: Place) -> None:
    place.install('docker')
    done = place.run(place.data, 'out', 'participant', '--work-dir')
    assert '--work-dir needs a value' in one_sentence(done, 2)


# What the container is given.


def test_docker_gets_the_least_that_babyseg_needs(place: Place) -> None:
    place.install('docker')
    command = place.started('--participant-label', '01', '02', '--save_probabilities')
    assert command[:3] == ['docker', 'run', '--rm']
    assert mounts(command) == {
        '/data': (str(place.data), False),
        '/out': (str(place.folder / 'out'), True),
    }
    assert values(command, '--network') == ['none']
    assert values(command, '--user') == [f'{os.getuid()}:{os.getgid()}']
    assert values(command, '--env') == ['HOME=/tmp']
    assert values(command, '--tmpfs') == ['/tmp']
    assert values(command, '--pull') == ['never']
    assert '--read-only' in command
    assert '--gpus' not in command
    image = command.index(f'babyseg:{wrapper.VERSION}')
    assert command[image + 1 :] == [
        '/data', '/out', 'participant', '--participant-label', '01', '02', '--save_probabilities',
    ]  # fmt: skip


def test_the_image_is_looked_for_before_anything_is_made(place: Place) -> None:
    place.install('docker')
    place.started('--image', 'mine:1')
    assert [call[1:3] for call in place.calls()] == [
        ['--version'], ['info', '--format'], ['image', 'inspect'], ['run', '--rm'],
    ]  # fmt: skip
    assert place.calls()[2][-1] == 'mine:1'
    assert 'mine:1' in place.calls()[3]


def test_podman_keeps_the_user_and_has_its_own_word_for_gpus(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place.install('podman')
    command = place.started('--device', 'cuda:1')
    assert command[0] == 'podman'
    assert values(command, '--device') == ['nvidia.com/gpu=all', 'cuda:1']
    assert values(command, '--user') == [f'{os.getuid()}:{os.getgid()}']
    # The suite may run as root, who needs no mapping.
    monkeypatch.setattr(os, 'getuid', lambda: 1000)
    monkeypatch.setenv('PATH', str(place.bin))
    assert wrapper.main([str(place.data), 'out', 'participant', '--show-command']) == 0
    assert '--userns keep-id' in capsys.readouterr().out


def test_docker_that_is_podman_in_truth_gets_podmans_options(place: Place) -> None:
    place.install('docker')
    answers = {'--version': [0, '', 'podman version 4.3.1\n']}
    command = place.started('--device=cuda', answers=answers)
    assert command[0] == 'docker'
    assert '--group-add' not in command
    assert 'nvidia.com/gpu=all' in command


def test_docker_without_roots_rights_maps_its_root_to_the_user(place: Place) -> None:
    place.install('docker')
    answers = {'info': [0, '', '[name=seccomp,profile=builtin name=rootless]\n']}
    assert values(place.started(answers=answers), '--user') == ['0:0']


@pytest.mark.parametrize('name', ['apptainer', 'singularity'])
def test_apptainer_and_singularity_are_given_a_file(place: Place, name: str) -> None:
    place.install(name)
    image = place.folder / 'my image.sif'
    image.touch()
    data = place.folder / 'data é'
    data.mkdir()
    done = place.run(
        data, 'out', 'participant', '--image', image.name, '--device=cuda', '--container-memory',
        '8g', '-w', 'scratch', SLURM_CPUS_PER_TASK='3',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    call = json.loads(place.record.read_text())
    assert call['words'] == [
        name, 'run', '--containall', '--cleanenv', '--pwd', '/tmp', '--nv', '--memory', '8g',
        '--bind', f'{data}:/data:ro', '--bind', f'{place.folder}/out:/out:rw',
        '--bind', f'{place.folder}/scratch:/work:rw', image.name,
        '/data', '/out', 'participant', '--device=cuda', '--work-dir', '/work',
    ]  # fmt: skip
    assert call['env'][f'{name.upper()}ENV_SLURM_CPUS_PER_TASK'] == '3'


def test_every_path_is_mounted_and_named_as_inside(place: Place) -> None:
    place.install('docker')
    for name in ('my weights.safetensors', 'filter.json', 'set.toml', 'ages.tsv', 'plugin.yml'):
        (place.folder / name).touch()
    (place.folder / 'templates').mkdir()
    command = place.started(
        '--model', 'my weights.safetensors', '--bids_filter_file=filter.json',
        '--config-file', 'set.toml', '--age-months', 'ages.tsv', '--use-plugin=plugin.yml',
        '-w', 'work', '--bids-database-dir', 'indices/one', TEMPLATEFLOW_HOME='templates',
    )  # fmt: skip
    words = command[command.index(f'babyseg:{wrapper.VERSION}') + 4 :]
    here = str(place.folder)
    assert words == [
        '--model', '/inputs/model/my weights.safetensors',
        '--bids-filter-file', '/inputs/filter/filter.json',
        '--config-file', '/inputs/config/set.toml',
        '--age-months', '/inputs/ages/ages.tsv',
        '--use-plugin', '/inputs/plugin/plugin.yml',
        '--work-dir', '/work',
        '--bids-database-dir', '/inputs/database/one',
    ]  # fmt: skip
    assert mounts(command) == {
        '/data': (str(place.data), False),
        '/out': (f'{here}/out', True),
        '/inputs/model/my weights.safetensors': (f'{here}/my weights.safetensors', False),
        '/inputs/filter/filter.json': (f'{here}/filter.json', False),
        '/inputs/config/set.toml': (f'{here}/set.toml', False),
        '/inputs/ages/ages.tsv': (f'{here}/ages.tsv', False),
        '/inputs/plugin/plugin.yml': (f'{here}/plugin.yml', False),
        '/work': (f'{here}/work', True),
        '/inputs/database': (f'{here}/indices', True),
        '/inputs/templateflow': (f'{here}/templates', False),
    }
    assert 'TEMPLATEFLOW_HOME=/inputs/templateflow' in values(command, '--env')
    # Docker would make what is not there, as root.
    assert all((place.folder / name).is_dir() for name in ('out', 'work', 'indices'))


def test_values_that_are_no_paths_stay_as_they_are(place: Place) -> None:
    place.install('docker')
    words = [
        '--model', 'default', '--bids-filter-file', '{"t1w": {"run": null}}', '--age-months',
        'sub-01=6.5', '02=7', '--fs-license-file', 'no/such/file', '--mem=8G',
    ]  # fmt: skip
    command = place.started(*words)
    assert command[command.index(f'babyseg:{wrapper.VERSION}') + 4 :] == words
    assert len(mounts(command)) == 2


def test_another_folder_is_bound_under_its_own_path(place: Place) -> None:
    place.install('docker')
    annex = place.folder / 'store'
    annex.mkdir()
    command = place.started('--bind', annex, '--bind=store')
    assert mounts(command)[str(annex)] == (str(annex), False)
    assert '--bind' not in command


def test_the_share_of_a_batch_job_is_told_to_the_container(place: Place) -> None:
    place.install('docker')
    command = place.started(SLURM_MEM_PER_NODE='8000', CUDA_VISIBLE_DEVICES='1', SLURM_JOB_ID='7')
    assert values(command, '--env') == [
        'HOME=/tmp', 'CUDA_VISIBLE_DEVICES=1', 'SLURM_MEM_PER_NODE=8000',
    ]  # fmt: skip


def test_the_gpu_is_given_when_it_is_asked_for(place: Place) -> None:
    place.install('docker')
    assert values(place.started('--device', 'cuda'), '--gpus') == ['all']
    assert '--gpus' not in place.started('--device', 'auto')
    place.install('nvidia-smi')
    assert '--gpus' not in place.started()
    done = place.run(place.data, 'out', 'participant', '--device=auto')
    assert 'NVIDIA driver' in done.stderr
    assert values(place.calls()[-1], '--gpus') == ['all']


def test_a_limit_of_memory_is_passed_on(place: Place) -> None:
    place.install('podman')
    assert values(place.started('--container_memory=6g'), '--memory') == ['6g']


def test_the_command_can_be_seen_without_being_run(place: Place) -> None:
    place.install('docker')
    done = place.run(place.data, 'out', 'participant', '--show-command')
    assert shlex.split(done.stdout)[-3:] == ['/data', '/out', 'participant']
    assert [call[1] for call in place.calls()] == ['--version']
    assert not (place.folder / 'out').exists()


def test_the_group_level_needs_no_dataset(place: Place) -> None:
    place.install('docker')
    assert place.run('nowhere', 'out', 'group').returncode == 0
    assert list(mounts(place.calls()[-1])) == ['/out']


# Which engine and which image.


def test_the_first_engine_that_is_installed_is_taken(place: Place) -> None:
    (place.folder / 'x.sif').touch()
    for name, image in (
        ('singularity', 'x.sif'), ('apptainer', 'x.sif'), ('podman', ''), ('docker', ''),
    ):  # fmt: skip
        place.install(name)
        assert place.started(BABYSEG_IMAGE=image)[0] == name
    # A file is nothing for docker.
    assert place.started('--image', 'x.sif')[0] == 'apptainer'


def test_the_user_chooses_the_engine(place: Place) -> None:
    place.install('docker', 'podman')
    assert place.started('--engine', 'podman')[0] == 'podman'
    assert place.started(BABYSEG_ENGINE='podman')[0] == 'podman'
    assert place.started(f'--engine={place.bin}/podman', BABYSEG_ENGINE='docker')[0] == 'podman'


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        (['--engine', 'lxc'], 'docker, podman, apptainer, singularity'),
        (['--engine', 'podman'], 'looked for podman'),
        (['--engine', 'apptainer'], 'needs an image: give --image FILE.sif'),
        (['--engine', 'apptainer', '--image', 'no.sif'], 'no.sif does not exist'),
        (['--image', 'no.sif'], 'no.sif does not exist'),
    ],
)
def test_an_engine_that_cannot_be_used_is_named(place: Place, words: list[str], said: str) -> None:
    place.install('docker', 'apptainer')
    assert said in one_sentence(place.run(place.data, 'out', 'participant', *words), 2)
    assert not (place.folder / 'out').exists()


def test_a_machine_without_any_engine_is_told_what_to_do(place: Place) -> None:
    last = one_sentence(place.run(place.data, 'out', 'participant'), 2)
    assert 'docker, podman, apptainer, singularity' in last
    assert '--engine' in last


# Failures.

NO_DAEMON = 'Cannot connect to the Docker daemon at unix:///var/run/docker.sock.'
DENIED = 'permission denied while trying to connect to the Docker daemon socket'


@pytest.mark.parametrize(
    ('answers', 'said'),
    [
        ({'info': [1, NO_DAEMON, '[]']}, 'its service does not run'),
        # Some versions say it and succeed.
        ({'info': [0, NO_DAEMON, '[]']}, 'its service does not run'),
        ({'info': [1, DENIED, '']}, 'the group docker'),
        ({'info': [1, 'something else', '']}, 'something else'),
        ({'image': [1, 'Error: No such image', '[]']}, 'docker build'),
    ],
)
def test_what_docker_lacks_is_said_before_it_starts(
    place: Place, answers: dict[str, list[Any]], said: str
) -> None:
    place.install('docker')
    done = place.run(place.data, 'out', 'participant', answers=answers)
    assert said in one_sentence(done, 2)
    assert not (place.folder / 'out').exists()
    assert all(call[1] != 'run' for call in place.calls())


@pytest.mark.parametrize(
    ('name', 'code', 'said'),
    [
        ('docker', 125, 'docker could not start babyseg'),
        ('podman', 125, 'podman could not start babyseg'),
        ('docker', 126, 'docker could not start babyseg'),
        ('docker', 127, 'docker could not start babyseg'),
        ('docker', 137, 'memory ran out'),
        ('apptainer', 255, 'apptainer could not start babyseg'),
    ],
)
def test_the_end_of_a_container_is_explained(
    place: Place, name: str, code: int, said: str
) -> None:
    place.install(name)
    (place.folder / 'x.sif').touch()
    place.data.rename(place.folder / 'data')
    image = ['--image', 'x.sif'] if name == 'apptainer' else []
    answers = {'run': [code, f'{name}: {NO_DAEMON}\n', '']}
    done = place.run('data', 'out', 'participant', *image, answers=answers)
    assert said in one_sentence(done, code)
    assert NO_DAEMON in done.stderr


@pytest.mark.parametrize('code', [0, 1, 2, 3, 130])
def test_the_exit_code_of_babyseg_is_passed_on_without_comment(place: Place, code: int) -> None:
    place.install('docker')
    answers = {'run': [code, 'babyseg: a sentence\n', 'text\n']}
    done = place.run(place.data, 'out', 'participant', answers=answers)
    assert (done.returncode, done.stdout) == (code, 'text\n')
    assert done.stderr == 'babyseg: a sentence\n'


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        (['no where', 'out', 'participant'], 'no where does not exist'),
        (['file', 'out', 'participant'], 'file is a file'),
        (['data', 'file/out', 'participant'], 'Cannot make the folder'),
        (['data', 'data', 'participant'], 'derivatives'),
        (['data', 'data/out', 'participant'], 'derivatives'),
        (['data', 'out', 'participant', '--model', 'a/b.pt'], 'b.pt does not exist'),
        (['data', 'out', 'participant', '--age-months', 'x.tsv'], 'x.tsv does not exist'),
        (['data', 'out', 'participant', '--bids-filter-file', 'x'], 'x does not exist'),
        (['data', 'out', 'participant', '--bind', 'x'], 'x does not exist'),
    ],
)
def test_a_path_that_cannot_be_used_is_named(place: Place, words: list[str], said: str) -> None:
    place.install('docker')
    (place.folder / 'data').mkdir()
    (place.folder / 'file').touch()
    assert said in one_sentence(place.run(*words), 2)
    assert all(call[1] != 'run' for call in place.calls())


def test_results_may_lie_among_the_derivatives_of_the_dataset(place: Place) -> None:
    place.install('docker')
    out = place.data / 'derivatives' / 'babyseg'
    assert place.run(place.data, out, 'participant').returncode == 0
    assert mounts(place.calls()[-1])['/out'] == (str(out), True)


def test_paths_with_commas_and_colons_are_for_docker_alone(place: Place) -> None:
    place.install('docker', 'apptainer')
    (place.folder / 'x.sif').touch()
    data = place.folder / 'a, "b": c'
    data.mkdir()
    assert place.run(data, 'out', 'participant').returncode == 0
    assert mounts(place.calls()[-1])['/data'] == (str(data), False)
    done = place.run(data, 'out', 'participant', '--image', 'x.sif')
    assert 'a colon or a comma' in one_sentence(done, 2)


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGHUP'])
def test_a_signal_reaches_the_container_and_its_answer_comes_back(place: Place, name: str) -> None:
    place.install('docker')
    command = [sys.executable, wrapper.__file__, str(place.data), 'out', 'participant']
    environ = place.environ({'run': ['wait', name, '']})
    with subprocess.Popen(
        command, cwd=place.folder, env=environ, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == 'ready\n'
        process.send_signal(getattr(signal, name))
        assert process.wait(20) == 77


def test_ctrl_c_before_the_start_ends_the_wrapper(place: Place) -> None:
    text = 'import time; open("begun", "w").close(); time.sleep(30)'
    place.install('docker', text=text)
    command = [sys.executable, wrapper.__file__, str(place.data), 'out', 'participant']
    with subprocess.Popen(
        command,
        cwd=place.folder,
        env=place.environ(),
        # What a shell starts in the background inherits that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        while not (place.folder / 'begun').exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_an_engine_that_cannot_be_run_is_named(place: Place) -> None:
    (place.bin / 'podman').write_text('#!/no/such/interpreter\n')
    (place.bin / 'podman').chmod(0o755)
    last = one_sentence(place.run(place.data, 'out', 'participant'), 2)
    assert 'podman cannot be run' in last


# Jobs of a cluster, from inside the container.


def test_a_submission_from_inside_writes_scripts_that_call_the_wrapper(
    place: Place, tmp_path: Path
) -> None:
    place.install('docker')
    data = tmp_path / 'my data'
    for name in ('sub-01', 'sub-02'):
        (data / name / 'anat').mkdir(parents=True)
    (data / 'dataset_description.json').write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    words = ['my data', 'the out', 'participant', '--submit', 'slurm', '--sessions-per-task=1']
    program = str(Path(sys.executable).with_name('babyseg'))
    done = place.run(
        *words, '-w', 'scratch', '--image', 'babyseg:test',
        answers={'run': ['babyseg', program, '']},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    logs = tmp_path / 'the out' / 'logs' / 'slurm'
    array = (logs / 'babyseg.sbatch').read_text()
    docker = place.bin / 'docker'
    assert f'--chdir="{tmp_path}"' in array
    assert f'--output="{logs}/babyseg-%A_%a.log"' in array
    assert array.splitlines()[-1] == (
        f'exec {sys.executable} {wrapper.__file__} --engine {docker} --image babyseg:test '
        "--array-task \"$task\" 'my data' 'the out' participant -w scratch --image babyseg:test"
    )
    # The job finds the same container.
    job = subprocess.run(
        ['/bin/bash', logs / 'babyseg.sbatch'], cwd=tmp_path, capture_output=True, text=True,
        env=place.environ({'run': [0, '', 'in the container\n']}, SLURM_ARRAY_TASK_ID='2'),
    )  # fmt: skip
    assert job.stdout == 'in the container\n', job.stderr
    inside = place.calls()[-1]
    assert inside[inside.index('babyseg:test') + 1 :] == [
        '/data', '/out', 'participant', '--array-task', '2/2', '--work-dir', '/work',
    ]  # fmt: skip


def test_both_sides_agree_on_the_name_of_the_variable(place: Place) -> None:
    place.install('docker')
    command = place.started('--submit', 'slurm')
    assert any(pair.startswith(f'{HOST_VARIABLE}=') for pair in values(command, '--env'))
    assert not any(HOST_VARIABLE in word for word in place.started())
