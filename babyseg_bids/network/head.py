"""Where the head is in a volume and how it stands there: a first look, in wide voxels."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
# Centres of the structures in an average head that stands upright.
LAYOUT = 'data/layout.tsv'
# Structures smaller than this have no reliable centre, mm3; and fewer of them tell nothing.
_SMALLEST, _FEWEST = 200.0, 8
# Share of the structures' scatter about their common centre that the average head may leave
# unexplained, of a head that can be put upright, and of one that contradicts the header.
_MISFIT, _MISFIT_UPRIGHT = 0.3, 0.05
# How much that share counts against the probability of the labels (see `Head.score`), and the
# score of a head that surely stands upright. Of 24 real scans of all ages 22 had at least 0.76
# in the right direction. Of wrong ones of four scans, all that were tried, none that was off by
# more than 45 degrees had more than 0.74; some that were off by 30 to 40 had.
_MISFIT_WEIGHT, _SURE = 2.0, 0.75
# How much better the score has to be in a direction that contradicts the header: backwards, and
# in one in which headers are hardly ever mistaken, where it has to be high besides. In noise,
# wrong ones of the latter had up to 0.71 and were better by up to 0.03 (two scans); a right one,
# of a child of 1 month, was better by 0.10, and backwards ones of three real scans by 0.11 on.
_HEADER, _UNLIKELY_HEADER, _UNLIKELY = 0.02, 0.05, 0.7
# With less brain than this, mm3, the header is believed: in fetuses of up to 29 weeks (to 140 mL)
# structures lie otherwise than in the average head. Of seven real scans, from a fetus of 165 mL
# on, turned by up to 150 degrees, the first look had at least 157 mL.
_LEAST_BRAIN = 150_000.0
# A head that stands upright within so many degrees is left as it stands.
_UPRIGHT = 10.0
# Of all quarter turns, in how many of the best the head is put upright.
_TRIED = 2
# How often a head is put upright at most: far from it, the first look is less exact.
_TURNS = 3
# Border around the brain of the volume in which it stands upright, mm.
_BORDER = 32.0
# A brain of less than this, mm3, is looked at closely in voxels that are narrower by its share of
# that to this power, down to so much of their width. A third would make all of them as large; with
# a half the outline of a brain of 1 month came to lie too far inside. Where they would still have
# the last of their width, it is not worth the interpolation and the larger volume.
_SMALL, _POWER, _NARROWEST, _WORTH = 800_000.0, 0.4, 0.5, 0.95


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
    part : of the volume that holds the brain, as large as the network asks for; all of it if
        there is none
    near : tighter, the brain and what is around it; None if there is none
    turn : None for a head that stands upright, or of which too little is seen to tell
    misfit : how far its structures lie from where those of an average upright head are, 0..1;
        1 if too few are seen
    brain : volume, mm3
    certainty : mean probability of its labels, 0..1
    """

    part: Box
    near: Box | None
    turn: Turn | None
    misfit: float
    brain: float
    certainty: float

    @property
    def score(self) -> float:
        """How much speaks for a head that stands upright; at most 1.

        A network that was trained on heads turned by no more than 20 degrees is less sure of
        others, and their structures do not come to lie where they belong.
        """
        return self.certainty - _MISFIT_WEIGHT * self.misfit


@dataclass(frozen=True)
class Standing:
    """Scans in whose grid the head stands upright, as far as that is known.

    Parameters
    ----------
    scans : (G, *size)
    grid : their grid
    head : what was found in them
    """

    scans: Tensor
    grid: WorkingGrid
    head: Head


