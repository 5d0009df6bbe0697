"""What can be wrong with a file before its content is looked at, in plain sentences."""

import re
import stat
from pathlib import Path

# A pointer that stands for the content is a few lines of text; real tables and images that are
# smaller than this are still told apart by their first bytes.
POINTER_BYTES = 1024
_LFS_START = b'version https://git-lfs'
_ANNEX_POINTER = re.compile(rb'^/?(\.git/)?annex/objects/')

GET_ANNEX = "its content was not fetched from git-annex: run 'datalad get' on it"
GET_LFS = "it is a Git LFS pointer and not the content: run 'git lfs pull' in the dataset"


def natural_key(text: str, /) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts `run-2` before `run-10`.

    >>> sorted(['run-10', 'run-2'], key=natural_key)
    ['run-2', 'run-10']
    """
    parts = re.split(r'([0-9]+)', text)
    return tuple((0, int(p), p) if p.isdecimal() else (1, 0, p) for p in parts if p)


def pointer_problem(start: bytes, /) -> str | None:
    """Say which kind of pointer a file with these first bytes is; None if it is none."""
    if start.startswith(_LFS_START):
        return GET_LFS
    if _ANNEX_POINTER.match(start):
        return GET_ANNEX
    return None


def file_problem(path: Path, /) -> str | None:
    """Why the content of `path` cannot be read, or None when it can.

    The sentence starts in lower case and does not name the file, so that the caller can write
    `{name}: {problem}`. Nothing is raised.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return _missing(path)
    except ValueError:
        return 'its name holds a character that no file system allows'
    if not stat.S_ISREG(mode):
        # Opening a pipe would wait for ever.
        return 'it is not a regular file'
    try:
        with path.open('rb') as f:
            start = f.read(POINTER_BYTES)
    except PermissionError:
        return 'you are not allowed to read it: change its permissions'
    except OSError as e:
        return f'it could not be read ({e.strerror or e})'
    if not start:
        return 'it is empty (zero bytes): copy it again from its source'
    return pointer_problem(start)


def _missing(path: Path, /) -> str:
    """Why `stat` failed."""
    try:
        if not path.is_symlink():
            return 'it could not be found or its folder could not be entered'
        target = path.readlink().as_posix()
    except OSError as e:
        return f'it could not be found ({e.strerror or e})'
    if 'annex/objects' in target or '/MD5E-' in target or '/SHA256E-' in target:
        return GET_ANNEX
    try:
        path.resolve(strict=True)
    except (OSError, RuntimeError) as e:
        if not isinstance(e, FileNotFoundError):
            return 'it is a link that leads back to itself: replace it by the file'
    return f'it is a link to {target}, which does not exist: restore that file'
