"""The documentation says what the code says."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from babyseg_bids.cli.parser import build_parser, option_names
from babyseg_bids.labels import label_table
from babyseg_bids.qc_flags import LIMITS


@pytest.fixture(scope='module')
def hooks(root: Path) -> dict[str, Any]:
    """What makes the tables of the pages."""
    return runpy.run_path(str(root / 'docs/_hooks.py'))


@pytest.fixture(scope='module')
def said(hooks: dict[str, Any]) -> str:
    """All text in the code, with … for values, one piece a line."""
    return '\n'.join(hooks['spoken']())


def page(root: Path, name: str) -> str:
    return (root / 'docs' / name).read_text('utf-8')


def quoted(root: Path) -> list[str]:
    """The messages on the page of errors: first column of its tables."""
    return re.findall(r'^\| `([^`]+)` \|', page(root, 'errors.md'), re.MULTILINE)


def test_every_option_of_every_program_is_on_the_page_of_options(
    hooks: dict[str, Any], root: Path
) -> None:
    shown = hooks['on_page_markdown'](page(root, 'options.md'))
    for program, parser in hooks['parsers']().items():
        assert f'## {program}\n' in shown
        commands = [a for a in parser._actions if isinstance(a.choices, dict)]
        for each in (parser, *(p for a in commands for p in a.choices.values())):
            for name in set(option_names(each)) - {'--help', '--version'}:
                assert re.search(rf'`{name}[ `]', shown), f'{program} {name}'


def test_help_texts_of_the_table_are_those_of_the_parser(hooks: dict[str, Any]) -> None:
    shown = hooks['options']('babyseg')
    for action in build_parser()._actions:
        if not {'--help', '--version'} & set(action.option_strings):
            assert hooks['plain'](action.help) in shown


def test_tables_of_labels_and_limits_have_a_row_for_each(hooks: dict[str, Any]) -> None:
    assert hooks['labels']().count('\n') == 1 + len(label_table().structures)
    for measure, limit in LIMITS.items():
        assert f'| `{measure}` | `{limit.code}` |' in hooks['limits']()
        assert f'| `{limit.code}` |' in hooks['flags']()


def test_flags_have_the_sentences_that_the_code_says(hooks: dict[str, Any]) -> None:
    rows = {r.split('`')[1]: r for r in hooks['flags']().splitlines() if r.startswith('| `')}
    assert 'Two ages that cannot both be right' in rows['age-contradiction']
    assert 'Left and right are swapped' in rows['left-right-swapped']
    assert 'lie on the wrong side of the midline…. Look at' in rows['left-right-confused']
    assert 'White matter and cortex hardly differ' in rows['low-contrast']


def test_every_quoted_message_is_said_somewhere_in_the_code(root: Path, said: str) -> None:
    messages = quoted(root)
    assert len(messages) > 30
    for message in messages:
        assert message in said, message


def test_a_message_that_nobody_says_would_be_noticed(said: str) -> None:
    assert 'The dataset folder … is missing. Check the path' not in said


def test_every_marker_of_the_pages_becomes_a_table(hooks: dict[str, Any], root: Path) -> None:
    for path in sorted((root / 'docs').glob('*.md')):
        text = path.read_text('utf-8')
        markers = hooks['MARKER'].findall(text)
        assert text.count('<!-- ') == len(markers), path
        for maker, argument in markers:
            assert len(hooks['MAKERS'][maker](*filter(None, [argument]))) > 80, (path, argument)


def test_quick_start_has_one_block_of_commands_that_checks_run(root: Path) -> None:
    blocks = re.findall(
        r'^```sh\n(.+?)^```$', page(root, 'quickstart.md'), re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == 1
    assert blocks[0].splitlines()[0] == 'babyseg-example demo'
    assert 'make quickstart' in (root / '.ci/run').read_text()


def test_the_container_is_built_as_the_dockerfile_says(root: Path) -> None:
    header = (root / 'Dockerfile').read_text().partition('\n\n')[0]
    commands = [line.removeprefix('#').strip() for line in header.splitlines()]
    shown = [line.strip() for line in page(root, 'installation.md').splitlines()]
    assert len(commands) > 2
    assert set(commands) <= set(shown)


@pytest.mark.parametrize('folder', ['images'])
def test_pictures_are_small(root: Path, folder: str) -> None:
    pictures = list((root / 'docs' / folder).iterdir())
    assert pictures
    assert all(p.stat().st_size < 150_000 for p in pictures)
