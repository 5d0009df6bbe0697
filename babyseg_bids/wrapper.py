"""Run babyseg in a container: docker, podman, apptainer or singularity.

usage: babyseg-wrapper BIDS_DIR OUT_DIR participant|group [options]

  --engine NAME       docker, podman, apptainer or singularity, or a path that ends in one of them
                      (default: BABYSEG_ENGINE, or the first that is installed)
  --image IMAGE       docker and podman: an image on this machine (default: babyseg:VERSION);
                      apptainer and singularity: a .sif file (default: BABYSEG_IMAGE)
  --bind DIR          another folder that the container may read, under its own path, for links
                      that lead out of the dataset; may be repeated
  --container-memory SIZE
                      end the container when it needs more than this, such as 8g
  --show-command      print the command instead of running it
  -h, --help          show this text
  --version           print the version

All other options are those of babyseg, see its documentation; the paths in them are mounted where
babyseg finds them, but not the paths inside a settings file. The exit code is that of babyseg.

This file needs nothing but Python 3.8: it may be copied and run alone.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

VERSION = '0.1.0'
ENGINES = ('docker', 'podman', 'apptainer', 'singularity')
# Their images are files.
FILE_ENGINES = ('apptainer', 'singularity')
LEVELS = ('participant', 'group')
USAGE, INTERRUPTED = 2, 130
# Seconds for an engine to say whether it works.
PATIENCE = 60

# Options of this program, then those of babyseg, by the number of values that they take.
OWN = ('--engine', '--image', '--bind', '--container-memory')
FLAGS = (
    '--boilerplate-only', '--clean-workdir', '--denoise', '--dry-run', '--help', '--low-mem',
    '--no-report', '--notrack', '--now', '--overwrite', '--reports-only', '--resource-monitor',
    '--save-probabilities', '--show-command', '--skip-bids-validation', '--stop-on-first-crash',
    '--verbose', '--version', '--write-graph',
)  # fmt: skip
SINGLE = (
    '--array-task', '--bias-correction', '--bids-database-dir', '--bids-filter-file',
    '--config-file', '--device', '--fs-license-file', '--mem', '--mem-gb', '--mem-mb', '--model',
    '--n-cpus', '--nipype-plugin-file', '--nprocs', '--nthreads', '--omp-nthreads',
    '--random-seed', '--reference-anat', '--sessions-per-task', '--slurm-account',
    '--slurm-partition', '--submit', '--uncertainty-threshold', '--use-plugin', '--work-dir',
)  # fmt: skip
SEVERAL = (
    '--age-months', '--contrasts', '--output-spaces', '--participant-label', '--session-id',
    '--session-label',
)  # fmt: skip
SHORT = {'-w': '--work-dir', '-h': '--help'}

DATA, OUT, WORK, INPUTS = '/data', '/out', '/work', '/inputs'
# Options that name a file, and the folder in INPUTS that it is mounted in.
FILES = {
    '--model': 'model',
    '--bids-filter-file': 'filter',
    '--config-file': 'config',
    '--use-plugin': 'plugin',
    '--nipype-plugin-file': 'plugin',
    '--age-months': 'ages',
}
# What a batch system says about this job's share of the machine.
FORWARDED = (
    'CUDA_VISIBLE_DEVICES', 'SLURM_CPUS_PER_TASK', 'SLURM_CPUS_ON_NODE',
    'SLURM_JOB_CPUS_PER_NODE', 'SLURM_MEM_PER_NODE', 'SLURM_MEM_PER_CPU', 'SLURM_ARRAY_TASK_ID',
    'SLURM_ARRAY_TASK_COUNT', 'SLURM_ARRAY_TASK_MIN', 'SLURM_ARRAY_TASK_MAX',
    'SLURM_ARRAY_TASK_STEP',
)  # fmt: skip
SELINUX = Path('/sys/fs/selinux/enforce')


class WrapperError(Exception):
    """What is wrong and what to do, in one sentence."""


class Option(NamedTuple):
    """An option of the command line: its name with dashes, its values, and its spelling."""

    name: str
    values: list[str]
    words: list[str]


class Mount(NamedTuple):
    """A path of this machine and its place in the container."""

    source: Path
    target: str
    writable: bool = False


class Plan(NamedTuple):
    """What runs inside the container, and what it is given."""

    words: list[str]
    mounts: list[Mount]
    environment: list[str]
    gpu: bool
    memory: str


# The command line.


def parse(argv: Sequence[str]) -> tuple[list[str], list[Option]]:
    """Dataset, output folder and level; and all options.

    An option with several values may stand right before the three: the level in the last place
    tells, as it does for babyseg.
    """
    found, options = scan(argv)
    if not is_complete(found) and len(argv) > 2 and argv[-1] in LEVELS:
        rest, options = scan(argv[:-3])
        found = [*rest, *argv[-3:]]
    if not is_complete(found) and not {o.name for o in options} & {'--help', '--version'}:
        raise WrapperError(
            'Give the dataset, the output folder and the level, in this order and before all '
            'options: babyseg-wrapper BIDS_DIR OUT_DIR participant. Paths with blanks need quotes.'
        )
    return found, options


def is_complete(found: Sequence[str]) -> bool:
    return len(found) == 3 and found[2] in LEVELS


def scan(argv: Sequence[str]) -> tuple[list[str], list[Option]]:
    """Words that belong to no option, and options with the words that belong to them."""
    found: list[str] = []
    options: list[Option] = []
    place = 0
    while place < len(argv):
        start, place = place, place + 1
        if not is_option(argv[start]):
            found.append(argv[start])
            continue
        name, values = split(argv[start])
        # An option of a babyseg that is newer than this file may have values, too.
        unknown = name not in SEVERAL + SINGLE + OWN + FLAGS and is_complete(found)
        if not values and name in SINGLE + OWN:
            place = min(place + 1, len(argv))
        elif not values and (name in SEVERAL or unknown):
            while place < len(argv) and not is_option(argv[place]):
                place += 1
        options.append(Option(name, [*values, *argv[start + 1 : place]], list(argv[start:place])))
    return found, options


def is_option(word: str) -> bool:
    return len(word) > 1 and word[0] == '-' and not word[1].isdigit()


def split(word: str) -> tuple[str, list[str]]:
    """Name of an option as babyseg spells it, and the value that is in the same word."""
    if word.startswith('--'):
        name, equals, value = word.partition('=')
        return name.replace('_', '-'), [value] if equals else []
    if word[:2] in SHORT:
        return SHORT[word[:2]], [word[2:]] if word[2:] else []
    return word, []


def last(options: Iterable[Option], name: str) -> str:
    """The value of an option, '' when it is not given; the last one wins."""
    values = [option.values for option in options if option.name == name]
    if values and not (values[-1] and values[-1][-1]):
        raise WrapperError(f'{name} needs a value.')
    return values[-1][-1] if values else ''


# What is mounted, and how it is called inside.


def make_plan(found: Sequence[str], options: Sequence[Option]) -> Plan:
    """Mounts, and the command line with the paths of the container."""
    bids, out, level = absolute(found[0]), absolute(found[1]), found[2]
    mounts = []
    # The group level does not need the dataset.
    if level == 'participant' or bids.is_dir():
        mounts.append(Mount(folder(bids, 'The dataset folder'), DATA))
    check_apart(out, bids)
    mounts.append(Mount(out, OUT, True))
    words = [DATA, OUT, level]
    for option in options:
        if option.name == '--bind':
            path = folder(absolute(last([option], '--bind')), '--bind: the folder')
            mounts.append(Mount(path, str(path)))
        elif option.name not in (*OWN, '--show-command'):
            changed, more = inside(option)
            words += changed
            mounts += [m for m in more if m not in mounts]
    environment = [f'{n}={os.environ[n]}' for n in FORWARDED if os.environ.get(n)]
    templates = os.environ.get('TEMPLATEFLOW_HOME', '')
    if templates and Path(templates).is_dir():
        mounts.append(Mount(absolute(templates), f'{INPUTS}/templateflow'))
        environment.append(f'TEMPLATEFLOW_HOME={INPUTS}/templateflow')
    gpu = wants_gpu(last(options, '--device'))
    return Plan(words, mounts, environment, gpu, last(options, '--container-memory'))


def inside(option: Option) -> tuple[list[str], list[Mount]]:
    """An option with the paths of the container, and what is mounted for it."""
    if option.name == '--work-dir':
        return [option.name, WORK], [Mount(absolute(last([option], option.name)), WORK, True)]
    if option.name == '--bids-database-dir':
        path, target = absolute(last([option], option.name)), f'{INPUTS}/database'
        # babyseg builds the index beside its place, so that the parent is what it writes to.
        return [option.name, f'{target}/{path.name}'], [Mount(path.parent, target, True)]
    if option.name not in FILES or not any(is_path(option.name, v) for v in option.values):
        return option.words, []
    words, mounts = [option.name], []
    for value in option.values:
        if is_path(option.name, value):
            path = absolute(value)
            if not path.exists():
                raise WrapperError(
                    f'{option.name}: the file {path} does not exist. Check the path.'
                )
            mounts.append(Mount(path, f'{INPUTS}/{FILES[option.name]}/{path.name}'))
            words.append(mounts[-1].target)
        else:
            words.append(value)
    return words, mounts


def is_path(name: str, value: str) -> bool:
    """Whether the value of an option that may name a file does so."""
    if name == '--bids-filter-file':
        return not value.lstrip().startswith('{')
    if name == '--model':
        return '/' in value or '.' in value
    if name == '--age-months':
        return value.lower().endswith('.tsv') or Path(value).is_file()
    return True


def absolute(path: str) -> Path:
    """An absolute path; links stay as they are."""
    return Path(path).expanduser().absolute()


def folder(path: Path, what: str) -> Path:
    """A folder that must be there."""
    if not path.is_dir():
        kind = 'is a file' if path.exists() else 'does not exist'
        raise WrapperError(f'{what} {path} {kind}. Check the path.')
    return path


def check_apart(out: Path, bids: Path) -> None:
    """Refuse results among the raw data; babyseg cannot see it, since both are mounted apart."""
    inner, outer = out.resolve(), bids.resolve()
    if inner != outer and outer not in inner.parents:
        return
    parts = inner.relative_to(outer).parts
    if len(parts) < 2 or parts[0] != 'derivatives':
        raise WrapperError(
            f'The output folder {out} lies inside the dataset {bids}. Choose a folder outside it, '
            f'or {bids / "derivatives" / "babyseg"}.'
        )


def make_folders(mounts: Iterable[Mount]) -> None:
    """Make the folders for results: docker would make them as root."""
    for mount in mounts:
        try:
            if mount.writable:
                mount.source.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WrapperError(
                f'Cannot make the folder {mount.source} ({error.strerror}). Choose another one or '
                'change the permissions.'
            ) from error


def wants_gpu(device: str) -> bool:
    """Whether the container gets the GPU; `auto` looks for a driver."""
    if device == 'auto' and shutil.which('nvidia-smi'):
        say('This machine has an NVIDIA driver, so the container gets the GPU.')
        return True
    return device.startswith('cuda')


# The engines.


def find_engine(asked: str, image: str) -> tuple[str, str]:
    """Path and kind of the program that runs containers."""
    kinds: tuple[str, ...] = ENGINES
    if asked:
        kinds = (Path(asked).name,)
        if kinds[0] not in ENGINES:
            raise WrapperError(f'{asked} is no engine that is known: {", ".join(ENGINES)}.')
    elif image.endswith(('.sif', '.simg')) or Path(image or '/nowhere/').is_file():
        kinds = FILE_ENGINES
    for kind in kinds:
        path = shutil.which(asked or kind)
        if path is not None:
            # On some machines docker is podman under another name, and takes podman's options.
            alias = kind == 'docker' and 'podman' in ask([path, '--version']).stdout.lower()
            return path, 'podman' if alias else kind
    raise WrapperError(
        f'No program for containers was found (looked for {asked or ", ".join(kinds)}): install '
        'one, load its module, or give its path with --engine.'
    )


def ask(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run something short and catch what it says."""
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=PATIENCE, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise WrapperError(
            f'{shlex.join(command)} gave no answer in {PATIENCE} seconds: is its service stuck?'
        ) from None
    except OSError as error:
        raise WrapperError(f'{command[0]} cannot be run ({error.strerror}).') from error