def put_upright(
    prepare: Callable[[WorkingGrid], Tensor], grid: WorkingGrid, model: Model, /, *, device: str
) -> Standing:
    """Find the head, and where it lies turned put the scans on a grid that is turned with it.

    Headers are mistaken about directions now and then; LPS data stored as RAS, whose head faces
    backwards, is the most common case. Where the head is not surely upright, that is tried, then
    all other quarter turns. Each is a rotation, so that no side is mirrored. The direction with
    the best score is taken.

    Parameters
    ----------
    prepare : gives the scans (G, *size) in 0..1 on a grid; the last shows most of the head
    grid : in axes nearest to RAS
    """
    scans = prepare(grid)
    ahead = Standing(scans, grid, find_head(scans, model, device=device))
    best = _erected(ahead, prepare, model, device)
    given = best.head.score
    backwards, *others = _other_quarter_turns()
    brain = scans[(slice(-1, None), *ahead.head.part)]
    unlikely = max(given + _UNLIKELY_HEADER, _UNLIKELY)
    for turns, lowest in (([backwards], given + _HEADER), (others, unlikely)):
        if best.head.score > _SURE or ahead.head.brain < _LEAST_BRAIN:
            break
        for turn in _most_promising(turns, brain, model, device):
            turned = _quarter_turned(scans, turn)
            seen = find_head(turned, model, device=device)
            other = Standing(turned, _same_voxels(grid, turn), seen)
            other = _erected(other, prepare, model, device)
            upright_now = other.head.misfit < _MISFIT_UPRIGHT
            if upright_now and other.head.score > max(lowest, best.head.score):
                best = other
    return best


def _most_promising(
    turns: list[np.ndarray], scan: Tensor, model: Model, device: str
) -> list[np.ndarray]:
    """The few turns after which a scan (1, *size) of the brain has the best scores."""
    if len(turns) <= _TRIED:
        return turns
    scores = [find_head(_quarter_turned(scan, t), model, device=device).score for t in turns]
    return [turns[i] for i in sorted(range(len(turns)), key=lambda i: -scores[i])[:_TRIED]]


def _other_quarter_turns() -> list[np.ndarray]:
    """All rotations (3, 3) by quarter turns but none, the one that faces backwards first."""
    turns = [
        np.diag(signs).astype(float)[list(order)]
        for order in itertools.permutations(range(3))
        for signs in itertools.product((1, -1), repeat=3)
    ]
    proper = [t for t in turns if np.linalg.det(t) > 0 and not np.array_equal(t, np.eye(3))]
    backwards = np.diag([-1.0, -1.0, 1.0])
    return sorted(proper, key=lambda t: not np.array_equal(t, backwards))


def _quarter_turned(scans: Tensor, turn: np.ndarray) -> Tensor:
    """Scans (G, *size) after a rotation (3, 3) by quarter turns."""
    axes, back = np.abs(turn).argmax(1), turn.sum(1) < 0
    return scans.permute(0, *(1 + axes).tolist()).flip((1 + np.flatnonzero(back)).tolist())


def _same_voxels(grid: WorkingGrid, turn: np.ndarray) -> WorkingGrid:
    """The grid of scans after that rotation."""
    size = np.array(grid.size)[np.abs(turn).argmax(1)]
    low = np.where(turn.sum(1) < 0, 1 - size, 0)
    return grid.turned(turn, low, size.tolist())


def _erected(
    given: Standing, prepare: Callable[[WorkingGrid], Tensor], model: Model, device: str
) -> Standing:
    """Put a head upright, as far as that makes its score better."""
    best = latest = given
    for _ in range(_TURNS):
        turn = latest.head.turn
        if not turn:
            break
        grid = latest.grid.turned(turn.rotation, turn.low, turn.size)
        scans = prepare(grid)
        latest = Standing(scans, grid, find_head(scans, model, device=device))
        if latest.head.score > best.head.score:
            best = latest
    return best


