"""The package is complete, wherever it is installed from, and its papers agree with each other."""

import ast
import configparser
import gzip
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import entry_points, metadata, packages_distributions, requires, version
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import babyseg_bids
from babyseg_bids import wrapper

FOLDERS = {
    'babyseg_bids': 'babyseg_bids',
    'workflows': 'babyseg_bids.workflows',
    'synthesis': 'babyseg_bids.synthesis',
}
SCRIPTS = (
    'babyseg', 'babyseg-segment', 'babyseg-wrapper', 'babyseg-train', 'babyseg-synth',
    'babyseg-example',
)  # fmt: skip
LOCKS = ('lock.txt', 'lock-test.txt', 'lock-docs.txt')
# The largest upload that the public index takes without being asked is 100 MB; half is left.
WHEEL_MB = 50


def packages_in(root: Path) -> Iterator[str]:
    """Importable name of each folder of Python files in the source tree."""
    for folder, package in FOLDERS.items():
        for path in (root / folder).rglob('__init__.py'):
            inside = path.parent.relative_to(root / folder).parts
            yield '.'.join((package, *inside))


def pins(root: Path, name: str) -> dict[str, str]:
    """Versions by canonical name in a lock file."""
    text = (root / 'requirements' / name).read_text()
    lines = [line for line in text.splitlines() if not line.startswith('#')]
    return {canonicalize_name(n): v for n, v in (line.split('==') for line in lines)}


def requirements(extra: str = '') -> list[Requirement]:
    """What the installed package asks for, or what one of its extras adds."""
    found = [Requirement(text) for text in requires('babyseg') or ()]
    if extra:
        return [r for r in found if r.marker and r.marker.evaluate({'extra': extra})]
    return [r for r in found if r.marker is None]


