"""Bring a session's finished results to the output folder, so that none is ever half there."""

import json
import shutil
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from babyseg_bids.errors import OutputError
from babyseg_bids.outputs import Names
from babyseg_bids.records import SessionInputs

Content = Path | str | Mapping[str, Any]


def put(content: Content, target: Path, /) -> None:
    """Write a file that appears when it is complete; see `draft`."""
    temporary = draft(content, target)
    try:
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def draft(content: Content, target: Path, /) -> Path:
    """Write what is to become a file beside its place, under a hidden name.

    Parameters
    ----------
    content : a file to copy, text, or an object that becomes JSON
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f'.{target.name}.{uuid4().hex[:8]}')
    try:
        if isinstance(content, Path):
            shutil.copyfile(content, temporary)
        else:
            text = content if isinstance(content, str) else json.dumps(content, indent=2) + '\n'
            temporary.write_text(text, 'utf-8')
    except BaseException as e:
        temporary.unlink(missing_ok=True)
        if isinstance(e, OSError) and not _is_about_source(e, temporary):
            raise OSError(e.errno, e.strerror, str(target)) from e
        raise
    return temporary


def _is_about_source(error: OSError, temporary: Path) -> bool:
    """Whether what was to be copied could not be read."""
    names = [n for n in (error.filename, error.filename2) if n is not None]
    return bool(names) and str(temporary) not in map(str, names)


def publish_session(
    session: SessionInputs,
    files: Mapping[str, Content],
    ledger: Mapping[str, Any],
    output: Path,
    /,
) -> Path:
    """Put a session's files in place, its ledger last.

    All are written before the first one gets its name: when the disk is full, earlier results of
    the session stay as they are.

    What an earlier run left for this session and this one does not write is removed, above all a
    label map in the space of another reference: two confuse programs that read them.

    Parameters
    ----------
    files : content by name, relative to `output`
    ledger : becomes the completion record, together with the names of the files

    Returns
    -------
    Path of the ledger

    Raises
    ------
    OutputError
        If something cannot be written.
    """
    names = Names(session)
    record = output / names.ledger
    drafts: dict[Path, Path] = {}
    try:
        _remove_drafts(session, [record, *(output / name for name in files)])
        for name, content in files.items():
            drafts[output / name] = draft(content, output / name)
        drafts[record] = draft({**ledger, 'outputs': list(files)}, record)
        # Without its record the session counts as not done until everything is in place.
        record.unlink(missing_ok=True)
        for target, temporary in drafts.items():
            if target == record:
                _remove_old(session, record.parent, drafts)
            temporary.replace(target)
    except OSError as e:
        # Of a copy, the second name is that of the file that could not be written.
        path = e.filename2 or e.filename or output
        raise OutputError(
            f'{path} cannot be written ({e.strerror}); check permissions and free space, then run '
            'again: finished sessions are kept.'
        ) from e
    finally:
        for temporary in drafts.values():
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    return record


def _remove_drafts(session: SessionInputs, targets: Iterable[Path]) -> None:
    """Remove what a run that was killed left of this session under hidden names."""
    for folder in {target.parent for target in targets}:
        for separator in '_.':
            for old in folder.glob(f'.{session.name}{separator}*'):
                old.unlink(missing_ok=True)


def _remove_old(session: SessionInputs, folder: Path, written: Container[Path]) -> None:
    for old in folder.glob(f'{session.name}_*'):
        if old not in written:
            old.unlink()
