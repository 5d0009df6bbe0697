"""White matter's share of white matter and cortex: what it is at an age, and how a map gets it.

Automatic label maps of infants draw white matter too thin where the scans show no contrast, and
what learns from them does the same. `data/white_matter_share.tsv` holds medians for children of
1 to 36 months from the brain charts (Bethlehem et al., Nature 2022, FreeSurfer 5.3;
doi 10.1038/s41586-022-04554-y). How they were got: docs/training-log.md.
"""

import csv
from dataclasses import replace
from functools import cache
from importlib.resources import files

import numpy as np
import torch

from babyseg_bids.synthesis.anatomy import thin_cortex
from babyseg_bids.synthesis.maps import DEPTH_STEPS, TrainingMap, class_table


def published_share(age: float, /) -> float:
    """Median share of white matter in white matter and cortex at an age in months.

    Linear between the table's ages, and that of the nearest one before and after them.
    """
    ages, shares = _table()
    return float(np.interp(age, ages, shares))


def white_matter_share(m: TrainingMap, /) -> float:
    """Share of white matter in white matter and cortex; nan without either."""
    white, cortex = _volumes(m)
    return white / (white + cortex) if white + cortex else float('nan')


def with_white_matter(m: TrainingMap, share: float, /) -> TrainingMap:
    """The map with white matter grown into the cortex, by one distance all around.

    What has more white matter stays as it is. Half of the cortex stays, which limits the share
    (see `cortical_depth`).

    Parameters
    ----------
    share : of white matter in white matter and cortex
    """
    white, cortex = _volumes(m)
    missing = round(share * (white + cortex)) - white
    if missing <= 0:
        return m
    # 127 is the half that stays; white matter has a depth, too.
    table = class_table()
    movable = np.isin(m.classes, table.of(3, 42)) & (m.depth < 127)
    depths = np.sort(m.depth[movable])
    if not len(depths):
        return m
    amount = float(depths[min(missing, len(depths) - 1)]) / DEPTH_STEPS
    flat = torch.from_numpy(m.classes.astype(np.int32)).view(-1)
    depth = torch.from_numpy(m.depth.astype(np.int32)).view(-1)
    grown = thin_cortex(flat, depth, amount, table).view(m.classes.shape)
    return replace(m, classes=grown.numpy().astype(np.uint8))


def _volumes(m: TrainingMap) -> tuple[int, int]:
    table = class_table()
    counts = np.bincount(m.classes.ravel(), minlength=len(table))
    white, cortex = (int(counts[table.tissue(t)].sum()) for t in ('white-matter', 'cortex'))
    return white, cortex


@cache
def _table() -> tuple[np.ndarray, np.ndarray]:
    text = files('babyseg_bids').joinpath('data/white_matter_share.tsv').read_text('utf-8')
    rows = list(csv.DictReader(text.splitlines(), delimiter='\t'))
    columns = [np.array([float(row[key]) for row in rows]) for key in ('age_months', 'share')]
    return columns[0], columns[1]
