"""Where the head is in a volume and how it stands there: a first look, in wide voxels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from babyseg_bids.labels import LabelTable
from babyseg_bids.network.boxes import Box, box_around, scaled
from babyseg_bids.network.grid import WorkingGrid
from babyseg_bids.network.looks import (
    AHEAD,
    BACK,
    background_of,
    exact,
    in_room,
    look,
    mean_logits,
    most_voxels,
    softmax,
)
from babyseg_bids.network.masks import islands, near_brain
from babyseg_bids.network.unet import GroupUNet
from babyseg_bids.network.weights import Model

# How many times as wide the voxels are in which the head is found. The network is trained on
# those, too.
WIDE = 2
# Voxels around what may be brain that are looked at closely, too.
_AROUND = 8
# Structures in the middle of the brain, whose place tells front from back.
_DEEP = (4, 10, 11, 12, 13, 14, 43, 49, 50, 51, 52)
_DEEP_VOXELS = 50
# How much better the turned head must fit. In 23 real scans of all ages the right direction fitted
# better by 0.10 to 0.53.
_TURN_MARGIN = 0.05
# Centres of the structures in an average head that stands upright.
LAYOUT = 'data/layout.tsv'
# Structures smaller than this have no reliable centre, mm3; and fewer of them tell nothing.
_SMALLEST, _FEWEST = 200.0, 8
# Share of the structures' scatter about their common centre that the average head may leave
# unexplained: of a head to be put upright, and of one that is upright then.
_MISFIT, _MISFIT_UPRIGHT = 0.3, 0.08
# A head that stands upright within so many degrees is left as it stands.
_UPRIGHT = 10.0
# How often a head is put upright at most: far from it, the first look is less exact.
_TURNS = 3
_ABOUT = np.diag([-1.0, -1.0, 1.0])
# Border around the brain of the volume in which it stands upright, mm.
_BORDER = 32.0


@dataclass(frozen=True)
class Turn:
    """How to put a head upright.

    Parameters
    ----------
    rotation : (3, 3), takes voxel indices of the volume to axes in which the head stands upright
    low : (3,), index along those axes of the first voxel around the head
    size : (3,), voxels around the head
    """

    rotation: np.ndarray
    low: np.ndarray
    size: tuple[int, ...]


@dataclass(frozen=True)
class Head:
    """What a first look finds.

    Parameters
    ----------
    part : of the volume that holds the brain; all of it if there is none
    turn : None for a head that stands upright, or of which too little is seen to tell
    backwards : whether it faces backwards, which is turned round before all else
    misfit : how far its structures lie from where those of an average upright head are, 0..1;
        1 if too few are seen
    """

    part: Box
    turn: Turn | None
    backwards: bool
    misfit: float


@dataclass(frozen=True)
class Standing:
    """Scans in whose grid the head stands upright, as far as that is known.

    Parameters
    ----------
    scans : (G, *size)
    grid : their grid
    part : of it that holds the brain
    backwards : whether the head faces backwards in the grid that was given
    """

    scans: Tensor
    grid: WorkingGrid
    part: Box
    backwards: bool


def put_upright(
    prepare: Callable[[WorkingGrid], Tensor], grid: WorkingGrid, model: Model, /, *, device: str
) -> Standing:
    """Find the head, and where it lies turned put the scans on a grid that is turned with it.

    A turn counts only if the structures, looked at again, then lie as in an upright head.

    Parameters
    ----------
    prepare : gives the scans (G, *size) in 0..1 on a grid; the last shows most of the head
    grid : in axes nearest to RAS
    """
    scans = prepare(grid)
    head = find_head(scans, model, device=device, either_way=True)
    backwards = head.backwards
    if backwards and head.turn:
        grid = grid.turned(head.turn.rotation, head.turn.low, head.turn.size)
        scans = prepare(grid)
        head = find_head(scans, model, device=device)
    standing = Standing(scans, grid, head.part, backwards)
    for _ in range(_TURNS):
        if not head.turn:
            break
        grid = grid.turned(head.turn.rotation, head.turn.low, head.turn.size)
        scans = prepare(grid)
        head = find_head(scans, model, device=device)
        if head.misfit < _MISFIT_UPRIGHT:
            standing = Standing(scans, grid, head.part, backwards)
    return standing


def find_head(
    scans: Tensor, model: Model, /, *, device: str = 'cpu', either_way: bool = False
) -> Head:
    """Find the head in prepared scans (G, *size) in 0..1, in axes nearest to RAS.

    One scan is enough, the last, which shows most of the head in the order that `inference`
    gives, and voxels `WIDE` times as wide.

    Parameters
    ----------
    either_way : try a head that faces backwards, too. A common mistake of conversion programs
        stores LPS data under a RAS header: the head is then turned by 180 degrees about the
        vertical axis (a rotation, so that no side is mirrored). The direction is taken in which
        the deep structures explain more of the intensities; the header's needs no evidence.
    """
    last = scans[-1:]
    return in_room(device, lambda room: _find(last, model, device, room, either_way))


@torch.inference_mode()
def _find(scan: Tensor, model: Model, device: str, room: float, either_way: bool) -> Head:
    """`find_head` on one device with so many GiB of memory."""
    network: GroupUNet = model.network.to(device, memory_format=torch.channels_last_3d)  # type: ignore[assignment]
    patch = network.config.patch
    factor = patch * WIDE
    limit = most_voxels(room, model, 1)
    scan = scan.to(device)
    small = F.avg_pool3d(scan[None], WIDE, ceil_mode=True, count_include_pad=False)[0]
    size = small.shape[1:]
    beyond = [after - n for n, after in zip(size, network.config.fitting(size), strict=True)]
    small = F.pad(small, [n for after in reversed(beyond) for n in (0, after)])
    with exact():
        logits = mean_logits([look(small, model, AHEAD, limit)])
        backwards = False
        if either_way:
            back = mean_logits([look(small, model, BACK, limit)])
            seen = F.avg_pool3d(small[None], patch)[0]
            fit, fit_back = (deep_fit(softmax(x, model), seen, model) for x in (logits, back))
            if fit_back - fit > _TURN_MARGIN:
                backwards, logits = True, back
    background = background_of(logits, model)
    gone = islands(background < 0.5, spacing=factor * model.spacing)
    background[gone] = 1
    part = _part_with_brain(background, scan.shape[1:], factor, network)
    likely = softmax(logits, model).masked_fill_(gone, 0)
    rotation, misfit = upright(likely.cpu().numpy(), model.labels, factor * model.spacing)
    if backwards:
        rotation = _ABOUT
    elif misfit > _MISFIT or angle_of(rotation) < _UPRIGHT:
        return Head(part, None, backwards, misfit)
    inside = factor * ((background < 0.5).nonzero().double().cpu().numpy() + 0.5) - 0.5
    if not len(inside):
        return Head(part, None, backwards, misfit)
    return Head(part, _turn(rotation, inside, factor, model), backwards, misfit)


def _turn(rotation: np.ndarray, inside: np.ndarray, factor: int, model: Model) -> Turn:
    """Make room for a brain of wide voxels, whose indices (N, 3) in the volume are given."""
    along = inside @ rotation.T
    low, high = along.min(0) - factor / 2, along.max(0) + factor / 2
    network: GroupUNet = model.network  # type: ignore[assignment]
    size = network.config.fitting(high - low + 2 * _BORDER / model.spacing)
    return Turn(rotation, (low + high - np.array(size) + 1) / 2, size)


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

    It is that of the similarity which brings their centres closest to those of the average
    (Umeyama, IEEE TPAMI 13(4), 1991), large structures counting more; never a reflection.
    Cerebellum, brainstem and fourth ventricle, which fields of view cut off and masks leave out,
    do not count.

    Parameters
    ----------
    posteriors : (C, *size), of a volume in axes nearest to RAS
    spacing : of the voxels, mm

    Returns
    -------
    (3, 3), from the volume's axes to the upright head's, and the share of the centres' scatter
    that stays unexplained; the identity and 1 where too few structures are seen
    """
    layout = _layout()
    channels = [c for c, n in enumerate(labels.indices.tolist()) if n in layout.index]
    seen = posteriors[channels].astype(np.float64)
    mass = seen.sum((1, 2, 3))
    volume = mass * spacing**3
    expected = layout.loc[labels.indices[channels]]
    weight = np.sqrt(np.minimum(volume, expected['volume'].to_numpy()))
    weight[volume < _SMALLEST] = 0
    if np.count_nonzero(weight) < _FEWEST:
        return np.eye(3), 1.0
    profiles = [seen.sum(tuple(a for a in (1, 2, 3) if a != axis)) for axis in (1, 2, 3)]
    moments = [profile @ np.arange(profile.shape[1]) for profile in profiles]
    centres = spacing * np.stack(moments, -1) / np.maximum(mass, 1e-12)[:, None]
    weight = weight[:, None] / weight.sum()
    wanted = expected[['x', 'y', 'z']].to_numpy()
    found, wanted = (x - (weight * x).sum(0) for x in (centres, wanted))
    u, stretch, vt = np.linalg.svd((weight * wanted).T @ found)
    proper = np.array([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    scatter = (weight * found**2).sum() * (weight * wanted**2).sum()
    misfit = 1 - (stretch * proper).sum() ** 2 / scatter
    return (u * proper) @ vt, float(misfit)


def _part_with_brain(
    background: Tensor, size: Sequence[int], factor: int, network: GroupUNet
) -> Box:
    """The part of a volume that is looked at closely; all of it without a brain.

    Parameters
    ----------
    background : posterior (*size / factor), rounded up
    size : of the volume
    """
    near = box_around(near_brain(background))
    if near is None:
        return tuple(slice(0, n) for n in size)  # type: ignore[return-value]
    inside = scaled(near, factor)
    low = [max(0, s.start - _AROUND) for s in inside]
    high = [min(n, s.stop + _AROUND) for s, n in zip(inside, size, strict=True)]
    widths = network.config.fitting([b - a for a, b in zip(low, high, strict=True)])
    part = []
    for a, b, width, n in zip(low, high, widths, size, strict=True):
        length = min(n, width)
        start = min(max(0, (a + b - length) // 2), n - length)
        part.append(slice(start, start + length))
    return tuple(part)  # type: ignore[return-value]


def deep_fit(posteriors: Tensor, scans: Tensor, model: Model, /) -> float:
    """Share of the intensity variance in the deep structures that their labels explain.

    This is the correlation ratio (eta squared), averaged over scans; 0 where there is too little
    to tell.

    Parameters
    ----------
    posteriors : (C, *size)
    scans : (G, *size)
    """
    deep = [c for c, index in enumerate(model.labels.indices.tolist()) if index in _DEEP]
    likely = posteriors[deep]
    inside = likely.sum(0) > 0.5
    chosen = likely[:, inside].argmax(0)
    if len(chosen) < _DEEP_VOXELS:
        return 0.0
    count = torch.bincount(chosen, minlength=len(deep)).clamp_min(1)
    fits = []
    for scan in scans:
        values = scan[inside].double()
        means = torch.bincount(chosen, values, len(deep)) / count
        total = (values - values.mean()).square().sum()
        rest = (values - means[chosen]).square().sum()
        fits.append(float(1 - rest / total) if total > 0 else 0.0)
    return sum(fits) / len(fits)
