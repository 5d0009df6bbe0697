"""Running the workflow: which Nipype plugin, with which share of the machine."""

import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from babyseg_bids import messages
from babyseg_bids.cli.crashes import keep_crash, session_of
from babyseg_bids.cli.environment import configure_nipype, logging_level
from babyseg_bids.cli.traces import log_folder
from babyseg_bids.errors import UsageError
from babyseg_bids.records import SessionInputs
from babyseg_bids.resources import (
    MEMORY_SHARE,
    Limit,
    Plan,
    cpu_limit,
    memory_limit,
    plan,
)
from babyseg_bids.settings import Settings

Callback = Callable[..., None]


def decide_resources(settings: Settings, sessions: int, /) -> tuple[Settings, Plan, Limit, Limit]:
    """Settings with processors, memory and threads decided, and where the numbers come from."""
    cpus, memory = cpu_limit(), memory_limit()
    if settings.nprocs:
        cpus = Limit(settings.nprocs, '--nprocs')
    if settings.mem_gb:
        memory = Limit(settings.mem_gb, '--mem')
    mem_gb = settings.mem_gb or round(memory.amount * MEMORY_SHARE, 2)
    shares = plan(
        int(cpus.amount),
        mem_gb,
        sessions,
        threads=settings.omp_nthreads,
        low_mem=settings.low_mem,
    )
    decided = settings.replace(nprocs=int(cpus.amount), mem_gb=mem_gb, omp_nthreads=shares.threads)
    return decided, shares, cpus, memory


def read_plugin(path: Path, /) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a Nipype plugin from a YAML or JSON file.

    Raises
    ------
    UsageError
        When the file is not of the form `{plugin: NAME, plugin_args: {...}}`.
    """
    import yaml

    try:
        # JSON is YAML, too.
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(
            messages.plugin_unusable(path, messages.first_line(str(error)))
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get('plugin'), str):
        raise UsageError(messages.plugin_unusable(path, 'it has no key plugin'))
    if unknown := sorted(set(content) - {'plugin', 'plugin_args'}):
        raise UsageError(messages.plugin_unusable(path, f'unknown key {unknown[0]}'))
    arguments = content.get('plugin_args') or {}
    if not isinstance(arguments, dict):
        raise UsageError(messages.plugin_unusable(path, 'plugin_args is not a mapping'))
    return content['plugin'], arguments


def check_plugin(name: str, path: Path, /) -> None:
    """Refuse a plugin that Nipype does not have.

    Raises
    ------
    UsageError
        Naming the nearest one that exists.
    """
    from nipype.pipeline import plugins

    known = [n.removesuffix('Plugin') for n in dir(plugins) if n.endswith('Plugin')]
    if name not in known:
        raise UsageError(
            messages.plugin_unusable(
                path, f'Nipype has no plugin {name}.{messages.nearest(name, known)}'
            )
        )


def build(sessions: Sequence[SessionInputs], settings: Settings, /) -> Any:
    """The workflow over sessions; Nipype is configured first, since each node keeps a copy."""
    configure_nipype(settings)
    from babyseg_bids.workflows import init_babyseg_wf

    workflow = init_babyseg_wf(list(sessions), settings)
    workflow.base_dir = str(settings.scratch)
    for node in workflow._get_all_nodes():
        session = session_of(node.fullname, sessions)
        if session is not None:
            folder = log_folder(session, settings)
            own = node.config or {}
            places = {**own.get('execution', {}), 'crashdump_dir': str(folder)}
            node.config = {**own, 'execution': places}
    return workflow


def explain_death(limit: Limit, need_gb: float, /) -> Callable[[int | None], str]:
    """A function from the exit code of a dead worker to a sentence.

    `need_gb` is the memory of the largest session.
    """

    def explain(exit_code: int | None) -> str:
        # The system's memory killer sends SIGKILL; so do cluster managers, for the same reason.
        if exit_code in (None, -signal.SIGKILL):
            return messages.memory_kill(need_gb, limit.amount, limit.source)
        # Libraries end a process when they are refused memory that they count on.
        if limit.amount < need_gb and exit_code < 0:
            return messages.memory_kill(need_gb, limit.amount, limit.source)
        return messages.worker_died(exit_code)

    return explain


def run_workflow(
    workflow: Any,
    settings: Settings,
    shares: Plan,
    memory: Limit,
    need_gb: float,
    callback: Callback,
    /,
) -> BaseException | None:
    """Run it to its end; sessions that fail do not stop the others.

    MultiProc is used even for one processor: when memory runs out the system kills a worker, and
    the process that remains can say so and go on.

    Returns
    -------
    The exception with which Nipype ended, for the log only: it says nothing about the other
    sessions, so that their fate is read from their files.
    """
    from babyseg_bids.cli.pool import SessionPool

    arguments: dict[str, Any] = {
        'n_procs': shares.processors,
        'memory_gb': settings.mem_gb,
        'raise_insufficient': False,
        'status_callback': callback,
    }
    name = 'MultiProc'
    if settings.plugin_file:
        name, own = read_plugin(settings.plugin_file)
        check_plugin(name, settings.plugin_file)
        # The resources of this machine mean nothing to the plugin of a cluster.
        arguments = {
            **(arguments if name == 'MultiProc' else {'status_callback': callback}),
            **own,
        }
    if name != 'MultiProc':
        return _run(workflow, name, arguments)
    pool = SessionPool(
        arguments,
        workers=shares.workers,
        explain=explain_death(memory, need_gb),
        keep_crash=partial(keep_crash, settings.run_uuid),
        logging_level=logging_level(settings.verbose),
    )
    try:
        return _run(workflow, pool, None)
    finally:
        # After an interruption, or with stop_on_first_crash, Nipype leaves workers behind.
        pool.stop()


def _run(workflow: Any, plugin: Any, arguments: dict[str, Any] | None) -> BaseException | None:
    try:
        workflow.run(plugin=plugin, plugin_args=arguments)
    except Exception as error:  # noqa: BLE001 - Nipype raises what the first failed step raised.
        return error
    return None


def step_names(workflow: Any, /) -> list[str]:
    """Full names of the steps that run; Nipype removes the nodes that only pass values on."""
    from nipype.interfaces.utility import IdentityInterface

    names = [
        node.fullname
        for node in workflow._get_all_nodes()
        if not isinstance(node.interface, IdentityInterface)
    ]
    # The outermost name is only added when the workflow runs.
    top = f'{workflow.name}.'
    return [top + name.removeprefix(top) for name in names]


def session_folders(workflow: Any, scratch: Path, /) -> list[Path]:
    """Folders in which the sessions of this run keep their intermediate files."""
    parts = {name.split('.')[1] for name in step_names(workflow)}
    return [scratch / workflow.name / part for part in sorted(parts)]
