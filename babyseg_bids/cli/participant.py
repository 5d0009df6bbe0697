"""The participant level: find the sessions, segment what is not done, say what became of each."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from babyseg_bids import messages
from babyseg_bids.cli import checks
from babyseg_bids.cli.environment import prepare_environment
from babyseg_bids.cli.progress import Progress, Tracker, error_console
from babyseg_bids.cli.scratch import prepare_scratch, release_scratch, scratch_folder
from babyseg_bids.cli.verdicts import Fate, conclude, judge, record_verdicts, stamp
from babyseg_bids.errors import NoInputError
from babyseg_bids.records import SessionInputs
from babyseg_bids.resources import SESSION_GB
from babyseg_bids.settings import Settings


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
    sessions = find(settings)
    if not sessions:
        out.print(messages.empty_share(settings.array_task))
        return 0
    fates = decide(sessions, settings)
    if settings.dry_run:
        _show_plan(sessions, fates, settings)
        return 0
    if settings.boilerplate_only or settings.reports_only:
        with scratch_folder(settings):
            return _write_texts(sessions, settings, out)
    to_do = [s for s in sessions if fates[s.name] == messages.TO_DO]
    before = {s.name: stamp(s, settings.output_dir) for s in to_do}
    if to_do:
        segment(to_do, settings, out)
    elif all(fate == messages.SKIPPED for fate in fates.values()):
        out.print(messages.NOTHING_TO_DO)
    verdicts = judge(sessions, fates, before, settings)
    record_verdicts(verdicts, settings)
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


def find(settings: Settings, /) -> list[SessionInputs]:
    """The sessions that were asked for, also those without any usable image."""
    # PyBIDS takes seconds to import.
    from babyseg_bids.age import parse_age_option
    from babyseg_bids.discovery import find_sessions

    return find_sessions(
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


def segment(sessions: Sequence[SessionInputs], settings: Settings, out: Console, /) -> None:
    """Run the workflow over sessions and clean up after it."""
    from babyseg_bids.cli import execution, traces

    settings, shares, cpus, memory = execution.decide_resources(settings, len(sessions))
    sentence = messages.resources(settings.nprocs, settings.mem_gb, cpus.source, memory.source)
    out.print(f'{sentence} {messages.shares(shares.at_once, shares.threads)}')
    if settings.mem_gb < SESSION_GB:
        warning = messages.little_memory(settings.mem_gb, SESSION_GB)
        out.print(f'Warning: {warning}', style='yellow')
    scratch = prepare_scratch(settings)
    prepare_environment(settings)
    traces.write_logs(sessions, settings)
    folders: list[Path] = []
    success = False
    try:
        workflow = execution.build(sessions, settings)
        folders = execution.session_folders(workflow, scratch)
        if settings.write_graph:
            out.print(f'Graph of the workflow: {traces.write_graph(workflow, settings)}')
        tracker = Tracker(sessions, execution.step_names(workflow))
        live = out.is_terminal and not settings.verbose
        with Progress(tracker, out, live=live) as progress:
            error = execution.run_workflow(workflow, settings, shares, memory, progress.callback)
        if settings.resource_monitor and traces.keep_resource_record(workflow, settings) is None:
            out.print(messages.NO_RESOURCE_RECORD)
        success = error is None and all(_is_done(s, settings) for s in sessions)
        if error is not None and settings.verbose > 1:
            out.print(f'Nipype ended with: {error}')
    finally:
        release_scratch(settings, folders, success=success)


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
    if any(s.ledger for s in sessions):
        return
    raise NoInputError(messages.all_empty(len(sessions), str(settings.bids_dir)))
