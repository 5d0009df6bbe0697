"""List the anatomical files of a dataset with PyBIDS, looking at nothing else.

A plain `BIDSLayout(dataset)` visits every file and opens every JSON file; that takes minutes for
a thousand subjects. Here only the `anat` folders of the requested subjects are visited.
"""

import os
import re
import shutil
import sqlite3
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from babyseg_bids.errors import UsageError


def list_anat_files(
    bids_dir: Path, participants: Sequence[str] = (), *, database_dir: Path | None = None
) -> list[str]:
    """Files in the `anat` folders, and images beside them, relative to the dataset.

    Parameters
    ----------
    bids_dir : Path
        The dataset.
    participants : sequence of str
        Bare labels; empty for all.
    database_dir : Path, optional
        Folder of a PyBIDS index, created when it is absent. It covers all subjects, so that jobs
        for different subjects can share it. It is not updated when the dataset changes, but a
        requested subject that it lacks is looked up in the dataset.

    Raises
    ------
    UsageError
        The index is damaged or belongs to another dataset, or cannot be written.
    """
    if database_dir is None:
        layout = _layout(bids_dir, _indexer(participants))
        try:
            paths = [Path(p) for p in layout.get_files()]
        finally:
            _close(layout.connection_manager)
        return sorted(p.relative_to(layout.root).as_posix() for p in paths)
    if not (database_dir / 'layout_index.sqlite').exists():
        _create_database(bids_dir, database_dir)
    files = _read_database(bids_dir, database_dir)
    if not participants:
        return files
    wanted = {f'sub-{p}' for p in participants}
    files = [f for f in files if f.partition('/')[0] in wanted]
    there = {f.partition('/')[0] for f in files}
    late = [p for p in participants if f'sub-{p}' not in there]
    late = [p for p in late if (bids_dir / f'sub-{p}').is_dir()]
    return sorted(files + (list_anat_files(bids_dir, late) if late else []))


def allowed_paths(participants: Sequence[str] = (), /) -> str:
    """Regular expression of the paths to index, relative to the dataset with a leading `/`."""
    label = '|'.join(re.escape(p) for p in participants) if participants else r'[^/]+'
    session = rf'/sub-(?:{label})(?:/ses-[^/]+)?'
    # Sidecars are read by their name where they are needed; half of the files need no index.
    in_anat = r'/anat(?:/[^/.][^/]*(?<!\.json))?'
    misplaced = r'/(?!\.)[^/]*\.(?:nii|nii\.gz)'
    return rf'{session}(?:{in_anat}|{misplaced})?'


def _indexer(participants: Sequence[str]) -> Any:
    from bids.layout import BIDSLayoutIndexer

    # SQLite cannot hold a name that is not in UTF-8 (a lone surrogate in Python).
    pattern = re.compile(rf'[\udc80-\udcff]|^(?!(?:{allowed_paths(participants)})\Z)', re.DOTALL)
    return BIDSLayoutIndexer(validate=False, ignore=[pattern], index_metadata=False)


def _layout(bids_dir: Path, indexer: Any, database_dir: Path | None = None) -> Any:
    # Imported here: it takes a second, which `babyseg -h` must not pay for.
    from bids.layout import BIDSLayout

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            return BIDSLayout(
                bids_dir,
                validate=False,
                derivatives=False,
                config=['bids'],
                database_path=database_dir,
                indexer=indexer,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            # PyBIDS trusts the description to be of the right form, and paths to be in UTF-8.
            raise UsageError(
                f'PyBIDS cannot index {bids_dir} ({e}). Check that its dataset_description.json '
                'is an object as BIDS describes it, and that its path is in UTF-8.'
            ) from e


def _create_database(bids_dir: Path, database_dir: Path) -> None:
    """Build the index beside its place and move it there: jobs may start at the same time."""
    try:
        database_dir.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix='.babyseg-', dir=database_dir.parent))
    except OSError as e:
        raise UsageError(
            f'--bids-database-dir: {database_dir} cannot be written ({e.strerror}). '
            'Choose another folder.'
        ) from e
    try:
        layout = _layout(bids_dir, _indexer(()), temporary / 'index')
        _close(layout.connection_manager)
        database_dir.mkdir(exist_ok=True)
        for file in (temporary / 'index').iterdir():
            file.replace(database_dir / file.name)
    except OSError as e:
        raise UsageError(
            f'--bids-database-dir: {database_dir} cannot be written ({e.strerror}). '
            'Choose another folder.'
        ) from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_database(bids_dir: Path, database_dir: Path) -> list[str]:
    """Relative paths in an index. `BIDSLayout` would insist on the place that was indexed."""
    from bids.layout.db import ConnectionManager
    from bids.layout.models import BIDSFile
    from sqlalchemy.exc import SQLAlchemyError

    hint = f'Delete the folder {database_dir}, or give another one with --bids-database-dir.'
    try:
        connection = ConnectionManager(database_dir)
        try:
            root = Path(connection.layout_info.root)
            paths = [Path(path) for (path,) in connection.session.query(BIDSFile.path)]
        finally:
            _close(connection)
    except (SQLAlchemyError, sqlite3.Error, AttributeError, ValueError, TypeError, OSError) as e:
        raise UsageError(f'The PyBIDS index in {database_dir} cannot be used ({e}). {hint}') from e
    # A dataset may be mounted elsewhere than where it was indexed; its relative paths still hold.
    files = sorted(p.relative_to(root).as_posix() for p in paths if p.is_relative_to(root))
    if files and not any(os.path.lexists(bids_dir / f) for f in files):
        raise UsageError(f'The PyBIDS index in {database_dir} is of another dataset. {hint}')
    return _wanted(files)


def _wanted(files: list[str]) -> list[str]:
    """What `allowed_paths` allows: an index that was made elsewhere lists far more."""
    pattern = re.compile(allowed_paths(), re.DOTALL)
    return [f for f in files if pattern.fullmatch(f'/{f}')]


def _close(connection: Any) -> None:
    connection.session.close()
    connection.engine.dispose()
