"""List the anatomical files of a dataset with PyBIDS, looking at nothing else.

PyBIDS' own indexer visits every folder, opens every JSON file and matches each name with dozens of
expressions; that takes minutes for a thousand subjects. `index_anat` takes its place: it lists the
`anat` folders of the requested subjects and fills the same tables at once.
"""

import os
import re
import shutil
import sqlite3
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from babyseg_bids.discovery_names import looks_like_image
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
        layout = _layout(bids_dir, partial(index_anat, participants=participants, tags=False))
        try:
            return _paths(layout.connection_manager, layout.root)
        finally:
            _close(layout.connection_manager)
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


def index_anat(layout: Any, *, participants: Sequence[str] = (), tags: bool = True) -> None:
    """Fill the index of a `BIDSLayout` with what `anat_files` finds; its argument `indexer`.

    Parameters
    ----------
    layout : BIDSLayout
        With an empty index.
    participants : sequence of str
        Bare labels; empty for all.
    tags : bool
        Also store the entities of each file, which `layout.get` needs.
    """
    from bids.layout.models import BIDSFile, Tag

    root = Path(layout.root)
    found = [str(root / name) for name in anat_files(root, participants)]
    if not found:
        return
    rows = [
        {
            'path': path,
            'filename': os.path.basename(path),  # noqa: PTH119 - a Path costs ten times as much.
            'dirname': os.path.dirname(path),  # noqa: PTH120
            'is_dir': False,
            'class_': 'image_file' if path.endswith(('.nii', '.nii.gz')) else 'file',
        }
        for path in found
    ]
    layout.session.execute(BIDSFile.__table__.insert(), rows)
    if tags:
        entities = [e for c in layout.config.values() for e in c.entities.values() if e.regex]
        matches = [(p, e, e.regex.search(p)) for p in found for e in entities]
        values = [
            {
                'file_path': path,
                'entity_name': entity.name,
                '_value': str(entity.dtype(match[1])),
                '_dtype': entity._dtype,
                'is_metadata': False,
            }
            for path, entity, match in matches
            if match
        ]
        layout.session.execute(Tag.__table__.insert(), values)
    layout.session.commit()


def anat_files(bids_dir: Path, participants: Sequence[str] = ()) -> Iterator[str]:
    """Files in the `anat` folders of subjects and sessions, and images that lie beside them.

    Sidecars are left out: they are read by their name where they are needed. So is what cannot
    be listed, and a name that is not in UTF-8, which SQLite cannot hold.

    Yields
    ------
    str
        Path relative to the dataset, with `/`.
    """
    subjects = [f'sub-{p}' for p in participants] or [
        name for name, _ in _entries(bids_dir) if name.startswith('sub-')
    ]
    for subject in subjects:
        inside = _entries(bids_dir / subject)
        yield from _anat_in(bids_dir, subject, inside)
        for name, is_folder in inside:
            if is_folder and name.startswith('ses-'):
                folder = f'{subject}/{name}'
                yield from _anat_in(bids_dir, folder, _entries(bids_dir / folder))


def _anat_in(bids_dir: Path, folder: str, inside: list[tuple[str, bool]]) -> Iterator[str]:
    """`anat_files` of one session or of one subject without sessions."""
    for name, is_folder in inside:
        if not is_folder and looks_like_image(name):
            yield f'{folder}/{name}'
        elif is_folder and name.lower() == 'anat':
            # Anat or ANAT is a slip, which the ledger names.
            for file, is_inner in _entries(bids_dir / folder / name):
                if looks_like_image(file) or not (is_inner or file.endswith('.json')):
                    yield f'{folder}/{name}/{file}'


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """Names in a folder without hidden ones, and whether each is a folder."""
    try:
        with os.scandir(folder) as entries:
            return [
                (e.name, _is_folder(e))
                for e in entries
                if not e.name.startswith('.') and not re.search(r'[\udc80-\udcff]', e.name)
            ]
    except OSError:
        return []


def _is_folder(entry: 'os.DirEntry[str]') -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link that leads back to itself.
        return False


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
        layout = _layout(bids_dir, index_anat, temporary / 'index')
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
    from sqlalchemy.exc import SQLAlchemyError

    hint = f'Delete the folder {database_dir}, or give another one with --bids-database-dir.'
    try:
        connection = ConnectionManager(database_dir)
        try:
            files = _paths(connection, connection.layout_info.root)
        finally:
            _close(connection)
    except (SQLAlchemyError, sqlite3.Error, AttributeError, ValueError, TypeError, OSError) as e:
        raise UsageError(f'The PyBIDS index in {database_dir} cannot be used ({e}). {hint}') from e
    if files and not any(os.path.lexists(bids_dir / f) for f in files):
        raise UsageError(f'The PyBIDS index in {database_dir} is of another dataset. {hint}')
    return _wanted(files)


def _paths(connection: Any, root: str) -> list[str]:
    """Relative paths in an index.

    A dataset may be mounted elsewhere than where it was indexed; these still hold.
    """
    from bids.layout.models import BIDSFile

    start = f'{root.rstrip("/")}/'
    paths = (path for (path,) in connection.session.query(BIDSFile.path))
    return sorted(p.removeprefix(start) for p in paths if p.startswith(start))


def _wanted(files: list[str]) -> list[str]:
    """What `anat_files` finds: an index that was made elsewhere lists far more."""
    folder = r'sub-[^/]+/(?:ses-[^/]+/)?'
    in_anat = re.compile(rf'{folder}(?i:anat)/[^/.][^/]*(?<!\.json)', re.DOTALL)
    beside = re.compile(rf'{folder}[^/]*', re.DOTALL)
    return [
        f
        for f in files
        if in_anat.fullmatch(f) or (beside.fullmatch(f) and looks_like_image(f.rpartition('/')[2]))
    ]


def _close(connection: Any) -> None:
    connection.session.close()
    connection.engine.dispose()
