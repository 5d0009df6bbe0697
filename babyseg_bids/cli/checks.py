"""Whether the folders and files that the user named can be used, before anything slow begins."""

import json
import uuid
from contextlib import suppress
from pathlib import Path

from babyseg_bids import messages
from babyseg_bids.errors import NoInputError, OutputError, UsageError
from babyseg_bids.settings import Settings

# Beginning of the name of files that only test whether a folder can be written.
PROBE = '.babyseg-write-test-'


def reason(error: OSError, /) -> str:
    """Why an operation on a file failed, in the system's words."""
    return (error.strerror or str(error)).lower()


def check_bids_dir(path: Path, /) -> bool:
    """Whether the dataset has a description.

    Raises
    ------
    UsageError
        When there is no such folder or it cannot be read.
    """
    try:
        if not path.exists():
            raise UsageError(messages.bids_dir_missing(path))
        if not path.is_dir():
            raise UsageError(messages.bids_dir_not_folder(path))
        # A folder may exist and yet refuse to be listed.
        next(path.iterdir(), None)
    except OSError as error:
        raise UsageError(messages.bids_dir_unreadable(path, reason(error))) from error
    return (path / 'dataset_description.json').exists()


def check_apart(output: Path, bids: Path, /, *, what: str = 'output') -> None:
    """Refuse to write among the raw data; `derivatives/` is the place for results.

    Raises
    ------
    UsageError
        When `output` is the dataset itself or inside it but not under `derivatives/`.
    """
    inner, outer = output.resolve(), bids.resolve()
    if inner != outer and outer not in inner.parents:
        return
    parts = inner.relative_to(outer).parts
    if len(parts) < 2 or parts[0] != 'derivatives':
        raise UsageError(messages.output_in_input(output, bids, what))


def check_ours(output: Path, /) -> None:
    """Refuse an output folder that holds a raw dataset or the results of another program.

    Raises
    ------
    UsageError
        When its dataset_description.json says so.
    """
    try:
        description = json.loads((output / 'dataset_description.json').read_text())
    except (OSError, ValueError):
        return
    if not isinstance(description, dict):
        return
    programs = description.get('GeneratedBy') or []
    names = [str(p.get('Name', '')) for p in programs if isinstance(p, dict)]
    if any('babyseg' in name.lower() for name in names):
        return
    if description.get('DatasetType') == 'derivative':
        # An empty name is a description that somebody wrote by hand, for these results perhaps.
        if any(names):
            raise UsageError(messages.output_is_dataset(output, f'the results of {names[0]}'))
        return
    raise UsageError(messages.output_is_dataset(output, 'a raw BIDS dataset'))


def check_writable(path: Path, /) -> list[Path]:
    """Create a folder and a file in it: permissions do not tell about quotas or mounts.

    Returns
    -------
    list of Path
        The folders that had to be made, the outermost first.

    Raises
    ------
    OutputError
        When it cannot be done.
    """
    made: list[Path] = []
    probe = path / f'{PROBE}{uuid.uuid4().hex}'
    try:
        for folder in (*reversed(path.parents), path):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                made.append(folder)
        try:
            probe.write_text('test')
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        remove_empty(made)
        raise OutputError(messages.output_unwritable(path, reason(error))) from error
    return made


def remove_empty(folders: list[Path], /) -> None:
    """Take back folders that were made and stayed empty."""
    for folder in reversed(folders):
        with suppress(OSError):
            folder.rmdir()


def check_files(settings: Settings, /) -> None:
    """Files that options name.

    Raises
    ------
    UsageError
        When one does not exist.
    """
    if settings.plugin_file and not settings.plugin_file.is_file():
        raise UsageError(messages.file_missing('--use-plugin', settings.plugin_file))
    model = Path(settings.model)
    looks_like_path = len(model.parts) > 1 or model.suffix != ''
    if looks_like_path and not model.exists():
        raise UsageError(messages.file_missing('--model', model.absolute()))


def check_results(output: Path, /) -> None:
    """The group level needs finished sessions.

    Raises
    ------
    UsageError, NoInputError
        When the folder does not exist, or holds no finished session.
    """
    if not output.is_dir():
        raise UsageError(messages.results_missing(output))
    if next(output.glob('sub-*/**/*_desc-babyseg_morph.tsv'), None) is None:
        raise NoInputError(messages.no_results(output))
