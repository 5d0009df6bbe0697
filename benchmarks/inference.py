"""One 1 mm whole head: the published network as written down, ours, and the shipped model.

The reference runs both convolutions of each group layer in float32 with contiguous tensors, as a
plain reading of the paper does, on 192 x 192 x 256 voxels: what a 1 mm head becomes at its 0.7 mm.
`our engine` is the same network, with the same numbers. `shipped model` is `segment`, from arrays
to a label map on their own grid, and `program` is `babyseg-segment` with its start. Every row is
measured in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from babyseg_bids.network import load_model, segment
from babyseg_bids.network.layers import GroupConv, concatenate, upsample
from babyseg_bids.network.unet import GroupUNet, official_config, official_network, rescale
from babyseg_bids.resources import freed_memory_kept
from babyseg_bids.synthesis.finetune import drawn_brains
from babyseg_bids.synthesis.generator import draw_sample
from babyseg_bids.synthesis.settings import load_settings, update

OFFICIAL = {'dim': 3, 'out': 22, 'enc': [1] + [64] * 5, 'dec': [64] * 6, 'add': [], 'rep': 2}
HEAD = (180, 220, 180)


class PlainGroupConv(GroupConv):
    """The definition of the group convolution, without any shortcut."""

    def forward(self, x: torch.Tensor, coarse: torch.Tensor | None = None) -> torch.Tensor:
        """(B, G, C, *size) and, if given, (B, G, C', *size / 2) to (B, G, outputs, *size)."""
        if coarse is not None:
            x = concatenate(x, upsample(coarse))
        groups = x.shape[1]
        each = self.conv_b(x.flatten(0, 1)).unflatten(0, (-1, groups))
        common = self.conv_m(x.mean(1))
        return (each + common[:, None]) / 2


class Plain(torch.nn.Module):
    """The published network without any shortcut: scans (B, G, *size) to posteriors."""

    def __init__(self, config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.network = GroupUNet(official_config(config))
        self.network.load_state_dict(state_dict)
        for module in self.network.modules():
            if isinstance(module, GroupConv):
                module.__class__ = PlainGroupConv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, G, *size) to (B, labels, *size)."""
        skip, x = self.network.levels(rescale(x))
        joined = concatenate(skip, upsample(x)).mean(1, keepdim=True)
        return self.network.add(joined).squeeze(1).softmax(1)


def head(scans: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """A synthetic 1 mm whole head of twelve months in some contrasts: images and affines."""
    shares = tuple(float(i == scans - 1) for i in range(4))
    settings = update(
        load_settings(),
        {
            'size': HEAD,
            'spacing': 1.0,
            'group_shares': shares,
            'contrast': {'shares': (0.0, 0.0, 0.0, 1.0)},
            'anatomy': {'translation': 0.0, 'rotation_deg': 0.0, 'scale_infant': (0.9, 0.9)},
            'surroundings': {'head_probability': 1.0, 'crop_probability': 0.0},
        },
    )
    sample = draw_sample(drawn_brains([(12.0, 1)]), seed=1, settings=settings)
    return [(1000 * image.numpy(), np.eye(4)) for image in sample.images]


def official_weights() -> dict[str, torch.Tensor]:
    """Random weights under the official names; figures of time do not depend on them."""
    torch.manual_seed(0)
    return GroupUNet(official_config(OFFICIAL)).state_dict()


def measure(row: str, scans: int, threads: int, size: tuple[int, int, int]) -> dict[str, float]:
    """Best wall and CPU seconds of two runs, and the peak memory of this process in GiB."""
    torch.set_num_threads(threads)
    if row == 'program':
        return _program(scans, threads)
    if row == 'shipped model':
        model = load_model()
        inputs = head(scans)

        def run() -> object:
            return segment(inputs, model, device='cpu', threads=threads)
    else:
        x = torch.rand(1, scans, *size)
        if row == 'reference':
            network: torch.nn.Module = Plain(OFFICIAL, official_weights())
        else:
            network = official_network(OFFICIAL, official_weights())
            network = network.to(memory_format=torch.channels_last_3d)

        def run() -> object:
            # As `segment` does with the official network.
            kept = freed_memory_kept() if row == 'our engine' else nullcontext()
            with torch.inference_mode(), kept:
                return network(x)

    best = (float('inf'), float('inf'))
    for _ in range(2):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        best = min(best, (time.perf_counter() - wall, time.process_time() - cpu))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {'wall': best[0], 'cpu': best[1], 'peak': peak}


def _program(scans: int, threads: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for i, (image, affine) in enumerate(head(scans)):
            files.append(f'{folder}/{i}.nii.gz')
            nib.save(nib.Nifti1Image(image, affine), files[-1])
        command = [str(Path(sys.executable).with_name('babyseg-segment')), *files]
        command += ['--out', f'{folder}/out', '--device', 'cpu', '--threads', str(threads)]
        wall = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        wall = time.perf_counter() - wall
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {'wall': wall, 'cpu': used.ru_utime + used.ru_stime, 'peak': used.ru_maxrss / 2**20}


def main() -> None:
    """Print a table of times, ratios and memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--size', type=int, nargs=3, default=(192, 192, 256), help='voxels')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--scans', type=int, nargs='+', default=[1, 3])
    parser.add_argument('--row', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(args.row, args.scans[0], args.threads, tuple(args.size))))
        return
    size = 'x'.join(map(str, args.size))
    print(f'{size} voxels, {args.threads} threads, torch {torch.__version__}')
    for scans in args.scans:
        reference = None
        for row in ('reference', 'our engine', 'shipped model', 'program'):
            command = [sys.executable, __file__, '--row', row, '--scans', str(scans)]
            command += ['--threads', str(args.threads), '--size', *map(str, args.size)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = json.loads(out.splitlines()[-1])
            reference = reference or found
            print(
                f'{scans} scans  {row:14s} {found["wall"]:7.1f} s wall {found["cpu"]:7.1f} s CPU '
                f'{found["peak"]:6.2f} GiB   x{reference["cpu"] / found["cpu"]:.1f} CPU, '
                f'x{reference["wall"] / found["wall"]:.1f} wall',
                flush=True,
            )


if __name__ == '__main__':
    main()
