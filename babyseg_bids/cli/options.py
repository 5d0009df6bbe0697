"""What the values of options mean: text from the command line in, values of `Settings` out."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from babyseg_bids.errors import UsageError
from babyseg_bids.resources import parse_memory
from babyseg_bids.shares import parse_array_task
from babyseg_bids.spaces import parse_space, standard_spaces

# Values below this are a mistaken unit: `--mem 8` means 8 MB.
LEAST_MEMORY_GB = 0.5


def labels(prefix: str = '') -> Any:
    """A type for bare BIDS labels, one or several with commas; `prefix` ('sub-') is stripped."""

    def convert(text: str) -> list[str]:
        found = [part.removeprefix(prefix) for part in text.split(',') if part]
        for label in found:
            if not re.fullmatch(r'[A-Za-z0-9+]+', label):
                raise argparse.ArgumentTypeError(
                    f'{label!r} is not a BIDS label; labels are letters and digits, such as '
                    f'{prefix}01'
                )
        return found

    return convert


class Gather(argparse.Action):
    """Collect the lists that a `labels` type gives; the option may be repeated."""

    def __call__(
        self,
        _parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        _option_string: str | None = None,
    ) -> None:
        """Add to what earlier uses of the option gave."""
        before = getattr(namespace, self.dest, [])
        setattr(namespace, self.dest, [*before, *(label for group in values for label in group)])


def memory(unit: str) -> Any:
    """A type for an amount of memory, in GiB; `unit` is that of a plain number."""

    def convert(text: str) -> float:
        try:
            amount = parse_memory(text, unit=unit)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if amount < LEAST_MEMORY_GB:
            raise argparse.ArgumentTypeError(
                f'{text!r} means {amount * 1024:.0f} MB, too little to run; did you mean {text}G?'
            )
        return amount

    return convert


def positive(text: str) -> int:
    """A type for whole numbers of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least 1')
    return int(text)


def seed(text: str) -> int:
    """A type for whole numbers of at least 0."""
    if not text.isdigit() or int(text) > 2**31 - 2:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number from 0 to 2147483646')
    return int(text)


def share(text: str) -> float:
    """A type for numbers from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number from 0 to 1')
    return value


def device(text: str) -> str:
    """A type for names of devices."""
    if not re.fullmatch(r'auto|cpu|mps|cuda(:\d+)?', text):
        raise argparse.ArgumentTypeError(f'{text!r} is not one of auto, cpu, cuda, cuda:N, mps')
    return text


def array_task(text: str) -> str:
    """A type for tasks of a job array: `auto` becomes what Slurm says."""
    return str(parse_array_task(text))


def path(text: str) -> Path:
    """A type for absolute paths; links stay as they are."""
    return Path(text).expanduser().absolute()


def bids_filter(text: str) -> dict[str, Any]:
    """A type for filters: the path of a JSON file, or JSON text itself."""
    content = text
    if not text.lstrip().startswith('{'):
        file = path(text)
        if not file.is_file():
            raise argparse.ArgumentTypeError(f'the file {file} does not exist')
        content = file.read_text()
    try:
        value = json.loads(content)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'{text} is not JSON ({error})') from None
    if not isinstance(value, dict) or not all(isinstance(v, dict) for v in value.values()):
        raise argparse.ArgumentTypeError(
            f'{text} is not of the form {{"t1w": {{"acquisition": "mprage"}}}}'
        )
    return value


def check_spaces(spaces: list[str], /) -> None:
    """Refuse what is no space: silence would be taken for success."""
    try:
        for text in standard_spaces(tuple(spaces)):
            parse_space(text)
    except ValueError as error:
        raise UsageError(str(error)) from None


def model(text: str) -> str:
    """Name of a model, or the absolute path of its file: processes that work elsewhere read it."""
    path = Path(text).expanduser()
    return str(path.absolute()) if len(path.parts) > 1 or path.suffix else text
