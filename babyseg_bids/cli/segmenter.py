"""Segmenting sessions batch after batch, with one progress display and one work folder for all.

Nipype needs time that grows with the square of the number of its steps, and the images of a batch
are read right before it runs: the first of ten thousand sessions begins as soon as that of one.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from traceback import format_exception
from types import TracebackType

from rich.console import Console

from babyseg_bids import messages
from babyseg_bids.cli import execution, traces
from babyseg_bids.cli.crashes import keep_crash, node_key, session_need_gb
from babyseg_bids.cli.environment import prepare_environment
from babyseg_bids.cli.progress import Progress, Tracker
from babyseg_bids.cli.scratch import forget, prepare_scratch, release_scratch
from babyseg_bids.outputs import is_done
from babyseg_bids.records import SessionInputs
from babyseg_bids.settings import Settings


class Segmenter:
    """Runs workflows over batches of sessions; use it as a context, which cleans up at its end.

    Parameters
    ----------
    settings : Settings
    sessions : int
        How many there may be to do, for the shares of the machine.
    out : Console
        Where progress goes.
    """

    def __init__(self, settings: Settings, sessions: int, out: Console) -> None:
        self._settings, self._shares, cpus, self._memory = execution.decide_resources(
            settings, sessions
        )
        self._out = out
        self._tracker = Tracker(sessions)
        self._stack = ExitStack()
        self._folders: list[Path] = []
        self._success = True
        self._number = 0
        # Of the sessions so far, the most memory that one needs.
        self._need_gb = 0.0
        sentence = messages.resources(
            self._settings.nprocs, self._settings.mem_gb, cpus.source, self._memory.source
        )
        out.print(f'{sentence} {messages.shares(self._shares.at_once, self._shares.threads)}')

    def __enter__(self) -> 'Segmenter':
        self._scratch = prepare_scratch(self._settings)
        prepare_environment(self._settings)
        live = self._out.is_terminal and not self._settings.verbose
        self._progress = Progress(self._tracker, self._out, live=live)
        self._stack.enter_context(self._progress)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._stack.close()
        release_scratch(
            self._settings, self._folders, success=self._success and self._number > 0 and not kind
        )

    def segment(self, sessions: Sequence[SessionInputs], *, later: int) -> bool:
        """Run one batch; whether another may follow.

        Parameters
        ----------
        sessions : with at least one scan each
        later : int
            How many more there may be to do after these.
        """
        settings, out = self._settings, self._out
        self._number += 1
        need_gb, largest = max((session_need_gb(s), s.name) for s in sessions)
        if need_gb > max(settings.mem_gb, self._need_gb):
            warning = messages.little_memory(largest, settings.mem_gb, need_gb)
            out.print(f'Warning: {warning}', style='yellow')
        self._need_gb = max(self._need_gb, need_gb)
        traces.write_logs(sessions, settings)
        workflow = execution.build(sessions, settings)
        folders = execution.session_folders(workflow, self._scratch)
        if settings.write_graph and self._number == 1:
            out.print(f'Graph of the workflow: {traces.write_graph(workflow, settings)}')
        self._tracker.begin(sessions, execution.step_names(workflow), later=later)
        error = execution.run_workflow(
            workflow,
            settings,
            self._shares,
            self._memory,
            self._need_gb,
            self._progress.callback,
        )
        if isinstance(error, OSError):
            # It met Nipype between two steps, and none of these sessions went on.
            lines = ''.join(format_exception(error))
            for session in sessions:
                keep_crash(settings.run_uuid, f'{node_key(session)}.schedule', lines)
        if settings.resource_monitor and not traces.keep_resource_record(
            workflow, settings, self._number
        ):
            out.print(messages.NO_RESOURCE_RECORD)
        success = error is None and all(
            is_done(s, settings.output_dir, settings) for s in sessions
        )
        if error is not None and settings.verbose > 1:
            out.print(f'Nipype ended with: {error}')
        if success and later:
            forget(settings, folders)
        else:
            self._folders += folders
        self._success &= success
        return success or not settings.stop_on_first_crash
