"""The participant level: find the sessions, segment what is not done, say what became of each."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from rich.console import Console

from babyseg_bids import messages
from babyseg_bids.cli import checks
from babyseg_bids.cli.environment import prepare_environment
from babyseg_bids.cli.progress import duration, error_console
from babyseg_bids.cli.scratch import scratch_folder
from babyseg_bids.cli.verdicts import Fate, conclude, judge, record_verdicts, stamp
from babyseg_bids.errors import NoInputError, OutputError
from babyseg_bids.records import SessionInputs
from babyseg_bids.settings import Settings

if TYPE_CHECKING:
    from babyseg_bids.discovery import Search

# Sessions whose images are read before they are segmented: enough to keep a large machine busy.
BATCH = 100


def run_participant(settings: Settings, /) -> int:
    """Do what the settings ask for; the exit code.

    Raises
    ------
    BabySegError
        When nothing can be done at all.
    """
    out = error_console()
    check(settings, out)
    prepare_environment(settings)
    # A dry run leaves no trace.
    made = [] if settings.dry_run else checks.check_writable(settings.output_dir)
    try:
        return _run(settings, out)
    except NoInputError:
        checks.remove_empty(made)
        raise


def _run(settings: Settings, out: Console) -> int:
    """`run_participant` after its checks."""
    search = find(settings)
    if not search.keys:
        out.print(messages.empty_share(settings.array_task))
        return 0
    if settings.dry_run:
        sessions = search.inspect()
        _show_plan(sessions, decide(sessions, settings), settings)
        return 0
    if settings.boilerplate_only or settings.reports_only:
        with scratch_folder(settings):
            return _write_texts(search.inspect(), settings, out)
    sessions, fates, before = _segment_all(search, settings, out)
    if all(fate == messages.SKIPPED for fate in fates.values()):
        out.print(messages.NOTHING_TO_DO)
        if settings.scratch.exists():
            # A run that was killed when all was done leaves its work folder.
            with scratch_folder(settings):
                pass
    verdicts = judge(sessions, fates, before, settings)
    try:
        record_verdicts(verdicts, settings)
    except OutputError as error:
        out.print(f'Warning: {messages.record_unwritten(str(error))}', style='yellow')
    return conclude(sessions, verdicts, settings, out)


def check(settings: Settings, out: Console, /) -> None:
    """Look for everything that can be known to be wrong before the dataset is read.

    Raises
    ------
    BabySegError
        For the first thing that is wrong.
    """
    described = checks.check_bids_dir(settings.bids_dir)
    checks.check_apart(settings.output_dir, settings.bids_dir)
    if settings.work_dir:
        checks.check_apart(settings.work_dir, settings.bids_dir, what='work')
    checks.check_ours(settings.output_dir)
    checks.check_files(settings)
    if settings.plugin_file:
        from babyseg_bids.cli.execution import read_plugin

        read_plugin(settings.plugin_file)
    if not described and not settings.skip_bids_validation:
        out.print(f'Warning: {messages.no_description(settings.bids_dir)}', style='yellow')


def find(settings: Settings, /) -> 'Search':
    """The sessions that were asked for, their images not read yet."""
    # PyBIDS takes seconds to import.
    from babyseg_bids.age import parse_age_option
    from babyseg_bids.discovery import Search

    return Search(
        settings.bids_dir,
        participants=settings.participants,
        sessions=settings.sessions,
        contrasts=settings.contrasts,
        filters=settings.bids_filter,
        reference=settings.reference_anat,
        ages=parse_age_option(settings.ages) if settings.ages else None,
        database_dir=settings.database_dir,
        task=settings.task,
    )


def decide(sessions: Sequence[SessionInputs], settings: Settings, /) -> dict[str, Fate]:
    """What is to become of each session."""
    fates: dict[str, Fate] = {}
    for session in sessions:
        if not session.scans:
            fates[session.name] = 'no usable image'
        elif not settings.overwrite and _is_done(session, settings):
            fates[session.name] = 'done before'
        else:
            fates[session.name] = 'to do'
    return fates


def _is_done(session: SessionInputs, settings: Settings) -> bool:
    """Imported when there is a session to ask about: it brings Nipype with it."""
    from babyseg_bids.outputs import is_done

    return is_done(session, settings.output_dir, settings)


def _segment_all(
    search: 'Search', settings: Settings, out: Console
) -> tuple[list[SessionInputs], dict[str, Fate], dict[str, int]]:
    """Inspect and segment `BATCH` sessions after `BATCH` sessions.

    Returns
    -------
    All sessions, what was to become of each, and stamps of earlier results of those to do.
    """
    sessions: list[SessionInputs] = []
    fates: dict[str, Fate] = {}
    before: dict[str, int] = {}
    left, goes_on = len(search.keys), True
    with ExitStack() as stack:
        segmenter = None
        for part in batches(left, BATCH):
            # After --stop-on-first-crash, names tell enough of the sessions that will not run.
            batch = search.inspect(search.keys[part], check_images=goes_on)
            left -= len(batch)
            sessions += batch
            fates |= decide(batch, settings)
            to_do = [s for s in batch if fates[s.name] == messages.TO_DO]
            before |= {s.name: stamp(s, settings.output_dir) for s in to_do}
            if not to_do or not goes_on:
                continue
            if segmenter is None:
                # It brings Nipype with it, which a run without anything to do must not wait for.
                from babyseg_bids.cli.segmenter import Segmenter

                segmenter = stack.enter_context(Segmenter(settings, len(to_do) + left, out))
            goes_on = segmenter.segment(to_do, later=left)
    return sessions, fates, before


def batches(count: int, size: int, /) -> Iterator[slice]:
    """Slices of `size` items, the last one shorter.

    >>> list(batches(5, 3))
    [slice(0, 3, None), slice(3, 5, None)]
    """
    return (slice(i, min(i + size, count)) for i in range(0, count, size))


def _write_texts(sessions: Sequence[SessionInputs], settings: Settings, out: Console) -> int:
    """Reports of finished sessions, or the methods text."""
    if settings.reports_only:
        from babyseg_bids.cli.reports_only import rewrite_reports

        return rewrite_reports(sessions, settings, out)
    from babyseg_bids.cli import execution

    # Building the workflow writes the methods text, since its parts know what they do.
    execution.build([s for s in sessions if s.scans], settings)
    out.print(messages.boilerplate(settings.output_dir / 'logs' / 'CITATION.md'))
    return 0


def _show_plan(
    sessions: Sequence[SessionInputs], fates: Mapping[str, Fate], settings: Settings
) -> None:
    from babyseg_bids.cli import tables

    console = tables.console()
    console.print(tables.plan_table(sessions, fates))
    for line in tables.notes(sessions, everything=settings.verbose > 0):
        tables.print_line(console, line)
    groups: dict[str, list[SessionInputs]] = {messages.TO_DO: [], messages.SKIPPED: []}
    for session in sessions:
        groups.setdefault(fates[session.name], []).append(session)
    if to_do := groups[messages.TO_DO]:
        from babyseg_bids.cli.estimate import estimate
        from babyseg_bids.cli.execution import decide_resources

        shares = decide_resources(settings, len(to_do))[1]
        needs = estimate(to_do, groups[messages.SKIPPED], settings, shares)
        time = (duration(needs.seconds), duration(needs.each), needs.known)
        disk_mb = needs.disk_bytes / 1e6
        sentence = messages.estimate(
            needs.sessions, shares.at_once, time, needs.memory_gb, disk_mb,
            more=settings.save_probabilities,
        )  # fmt: skip
        tables.print_line(console, sentence)
    counts = ((name, len(group)) for name, group in groups.items())
    tables.print_line(console, messages.plan_counts(counts))
    if any(s.ledger for s in sessions):
        return
    raise NoInputError(messages.all_empty(len(sessions), str(settings.bids_dir)))