def check_docker(engine: str) -> bool:
    """Whether docker runs without root's rights; refuses one that cannot be used."""
    done = ask([engine, 'info', '--format', '{{.SecurityOptions}}'])
    said = done.stderr.strip()
    if 'permission denied' in said.lower():
        raise WrapperError(
            'You may not use docker here (permission denied on its socket): ask to be added to '
            'the group docker, or choose podman or apptainer with --engine.'
        )
    if 'cannot connect' in said.lower():
        raise WrapperError(
            'docker is installed but its service does not run (it cannot connect to the Docker '
            'daemon): start it, or choose another program with --engine.'
        )
    if done.returncode != 0:
        raise WrapperError(f'docker cannot be used: {said or "it does not say why."}')
    return 'rootless' in done.stdout


def check_image(engine: str, kind: str, image: str) -> None:
    """Refuse an image that is not on this machine: nothing is fetched unasked."""
    if kind in FILE_ENGINES:
        if not Path(image).exists() and '://' not in image:
            raise WrapperError(
                f'The image file {absolute(image)} does not exist: check --image and '
                f'BABYSEG_IMAGE, or make it with {kind} build.'
            )
    elif ask([engine, 'image', 'inspect', image]).returncode != 0:
        raise WrapperError(
            f'The image {image} is not on this machine: make it with {kind} build -t {image} in '
            f'the source folder of babyseg, fetch it with {kind} pull, or name another one with '
            '--image.'
        )


