"""What became of each session, judged by the files that exist, and the exit code that follows."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from rich.console import Console

from babyseg_bids import messages
from babyseg_bids.cli.crashes import Crash, read_crashes, session_of
from babyseg_bids.errors import NoInputError
from babyseg_bids.records import VERDICTS_FILE, SessionInputs
from babyseg_bids.settings import Settings

Fate = Literal['done', 'failed', 'no usable image', 'done before', 'to do']


@dataclass(frozen=True)
class Verdict:
    """What became of one session, and why in one sentence."""

    name: str
    fate: Fate
    reason: str = ''
    crash_file: Path | None = None


def stamp(session: SessionInputs, output: Path, /) -> int:
    """When the session was completed last: the time of its ledger, which is written last."""
    ledger = output.joinpath(
        *session.name.split('_'), 'anat', f'{session.name}_desc-inputs_ledger.json'
    )
    return ledger.stat().st_mtime_ns if ledger.exists() else 0


def empty_reason(session: SessionInputs, /) -> str:
    """Why a session has no image, from its ledger."""
    rejected = [
        f'{PurePosixPath(row.relative_path).name}: {row.reason}'
        for row in session.ledger
        if row.status == 'rejected'
    ]
    return '; '.join(rejected) or messages.NO_ANATOMICAL


def judge(
    sessions: Sequence[SessionInputs],
    fates: Mapping[str, Fate],
    before: Mapping[str, int],
    settings: Settings,
    /,
) -> list[Verdict]:
    """A verdict for each session, from the files that exist and not from what was raised.

    With --overwrite old results are there in any case: `before` holds their stamps.
    """
    crashes: dict[str, Crash] = {}
    for crash in read_crashes(settings, sessions):
        session = session_of(crash.step, sessions)
        if session is not None:
            # The first is the cause, later ones may follow from it.
            crashes.setdefault(session.name, crash)
    verdicts = []
    for session in sessions:
        name, fate = session.name, fates[session.name]
        if fate == messages.TO_DO:
            verdicts.append(_judge_one(session, before[name], crashes.get(name), settings))
        else:
            reason = empty_reason(session) if fate == messages.NO_IMAGE else ''
            verdicts.append(Verdict(name, fate, reason))
    return verdicts


def _judge_one(
    session: SessionInputs, before: int, crash: Crash | None, settings: Settings
) -> Verdict:
    """The verdict on a session that was to be segmented."""
    from babyseg_bids.outputs import is_done

    is_new = stamp(session, settings.output_dir) != before
    if is_new and is_done(session, settings.output_dir, settings):
        return Verdict(session.name, 'done')
    if crash is not None:
        reason = f'{crash.reason} (step {crash.name})'
        return Verdict(session.name, 'failed', reason, crash.file)
    reason = messages.NOT_RUN if settings.stop_on_first_crash else messages.NO_REASON
    return Verdict(session.name, 'failed', reason)


def record_verdicts(verdicts: Sequence[Verdict], settings: Settings, /) -> None:
    """Leave what became of sessions without results beside their logs, for the group level."""
    from babyseg_bids.reports.files import write_atomic

    wrong = [v for v in verdicts if v.fate in (messages.FAILED, messages.NO_IMAGE)]
    for subject in sorted({v.name.split('_')[0] for v in wrong}):
        content = [
            {'name': v.name, 'fate': v.fate, 'reason': v.reason}
            for v in wrong
            if v.name.split('_')[0] == subject
        ]
        path = settings.output_dir / subject / 'log' / settings.run_uuid / VERDICTS_FILE
        write_atomic(path, json.dumps(content, indent=2) + '\n')


def conclude(
    sessions: Sequence[SessionInputs],
    verdicts: Sequence[Verdict],
    settings: Settings,
    out: Console,
    /,
    *,
    deed: str = 'segmented',
) -> int:
    """Show what became of the sessions; the exit code. `deed` is what was done to them.

    Raises
    ------
    NoInputError
        When there was not one usable image, unless other tasks of an array may have some.
    """
    from babyseg_bids.cli import tables

    wrong = [v for v in verdicts if v.fate in (messages.FAILED, messages.NO_IMAGE)]
    empty = sum(v.fate == messages.NO_IMAGE for v in verdicts)
    failed = len(wrong) - empty
    if len(wrong) > 1 or failed:
        tables.show_verdicts(wrong)
    if empty == len(verdicts) and settings.array_task is None:
        first = f'{wrong[0].name}: {wrong[0].reason}'
        raise NoInputError(messages.all_empty(len(wrong), first))
    if empty == 1 and not failed:
        tables.print_line(out, f'{wrong[0].name}: {messages.NO_IMAGE}. {wrong[0].reason}')
    done = sum(v.fate == messages.DONE for v in verdicts)
    skipped = sum(v.fate == messages.SKIPPED for v in verdicts)
    out.print(messages.summary(f'{done} {deed}', skipped, empty, failed, settings.output_dir))
    # A participant who was asked for by name and does not exist is a request that was not met.
    absent = [s for s in sessions if s.subject in settings.participants and not s.ledger]
    return 1 if failed or absent else 0
