"""What taking in patches of 2 x 2 x 2 voxels is worth: short trainings with and without them.

Both networks have the widths of the shipped one, see the same synthetic anatomies at 4 mm, and are
trained from scratch for the same time on the same machine; so are a third and a fourth for which
the voxels are not now and then twice as wide, as the look that finds the head needs them. All
are judged on the same scans of the held-out children. The reference is the network without
patches. Differences below the spread between two seeds mean nothing.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from babyseg_bids.network.weights import new_model
from babyseg_bids.synthesis.evaluate import evaluate, held_out_cases, summarise
from babyseg_bids.synthesis.maps import load_maps
from babyseg_bids.synthesis.train import (
    DEFAULT_NETWORK,
    HELD_OUT,
    Stage,
    SyntheticBatches,
    Trainer,
    TrainingPlan,
)

SPACING = 4.0
SIZE = (32, 64, 32)
# Steps that are timed before the length of a training is set.
TIMED = 8


def plan_for(patch: int, wide: float, steps: int, seed: int) -> TrainingPlan:
    """A training of so many steps of two samples."""
    return TrainingPlan(
        (Stage(SPACING, SIZE, steps, 2),),
        network=replace(DEFAULT_NETWORK, patch=patch),
        wide=wide,
        seed=seed,
        warmup=20,
    )


def main() -> None:
    """Train what was not trained yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('maps', type=Path, help='file that `babyseg-train prepare` wrote')
    parser.add_argument('--out', type=Path, default=Path('training/patches'))
    parser.add_argument('--minutes', type=float, default=15, help='of each training')
    parser.add_argument('--samples', type=int, default=4, help='of each child')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    everyone = load_maps(args.maps)
    held_out = [m for m in everyone if m.name in HELD_OUT]
    donors = [m for m in everyone if m.has_head]
    maps = [m for m in everyone if m.name not in HELD_OUT]
    torch.set_num_threads(args.threads)
    rows = []
    for name, patch, wide in (
        ('voxels', 1, 0.15),
        ('patches', 2, 0.15),
        ('voxels, never wide', 1, 0.0),
        ('patches, never wide', 2, 0.0),
    ):
        folder = args.out / f'{name.replace(", ", "-").replace(" ", "-")}-{args.seed}'
        note = folder / 'steps.txt'
        if not note.exists():
            timed = plan_for(patch, wide, TIMED, args.seed)
            trial = Trainer(timed, folder / 'trial')
            batches = SyntheticBatches(maps, timed, 0, TIMED)
            trial.train_step(*batches[0])
            began = time.perf_counter()
            for i in range(1, TIMED):
                trial.train_step(*batches[i])
            seconds = (time.perf_counter() - began) / (TIMED - 1)
            note.write_text(str(int(60 * args.minutes / seconds)))
        steps = int(note.read_text())
        trainer = Trainer(plan_for(patch, wide, steps, args.seed), folder)
        trainer.run(maps, workers=0)
        model = new_model(
            trainer.averaged.eval(),
            name=name,
            version='0',
            spacing=SPACING,
            training={'steps': steps},
        )
        cases = held_out_cases(model, held_out, donors=donors, samples=args.samples)
        began = time.perf_counter()
        table = summarise(evaluate(cases))['all']
        rows.append(
            {
                'network': name,
                'steps': steps,
                **{k: table[k] for k in ('mean', 'L-WM', 'L-CTX')},
                'seconds': round((time.perf_counter() - began) / (3 * args.samples), 2),
            }
        )
        print(rows[-1], flush=True)
    result = pd.DataFrame(rows)
    result['ratio'] = (result['mean'] / result['mean'].iloc[0]).round(3)
    print(result.to_string(index=False))


if __name__ == '__main__':
    main()