def docker_command(engine: str, kind: str, image: str, rootless: bool, plan: Plan) -> list[str]:
    """The whole command for docker and podman."""
    options = ['--rm', '--network', 'none', '--read-only', '--tmpfs', '/tmp', '--pull', 'never']
    gpu = ['--gpus', 'all']
    if kind == 'podman':
        gpu = ['--device', 'nvidia.com/gpu=all']
        # Results would belong to a user number that exists inside only. Root has no such trouble.
        options += ['--userns', 'keep-id'] if os.getuid() else []
    # The image has a user of its own. Where docker runs without root's rights, its root is you.
    options += ['--user', '0:0' if rootless else f'{os.getuid()}:{os.getgid()}']
    if kind == 'docker' and not rootless:
        # The data of a lab often belong to a group that is not the user's first.
        for group in sorted(set(os.getgroups()) - {0, os.getgid()}):
            options += ['--group-add', str(group)]
    options += ['--security-opt', 'label=disable'] if SELINUX.exists() else []
    options += gpu if plan.gpu else []
    options += ['--memory', plan.memory] if plan.memory else []
    for pair in ('HOME=/tmp', *plan.environment):
        options += ['--env', pair]
    for mount in plan.mounts:
        fields = ['type=bind', f'source={mount.source}', f'target={mount.target}']
        fields += [] if mount.writable else ['readonly']
        # It is read as a line of comma-separated values.
        quoted = ['"{}"'.format(f.replace('"', '""')) if set(f) & set('",') else f for f in fields]
        options += ['--mount', ','.join(quoted)]
    return [engine, 'run', *options, image, *plan.words]


