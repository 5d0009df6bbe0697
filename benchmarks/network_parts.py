"""What the parts of the shipped network are worth: Dice with and without each of them.

The same synthetic scans of the held-out children are segmented by the model as it is, with the
plain mean over scans instead of their learned weights, and without the mirrored pass. Nothing is
trained anew: this says what the model would lose, not what a network trained without the part
would reach.
"""

import argparse
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from babyseg_bids.network import Model, load_model
from babyseg_bids.synthesis.evaluate import evaluate, held_out_cases, summarise
from babyseg_bids.synthesis.maps import load_maps
from babyseg_bids.synthesis.settings import load_settings
from babyseg_bids.synthesis.train import HELD_OUT


def without_attention(model: Model) -> Model:
    """The model with equal weights of the scans."""
    network = deepcopy(model.network)
    torch.nn.init.zeros_(network.attention.score.weight)
    return replace(model, network=network)


def main() -> None:
    """Print a table of mean Dice over structures and children."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('maps', type=Path, help='file that `babyseg-train prepare` wrote')
    parser.add_argument('--model', default='default')
    parser.add_argument('--samples', type=int, default=4, help='of each child')
    parser.add_argument('--scans', type=int, default=3)
    parser.add_argument('--seed', type=int, default=3000)
    parser.add_argument('--settings', default='default')
    args = parser.parse_args()
    everyone = load_maps(args.maps)
    maps = [m for m in everyone if m.name in HELD_OUT]
    donors = [m for m in everyone if m.has_head]
    model = load_model(args.model)
    variants = {
        'as it is': (model, True),
        'plain mean over scans': (without_attention(model), True),
        'without the mirrored pass': (model, False),
    }
    rows = []
    for name, (variant, both_sides) in variants.items():
        cases = held_out_cases(
            variant,
            maps,
            donors=donors,
            samples=args.samples,
            scans=args.scans,
            seed=args.seed,
            settings=load_settings(args.settings),
            both_sides=both_sides,
        )
        table = summarise(evaluate(cases))['all']
        shown = {k: table[k] for k in ('mean', 'L-WM', 'L-CTX') if k in table}
        rows.append({'network': name, **shown})
        print(rows[-1], flush=True)
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == '__main__':
    main()
