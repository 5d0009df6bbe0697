"""The folder of intermediate files: made, shared between runs, and deleted when it is ours."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from babyseg_bids import messages
from babyseg_bids.cli.checks import check_writable
from babyseg_bids.errors import UsageError
from babyseg_bids.settings import Settings

# Left in each work folder that babyseg makes, so that it only ever deletes its own.
MARKER = '.made-by-babyseg'
# One file for each run under way: jobs of a cluster share one work folder.
RUNS = '.runs'


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
    is_new = not _has_content(root)
    check_writable(scratch)
    if is_new:
        (root / MARKER).write_text('babyseg may delete this folder.\n')
    _run_file(settings).parent.mkdir(exist_ok=True)
    _run_file(settings).touch()
    return scratch


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
    _run_file(settings).unlink(missing_ok=True)
    if not success or settings.work_dir is not None or not (root / MARKER).exists():
        return
    if settings.array_task:
        shutil.rmtree(scratch, ignore_errors=True)
        return
    # Other files may appear while these go; what is left is deleted by the last run to end.
    if any((scratch / RUNS).iterdir()):
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    else:
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):
            scratch.rmdir()


def forget(settings: Settings, folders: Iterable[Path], /) -> None:
    """Delete intermediate files of finished sessions, unless they are kept for the user."""
    if settings.work_dir is None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _run_file(settings: Settings) -> Path:
    """A task keeps its name when a cluster ends it and runs it again."""
    name = settings.task.folder if settings.task else settings.run_uuid
    return settings.work_root / RUNS / name
