"""The command line of `babyseg`: options in, `Settings` out.

Nothing here imports more than the standard library: `babyseg -h` answers at once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from babyseg_bids import __version__, messages
from babyseg_bids.cli import options, submission
from babyseg_bids.cli.submission import Submission
from babyseg_bids.errors import UsageError
from babyseg_bids.settings import OPTIONS, Settings

LEVELS = ('participant', 'group')

DESCRIPTION = """\
Segment the brain MRI of infants and young children (BIDS App).

participant  segments every session: label map, mask, uncertainty, volumes, quality, report
group        gathers the results in output_dir into tables and a page
"""

EPILOG = """\
exit codes: 0 every requested session has its outputs; 1 some sessions failed; 2 wrong usage or an
unwritable folder; 3 nothing in the dataset matches; 130 interrupted.

Options may be written with underscores, too. Run the same command again to continue: finished
sessions are skipped.
"""

# Options whose field of `Settings` has another name.
FIELDS = {option: name for name, option in OPTIONS.items()}


class Parser(argparse.ArgumentParser):
    """A parser that raises `UsageError` instead of printing its whole usage and exiting."""

    def short_usage(self) -> str:
        """The usage as a part of a sentence."""
        return f'Usage: {self.usage}; see {self.prog} -h.'

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one sentence, with a hint."""
        if 'arguments are required' in message:
            raise UsageError(messages.missing(message.rpartition(': ')[2], self.short_usage()))
        message = message.removeprefix('argument ')
        raise UsageError(message if message.endswith('?') else f'{message}.')


