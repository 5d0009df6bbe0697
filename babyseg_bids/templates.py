"""Templates from TemplateFlow: found on this machine, or fetched when there is a network."""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from babyseg_bids import messages
from babyseg_bids.errors import InputError
from babyseg_bids.spaces import Space

VARIABLE = 'TEMPLATEFLOW_HOME'


def template_root(work_dir: Path, /) -> Path:
    """TemplateFlow's folder: as its variable says, its usual place if it is there, else ours."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    usual = Path.home() / '.cache' / 'templateflow'
    return usual if usual.is_dir() else work_dir / 'templateflow'


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Only one process at a time fills the folder; where it cannot be written, nobody does."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / '.babyseg.lock').open('a')
    except OSError:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _preference(path: Path) -> tuple[int, str]:
    """Finer resolutions first: TemplateFlow counts them from 1."""
    match = re.search(r'_res-(\d+)', path.name)
    return (int(match[1]) if match else 0, path.name)


def is_on_disk(space: Space, root: Path, /) -> bool:
    """Whether an image of the template is in TemplateFlow's folder; a quick look by name."""
    folder = root / f'tpl-{space.template}'
    if space.cohort is not None:
        folder /= f'cohort-{space.cohort}'
    return any(
        path.stat().st_size > 0
        for path in folder.glob('tpl-*_T[12]w.nii.gz')
        if '_desc-' not in path.name
    )


def find_template(space: Space, contrast: str, root: Path, /) -> Path:
    """The template's image of this contrast, or of another one if it has none.

    Parameters
    ----------
    contrast : suffix of the child's scan
    root : folder of TemplateFlow, which is given what had to be fetched

    Raises
    ------
    InputError
        When it is not there and cannot be fetched; one sentence.
    """
    # It takes seconds to import, and makes a folder of its own unless it is told of one.
    os.environ.setdefault(VARIABLE, str(root))
    from templateflow.client import TemplateFlowClient

    cohort = {} if space.cohort is None else {'cohort': str(space.cohort)}
    query = {'desc': None, 'extension': '.nii.gz', **cohort}
    suffixes = list(dict.fromkeys((contrast, 'T1w', 'T2w')))
    found: list[Path] = []
    try:
        with _alone(root):
            client = TemplateFlowClient(root=root, autoupdate=False)
            for suffix in suffixes:
                listed = client.ls(space.template, suffix=suffix, **query)
                found += sorted(listed, key=_preference)
            if not found:
                raise ValueError('there is no such template')
            if not _is_there(found[0]):
                _fetch(client, space, found[0], query)
            return found[0]
    # What is raised without a network depends on how it is absent.
    except (OSError, RuntimeError, ValueError) as error:
        there = [path for path in found if _is_there(path)]
        if there:
            return there[0]
        # The errors of connections have no number of the system's.
        reason = 'no connection'
        if not isinstance(error, OSError) or error.strerror:
            reason = messages.first_line(str(error))
        raise InputError(messages.template_missing(space.name, root, reason)) from error


def _is_there(path: Path) -> bool:
    """Files that are known but were not fetched are empty."""
    return path.is_file() and path.stat().st_size > 0


def _fetch(client: Any, space: Space, path: Path, query: dict[str, Any]) -> None:
    suffix = path.name.removesuffix('.nii.gz').rpartition('_')[2]
    resolution, _ = _preference(path)
    exact = {'resolution': resolution} if resolution else {}
    client.get(space.template, suffix=suffix, **query, **exact)
    if not _is_there(path):
        raise ValueError('the file is empty')
