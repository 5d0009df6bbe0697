"""Where the head is in a volume and how it stands there: a first look, in wide voxels."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from babyseg_bids.network.boxes import Box, box_around, scaled
from babyseg_bids.network.compass import Reading, read_compass
from babyseg_bids.network.grid import WorkingGrid
from babyseg_bids.network.layout import angle_of, quarter_turned, upright
from babyseg_bids.network.looks import (
    averaged_blocks,
    background_of,
    exact,
    fitted,
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
# Share of the structures' scatter about their common centre that the average head may leave
# unexplained, of a head that can be put upright.
_MISFIT = 0.3
# How much that share counts against the probability of the labels (see `Head.score`), and the
# score of a head that surely stands upright.
_MISFIT_WEIGHT, _SURE = 2.0, 0.75
# Misfit from which the compass is lost, and by how many degrees a head lies far from upright. Of
# 273 cases (24 real scans and 15 of fetuses, turned in seven ways) none with a smaller misfit was
# off by more than 27 degrees; of scans after birth none by more than 13, and none was lost.
_LOST, _FAR = 0.15, 25.0
# A head that stands upright within so many degrees is left as it stands.
_UPRIGHT = 10.0
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

    The compass tells the direction. Headers are mistaken about it now and then; LPS data stored
    as RAS, whose head faces backwards, is the most common case. Then the same voxels are taken in
    another order: a rotation, so that no side is mirrored. Where the head does not surely stand
    upright after that, the scans are resampled exactly as the compass says, and the better score
    decides. Where the compass is lost, the header is believed.

    Parameters
    ----------
    prepare : gives the scans (G, *size) in 0..1 on a grid; the last shows most of the head
    grid : in axes nearest to RAS
    """

    def look(grid: WorkingGrid, scans: Tensor) -> Standing:
        return Standing(scans, grid, find_head(scans, model, device=device))

    scans = prepare(grid)
    lies = read_compass(scans[-1:], spacing=model.spacing, device=device)
    found: list[Standing] = []
    for towards in _directions(lies, grid, scans, prepare, model):
        found.append(_erected(look(*towards), prepare, look))
        if found[-1].head.score > _SURE:
            break
    return max(found, key=lambda standing: standing.head.score)


def _directions(
    lies: Reading,
    grid: WorkingGrid,
    scans: Tensor,
    prepare: Callable[[WorkingGrid], Tensor],
    model: Model,
) -> Iterator[tuple[WorkingGrid, Tensor]]:
    """Grids to begin with, the likeliest first, and the scans (G, *size) on them."""
    if lies.misfit >= _LOST:
        yield grid, scans
        return
    turn = lies.quarter_turn
    # Far from upright a first look is less exact than the compass.
    far = angle_of(lies.rotation @ turn.T) > _FAR
    if not far:
        yield _same_voxels(grid, turn), quarter_turned(scans, turn)
    exactly = _turn(lies.rotation, lies.inside, model)
    there = grid.turned(exactly.rotation, exactly.low, exactly.size)
    yield there, prepare(there)
    if far:
        yield _same_voxels(grid, turn), quarter_turned(scans, turn)


def _same_voxels(grid: WorkingGrid, turn: np.ndarray) -> WorkingGrid:
    """The grid of scans after a rotation (3, 3) by quarter turns; itself after none."""
    if np.array_equal(turn, np.eye(3)):
        return grid
    size = np.array(grid.size)[np.abs(turn).argmax(1)]
    low = np.where(turn.sum(1) < 0, 1 - size, 0)
    return grid.turned(turn, low, size.tolist())


def _erected(
    given: Standing,
    prepare: Callable[[WorkingGrid], Tensor],
    look: Callable[[WorkingGrid, Tensor], Standing],
) -> Standing:
    """Put a head upright, as far as that makes its score better."""
    best = latest = given
    for _ in range(_TURNS):
        turn = latest.head.turn
        if not turn:
            break
        grid = latest.grid.turned(turn.rotation, turn.low, turn.size)
        latest = look(grid, prepare(grid))
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
    small = fitted(averaged_blocks(scan, WIDE), network)
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
        turn = _turn(rotation, where, model)
    return Head(part, near, turn, misfit, brain, certainty)


def _turn(rotation: np.ndarray, inside: np.ndarray, model: Model) -> Turn:
    """Make room for a brain, places (N, 3) in which are given as indices of the volume."""
    along = inside @ rotation.T
    low, high = along.min(0), along.max(0)
    network: GroupUNet = model.network  # type: ignore[assignment]
    size = network.config.fitting(high - low + 2 * _BORDER / model.spacing)
    return Turn(rotation, (low + high - np.array(size) + 1) / 2, size)


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