def apptainer_command(engine: str, kind: str, image: str, plan: Plan) -> list[str]:
    """The whole command for apptainer and singularity."""
    options = ['--containall', '--cleanenv', '--pwd', '/tmp']
    options += ['--nv'] if plan.gpu else []
    options += ['--memory', plan.memory] if plan.memory else []
    for mount in plan.mounts:
        if set(str(mount.source)) & set(':,'):
            raise WrapperError(
                f'{kind} cannot mount {mount.source}, since the path has a colon or a comma: '
                'rename it, or give a link to it that has another name.'
            )
        access = 'rw' if mount.writable else 'ro'
        options += ['--bind', f'{mount.source}:{mount.target}:{access}']
    # Its option --env would take commas apart.
    variables = [f'{kind.upper()}ENV_{pair}' for pair in plan.environment]
    start = ['/usr/bin/env', *variables] if variables else []
    return [*start, engine, 'run', *options, image, *plan.words]


# Running it.


def run(command: Sequence[str]) -> int:
    """Run the container; its exit code, or 128 and the number of the signal that ended it.

    It has a session of its own, so that Ctrl-C reaches it once: from here, as SIGTERM does.
    """
    child: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _frame: Any) -> None:
        if not child:
            raise KeyboardInterrupt
        child[0].send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, forward)
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        raise WrapperError(f'{command[0]} cannot be run ({error.strerror}).') from error
    child.append(process)
    code = process.wait()
    return code if code >= 0 else 128 - code


