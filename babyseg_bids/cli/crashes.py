"""From the crash files of Nipype to one sentence for each session that failed."""

import re
import tempfile
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from babyseg_bids import messages
from babyseg_bids.preflight import voxel_count
from babyseg_bids.records import SessionInputs
from babyseg_bids.resources import SESSION_GB, memory_limit, session_gb
from babyseg_bids.settings import Settings

# What the libraries say when an allocation is refused; a graphics card is another matter.
_NO_MEMORY = re.compile(
    r"\b_?(?:Array)?MemoryError\b|[Cc]annot allocate memory|can't allocate memory|bad_alloc"
    r"|can't start new thread|failed to map segment from shared object(?!: [^C])"
)
_NO_RESULTS = re.compile(r'FileNotFoundError: .*result_\w+\.pklz')
# Reports of this process that could not be written, by run.
_unwritten: dict[str, list['Crash']] = {}
# The last line of a traceback: a dotted name of a class, and the message.
_RAISED = re.compile(r'^\s*(?P<name>[A-Za-z_][\w.]*)(?:: (?P<text>.*))?$')
_BEGIN = 'Traceback (most recent call last)'
_OURS = 'babyseg_bids.errors.'


@dataclass(frozen=True)
class Crash:
    """A step that failed: its full name, why in one line, and the file with the details."""

    step: str
    reason: str
    file: Path | None

    @property
    def name(self) -> str:
        """The step's own name (`segment`)."""
        return self.step.rpartition('.')[2]


def node_key(session: SessionInputs, /) -> str:
    """The session's name as it occurs in names of Nipype workflows, which have no dashes."""
    return re.sub(r'\W', '_', session.name)


def session_of(step: str, sessions: Iterable[SessionInputs], /) -> SessionInputs | None:
    """The session that a step (`babyseg_wf.sub_01_ses_A_wf.segment`) belongs to."""
    words = [f'_{part}_' for part in step.split('.')]
    found = [s for s in sessions if any(f'_{node_key(s)}_' in word for word in words)]
    # `sub_1` also occurs in the name of `sub_1_ses_A`.
    return max(found, key=lambda s: len(s.name), default=None)


def session_need_gb(session: SessionInputs, /) -> float:
    """Memory in GiB that a session needs."""
    return session_gb(voxel_count(session.scans[0].path)) if session.scans else SESSION_GB


def crash_files(settings: Settings, /) -> list[Path]:
    """Crash files of this run, in the order of their times."""
    folders = [
        settings.output_dir / 'logs',
        *settings.output_dir.glob(f'sub-*/log/{settings.run_uuid}'),
    ]
    # Seconds in the file's name tell files of this run from older ones in logs/.
    began = settings.run_uuid.split('_')[0]
    files = [f for folder in folders for f in folder.glob('crash-*.txt')]
    return sorted(f for f in files if f.name.removeprefix('crash-')[: len(began)] >= began)


def read_crashes(settings: Settings, sessions: Sequence[SessionInputs] = (), /) -> list[Crash]:
    """All crashes of this run; `sessions` tell how much memory each would have needed."""
    written = [parse_crash(f.read_text(errors='replace'), f) for f in crash_files(settings)]
    # Those come first: half a report of the same crash may be on the disk.
    crashes = [*_unwritten.get(settings.run_uuid, ()), *written]
    explained = []
    for crash in crashes:
        session = session_of(crash.step, sessions)
        need_gb = session_need_gb(session) if session else SESSION_GB
        explained.append(replace(crash, reason=in_words(crash.reason, settings, need_gb)))
    return explained


def keep_crash(run_uuid: str, step: str, traceback: str, /) -> None:
    """Remember a crash whose report cannot be written, since the disk is full."""
    crash = Crash(step, crash_reason(traceback), None)
    _unwritten.setdefault(run_uuid, []).append(crash)


def in_words(reason: str, settings: Settings, need_gb: float = SESSION_GB, /) -> str:
    """What to do about an error that is not babyseg's own, where that is known."""
    if reason.startswith('OSError') and messages.is_full(reason):
        return messages.disk_full(settings.output_dir, settings.work_root)
    if _NO_MEMORY.search(reason):
        limit = memory_limit()
        return messages.memory_short(need_gb, limit.amount, limit.source)
    return reason


def parse_crash(text: str, file: Path, /) -> Crash:
    """Read a crash file of Nipype."""
    match = re.match(r'Node: (\S+)', text)
    return Crash(match[1] if match else file.stem, crash_reason(text), file)


def crash_reason(text: str, /) -> str:
    """Why a step failed, in one line: the message of the innermost exception that is known.

    Nipype puts the traceback of the interface, indented, into the message of its own exception.
    The sentences of babyseg's own errors stand for themselves; other errors keep their name.
    """
    starts = [match.start() for match in re.finditer(re.escape(_BEGIN), text)]
    if not starts:
        return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), '')
    reasons = [_raised(text, start) for start in starts]
    # That a step left no results follows from what stopped it, which stands before.
    causes = [reason for reason in reasons if not _NO_RESULTS.match(reason)]
    return (causes or reasons)[-1]


def _raised(text: str, start: int) -> str:
    """The exception at the end of the traceback that begins at `start`."""
    # The beginning of the line counts: its indentation is that of the whole traceback.
    lines = text[text.rfind('\n', 0, start) + 1 :].splitlines()
    for line in lines[1:]:
        match = _RAISED.match(line)
        if match and _indent(line) <= _indent(lines[0]):
            name, message = match['name'], match['text'] or ''
            if name.startswith(_OURS):
                return message
            return f'{name.rpartition(".")[2]}: {message}'.rstrip(': ')
    return lines[-1].strip()


def _indent(line: str) -> int:
    return len(line.expandtabs()) - len(line.expandtabs().lstrip())


def write_crash(error: BaseException, settings: Settings | None, /) -> Path | None:
    """Write the traceback of an unexpected error where that is possible."""
    folders = [Path.cwd(), Path(tempfile.gettempdir())]
    if settings and settings.output_dir.is_dir():
        folders.insert(0, settings.output_dir / 'logs')
    text = ''.join(traceback.format_exception(error))
    if settings:
        text = f'{settings.to_toml()}\n{text}'
    name = f'crash-{settings.run_uuid if settings else "babyseg"}.txt'
    for folder in folders:
        try:
            folder.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        except OSError:
            continue
        return folder / name
    return None
