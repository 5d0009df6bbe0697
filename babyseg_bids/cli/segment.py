"""The program `babyseg-segment`: one case, without BIDS. Images in, label map and volumes out."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from babyseg_bids import __version__, messages
from babyseg_bids.cli import options
from babyseg_bids.cli.parser import Parser, normalise, option_names
from babyseg_bids.errors import BabySegError, InputError, OutputError, UsageError

if TYPE_CHECKING:
    from babyseg_bids.pipeline import Result

DESCRIPTION = """\
Segment the scans of one child and one session jointly, without BIDS. They need not be aligned; the
results are on the grid of the first. For datasets use babyseg.
"""
# What is written, each after the name of the first scan.
FILES = {
    'segmentation': '_dseg.nii.gz',
    'brain_mask': '_mask.nii.gz',
    'uncertainty': '_uncertainty.nii.gz',
    'volumes': '_volumes.tsv',
}


def build_parser() -> Parser:
    """The command line of `babyseg-segment`."""
    parser = Parser(
        prog='babyseg-segment',
        usage='babyseg-segment T1.nii.gz [T2.nii.gz ...] --out DIR [options]',
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        'images', nargs='+', type=options.path, metavar='IMAGE', help='NIfTI files, any contrasts'
    )
    parser.add_argument(
        '-o',
        '--out',
        type=options.path,
        required=True,
        metavar='DIR',
        help='folder for NAME_dseg.nii.gz, NAME_mask.nii.gz, NAME_uncertainty.nii.gz and '
        'NAME_volumes.tsv, where NAME is that of the first image',
    )
    parser.add_argument(
        '--model', default='default', metavar='NAME|FILE', help='weights (default: those shipped)'
    )
    parser.add_argument(
        '--device',
        type=options.device,
        default='auto',
        metavar='DEVICE',
        help='auto (default), cpu, cuda, cuda:N or mps',
    )
    parser.add_argument(
        '--threads',
        type=options.positive,
        metavar='N',
        help='threads of the processor (default: those that may be used, at most 8)',
    )
    parser.add_argument(
        '--uncertainty-threshold',
        type=options.share,
        default=0.3,
        metavar='X',
        help='voxels above it count as uncertain, from 0 to 1 (default: 0.3)',
    )
    parser.add_argument(
        '--random-seed', type=options.seed, default=0, metavar='N', help='default: 0'
    )
    parser.add_argument('--overwrite', action='store_true', help='replace existing results')
    parser.add_argument('--version', action='version', version=f'babyseg-segment {__version__}')
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises
    ------
    UsageError
        One sentence about the first thing that is wrong.
    """
    parser = build_parser()
    words = normalise(argv)
    known = option_names(parser)
    for word in words:
        name = word.partition('=')[0]
        if word.startswith('--') and len(word) > 2 and name not in known:
            raise UsageError(messages.unknown_option(name, known, program='babyseg-segment'))
    return parser.parse_args(words)


def case_name(image: Path, /) -> str:
    """The name of an image without its endings."""
    return image.name.removesuffix('.gz').removesuffix('.nii')


def check(args: argparse.Namespace, /) -> dict[str, Path]:
    """The files to write, after a look at those to read.

    Raises
    ------
    InputError, OutputError, UsageError
        When a file does not exist, or is in the way.
    """
    from babyseg_bids.cli.checks import check_writable
    from babyseg_bids.preflight import check_image

    for image in args.images:
        if not image.exists():
            raise UsageError(messages.image_missing(image))
    for image in args.images:
        found = check_image(image)
        if not found.ok:
            raise InputError(messages.image_unusable(image, found.reason))
    targets = {
        what: args.out / (case_name(args.images[0]) + ending) for what, ending in FILES.items()
    }
    if not args.overwrite:
        for target in targets.values():
            if target.exists():
                raise OutputError(messages.exists(target))
    check_writable(args.out)
    return targets


def write(result: 'Result', targets: dict[str, Path], /) -> None:
    """Write all results under temporary names, and give them their own when all are there.

    Raises
    ------
    OutputError
        When they cannot be written.
    """
    from babyseg_bids.morphometry import write_morph_tsv

    drafts = {what: path.with_name(f'.part-{path.name}') for what, path in targets.items()}
    try:
        for what in ('segmentation', 'brain_mask', 'uncertainty'):
            getattr(result, what).to_filename(drafts[what])
        write_morph_tsv(result.volumes, drafts['volumes'])
        for what, draft in drafts.items():
            draft.replace(targets[what])
    except OSError as error:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
        reason = (error.strerror or str(error)).lower()
        raise OutputError(messages.output_unwritable(targets['volumes'].parent, reason)) from error


def run(args: argparse.Namespace, /) -> int:
    """Segment one case; the exit code."""
    from babyseg_bids.resources import MAX_THREADS, cpu_limit

    targets = check(args)
    threads = args.threads or min(MAX_THREADS, int(cpu_limit().amount))
    from babyseg_bids.cli.environment import set_threads

    set_threads(threads)
    from babyseg_bids.pipeline import BabySegPipeline

    pipeline = BabySegPipeline(
        args.model,
        args.device,
        args.uncertainty_threshold,
        threads=threads,
        random_seed=args.random_seed,
    )
    result = pipeline.predict(args.images)
    write(result, targets)
    for flag in result.flags:
        print(f'{flag.severity}: {flag.message}', file=sys.stderr)
    for path in targets.values():
        print(path)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run babyseg-segment; the exit code is 0, 1 (failed), 2 (usage) or 130 (interrupted)."""
    try:
        return run(parse(sys.argv[1:] if argv is None else list(argv)))
    except KeyboardInterrupt:
        print('babyseg-segment: Interrupted; nothing was written.', file=sys.stderr)
        return 130
    except BabySegError as error:
        print(f'babyseg-segment: {error}', file=sys.stderr)
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - the last place where a bug can become a sentence.
        from babyseg_bids.cli.crashes import write_crash

        sentence = messages.unexpected(error, write_crash(error, None))
        print(f'babyseg-segment: {sentence}', file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
