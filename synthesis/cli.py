"""`babyseg-synth`: look at what the network is trained on."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from babyseg_bids import __version__
from babyseg_bids.errors import BabySegError, OutputError


def build_parser() -> argparse.ArgumentParser:
    """The command line of `babyseg-synth`."""
    parser = argparse.ArgumentParser(
        prog='babyseg-synth', description='Draw synthetic training samples from label maps.'
    )
    parser.add_argument('--version', action='version', version=f'babyseg {__version__}')
    commands = parser.add_subparsers(dest='command', required=True)
    for name, text in (
        ('sample', 'write samples as NIfTI images with their label maps'),
        ('gallery', 'write one picture of many samples'),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument('maps', type=Path, help='file that `babyseg-train prepare` wrote')
        command.add_argument('--out', type=Path, required=True, help='folder, or .png of gallery')
        command.add_argument('--count', type=int, default=1 if name == 'sample' else 24)
        command.add_argument('--seed', type=int, default=0, help='of the first sample')
        command.add_argument('--spacing', type=float, default=2.0, help='voxel size, mm')
        command.add_argument(
            '--size', type=int, nargs=3, default=(80, 96, 80), metavar=('X', 'Y', 'Z')
        )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `babyseg-synth`; returns the exit code."""
    args = build_parser().parse_args(arguments)
    try:
        samples = _draw(args)
        try:
            {'sample': _write_samples, 'gallery': _write_gallery}[args.command](args, samples)
        except OSError as e:
            raise OutputError(f'{args.out} cannot be written ({e}); choose another --out.') from e
    except BabySegError as e:
        print(f'babyseg-synth: {e}', file=sys.stderr)
        return e.exit_code
    return 0


def _draw(args: argparse.Namespace) -> list:
    from babyseg_bids.synthesis.generator import draw_sample
    from babyseg_bids.synthesis.maps import load_maps
    from babyseg_bids.synthesis.settings import SynthesisSettings

    settings = replace(SynthesisSettings(), size=tuple(args.size), spacing=args.spacing)
    maps = load_maps(args.maps)
    return [draw_sample(maps, seed=args.seed + i, settings=settings) for i in range(args.count)]


def _write_samples(args: argparse.Namespace, samples: list) -> None:
    import json

    import nibabel as nib
    import numpy as np

    from babyseg_bids.labels import label_table

    args.out.mkdir(parents=True, exist_ok=True)
    affine = np.diag([args.spacing] * 3 + [1.0])
    for sample in samples:
        stem = f'sample-{sample.record["seed"]}'
        labels = label_table().indices[sample.target.numpy()]
        nib.save(nib.Nifti1Image(labels, affine), args.out / f'{stem}_dseg.nii.gz')
        for i, image in enumerate(sample.images, start=1):
            path = args.out / f'{stem}_scan-{i}.nii.gz'
            nib.save(nib.Nifti1Image(image.numpy(), affine), path)
        (args.out / f'{stem}.json').write_text(json.dumps(sample.record, indent=2) + '\n')
        print(args.out / stem)


def _write_gallery(args: argparse.Namespace, samples: list) -> None:
    import numpy as np
    from matplotlib.figure import Figure

    from babyseg_bids.labels import label_table

    colours = np.array([r.rgb for r in label_table().rows], np.uint8)
    columns = 4
    rows = -(-len(samples) // columns)
    figure = Figure(figsize=(4 * columns, 2.2 * rows))
    axes = figure.subplots(rows, 2 * columns).ravel()
    for axis in axes:
        axis.axis('off')
    for i, sample in enumerate(samples):
        axis = i % 3
        plane = sample.target.shape[axis] // 2
        image = sample.images[0].select(axis, plane).T
        target = sample.target.select(axis, plane).T
        axes[2 * i].imshow(image.numpy(), cmap='gray', origin='lower', vmin=0, vmax=1)
        axes[2 * i + 1].imshow(colours[target], origin='lower')
        text = ', '.join(f'{k} {v}' for k, v in sample.record.items())
        axes[2 * i].set_title(text, fontsize=5, loc='left')
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)
    print(args.out)


if __name__ == '__main__':
    sys.exit(main())
