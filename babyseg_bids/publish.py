"""Bring a session's finished results to the output folder, so that none is ever half there."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from babyseg_bids.errors import OutputError
from babyseg_bids.outputs import Names
from babyseg_bids.records import SessionInputs

Content = Path | str | Mapping[str, Any]


def put(content: Content, target: Path, /) -> None:
    """Write a file that appears when it is complete.

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
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def publish_session(
    session: SessionInputs,
    files: Mapping[str, Content],
    ledger: Mapping[str, Any],
    output: Path,
    /,
) -> Path:
    """Put a session's files in place, its ledger last.

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
    try:
        # Without its record the session counts as not done until everything is in place.
        record.unlink(missing_ok=True)
        for name, content in files.items():
            put(content, output / name)
        written = {output / name for name in files}
        for old in (output / names.folder).glob(f'{session.name}_*'):
            if old not in written:
                old.unlink()
        put({**ledger, 'outputs': list(files)}, record)
    except OSError as e:
        raise OutputError(
            f'{e.filename or output} cannot be written ({e.strerror}); check permissions and free '
            'space, then run again: finished sessions are kept.'
        ) from e
    return record
