"""What the parts of the shipped network are worth: Dice with and without each of them.

The same synthetic scans of the held-out children are segmented by the model as it is and without
the mirrored pass; then groups of which motion has ruined one scan, with it and without it. Nothing
is trained anew: this says what the model would lose, not what a network trained without the part
would reach.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from babyseg_bids.network import load_model
from babyseg_bids.synthesis.evaluate import evaluate, held_out_cases, summarise
from babyseg_bids.synthesis.maps import load_maps
from babyseg_bids.synthesis.settings import load_settings
from babyseg_bids.synthesis.train import HELD_OUT


def with_a_ruined_scan(images: torch.Tensor) -> torch.Tensor:
    """Scans (G, *size), the first of them as after strong motion: ghosts, shifted, and noise."""
    generator = torch.Generator().manual_seed(0)
    first = images[0]
    ghosts = torch.zeros_like(first)
    for shift in torch.randint(-30, 31, (8,), generator=generator).tolist():
        ghosts += first.roll((shift, shift // 3), (1, 2)) / 8
    noise = torch.randn(first.shape, generator=generator)
    return torch.cat([(ghosts + 0.1 * noise).clamp(0, 1)[None], images[1:]])


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

    def unchanged(images: torch.Tensor) -> torch.Tensor:
        return images

    variants = {
        'as it is': (True, unchanged),
        'without the mirrored pass': (False, unchanged),
        'one scan ruined': (True, with_a_ruined_scan),
        'the others without it': (True, lambda images: images[1:]),
    }
    settings = load_settings(args.settings)
    # Scans are ruined here, in all groups alike.
    settings = replace(settings, group=replace(settings.group, ruined_probability=0.0))
    rows = []
    for name, (both_sides, change) in variants.items():
        cases = held_out_cases(
            model,
            maps,
            donors=donors,
            samples=args.samples,
            scans=args.scans,
            seed=args.seed,
            settings=settings,
            both_sides=both_sides,
            change=change,
        )
        table = summarise(evaluate(cases))['all']
        rows.append({'network': name, **{k: table[k] for k in ('mean', 'L-WM', 'L-CTX')}})
        print(rows[-1], flush=True)
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == '__main__':
    main()
