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
# One file for each run under way: jobs of a cluster share one output folder.
RUNS = '.runs'


def prepare_scratch(settings: Settings, /) -> Path:
    """Make the work folder, emptied when asked, and mark it as babyseg's.

    Raises
    ------
    UsageError, OutputError
        When it is to be emptied but is someone else's, or cannot be written.
    """
    scratch = settings.scratch
    if settings.clean_workdir and scratch.is_dir() and any(scratch.iterdir()):
        if not (scratch / MARKER).exists():
            raise UsageError(messages.foreign_work_dir(scratch))
        shutil.rmtree(scratch)
    is_new = not scratch.is_dir() or not any(scratch.iterdir())
    check_writable(scratch)
    if is_new:
        (scratch / MARKER).write_text('babyseg may delete this folder.\n')
    _run_file(settings).parent.mkdir(exist_ok=True)
    _run_file(settings).touch()
    return scratch


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
    """
    scratch = settings.scratch
    _run_file(settings).unlink(missing_ok=True)
    if not success or settings.work_dir is not None or not (scratch / MARKER).exists():
        return
    # Other files may appear while these go; what is left is deleted by the last run to end.
    if any((scratch / RUNS).iterdir()):
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    else:
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):
            scratch.rmdir()


def _run_file(settings: Settings) -> Path:
    return settings.scratch / RUNS / settings.run_uuid
