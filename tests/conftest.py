"""What tests share: a quiet environment, and the way to real scans beside the checkout."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

# Set before anything imports numpy, torch or nipype. One thread a worker: pytest-xdist runs
# several workers, and tiny arrays gain nothing from threads. NO_ET stops nipype's version check
# on the network.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ['NO_ET'] = '1'

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / 'shared'


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out the tests that read real scans where those scans, or the one folder, are missing.

    `@pytest.mark.needs_shared` asks for the folder, `@pytest.mark.needs_shared('data/ds-bmex')`
    for a part of it. A test that uses the fixture `shared` needs it too.
    """
    for item in items:
        marker = item.get_closest_marker('needs_shared')
        if marker is None and 'shared' not in getattr(item, 'fixturenames', ()):
            continue
        wanted = SHARED.joinpath(*(marker.args if marker else ()))
        if not wanted.is_dir():
            item.add_marker(pytest.mark.skip(reason=f'no real scans at {wanted}'))


@pytest.fixture(scope='session')
def root() -> Path:
    """The top of the source tree."""
    return ROOT


@pytest.fixture(scope='session')
def benchmark_module() -> Callable[[str], ModuleType]:
    """Import a file of `benchmarks/` by its name: they are scripts, not part of the package."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, ROOT / 'benchmarks' / f'{name}.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope='session')
def shared() -> Path:
    """The folder beside the checkout that holds real scans (`shared / 'data' / 'ds-bmex'`)."""
    return SHARED
