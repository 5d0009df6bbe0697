"""`babyseg-synth`: look at what the network is trained on."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from babyseg_bids import __version__
from babyseg_bids.errors import BabySegError, OutputError, UsageError

if TYPE_CHECKING:
    from babyseg_bids.synthesis.settings import SynthesisSettings


def build_parser() -> argparse.ArgumentParser:
    """The command line of `babyseg-synth`."""
    parser = argparse.ArgumentParser(
        prog='babyseg-synth', description='Draw synthetic training samples from label maps.'
    )
    parser.add_argument('--version', action='version', version=f'babyseg {__version__}')
    commands = parser.add_subparsers(dest='command', required=True)
    for name, text in (
        ('sample', 'write samples as NIfTI images with their label maps'),
        ('gallery', 'write a page of samples with their parameters'),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument('maps', type=Path, help='file that `babyseg-train prepare` wrote')
        what = 'folder' if name == 'sample' else 'page (.html)'
        command.add_argument('--out', type=Path, required=True, help=f'{what} to write')
        command.add_argument('--count', type=int, default=1 if name == 'sample' else 24)
        command.add_argument('--seed', type=int, default=0, help='of the first sample')
        command.add_argument('--spacing', type=float, help='voxel size, mm')
        command.add_argument('--size', type=int, nargs='+', metavar='N', help='voxels by axis')
        _add_settings(command)
        if name == 'gallery':
            command.add_argument(
                '--by-setting',
                action='store_true',
                help='show what each probability in the settings does, alone',
            )
    show = commands.add_parser('settings', help='print a settings file with every key explained')
    _add_settings(show)
    return parser


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        '--settings', default='default', metavar='NAME|FILE', help='preset, or TOML file'
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `babyseg-synth`; returns the exit code."""
    args = build_parser().parse_args(arguments)
    try:
        if args.command == 'settings':
            from babyseg_bids.synthesis.settings import load_settings, to_toml

            print(to_toml(load_settings(args.settings)), end='')
            return 0
        try:
            {'sample': _sample, 'gallery': _gallery}[args.command](args)
        except OSError as e:
            raise OutputError(f'{args.out} cannot be written ({e}); choose another --out.') from e
    except BabySegError as e:
        print(f'babyseg-synth: {e}', file=sys.stderr)
        return e.exit_code
    return 0


def _settings(args: argparse.Namespace) -> 'SynthesisSettings':
    from babyseg_bids.synthesis.settings import load_settings, update

    if args.count < 1 or args.seed < 0:
        raise UsageError('--count starts at 1 and --seed at 0.')
    given = {'size': args.size, 'spacing': args.spacing}
    changes = {k: v for k, v in given.items() if v is not None}
    return update(load_settings(args.settings), changes)


def _sample(args: argparse.Namespace) -> None:
    import json

    import nibabel as nib

    from babyseg_bids.labels import label_table
    from babyseg_bids.synthesis.gallery import affine_of
    from babyseg_bids.synthesis.generator import draw_sample
    from babyseg_bids.synthesis.maps import load_maps

    settings = _settings(args)
    if len(settings.size) != 3:
        raise UsageError('NIfTI samples have three axes; give --size three numbers.')
    maps = load_maps(args.maps)
    args.out.mkdir(parents=True, exist_ok=True)
    affine = affine_of(settings)
    for seed in range(args.seed, args.seed + args.count):
        sample = draw_sample(maps, seed=seed, settings=settings)
        stem = f'sample-{seed}'
        labels = label_table().indices[sample.target.numpy()]
        nib.save(nib.Nifti1Image(labels, affine), args.out / f'{stem}_dseg.nii.gz')
        for i, image in enumerate(sample.images, start=1):
            path = args.out / f'{stem}_scan-{i}.nii.gz'
            nib.save(nib.Nifti1Image(image.numpy(), affine), path)
        (args.out / f'{stem}.json').write_text(json.dumps(sample.record, indent=2) + '\n')
        print(args.out / stem)


def _gallery(args: argparse.Namespace) -> None:
    from babyseg_bids.synthesis.gallery import gallery_page
    from babyseg_bids.synthesis.maps import load_maps

    settings = _settings(args)
    page = gallery_page(
        load_maps(args.maps),
        settings,
        count=args.count,
        seed=args.seed,
        by_setting=args.by_setting,
        title=f'Synthetic training samples ({args.settings})',
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page, 'utf-8')
    print(args.out)


if __name__ == '__main__':
    sys.exit(main())
