"""What a run leaves about itself: settings, the graph of the workflow, use of the machine."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from babyseg_bids import messages
from babyseg_bids.errors import OutputError
from babyseg_bids.records import SessionInputs
from babyseg_bids.settings import Settings


def log_folder(session: SessionInputs, settings: Settings, /) -> Path:
    """Where this run writes about a subject: its settings and its crashes."""
    return settings.output_dir / f'sub-{session.subject}' / 'log' / settings.run_uuid


def write_logs(sessions: Sequence[SessionInputs], settings: Settings, /) -> None:
    """Record the settings beside each subject's results.

    Raises
    ------
    OutputError
        When they cannot be written.
    """
    for folder in sorted({log_folder(s, settings) for s in sessions}):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / 'babyseg.toml').write_text(settings.to_toml())
        except OSError as error:
            sentence = messages.output_unwritable(folder, str(error.strerror).lower())
            raise OutputError(sentence) from error


def write_graph(workflow: Any, settings: Settings, /) -> Path:
    """Write the workflow as a graph, a picture where Graphviz is installed.

    Raises
    ------
    OutputError
        When the folder cannot be written.
    """
    file = settings.output_dir / 'logs' / f'graph_{settings.run_uuid}.dot'
    try:
        file.parent.mkdir(exist_ok=True)
        workflow.write_hierarchical_dotfile(str(file), colored=True, simple_form=True)
    except OSError as error:
        raise OutputError(messages.output_unwritable(file, str(error.strerror).lower())) from error
    dot = shutil.which('dot')
    if dot is None:
        return file
    picture = file.with_suffix('.svg')
    done = subprocess.run([dot, '-Tsvg', '-o', picture, file], capture_output=True, check=False)
    return picture if done.returncode == 0 else file


def keep_resource_record(workflow: Any, settings: Settings, batch: int = 1, /) -> Path | None:
    """Copy what Nipype's resource monitor recorded of a batch out of the work folder, if any."""
    source = settings.scratch / workflow.name / 'resource_monitor.json'
    if not source.exists():
        return None
    number = f'_{batch}' if batch > 1 else ''
    target = settings.output_dir / 'logs' / f'resources_{settings.run_uuid}{number}.json'
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(source, target)
    return target
