"""What parts of the synthesis are worth: short trainings without them, judged alike.

Every training has the same network, steps, seed and resolution. All are judged on the held-out
children with the default settings and with the hard ones, and by how much the segmentations of
two versions of a real scan agree (none is needed for training). The reference is the training
with everything. Differences below the spread between two seeds mean nothing: --repeat shows it.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from babyseg_bids import BabySegPipeline
from babyseg_bids.network.weights import Model, load_model, new_model, save_model
from babyseg_bids.synthesis.evaluate import evaluate, held_out_cases, summarise
from babyseg_bids.synthesis.maps import TrainingMap, load_maps
from babyseg_bids.synthesis.settings import load_settings
from babyseg_bids.synthesis.train import HELD_OUT, Stage, Trainer, TrainingPlan

HERE = Path(__file__).parent / 'ablation'
SPACING = 4.0


def train(
    name: str, maps: list[TrainingMap], folder: Path, /, *, steps: int, seed: int, threads: int
) -> Model:
    """Train with a settings file of `ablation/`, or with everything; continues a stopped one."""
    settings = load_settings('default' if name == 'everything' else HERE / f'{name}.toml')
    plan = TrainingPlan((Stage(SPACING, (32, 48, 32), steps, 2),), synthesis=settings, seed=seed)
    torch.set_num_threads(threads)
    trainer = Trainer(plan, folder)
    trainer.run(maps, workers=1)
    path = folder / 'model.safetensors'
    about = {'name': name, 'version': '0', 'spacing': SPACING, 'training': {'steps': steps}}
    save_model(path, new_model(trainer.averaged, **about))
    return load_model(path)


def agreement(model: Path, images: tuple[Path, Path], /) -> float:
    """Mean Dice between the segmentations of two images on one grid."""
    pipeline = BabySegPipeline(model=str(model))
    a, b = (np.asarray(pipeline.predict([p]).segmentation.dataobj) for p in images)
    labels = [n for n in np.union1d(a, b) if n]
    return float(
        np.mean(
            [2 * ((a == n) & (b == n)).sum() / ((a == n).sum() + (b == n).sum()) for n in labels]
        )
    )


def main() -> None:
    """Train what was not trained yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('maps', type=Path)
    parser.add_argument('--out', type=Path, default=Path('training/ablation'))
    parser.add_argument('--steps', type=int, default=500)
    parser.add_argument('--samples', type=int, default=8, help='of each child and setting')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--repeat', action='store_true', help='train with everything twice')
    parser.add_argument('--images', type=Path, nargs=2, metavar='IMAGE')
    args = parser.parse_args()
    everyone = load_maps(args.maps)
    held_out = [m for m in everyone if m.name in HELD_OUT]
    donors = [m for m in everyone if m.has_head]
    maps = [m for m in everyone if m.name not in HELD_OUT]
    names = ['everything', *sorted(p.stem for p in HERE.glob('*.toml'))]
    runs = [(name, 0) for name in names] + ([('everything', 1)] if args.repeat else [])
    rows = []
    for name, seed in runs:
        folder = args.out / f'{name}-{seed}'
        model = train(name, maps, folder, steps=args.steps, seed=seed, threads=args.threads)
        row: dict[str, object] = {'synthesis': name, 'seed': seed}
        for preset in ('default', 'hard'):
            cases = held_out_cases(
                model,
                held_out,
                donors=donors,
                samples=args.samples,
                settings=load_settings(preset),
            )
            row[preset] = summarise(evaluate(cases)).loc['mean', 'all']
        if args.images:
            row['agreement'] = round(agreement(folder / 'model.safetensors', args.images), 3)
        rows.append(row)
        print(row, flush=True)
    table = pd.DataFrame(rows)
    table.to_csv(args.out / 'table.tsv', sep='\t', index=False)
    print(table.to_string(index=False))


if __name__ == '__main__':
    main()
