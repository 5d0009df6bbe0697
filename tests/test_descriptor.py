"""The Boutiques descriptor says what the parser says."""

import json
import subprocess
import sys
from typing import Any

import pytest

import babyseg_bids
from babyseg_bids import errors
from babyseg_bids.cli.descriptor import EXIT_CODES, build_descriptor
from babyseg_bids.cli.parser import build_parser, option_names
from babyseg_bids.cli.run import FAILURE, INTERRUPTED


@pytest.fixture(scope='module')
def descriptor() -> dict[str, Any]:
    """What the documented command prints."""
    run = [sys.executable, '-m', 'babyseg_bids.cli.descriptor']
    return json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)


@pytest.fixture(scope='module')
def inputs(descriptor: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {item['id']: item for item in descriptor['inputs']}


def test_every_option_of_the_parser_and_every_other_spelling_is_named(
    descriptor: dict[str, Any],
) -> None:
    named = {item.get('command-line-flag') for item in descriptor['inputs']}
    text = ' '.join(item['description'] for item in descriptor['inputs'])
    for option in set(option_names(build_parser())) - {'--help', '--version'}:
        assert option in named or f'{option},' in text or f'{option})' in text, option


def test_the_three_positions_come_first_and_are_required(descriptor: dict[str, Any]) -> None:
    first = [item['id'] for item in descriptor['inputs'] if not item['optional']]
    assert first == ['bids_dir', 'output_dir', 'analysis_level']
    line = descriptor['command-line'].split()
    assert line[:4] == ['babyseg', '[BIDS_DIR]', '[OUTPUT_DIR]', '[ANALYSIS_LEVEL]']
    assert sorted(line[1:]) == sorted(item['value-key'] for item in descriptor['inputs'])


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('analysis_level', {'type': 'String', 'value-choices': ['participant', 'group']}),
        ('session_label', {'type': 'String', 'list': True, 'optional': True}),
        ('bids_filter_file', {'type': 'File', 'command-line-flag': '--bids-filter-file'}),
        ('nprocs', {'type': 'Number', 'integer': True}),
        ('mem', {'type': 'String', 'command-line-flag': '--mem'}),
        ('mem_gb', {'type': 'String', 'command-line-flag': '--mem-gb'}),
        ('work_dir', {'type': 'String', 'command-line-flag': '--work-dir'}),
        ('no_report', {'type': 'Flag', 'command-line-flag': '--no-report'}),
        ('verbose', {'type': 'Flag', 'command-line-flag': '--verbose'}),
    ],
)
def test_inputs_have_the_types_of_their_options(
    inputs: dict[str, dict[str, Any]], name: str, expected: dict[str, Any]
) -> None:
    assert expected.items() <= inputs[name].items()


def test_it_names_this_version_and_its_image(descriptor: dict[str, Any]) -> None:
    version = babyseg_bids.__version__
    assert descriptor['tool-version'] == version
    assert descriptor['container-image']['image'] == f'babyseg:{version}'
    assert descriptor == build_descriptor(build_parser())


def test_exit_codes_are_those_of_the_program() -> None:
    raised = {e.exit_code for e in vars(errors).values() if hasattr(e, 'exit_code')}
    assert set(EXIT_CODES) == raised | {FAILURE, INTERRUPTED}
