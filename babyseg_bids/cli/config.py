"""Settings files: TOML whose keys are the names of options."""

import argparse
import tomllib
from pathlib import Path
from typing import Any

from babyseg_bids import messages
from babyseg_bids.cli import submission
from babyseg_bids.cli.parser import build_parser, parse_given
from babyseg_bids.errors import UsageError

# Written into each recorded settings file, so that it can be given back to --config-file.
RECORDED = ('bids-dir', 'output-dir', 'analysis-level', 'run-uuid')
# They make no sense inside a settings file.
_NEVER = ('--help', '--version', '--config-file', *submission.OPTIONS)


def read_config(path: Path, /) -> dict[str, Any]:
    """What a settings file says, by field of `Settings`.

    Raises
    ------
    UsageError
        For a file that is missing or not TOML, an unknown key or a value that an option refuses.
    """
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(messages.bad_config(path, f'{error.strerror}.')) from error
    except ValueError as error:
        raise UsageError(messages.bad_config(path, f'it is not TOML ({error}).')) from error
    actions = _actions()
    argv: list[str] = []
    for key, value in table.items():
        name = key.replace('_', '-')
        if name in RECORDED or value == [] or (name in ('mem-gb', 'nprocs') and value == 0):
            continue
        if name == 'omp-nthreads' and value == 0:
            continue
        # `report = false` is how a recorded file says --no-report.
        if name == 'report':
            name, value = 'no-report', not value
        if name not in actions:
            raise UsageError(messages.unknown_key(path, key, actions))
        argv += _words(path, key, actions[name], value)
    try:
        return parse_given(argv, positionals=False)
    except UsageError as error:
        raise UsageError(messages.bad_config(path, str(error))) from error


def _actions() -> dict[str, argparse.Action]:
    """The options that a settings file may hold, by name without dashes."""
    table = build_parser(positionals=False)._option_string_actions
    return {
        name.removeprefix('--'): action
        for name, action in table.items()
        if name.startswith('--') and name not in _NEVER
    }


def _words(path: Path, key: str, action: argparse.Action, value: Any) -> list[str]:
    """The arguments that say the same as `key = value`."""
    option = next(name for name in action.option_strings if name.startswith('--'))
    values = value if isinstance(value, list) else [value]
    flag = action.nargs == 0
    if any(isinstance(v, dict | list) for v in values):
        raise UsageError(messages.bad_config(path, f'{key} must not be a table.'))
    if flag and option == '--verbose' and isinstance(value, int):
        return [option] * int(value)
    if flag != isinstance(value, bool):
        wanted = 'true or false' if flag else 'a value, not true or false'
        raise UsageError(messages.bad_config(path, f'{key} takes {wanted}.'))
    if flag:
        return [option] if value else []
    if len(values) > 1 and action.nargs != '+':
        raise UsageError(messages.bad_config(path, f'{key} takes one value, not a list.'))
    if action.nargs != '+':
        # In one word, a value that begins with a dash is still a value.
        return [f'{option}={values[0]}']
    return [option, *map(str, values)]
