"""What is set before Nipype, matplotlib and torch are imported: caches, threads, quietness."""

import logging
import os
import tempfile
import warnings
from pathlib import Path

from babyseg_bids.settings import Settings

# Nipype's own words: what is left of its logging at each -v.
LEVELS = ('CRITICAL', 'INFO', 'DEBUG')
_THREADS = (
    'OMP_NUM_THREADS',
    'OPENBLAS_NUM_THREADS',
    'MKL_NUM_THREADS',
    'ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS',
)


def logging_level(verbose: int, /) -> str:
    """Level of Nipype's logging for a number of -v."""
    return LEVELS[min(verbose, len(LEVELS) - 1)]


def prepare_environment(settings: Settings, /) -> None:
    """Keep every cache in the work folder, and libraries offline and within their threads.

    HOME may be unwritable, and a node's core count is not ours to use. Workers inherit all of it.
    """
    cache = settings.scratch / 'cache'
    os.environ.update(
        NO_ET='1',
        NIPYPE_NO_ET='1',
        NIPYPE_CONFIG_DIR=str(cache / 'nipype'),
        MPLCONFIGDIR=str(cache / 'matplotlib'),
        MPLBACKEND='Agg',
        TEMPLATEFLOW_AUTOUPDATE='0',
    )
    set_threads(max(1, settings.omp_nthreads))
    # Templates that the user already has are worth more than an empty folder of our own.
    os.environ.setdefault('TEMPLATEFLOW_HOME', str(cache / 'templateflow'))
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        os.environ['TMPDIR'] = str(_make(cache / 'tmp'))
        tempfile.tempdir = None
    quieten(logging_level(settings.verbose))


def set_threads(threads: int, /) -> None:
    """Bound the threads of all libraries that are imported later, and of all workers."""
    for name in _THREADS:
        os.environ[name] = str(threads)


def _make(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def quieten(level: str, /) -> None:
    """Let Nipype and the libraries under it say only what `level` lets through.

    babyseg's own warnings are always shown.
    """
    number = getattr(logging, level)
    if number > logging.INFO:
        warnings.simplefilter('ignore')
        logging.getLogger().setLevel(logging.ERROR)
    ours = logging.getLogger('babyseg_bids')
    ours.setLevel(min(number, logging.WARNING))
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter('%(levelname)s: %(message)s'))
        ours.addHandler(handler)
        ours.propagate = False
    for name in ('nipype', 'nipype.workflow', 'nipype.utils', 'nipype.interface', 'bids'):
        logging.getLogger(name).setLevel(number)


def configure_nipype(settings: Settings, /) -> None:
    """Nipype's own configuration for this run, in this process."""
    from nipype import config
    from nipype import logging as nipype_logging

    level = logging_level(settings.verbose)
    config.update_config(
        {
            'logging': {
                'workflow_level': level,
                'utils_level': level,
                'interface_level': level,
                'log_to_file': 'false',
            },
            'execution': {
                'crashdump_dir': str(settings.output_dir / 'logs').replace('%', '%%'),
                'crashfile_format': 'txt',
                'stop_on_first_crash': str(settings.stop_on_first_crash).lower(),
                'create_report': 'false',
                # The default of 2 s is waited for after every single step.
                'poll_sleep_duration': '0.2',
                'check_version': 'false',
            },
        }
    )
    if settings.resource_monitor:
        config.enable_resource_monitor()
    nipype_logging.update_logging(config)
