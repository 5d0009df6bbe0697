"""The group level: tables and a page from the results of the participant level."""

from babyseg_bids import messages
from babyseg_bids.cli import checks
from babyseg_bids.cli.environment import prepare_environment
from babyseg_bids.cli.progress import error_console
from babyseg_bids.errors import UsageError
from babyseg_bids.settings import Settings


def run_group(settings: Settings, /) -> int:
    """Gather what is in the output folder; the raw data need not be there any more.

    Raises
    ------
    UsageError, OutputError, NoInputError
        When there are no results, or the folder cannot be written.
    """
    if settings.array_task:
        raise UsageError(messages.task_of_group('--array-task'))
    checks.check_results(settings.output_dir)
    checks.check_writable(settings.output_dir)
    prepare_environment(settings)
    from babyseg_bids.cli.scratch import scratch_folder

    with scratch_folder(settings):
        from babyseg_bids.reports.group import write_group

        write_group(settings.output_dir, settings.bids_dir)
    error_console().print(f'Group tables and page: {settings.output_dir / "group.html"}')
    return 0