def build_parser(*, positionals: bool = True) -> Parser:
    """The parser; without positional arguments it reads the content of a settings file.

    Its result holds only what was given, so that sources of settings can be put on top of each
    other.
    """
    parser = Parser(
        prog='babyseg',
        description=DESCRIPTION,
        epilog=EPILOG,
        usage='babyseg BIDS_DIR OUTPUT_DIR participant|group [options]',
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if positionals:
        parser.add_argument('bids_dir', type=options.path, help='root folder of the BIDS dataset')
        parser.add_argument('output_dir', type=options.path, help='folder for the results')
        parser.add_argument(
            'analysis_level',
            choices=LEVELS,
            metavar='level',
            help='participant or group, see above',
        )
    parser.add_argument('--version', action='version', version=f'babyseg {__version__}')
    _add_selection(parser)
    _add_segmentation(parser)
    _add_outputs(parser)
    _add_machine(parser)
    _add_running(parser)
    submission.add_options(parser)
    _add_accepted(parser)
    return parser


def option_names(parser: argparse.ArgumentParser) -> tuple[str, ...]:
    """All long options of a parser, with their dashes."""
    return tuple(name for name in parser._option_string_actions if name.startswith('--'))


def _add_selection(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('which data')

    def labels(*names: str, prefix: str, text: str, metavar: str = 'LABEL') -> None:
        group.add_argument(
            *names,
            nargs='+',
            type=options.labels(prefix),
            action=options.Gather,
            metavar=metavar,
            help=text,
        )

    labels(
        '--participant-label',
        prefix='sub-',
        text='participants, with or without sub- (default: all)',
    )
    labels(
        '--session-label',
        '--session-id',
        prefix='ses-',
        text='sessions, with or without ses- (default: all)',
    )
    labels(
        '--contrasts',
        prefix='',
        metavar='SUFFIX',
        text='contrasts to use, such as T1w T2w FLAIR (default: any anatomical contrast)',
    )
    _add_dataset(group)


def _add_dataset(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--reference-anat',
        metavar='SUFFIX',
        help='contrast whose grid the results are on (default: T1w, then T2w, then others)',
    )
    group.add_argument(
        '--age-months',
        nargs='+',
        metavar='AGE',
        help='age at scan in months: one value, LABEL=VALUE pairs (sub-01_ses-A=6.5), or a TSV '
        'file with the columns participant_id, session_id and age_months',
    )
    group.add_argument(
        '--bids-filter-file',
        type=options.bids_filter,
        metavar='FILE',
        help='JSON file of PyBIDS filters, as in other BIDS Apps',
    )
    group.add_argument(
        '--bids-database-dir',
        type=options.path,
        metavar='DIR',
        help='keep the index of the dataset here, for faster starts on large datasets',
    )
    group.add_argument(
        '--skip-bids-validation',
        action='store_true',
        help='do not warn when dataset_description.json is missing; babyseg checks the images '
        'themselves and runs no validator in any case',
    )


def _add_segmentation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('segmentation')
    group.add_argument(
        '--model',
        type=options.model,
        metavar='NAME|FILE',
        help='weights that ship with babyseg (default), or a file of weights: of babyseg '
        '(.safetensors), or the official checkpoint (.pt)',
    )
    group.add_argument(
        '--device',
        type=options.device,
        metavar='DEVICE',
        help='auto (default), cpu, cuda, cuda:N or mps',
    )
    group.add_argument(
        '--uncertainty-threshold',
        type=options.share,
        metavar='X',
        help='voxels above it count as uncertain, from 0 to 1 (default: 0.3)',
    )
    group.add_argument(
        '--bias-correction',
        choices=('none', 'n4'),
        metavar='METHOD',
        help='n4: take bias fields out of the scans first (default: none)',
    )
    group.add_argument('--denoise', action='store_true', help='take noise out of the scans first')
    group.add_argument(
        '--random-seed', type=options.seed, metavar='N', help='fixes all chance (default: 0)'
    )


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('results')
    group.add_argument(
        '--save-probabilities', action='store_true', help='write the probability of each label'
    )
    group.add_argument(
        '--output-spaces',
        nargs='+',
        metavar='SPACE',
        help='label map and transforms in standard spaces, too: MNIInfant or UNCInfant, with '
        ':cohort-auto (by age) or :cohort-N, and MNI152NLin2009cAsym; anat, the grid of the '
        'reference, is always written',
    )
    group.add_argument('--no-report', dest='report', action='store_false', help='no HTML reports')
    group.add_argument('--overwrite', action='store_true', help='compute finished sessions again')
    group.add_argument(
        '--reports-only', action='store_true', help='write reports again from existing results'
    )
    group.add_argument(
        '--boilerplate-only', action='store_true', help='write the methods text and its references'
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        'processors and memory',
        'Defaults are what this process may use: control groups, affinity and SLURM_* variables.',
    )
    group.add_argument(
        '--nprocs',
        '--nthreads',
        '--n-cpus',
        dest='nprocs',
        type=options.positive,
        metavar='N',
        help='processors for all sessions together',
    )
    group.add_argument(
        '--omp-nthreads',
        type=options.positive,
        metavar='N',
        help='threads of one session (default: about 4, up to 8 when there are few sessions)',
    )
    group.add_argument(
        '--mem',
        '--mem-mb',
        dest='mem_gb',
        type=options.memory('M'),
        metavar='SIZE',
        help='memory for all sessions together: 8G, 1.5g or 8000 (MB)',
    )
    group.add_argument(
        '--mem-gb',
        dest='mem_gb',
        type=options.memory('G'),
        metavar='SIZE',
        help='the same, but a plain number means GB',
    )
    group.add_argument(
        '--low-mem', action='store_true', help='one session at a time, with as little as possible'
    )
    group.add_argument(
        '--use-plugin',
        '--nipype-plugin-file',
        dest='use_plugin',
        type=options.path,
        metavar='FILE',
        help='YAML or JSON file with the Nipype plugin and its plugin_args',
    )


def _add_running(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('running')
    group.add_argument(
        '-w',
        '--work-dir',
        type=options.path,
        metavar='DIR',
        help='intermediate files (default: output_dir/.babyseg-work, removed after success)',
    )
    group.add_argument(
        '--clean-workdir', action='store_true', help='empty the work folder before the run'
    )
    group.add_argument(
        '--config-file',
        type=options.path,
        metavar='FILE',
        help='TOML file whose keys are the names of options; the command line wins',
    )
    group.add_argument(
        '--dry-run', action='store_true', help='show what would be done with each image, and why'
    )
    group.add_argument(
        '--stop-on-first-crash', action='store_true', help='end the run when a session fails'
    )
    group.add_argument(
        '--write-graph', action='store_true', help='write the workflow as a graph to logs/'
    )
    group.add_argument(
        '--resource-monitor', action='store_true', help='record memory and processors of each step'
    )
    group.add_argument(
        '-v', '--verbose', action='count', help='show what each step does; -vv shows everything'
    )


def _add_accepted(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("accepted for other BIDS Apps' scripts, without any effect")
    group.add_argument('--notrack', action='store_true', help='babyseg never sends anything')
    group.add_argument(
        '--fs-license-file', type=options.path, metavar='FILE', help='no licence is needed'
    )


def normalise(argv: Sequence[str]) -> list[str]:
    """Spell the names of long options with dashes; values are left alone."""
    out: list[str] = []
    for position, word in enumerate(argv):
        if word == '--':
            return [*out, *argv[position:]]
        if word.startswith('--'):
            name, equals, value = word.partition('=')
            word = name.replace('_', '-') + equals + value
        out.append(word)
    return out


def parse_given(argv: Sequence[str], *, positionals: bool = True) -> dict[str, Any]:
    """What the arguments say, by field of `Settings` (and `config_file`); no defaults."""
    parser = build_parser(positionals=positionals)
    words = normalise(argv)
    # The unknown option is named before the arguments that it may have made incomplete.
    known = option_names(parser)
    for word in words[: words.index('--')] if '--' in words else words:
        name = word.partition('=')[0]
        if word.startswith('--') and name not in known:
            raise UsageError(messages.unknown_option(name, known))
    given, rest = parser.parse_known_args(words)
    if rest:
        raise UsageError(
            f'Not understood: {" ".join(rest)}. {parser.short_usage()} '
            'Paths with blanks need quotes.'
        )
    return _fields(vars(given))


def _fields(given: dict[str, Any]) -> dict[str, Any]:
    """Names of options turned into names of fields, lists into tuples."""
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if name in ('notrack', 'fs_license_file'):
            continue
        if name == 'age_months':
            value = ' '.join(value)
            value = str(Path(value).absolute()) if Path(value).is_file() else value
        if name == 'output_spaces':
            options.check_spaces(value)
        if isinstance(value, list):
            # The order given is kept, repetitions are dropped.
            value = tuple(dict.fromkeys(value))
        fields[FIELDS.get(name.replace('_', '-'), name)] = value
    return fields


def _parse_any_order(argv: Sequence[str]) -> dict[str, Any]:
    """`parse_given`, also when an option with several values stands before the positionals.

    argparse gives all that follows to the option; the level in the last place tells better.
    """
    try:
        return parse_given(argv)
    except UsageError:
        if len(argv) < 3 or argv[-1] not in LEVELS:
            raise
        return parse_given([*argv[-3:], *argv[:-3]])


def parse_command(argv: Sequence[str]) -> tuple[Settings, Submission | None]:
    """Settings from a command line and its settings file, and the submission if it asks for one.

    Raises
    ------
    UsageError
        One sentence about the first thing that is wrong.
    """
    given = _parse_any_order(argv)
    job = submission.take(given)
    config_file = given.pop('config_file', None)
    if config_file is not None:
        # tomllib is only needed here.
        from babyseg_bids.cli.config import read_config

        given = {**read_config(config_file), **given}
    return Settings(**given), job


def parse_settings(argv: Sequence[str]) -> Settings:
    """The settings alone, see `parse_command`."""
    return parse_command(argv)[0]
