"""Samples per second of the synthesis beside the least that any generator must do.

The reference is a bare mixture: one affine resampling of the label map, one Gaussian draw a voxel
and one blur. The ratio says what everything else (warp, head, artefacts) costs on top.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from babyseg_bids.synthesis.artefacts import blur
from babyseg_bids.synthesis.generator import draw_sample
from babyseg_bids.synthesis.maps import class_table, load_maps
from babyseg_bids.synthesis.settings import SynthesisSettings


def bare_sample(labels: torch.Tensor, classes: int, size: int) -> torch.Tensor:
    """Affine resampling, mixture and blur; (size, size, size)."""
    theta = (torch.eye(3, 4) + 0.05 * torch.randn(3, 4))[None]
    where = F.affine_grid(theta, [1, 1, size, size, size], align_corners=False)
    moved = F.grid_sample(labels, where, mode='nearest', align_corners=False)[0, 0].long()
    image = torch.rand(classes)[moved] + 0.1 * torch.rand(classes)[moved] * torch.randn(size)
    return blur(image, torch.ones(3))


def main() -> None:
    """Print seconds a sample and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('maps', type=Path)
    parser.add_argument('--size', type=int, default=96)
    parser.add_argument('--samples', type=int, default=8)
    parser.add_argument('--threads', type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    maps = load_maps(args.maps)
    settings = replace(
        SynthesisSettings(), size=(args.size,) * 3, spacing=192 / args.size, group_shares=(1.0,)
    )
    labels = torch.from_numpy(maps[0].classes).float()[None, None]
    runs = {
        'bare mixture (reference)': lambda _: bare_sample(labels, len(class_table()), args.size),
        'babyseg, all defaults': lambda i: draw_sample(maps, seed=i, settings=settings),
    }
    seconds = {}
    for name, run in runs.items():
        run(0)
        began = time.process_time()
        for i in range(args.samples):
            run(i)
        seconds[name] = (time.process_time() - began) / args.samples
    reference = seconds['bare mixture (reference)']
    print(f'{args.size}^3 voxels, {args.threads} threads, one scan a sample')
    for name, cpu in seconds.items():
        print(f'{name:28s} {cpu:6.2f} s CPU   x{cpu / reference:.1f} of the reference')


if __name__ == '__main__':
    main()
