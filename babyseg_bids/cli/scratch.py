"""The folder of intermediate files: made, shared between runs, and deleted when it is ours."""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from babyseg_bids import messages
from babyseg_bids.cli.checks import PROBE, check_writable, reason
from babyseg_bids.errors import OutputError, UsageError
from babyseg_bids.settings import Settings

# Left in each work folder that babyseg makes, so that it only ever deletes its own.
MARKER = '.made-by-babyseg'
# One file for each run under way: jobs of a cluster share one work folder. Each run holds a lock
# on its file; the system takes it back when the run is killed, and the file counts for nothing.
RUNS = '.runs'
# Held while a run adds its file and while the last one deletes the folder.
DOOR = 'door'
_locks: dict[Path, int] = {}


def prepare_scratch(settings: Settings, /) -> Path:
    """Make the work folder, emptied when asked, and mark it as babyseg's.

    Raises
    ------
    UsageError, OutputError
        When it is to be emptied but is someone else's, or cannot be written.
    """
    root, scratch = settings.work_root, settings.scratch
    if settings.clean_workdir and _has_content(scratch):
        if not (root / MARKER).exists():
            raise UsageError(messages.foreign_work_dir(scratch))
        _empty(scratch)
    check_writable(root)
    try:
        _enter(settings)
        check_writable(scratch)
    except OSError as error:
        raise OutputError(messages.output_unwritable(scratch, reason(error))) from error
    return scratch


def _enter(settings: Settings) -> None:
    """Mark the folder as babyseg's when it is new, and add this run to those under way."""
    root, file = settings.work_root, _run_file(settings)
    with _door(file.parent):
        # Others that begin at the same moment test whether they can write.
        theirs = (p for p in root.iterdir() if p.name != RUNS and not p.name.startswith(PROBE))
        if settings.work_dir is None or not any(theirs):
            (root / MARKER).write_text('babyseg may delete this folder.\n')
        if file in _locks:
            os.close(_locks.pop(file))
        _locks[file] = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        # Where the file system has no locks, every run counts as under way for ever.
        with suppress(OSError):
            fcntl.flock(_locks[file], fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def _door(runs: Path) -> Iterator[None]:
    """No other run begins or ends meanwhile; the folder exists and is the one on disk."""
    while True:
        runs.mkdir(parents=True, exist_ok=True)
        try:
            door = os.open(runs / DOOR, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            with suppress(OSError):
                fcntl.flock(door, fcntl.LOCK_EX)
            # The last run may have taken the folder away while this one waited.
            with suppress(FileNotFoundError):
                if (runs / DOOR).stat().st_ino == os.fstat(door).st_ino:
                    yield
                    return
        finally:
            os.close(door)


def _others(runs: Path) -> bool:
    """Whether another run is under way; the files of those that were killed are removed."""
    found = False
    for file in runs.iterdir():
        if file.name == DOOR:
            continue
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            # Of another user, or gone just now.
            found |= file.exists()
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            found = True
        else:
            file.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
    return found


def _has_content(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _empty(folder: Path) -> None:
    """Delete what is in a folder; the folder itself may be where something is mounted."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def scratch_folder(settings: Settings, /) -> Iterator[Path]:
    """The work folder for something short, which leaves nothing behind."""
    folder = prepare_scratch(settings)
    try:
        yield folder
    finally:
        release_scratch(settings, [], success=True)


def release_scratch(settings: Settings, folders: Iterable[Path], /, *, success: bool) -> None:
    """Leave the work folder; after success, delete it when nobody asked for a particular one.

    `folders` are those of this run's sessions: the only ones to go while another run is under way.
    A task of an array deletes its own folder and leaves the rest to the group level, because
    other tasks begin at any time.
    """
    root, scratch = settings.work_root, settings.scratch
    file = _run_file(settings)
    kept = not success or settings.work_dir is not None or not (root / MARKER).exists()
    # Nothing to tidy up is left when somebody deleted the folder under the run.
    if not file.parent.exists():
        kept, folders = True, ()
    else:
        with _door(file.parent):
            file.unlink(missing_ok=True)
            if not (kept or settings.array_task or _others(file.parent)):
                # Under another name at once: a run that begins now makes a folder of its own.
                gone = root.with_name(f'{root.name}.{settings.run_uuid}')
                with suppress(OSError):
                    root.replace(gone)
    if file in _locks:
        os.close(_locks.pop(file))
    if kept:
        return
    for folder in (scratch,) if settings.array_task else folders:
        shutil.rmtree(folder, ignore_errors=True)
    # Also those of runs that were killed while they deleted them.
    for gone in root.parent.glob(f'{root.name}.*'):
        shutil.rmtree(gone, ignore_errors=True)


def forget(settings: Settings, folders: Iterable[Path], /) -> None:
    """Delete intermediate files of finished sessions, unless they are kept for the user."""
    if settings.work_dir is None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _run_file(settings: Settings) -> Path:
    """A task keeps its name when a cluster ends it and runs it again."""
    name = settings.task.folder if settings.task else settings.run_uuid
    return settings.work_root / RUNS / name