@pytest.fixture(scope='module')
def source(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is built from: building leaves files in the tree."""
    folder = tmp_path_factory.mktemp('source')
    for name in FOLDERS:
        copytree(root / name, folder / name, ignore=ignore_patterns('__pycache__'))
    for name in ('setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE'):
        (folder / name).write_bytes((root / name).read_bytes())
    return folder


@pytest.fixture(scope='module')
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from the copy."""
    folder = tmp_path_factory.mktemp('wheel')
    pip = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation']
    subprocess.run([*pip, '--wheel-dir', str(folder), str(source)], check=True)
    return zipfile.ZipFile(next(folder.glob('*.whl')))


@pytest.mark.parametrize('package', ['babyseg_bids.workflows', 'babyseg_bids.synthesis'])
def test_top_level_folders_are_imported_as_parts_of_the_package(root: Path, package: str) -> None:
    code = f'import {package} as p; print(p.__file__)'
    run = [sys.executable, '-c', code]
    printed = subprocess.run(run, cwd='/', capture_output=True, text=True, check=True).stdout
    assert Path(printed.strip()).parent == root / package.split('.')[1]


def test_every_package_of_the_source_tree_is_listed_in_setup_cfg(root: Path) -> None:
    config = configparser.ConfigParser()
    config.read(root / 'setup.cfg')
    listed = config['options']['packages'].split()
    assert sorted(listed) == sorted(packages_in(root))


def test_the_wheel_has_every_module_and_data_file_and_nothing_else(
    source: Path, wheel: zipfile.ZipFile
) -> None:
    expected = set()
    for folder, package in FOLDERS.items():
        for path in (source / folder).rglob('*'):
            if path.is_file():
                inside = path.relative_to(source / folder).as_posix()
                expected.add(f'{package.replace(".", "/")}/{inside}')
    got = {name for name in wheel.namelist() if '.dist-info/' not in name}
    assert got == expected


def test_the_wheel_ships_label_table_weights_and_type_marker(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert 'babyseg_bids/data/labels.tsv' in names
    assert 'babyseg_bids/py.typed' in names
    assert any(name.endswith('.safetensors') for name in names)
    assert any(name.endswith('licenses/LICENSE') for name in names)


def test_the_wheel_is_small_enough_to_share(wheel: zipfile.ZipFile) -> None:
    assert Path(wheel.filename or '').stat().st_size < WHEEL_MB * 1e6


@pytest.mark.parametrize('name', SCRIPTS)
def test_console_script_is_installed_and_starts(name: str) -> None:
    assert [e.name for e in entry_points(group='console_scripts', name=name)] == [name]
    script = Path(sys.executable).with_name(name)
    for option in ('--help', '--version'):
        done = subprocess.run([script, option], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
    assert version('babyseg') in done.stdout


def test_help_does_not_wait_for_slow_imports() -> None:
    code = (
        'import sys\n'
        'from babyseg_bids.cli.run import main\n'
        "sys.argv = ['babyseg', '--help']\n"
        'try:\n    main()\nexcept SystemExit:\n    pass\n'
        "print(sorted({'torch', 'nipype', 'ants', 'bids'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == '[]'


def test_every_dependency_is_pinned_inside_the_range_that_setup_cfg_allows(root: Path) -> None:
    locked = pins(root, 'lock.txt')
    for requirement in requirements():
        pinned = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned), f'{requirement} but {pinned}'


def test_every_library_that_is_imported_is_a_declared_dependency(root: Path) -> None:
    imported = set()
    for folder in FOLDERS:
        for path in (root / folder).rglob('*.py'):
            for node in ast.walk(ast.parse(path.read_text('utf-8'))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition('.')[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    imported.add(node.module.partition('.')[0])
    foreign = imported - set(sys.stdlib_module_names) - {'babyseg_bids'}
    declared = {canonicalize_name(requirement.name) for requirement in requirements()}
    owners = packages_distributions()
    missing = {m for m in foreign if not declared & {canonicalize_name(d) for d in owners[m]}}
    assert not missing


@pytest.mark.parametrize('extra', ['test', 'docs'])
def test_every_tool_of_an_extra_is_pinned(root: Path, extra: str) -> None:
    locked = pins(root, 'lock.txt') | pins(root, f'lock-{extra}.txt')
    for requirement in requirements(extra):
        pinned = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned), f'{requirement} but {pinned}'


@pytest.mark.parametrize('name', LOCKS)
def test_lock_files_hold_plain_pins_without_hosts_or_builds(root: Path, name: str) -> None:
    for line in (root / 'requirements' / name).read_text().splitlines():
        assert line.startswith('#') or re.fullmatch(r'[A-Za-z0-9._-]+==[A-Za-z0-9.]+', line), line


def test_the_bill_of_materials_names_all_that_is_installed_or_bundled(root: Path) -> None:
    run = [sys.executable, str(root / 'requirements' / 'sbom.py')]
    run.append(str(root / 'requirements' / 'lock.txt'))
    bill = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    named = {component['purl']: component for component in bill['components']}
    pypi = {f'pkg:pypi/{name}@{v}' for name, v in pins(root, 'lock.txt').items()}
    assert {purl for purl in named if purl.startswith('pkg:pypi/')} == pypi
    assert all(named[purl]['licenses'] for purl in pypi)
    packed = (root / 'babyseg_bids' / 'data' / 'viewer' / 'niivue.js.gz').read_bytes()
    niivue = gzip.decompress(packed)[:100].decode().split()[2].rstrip(',')
    assert f'pkg:npm/%40niivue/niivue@{niivue}' in named
    needs = {d['ref']: d['dependsOn'] for d in bill['dependencies']}
    reached, waiting = set(), [bill['metadata']['component']['bom-ref']]
    while waiting:
        ref = waiting.pop()
        waiting += [] if ref in reached else needs.get(ref, [])
        reached.add(ref)
    assert set(named) <= reached, 'something is listed that nothing needs'


def test_the_installed_versions_are_those_of_the_lock_file(root: Path) -> None:
    locked = pins(root, 'lock.txt')
    # torch adds the build: 2.13.0+cpu.
    installed = {name: version(name).partition('+')[0] for name in locked}
    assert installed == locked


def test_version_is_the_same_in_package_citation_changes_and_container(root: Path) -> None:
    here = babyseg_bids.__version__
    assert metadata('babyseg')['Version'] == here
    assert f'version: {here}\n' in (root / 'CITATION.cff').read_text()
    assert f'## {here} ' in (root / 'CHANGES.md').read_text()
    assert here == wrapper.VERSION
    assert f'ARG VERSION={here}\n' in (root / 'Dockerfile').read_text()


def test_python_versions_agree(root: Path) -> None:
    specifier = metadata('babyseg')['Requires-Python']
    assert set(specifier.split(',')) == {'>=3.11', '<3.14'}
    config = tomllib.loads((root / 'pyproject.toml').read_text())
    assert config['tool']['mypy']['python_version'] == '3.11'
    assert '(3, 11) <= sys.version_info[:2] <= (3, 13)' in (root / 'Makefile').read_text()


@pytest.fixture(scope='module')
def all_help() -> str:
    """What all programs say about themselves."""
    commands = [['babyseg'], ['babyseg-segment'], ['babyseg-synth'], ['babyseg-example']]
    commands += [['babyseg-train', sub] for sub in ('prepare', 'complete', 'fit', 'export')]
    shown = ''
    for program, *sub in commands:
        run = [Path(sys.executable).with_name(program), *sub, '--help']
        shown += subprocess.run(run, capture_output=True, text=True, check=True).stdout
    return shown


@pytest.mark.parametrize('name', ['README.md', 'docs/usage.md', 'docs/model.md'])
def test_options_named_in_the_documents_exist(root: Path, all_help: str, name: str) -> None:
    # Options of the cluster's own program are not ours to check.
    text = re.sub(r'^#SBATCH.*', '', (root / name).read_text(), flags=re.MULTILINE)
    missing = {o for o in re.findall(r'(?<![\w-])--[a-z][a-z-]+', text) if o not in all_help}
    assert not missing