def explain(code: int, kind: str, gpu: bool) -> str:
    """A sentence about an exit code that is not babyseg's; '' for those that are."""
    if code == 137:
        return (
            'The container was killed, most likely because memory ran out: give it more, or run '
            'fewer sessions side by side with --nprocs or --low-mem.'
        )
    if code in ((255,) if kind in FILE_ENGINES else (125, 126, 127)):
        hint = ' If it speaks of a GPU, leave --device out.' if gpu else ''
        return f'{kind} could not start babyseg; its own message is above.{hint}'
    return ''


def say(sentence: str) -> None:
    """Tell the user; standard output is left to babyseg."""
    print(f'babyseg-wrapper: {sentence}', file=sys.stderr)


def host(argv: Sequence[str], out: str, engine: str, image: str) -> str:
    """How a job of a cluster calls this program: --submit runs inside and cannot know it."""
    image = str(absolute(image)) if Path(image).exists() else image
    program = [sys.executable, str(absolute(__file__)), '--engine', engine, '--image', image]
    known = {
        'program': program,
        'words': list(argv),
        'folder': str(Path.cwd()),
        'output_dir': str(absolute(out)),
    }
    return f'BABYSEG_HOST={json.dumps(known)}'


def wrap(argv: Sequence[str]) -> int:
    """Do what the command line says; the exit code."""
    found, options = parse(argv)
    names = {option.name for option in options}
    if '--help' in names:
        print((__doc__ or '').replace('VERSION)', f'{VERSION})').strip())
        return 0
    if '--version' in names:
        print(f'babyseg-wrapper {VERSION}')
        return 0
    image = last(options, '--image') or os.environ.get('BABYSEG_IMAGE', '')
    asked = last(options, '--engine') or os.environ.get('BABYSEG_ENGINE', '')
    engine, kind = find_engine(asked, image)
    if not image and kind in FILE_ENGINES:
        raise WrapperError(f'{kind} needs an image: give --image FILE.sif or set BABYSEG_IMAGE.')
    image = image or f'babyseg:{VERSION}'
    plan = make_plan(found, options)
    if '--submit' in names:
        plan.environment.append(host(argv, found[1], engine, image))
    show = '--show-command' in names
    rootless = kind == 'docker' and not show and check_docker(engine)
    if kind in FILE_ENGINES:
        command = apptainer_command(engine, kind, image, plan)
    else:
        command = docker_command(engine, kind, image, rootless, plan)
    if show:
        print(shlex.join(command))
        return 0
    check_image(engine, kind, image)
    make_folders(plan.mounts)
    code = run(command)
    if explain(code, kind, plan.gpu):
        say(explain(code, kind, plan.gpu))
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run babyseg-wrapper; the exit code is babyseg's, or 2 when it could not be started."""
    try:
        return wrap(sys.argv[1:] if argv is None else list(argv))
    except WrapperError as problem:
        say(str(problem))
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == '__main__':
    sys.exit(main())
