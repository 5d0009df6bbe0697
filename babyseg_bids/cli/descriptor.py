"""The Boutiques descriptor of `babyseg`, made from its parser.

`python -m babyseg_bids.cli.descriptor > boutiques.json` writes it, for platforms that build their
forms and command lines from such a file. Its schema is 0.5, see https://boutiques.github.io.
"""

import argparse
import json
from typing import Any

from babyseg_bids import __version__
from babyseg_bids.cli.parser import DESCRIPTION, build_parser

SCHEMA = '0.5'
# Zero is success by definition of the schema.
EXIT_CODES = {
    1: 'Some sessions failed; a table says which and why.',
    2: 'Wrong usage, or a folder that cannot be written.',
    3: 'Nothing in the dataset matches.',
    130: 'Interrupted.',
}
# What the name of a value in the help says about it. Folders need not exist, so they are no files.
TYPES = {
    'FILE': {'type': 'File'},
    'N': {'type': 'Number', 'integer': True},
    'X': {'type': 'Number'},
}


def build_descriptor(parser: argparse.ArgumentParser, /) -> dict[str, Any]:
    """Describe a parser as a Boutiques tool, schema 0.5."""
    actions = [a for a in parser._actions if not set(a.option_strings) & {'--help', '--version'}]
    keys = ' '.join(_key(action) for action in actions)
    return {
        'name': parser.prog,
        'tool-version': __version__,
        'schema-version': SCHEMA,
        'description': DESCRIPTION.strip(),
        'author': 'The babyseg developers',
        'command-line': f'{parser.prog} {keys}',
        'container-image': {'type': 'docker', 'image': f'babyseg:{__version__}'},
        'inputs': [_input(action) for action in actions],
        'output-files': [
            {
                'id': 'results',
                'name': 'results',
                'description': 'BIDS derivatives, reports and tables',
                'path-template': '[OUTPUT_DIR]',
                'optional': True,
            }
        ],
        'error-codes': [{'code': c, 'description': text} for c, text in EXIT_CODES.items()],
        'suggested-resources': {'cpu-cores': 2, 'ram': 5},
        'tags': {'domain': ['neuroinformatics', 'mri', 'bids-app']},
    }


def _name(action: argparse.Action) -> str:
    """`session_label` for --session-label: its first long spelling, not where argparse puts it."""
    long = [option for option in action.option_strings if option.startswith('--')]
    return long[0][2:].replace('-', '_') if long else action.dest


def _key(action: argparse.Action) -> str:
    return f'[{_name(action).upper()}]'


def _input(action: argparse.Action) -> dict[str, Any]:
    """One argument of the parser as an input of the tool."""
    name = _name(action)
    found: dict[str, Any] = {
        'id': name,
        'name': name.replace('_', ' '),
        'description': action.help,
        'value-key': _key(action),
        'optional': bool(action.option_strings),
        **_value(action),
    }
    if action.option_strings:
        found['command-line-flag'] = f'--{name.replace("_", "-")}'
        others = [o for o in action.option_strings if o != found['command-line-flag']]
        found['description'] += f' (also {", ".join(others)})' if others else ''
    return found


def _value(action: argparse.Action) -> dict[str, Any]:
    """What an argument takes."""
    if action.nargs == 0:
        return {'type': 'Flag'}
    if action.dest == 'bids_dir':
        return TYPES['FILE']
    found = {**TYPES.get(str(action.metavar), {'type': 'String'})}
    if action.nargs == '+':
        found['list'] = True
    if action.choices:
        found['value-choices'] = list(action.choices)
    return found


def main() -> None:
    """Print the descriptor."""
    print(json.dumps(build_descriptor(build_parser()), indent=2, ensure_ascii=False))


if __name__ == '__main__':
    main()
