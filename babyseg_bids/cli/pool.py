"""Nipype's MultiProc plugin, made to survive the death of a worker.

When the system kills a worker (memory, mostly), Python gives up the whole pool, and Nipype waits
for ever for results that never come. Here the pool is replaced: steps that were under way beside
the killed one are run again, one at a time, so that only the one to blame is lost.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir
from traceback import format_exc, format_exception, format_exception_only
from typing import Any

from nipype import config
from nipype.pipeline.plugins.multiproc import MultiProcPlugin, run_node

from babyseg_bids.cli.environment import quieten
from babyseg_bids.errors import BabySegError

# A path of a socket holds at most 107 characters; the server of processes adds about 40.
LONGEST_SOCKET_FOLDER = 60
# Seconds between two looks of a worker at its parent, and for workers to end when told.
WATCH_SECONDS = 2.0
PATIENCE_SECONDS = 10.0


def start_method() -> str:
    """How processes begin: not by forking, since torch and ITK have threads by then."""
    return 'forkserver' if len(gettempdir()) < LONGEST_SOCKET_FOLDER else 'spawn'


def start_worker(folder: str, parent: int, logging_level: str, monitor: bool) -> None:
    """Run once in each new worker."""
    os.chdir(folder)
    # Ctrl-C reaches every process of the terminal; the parent alone decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # When memory runs out, the system shall end a worker: the parent can say so and go on.
    with suppress(OSError):
        Path('/proc/self/oom_score_adj').write_text('500')
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    quieten(logging_level)
    if monitor:
        config.enable_resource_monitor()


def _watch(parent: int) -> None:
    """End this process when the parent is gone: its queue would never tell."""
    while True:
        time.sleep(WATCH_SECONDS)
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            os._exit(1)


class SessionPool(MultiProcPlugin):
    """MultiProc that reports a killed worker as the failure of one step and goes on.

    Parameters
    ----------
    plugin_args : dict
        As for MultiProc.
    workers : int
        Processes at most, which may be fewer than the processors that steps share.
    explain : callable
        From the exit code of a dead worker (negative for a signal), or None when it is unknown, to
        a sentence for the user.
    keep_crash : callable
        Takes the name of a step that failed and its traceback when neither can be written.
    logging_level : str
        Of Nipype inside the workers.
    """

    def __init__(
        self,
        plugin_args: Mapping[str, Any],
        *,
        workers: int,
        explain: Callable[[int | None], str],
        keep_crash: Callable[[str, str], None],
        logging_level: str = 'ERROR',
    ) -> None:
        super().__init__(plugin_args=dict(plugin_args))
        self._workers = workers
        self._explain = explain
        self._keep_crash = keep_crash
        self._logging_level = logging_level
        self._jobs: dict[int, tuple[Any, bool]] = {}
        self._futures: dict[int, Future[Any]] = {}
        self._failures: dict[int, dict[str, Any]] = {}
        # Steps that wait for their second try, and the one that is having it.
        self._again: deque[int] = deque()
        self._alone: int | None = None
        self._crowded = False
        self.pool.shutdown(wait=False)
        self._new_pool()

    def _new_pool(self) -> None:
        context = self.plugin_args.get('mp_context') or start_method()
        self.pool = ProcessPoolExecutor(
            max_workers=self._workers,
            initializer=start_worker,
            initargs=(self._cwd, os.getpid(), self._logging_level, bool(config.resource_monitor)),
            mp_context=multiprocessing.get_context(context),
        )
        # The pool forgets its processes when it ends, before their exit codes can be read.
        self._processes = self.pool._processes

    def _submit_job(self, node: Any, updatehash: bool = False) -> int:
        self._taskid += 1
        self._jobs[self._taskid] = (node, updatehash)
        self._begin(self._taskid)
        return self._taskid

    def _begin(self, taskid: int) -> None:
        node, updatehash = self._jobs[taskid]
        try:
            future = self.pool.submit(run_node, node, updatehash, taskid)
        except BrokenProcessPool:
            # It broke since the last look; the steps in it are dealt with first.
            self._replace_pool()
            future = self.pool.submit(run_node, node, updatehash, taskid)
        self._futures[taskid] = future

    def _get_result(self, taskid: int) -> dict[str, Any] | None:
        future = self._futures.get(taskid)
        if future is not None and future.done():
            error = future.exception()
            if error is None:
                return future.result()
            if not isinstance(error, BrokenProcessPool):
                # What a step was given or gave back cannot be sent between processes.
                return _failure(taskid, format_exception(error))
            self._replace_pool()
        if taskid in self._failures:
            return self._failures[taskid]
        if self._alone is None and self._again:
            self._alone = self._again.popleft()
            self._begin(self._alone)
        return None

    def _clear_task(self, taskid: int) -> None:
        self._futures.pop(taskid, None)
        self._failures.pop(taskid, None)
        del self._jobs[taskid]
        if self._alone == taskid:
            self._alone = None

    def _check_resources(self, running_tasks: Any) -> tuple[float, int, int]:
        if self._again or self._alone is not None or (self._crowded and running_tasks):
            return 0.0, 0, 0
        return super()._check_resources(running_tasks)

    def _sort_jobs(self, jobids: Any, scheduler: str | None = None) -> Any:
        """Earlier sessions first, and nothing that overtakes a step that waits for room.

        Nipype takes whatever fits: small steps of all sessions would go before the first large
        one, no session would be done until late, and all would fill the disk.
        """
        if scheduler is not None:
            return super()._sort_jobs(jobids, scheduler=scheduler)
        order: dict[str, int] = {}
        for node in self.procs:
            order.setdefault(_part(node), len(order))
        wanted = sorted(jobids, key=lambda job: (order[_part(self.procs[job])], job))
        memory, processors, _ = self._check_resources(self.pending_tasks)
        for place, job in enumerate(wanted):
            memory -= min(self.procs[job].mem_gb, self.memory_gb)
            processors -= min(self.procs[job].n_procs, self.processors)
            if memory < 0 or processors < 0:
                wanted = wanted[:place]
                break
        return wanted[: max(0, self._workers - len(self.pending_tasks))]

    def _report_crash(self, node: Any, result: dict[str, Any] | None = None) -> str | None:
        """Write a crash file; a full disk must not take the other sessions with it."""
        try:
            return super()._report_crash(node, result)
        except OSError:
            lines = (result or {}).get('traceback') or format_exc()
            self._keep_crash(node.fullname, ''.join(lines))
            return None

    def _replace_pool(self) -> None:
        """Blame the one step that was in the broken pool, or have all try again one by one."""
        wait(self._futures.values(), timeout=PATIENCE_SECONDS)
        lost = [
            taskid
            for taskid, future in self._futures.items()
            if future.done() and isinstance(future.exception(), BrokenProcessPool)
        ]
        exit_code = self._exit_code()
        self.pool.shutdown(wait=False, cancel_futures=True)
        self._new_pool()
        for taskid in lost:
            del self._futures[taskid]
        if len(lost) == 1:
            self._failures[lost[0]] = _failure(lost[0], self._died(exit_code))
        elif lost:
            self._again.extend(sorted(lost))
            # Together they needed too much, so the rest does not run side by side either.
            self._crowded = True

    def _died(self, exit_code: int | None) -> list[str]:
        """A death in the form of a traceback, as crash files have it."""
        error = BabySegError(self._explain(exit_code))
        return ['Traceback (most recent call last):\n', *format_exception_only(error)]

    def _exit_code(self) -> int | None:
        """Exit code of the worker that died first; the pool then ended the others with SIGTERM."""
        processes = list(self._processes.values())
        for process in processes:
            process.join(PATIENCE_SECONDS)
        codes = [p.exitcode for p in processes if p.exitcode not in (None, 0, -signal.SIGTERM)]
        return codes[0] if codes else None

    def stop(self) -> None:
        """End all workers at once; what they were doing is lost."""
        processes = list((self._processes or {}).values())
        for process in processes:
            process.terminate()
        end = time.monotonic() + PATIENCE_SECONDS
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                process.kill()
        self.pool.shutdown(wait=False, cancel_futures=True)


def _part(node: Any) -> str:
    """The part of the workflow, that is the session, which a step belongs to."""
    return '.'.join(node.fullname.split('.')[:2])


def _failure(taskid: int, lines: list[str]) -> dict[str, Any]:
    """What `run_node` gives for a step that failed."""
    return {'result': None, 'traceback': lines, 'taskid': taskid}
