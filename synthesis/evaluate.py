"""Measure a model on synthetic scans of children that it was not trained on."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from babyseg_bids.labels import label_table
from babyseg_bids.network.grid import WorkingGrid, from_grid, onto_grid, reference_box
from babyseg_bids.network.intensity import normalise
from babyseg_bids.network.prediction import Prediction, predict_upright
from babyseg_bids.network.weights import Model
from babyseg_bids.synthesis.generator import draw_sample
from babyseg_bids.synthesis.losses import hard_dice
from babyseg_bids.synthesis.maps import TrainingMap
from babyseg_bids.synthesis.settings import SynthesisSettings, load_settings


@dataclass(frozen=True)
class Case:
    """A synthetic sample of a held-out child and what the model makes of it.

    Parameters
    ----------
    child : name of the map
    target : (*size) int64, channels
    prediction : of a volume of that size
    """

    child: str
    target: Tensor
    prediction: Prediction


def held_out_cases(
    model: Model,
    maps: Sequence[TrainingMap],
    /,
    *,
    donors: Sequence[TrainingMap] = (),
    samples: int,
    scans: int = 1,
    seed: int = 0,
    settings: SynthesisSettings | None = None,
    extent: tuple[int, int, int] = (192, 224, 192),
    both_sides: bool = True,
    change: Callable[[Tensor], Tensor] = lambda images: images,
) -> Iterator[Case]:
    """Draw synthetic scans and segment them at the model's own resolution.

    Parameters
    ----------
    maps : of held-out children
    donors : maps of heads, which the children are given; none if empty
    samples : drawn from each map
    scans : number of scans that each sample has
    settings : what the scans are like; the size, spacing and number of scans are set here
    extent : of the volume, mm; rounded down to what the network asks for
    both_sides : as in `predict`
    change : done to the scans (G, *size) of a sample before they are segmented
    """
    shares = tuple(float(i == scans - 1) for i in range(4))
    base = settings or load_settings()
    size = tuple(int(n / model.spacing) // model.multiple * model.multiple for n in extent)
    settings = replace(
        base,
        anatomy=base.anatomy.of_one_child(),
        size=size,  # type: ignore[arg-type]
        spacing=model.spacing,
        group_shares=shares,
    )
    for source in maps:
        for i in range(samples):
            sample = draw_sample([source, *donors], seed=seed + i, settings=settings)
            prediction = segment_sample(change(sample.images), model, both_sides=both_sides)
            yield Case(source.name, sample.target, prediction)


def segment_sample(images: Tensor, model: Model, /, *, both_sides: bool = True) -> Prediction:
    """Segment the images (G, *size) of a sample as `network.segment` does scans.

    Returns
    -------
    posteriors on the images' own grid, also where the head was put upright or enlarged
    """
    size = tuple(images.shape[1:])
    affine = np.diag([model.spacing] * 3 + [1.0])
    own = WorkingGrid(size, affine, np.eye(4))  # type: ignore[arg-type]

    def on(grid: WorkingGrid) -> Tensor:
        if grid is own:
            return images
        return torch.stack([normalise(onto_grid(x, affine, grid)) for x in images])

    found, upright = predict_upright(on, own, model, both_sides=both_sides)
    if upright is own:
        return found
    grid = upright.part(found.box)
    box = reference_box([slice(0, n) for n in grid.size], grid, size)
    return Prediction(torch.stack([from_grid(p, grid, box) for p in found.posteriors]), box)


def evaluate(cases: Iterable[Case], /) -> pd.DataFrame:
    """Dice of each structure.

    Returns
    -------
    One row a sample: map, then Dice by abbreviation; NaN where a structure is in neither.
    """
    table = label_table()
    names = [r.abbreviation for r in table.rows]
    rows = []
    for case in cases:
        labels = case.prediction.channels(case.target.shape)
        dice = hard_dice(labels, case.target, classes=len(table)).numpy()
        rows.append({'map': case.child, **dict(zip(names, dice, strict=True))})
    return pd.DataFrame(rows).drop(columns='BG')


def summarise(dice: pd.DataFrame, /) -> pd.DataFrame:
    """Mean Dice by structure and map, with the mean over structures in the last row."""
    means = dice.groupby('map').mean(numeric_only=True).T
    means['all'] = means.mean(axis=1)
    means.loc['mean'] = means.mean()
    return means.round(3).replace(np.nan, None)
