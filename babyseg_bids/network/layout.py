"""How a head stands, from where its structures lie: those of an average upright head tell."""

import itertools
from functools import cache
from importlib.resources import files

import numpy as np
import pandas as pd
from torch import Tensor

from babyseg_bids.labels import LabelTable

# Centres of the structures in an average head that stands upright.
LAYOUT = 'data/layout.tsv'
# Structures smaller than this have no reliable centre, mm3; and fewer of them tell nothing.
_SMALLEST, _FEWEST = 200.0, 8


@cache
def _layout() -> pd.DataFrame:
    """Centre (x, y, z; mm, RAS) and volume (mm3) of each structure by FreeSurfer number."""
    path = files('babyseg_bids').joinpath(LAYOUT)
    with path.open() as f:
        return pd.read_csv(f, sep='\t', index_col='index')


def angle_of(rotation: np.ndarray, /) -> float:
    """Angle of a rotation (3, 3), degrees."""
    return float(np.rad2deg(np.arccos(np.clip((np.trace(rotation) - 1) / 2, -1, 1))))


def upright(
    posteriors: np.ndarray, labels: LabelTable, spacing: float, /
) -> tuple[np.ndarray, float]:
    """Rotation after which the structures lie as in an average head that stands upright.

    It is that of the similarity which brings their centres closest to those of the average,
    large structures counting more; never a reflection. Cerebellum, brainstem and fourth
    ventricle, which fields of view cut off and masks leave out, do not count.

    Parameters
    ----------
    posteriors : (C, *size), of a volume in axes nearest to RAS
    spacing : of the voxels, mm

    Returns
    -------
    (3, 3), from the volume's axes to the upright head's, and the share of the centres' scatter
    that stays unexplained; the identity and 1 where too few structures are seen
    """
    mass = posteriors.sum((1, 2, 3), dtype=np.float64)
    moments = []
    for axis in (1, 2, 3):
        others = tuple(a for a in (1, 2, 3) if a != axis)
        profile = posteriors.sum(others, dtype=np.float64)
        moments.append(profile @ np.arange(profile.shape[1]))
    return _upright(mass, np.stack(moments, -1), labels, spacing)


def upright_labels(
    channels: np.ndarray, labels: LabelTable, spacing: float, /
) -> tuple[np.ndarray, float]:
    """`upright` of a map of channels (*size)."""
    where = np.nonzero(channels)
    found = channels[where]
    mass, *moments = (
        np.bincount(found, weights, minlength=len(labels)) for weights in (None, *where)
    )
    return _upright(mass.astype(np.float64), np.stack(moments, -1), labels, spacing)


def _upright(
    mass: np.ndarray, moments: np.ndarray, labels: LabelTable, spacing: float
) -> tuple[np.ndarray, float]:
    """`upright`, of the voxels of each channel (C,) and the sums of their indices (C, 3)."""
    layout = _layout()
    channels = [c for c, n in enumerate(labels.indices.tolist()) if n in layout.index]
    expected = layout.loc[labels.indices[channels]]
    mass, moments = mass[channels], moments[channels]
    volume = mass * spacing**3
    weight = np.sqrt(np.minimum(volume, expected['volume'].to_numpy()))
    weight[volume < _SMALLEST] = 0
    if np.count_nonzero(weight) < _FEWEST:
        return np.eye(3), 1.0
    centres = spacing * moments / np.maximum(mass, 1e-12)[:, None]
    return rotation_between(centres, expected[['x', 'y', 'z']].to_numpy(), weight)


def rotation_between(
    found: np.ndarray, wanted: np.ndarray, weight: np.ndarray, /
) -> tuple[np.ndarray, float]:
    """Rotation of the similarity that brings points closest to others, never a reflection.

    Umeyama, IEEE TPAMI 13(4), 1991.

    Parameters
    ----------
    found, wanted : (N, 3)
    weight : (N,), not all zero

    Returns
    -------
    (3, 3), and the share of the scatter that stays unexplained
    """
    weight = weight[:, None] / weight.sum()
    found, wanted = (x - (weight * x).sum(0) for x in (found, wanted))
    u, stretch, vt = np.linalg.svd((weight * wanted).T @ found)
    proper = np.array([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    scatter = (weight * found**2).sum() * (weight * wanted**2).sum()
    misfit = 1 - (stretch * proper).sum() ** 2 / scatter
    return (u * proper) @ vt, float(misfit)


@cache
def quarter_turns() -> tuple[np.ndarray, ...]:
    """The 24 rotations (3, 3) by quarter turns, none first."""
    turns = [
        np.diag(signs).astype(float)[list(order)]
        for order in itertools.permutations(range(3))
        for signs in itertools.product((1, -1), repeat=3)
    ]
    return tuple(t for t in turns if np.linalg.det(t) > 0)


def quarter_turned(x: Tensor, turn: np.ndarray, /) -> Tensor:
    """Volumes (N, *size) after a rotation (3, 3) by quarter turns."""
    axes, back = np.abs(turn).argmax(1), turn.sum(1) < 0
    return x.permute(0, *(1 + axes).tolist()).flip((1 + np.flatnonzero(back)).tolist())
