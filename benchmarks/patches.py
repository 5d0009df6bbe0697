"""What taking in patches of 2 x 2 x 2 voxels is worth: short trainings with and without them.

Three networks with the widths of the shipped one are trained from scratch for the same time, on
the same synthetic anatomies: one on voxels of 4 mm, one that takes in patches of voxels of 2 mm
and so works on the same grid, and one on voxels of 2 mm each for itself, which does eight times
as much a step. A fourth, with patches, never sees the voxels twice as wide in which the head is
found. All are judged at 2 mm on the same scans of the held-out children, the coarse one after
interpolation. The reference is the first. Differences below the spread between two seeds mean
nothing.
"""

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from babyseg_bids.labels import label_table
from babyseg_bids.network.unet import GroupUNet
from babyseg_bids.synthesis.generator import draw_sample
from babyseg_bids.synthesis.losses import hard_dice
from babyseg_bids.synthesis.maps import TrainingMap, load_maps
from babyseg_bids.synthesis.settings import load_settings
from babyseg_bids.synthesis.train import (
    DEFAULT_NETWORK,
    HELD_OUT,
    Stage,
    SyntheticBatches,
    Trainer,
    TrainingPlan,
)

JUDGED_AT = 2.0
JUDGED_SIZE = (96, 128, 96)
# Steps that are timed before the length of a training is set.
TIMED = 6


@dataclass(frozen=True)
class Variant:
    """A network and the voxels (mm) that it sees; `wide` as in `TrainingPlan`."""

    name: str
    patch: int
    spacing: float
    size: tuple[int, int, int]
    wide: float = 0.15

    def plan(self, steps: int, seed: int) -> TrainingPlan:
        """A training of so many steps of two samples."""
        return TrainingPlan(
            (Stage(self.spacing, self.size, steps, 2),),
            network=replace(DEFAULT_NETWORK, patch=self.patch),
            wide=self.wide,
            seed=seed,
            warmup=20,
        )


VARIANTS = (
    Variant('voxels of 4 mm', 1, 4.0, (32, 48, 32)),
    Variant('patches of voxels of 2 mm', 2, 2.0, (64, 96, 64)),
    Variant('voxels of 2 mm', 1, 2.0, (64, 96, 64)),
    Variant('patches, never twice as wide', 2, 2.0, (64, 96, 64), 0.0),
)


def train(
    variant: Variant, maps: list[TrainingMap], folder: Path, minutes: float, seed: int
) -> tuple[GroupUNet, int]:
    """Averaged weights after so many minutes of network time, and the steps they took."""
    note = folder / 'steps.txt'
    if not note.exists():
        plan = variant.plan(TIMED, seed)
        trial = Trainer(plan, folder / 'trial')
        batches = [SyntheticBatches(maps, plan, 0, TIMED)[i] for i in range(TIMED)]
        trial.train_step(*batches[0])
        began = time.perf_counter()
        for batch in batches[1:]:
            trial.train_step(*batch)
        seconds = (time.perf_counter() - began) / (TIMED - 1)
        note.write_text(str(int(60 * minutes / seconds)))
    steps = int(note.read_text())
    trainer = Trainer(variant.plan(steps, seed), folder)
    trainer.run(maps, workers=1)
    return trainer.averaged.eval(), steps


@torch.inference_mode()
def judge(network: GroupUNet, variant: Variant, image: Tensor, target: Tensor) -> np.ndarray:
    """Dice of each structure of one scan (*size) with its true channels (*size)."""
    wider = round(variant.spacing / JUDGED_AT)
    x = image[None, None]
    posteriors = network(F.avg_pool3d(x, wider) if wider > 1 else x).softmax(1)
    if wider > 1:
        posteriors = F.interpolate(posteriors, scale_factor=wider, mode='trilinear')
    return hard_dice(posteriors[0].argmax(0), target, classes=len(label_table())).numpy()


def main() -> None:
    """Train what was not trained yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('maps', type=Path, help='file that `babyseg-train prepare` wrote')
    parser.add_argument('--out', type=Path, default=Path('training/patches'))
    parser.add_argument('--minutes', type=float, default=15, help='of each training')
    parser.add_argument('--samples', type=int, default=8, help='of each child')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', type=int, nargs='*', help='numbers of networks, from 0')
    args = parser.parse_args()
    everyone = load_maps(args.maps)
    donors = [m for m in everyone if m.has_head]
    maps = [m for m in everyone if m.name not in HELD_OUT]
    torch.set_num_threads(args.threads)
    base = load_settings()
    settings = replace(
        base,
        anatomy=base.anatomy.of_one_child(),
        size=JUDGED_SIZE,
        spacing=JUDGED_AT,
        group_shares=(1.0,),
    )
    samples = [
        draw_sample([m, *donors], seed=args.seed + i, settings=settings)
        for m in everyone
        if m.name in HELD_OUT
        for i in range(args.samples)
    ]
    names = [r.abbreviation for r in label_table().rows]
    rows = []
    for number, variant in enumerate(VARIANTS):
        if args.only and number not in args.only:
            continue
        folder = args.out / f'{number}-{args.seed}'
        network, steps = train(variant, maps, folder, args.minutes, args.seed)
        began = time.perf_counter()
        dice = np.array([judge(network, variant, s.images[0], s.target) for s in samples])
        seconds = (time.perf_counter() - began) / len(samples)
        mean = dict(zip(names, np.nanmean(dice, 0), strict=True))
        rows.append(
            {
                'network': variant.name,
                'steps': steps,
                'mean': round(float(np.nanmean(dice[:, 1:])), 3),
                **{k: round(float(mean[k]), 3) for k in ('L-WM', 'L-CTX', 'L-PUT')},
                'seconds': round(seconds, 3),
            }
        )
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    table['dice ratio'] = (table['mean'] / table['mean'].iloc[0]).round(2)
    table['time ratio'] = (table['seconds'] / table['seconds'].iloc[0]).round(2)
    print(table.to_string(index=False))


if __name__ == '__main__':
    main()