def enlarged(
    standing: Standing, prepare: Callable[[WorkingGrid], Tensor], model: Model, /
) -> Standing:
    """The part with the brain, on a finer grid if the brain is small; `prepare` as above."""
    near, ratio = standing.head.near, round((standing.head.brain / _SMALL) ** _POWER, 2)
    if near is None or ratio >= _WORTH:
        return standing
    ratio = max(ratio, _NARROWEST)
    network: GroupUNet = model.network  # type: ignore[assignment]
    size = network.config.fitting([(s.stop - s.start) / ratio for s in near])
    grid = standing.grid.part(near).finer(ratio, size)
    whole = tuple(slice(0, n) for n in size)
    return Standing(prepare(grid), grid, replace(standing.head, part=whole))  # type: ignore[arg-type]


def find_head(scans: Tensor, model: Model, /, *, device: str = 'cpu') -> Head:
    """Find the head in prepared scans (G, *size) in 0..1, in axes nearest to RAS.

    One scan is enough, the last, which shows most of the head in the order that `inference`
    gives, and voxels `WIDE` times as wide.
    """
    # Flipped views have no layout that convolutions are fast in.
    last = scans[-1:].contiguous()
    return in_room(device, lambda room: _find(last, model, device, room))


@torch.inference_mode()
def _find(scan: Tensor, model: Model, device: str, room: float) -> Head:
    """`find_head` on one device with so many GiB of memory."""
    # Scores are compared with fixed limits, so that they must not depend on how the posteriors
    # were calibrated.
    model = replace(model, temperature=1.0)
    network: GroupUNet = model.network.to(device, memory_format=torch.channels_last_3d)  # type: ignore[assignment]
    patch = network.config.patch
    factor = patch * WIDE
    scan = scan.to(device)
    small = F.avg_pool3d(scan[None], WIDE, ceil_mode=True, count_include_pad=False)[0]
    size = small.shape[1:]
    beyond = [after - n for n, after in zip(size, network.config.fitting(size), strict=True)]
    small = F.pad(small, [n for after in reversed(beyond) for n in (0, after)])
    with exact():
        logits = mean_logits([look(small, model, most_voxels(room, model, 1))])
    likely = softmax(logits, model)
    background = background_of(logits, model)
    gone = islands(background < 0.5, spacing=factor * model.spacing)
    background[gone] = 1
    inside = background < 0.5
    brain = float(inside.count_nonzero()) * (factor * model.spacing) ** 3
    certainty = float(likely[1:].amax(0)[inside].mean()) if brain else 0.0
    near = _near(background, scan.shape[1:], factor)
    part = _fitted(near, scan.shape[1:], network)
    rotation, misfit = upright(
        likely.masked_fill_(gone, 0).cpu().numpy(), model.labels, factor * model.spacing
    )
    turn = None
    if brain and misfit < _MISFIT and angle_of(rotation) > _UPRIGHT:
        where = factor * (inside.nonzero().double().cpu().numpy() + 0.5) - 0.5
        turn = _turn(rotation, where, factor, model)
    return Head(part, near, turn, misfit, brain, certainty)


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


def _near(background: Tensor, size: Sequence[int], factor: int) -> Box | None:
    """The part of a volume that holds the brain and a border; None without a brain.

    Parameters
    ----------
    background : posterior (*size / factor), rounded up
    size : of the volume
    """
    near = box_around(near_brain(background))
    if near is None:
        return None
    inside = zip(scaled(near, factor), size, strict=True)
    return tuple(  # type: ignore[return-value]
        slice(max(0, s.start - _AROUND), min(n, s.stop + _AROUND)) for s, n in inside
    )


def _fitted(near: Box | None, size: Sequence[int], network: GroupUNet) -> Box:
    """A part of a volume made as large as the network asks for; the whole volume for None."""
    if near is None:
        return tuple(slice(0, n) for n in size)  # type: ignore[return-value]
    widths = network.config.fitting([s.stop - s.start for s in near])
    part = []
    for s, width, n in zip(near, widths, size, strict=True):
        length = min(n, width)
        start = min(max(0, (s.start + s.stop - length) // 2), n - length)
        part.append(slice(start, start + length))
    return tuple(part)  # type: ignore[return-value]
