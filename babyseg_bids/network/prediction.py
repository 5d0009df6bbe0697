"""From prepared scans to posteriors on the working grid: tensors in, tensors out."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from babyseg_bids.labels import label_table
from babyseg_bids.network.layers import from_patches
from babyseg_bids.network.tissue import redistribute
from babyseg_bids.network.unet import GroupUNet
from babyseg_bids.network.weights import Model
from babyseg_bids.resources import GIB, give_back_freed_memory, memory_limit

_LOG = logging.getLogger(__name__)

Box = tuple[slice, slice, slice]

# What is background by more than this is left out of the result, unless it is within so many
# voxels of the U-Net's grid of what is not; so is what is farther than `_FAR` from likely brain,
# such as a skull that the network is not sure about.
_SURE = 0.9
_NEAR = 1
_FAR = 4
# How many times as wide the voxels are in which the head is found.
_WIDE = 2
# Voxels around what may be brain that are looked at closely, too.
_AROUND = 8
# Pieces of brain smaller than this share of the largest are taken for false detections, and so are
# those smaller than the second share that lie farther from the largest than this many mm: a neck
# or a shoulder. A cerebellum or a hemisphere is nearer, even where what joins it was not found.
_ISLAND_SHARE, _FAR_ISLAND_SHARE, _ISLAND_MM = 0.05, 0.5, 8.0
# Structures in the middle of the brain, whose place tells front from back.
_DEEP = (4, 10, 11, 12, 13, 14, 43, 49, 50, 51, 52)
_DEEP_VOXELS = 50
# How much better the turned head must fit; set on a few real scans with the first weights, where
# the right direction fitted better by 0.07 to 0.55.
_TURN_MARGIN = 0.05
# Share of the free memory that the U-Net may plan with; images and libraries have the rest.
_MEMORY_SHARE = 0.5
# Blocks of the U-Net, where memory is short: smallest side and overlap, voxels of its grid.
_SMALLEST = 64
_OVERLAP = 32
# Posteriors are computed for so many voxels at once, and for no fewer than so many of the U-Net's
# along an axis: small blocks stay in the cache and leave out more of the background.
_BLOCK = 300_000
_SHORTEST = 12


@dataclass(frozen=True)
class Prediction:
    """Posteriors of one child.

    Parameters
    ----------
    posteriors : (C, *box), float32, background first
    box : part of the working grid that they cover; background is sure outside
    turned : whether the head faces backwards in the grid (see `predict`)
    device : where the network ran in the end
    """

    posteriors: Tensor
    box: Box
    turned: bool
    device: str = 'cpu'

    def channels(self, size: Sequence[int]) -> Tensor:
        """The likeliest channel of every voxel of the whole grid, int64 (*size)."""
        labels = torch.zeros(tuple(size), dtype=torch.int64, device=self.posteriors.device)
        labels[self.box] = self.posteriors.argmax(0)
        return labels


@dataclass(frozen=True)
class _View:
    """One look at the head: some axes flipped, of which an odd number swaps left and right."""

    flips: tuple[int, ...]

    @property
    def mirrored(self) -> bool:
        return len(self.flips) % 2 == 1

    def turn(self, x: Tensor) -> Tensor:
        """Flip the last three axes of anything, there or back."""
        return x.flip([a - 3 for a in self.flips]) if self.flips else x


_AHEAD, _AHEAD_MIRRORED = _View(()), _View((0,))
# A turn by 180 degrees about the vertical axis flips two axes; mirroring it leaves one.
_BACK, _BACK_MIRRORED = _View((0, 1)), _View((1,))


def predict(
    scans: Tensor,
    model: Model,
    /,
    *,
    device: str = 'cpu',
    both_sides: bool = True,
    either_way: bool = False,
) -> Prediction:
    """Posteriors of prepared scans (G, *size) in 0..1, in RAS axes.

    Parameters
    ----------
    both_sides : average with the result of the mirrored scans, whose labels change sides. It
        costs a second pass, and takes away the network's own preference for a side.
    either_way : try a head that faces backwards, too. A common mistake of conversion programs
        stores LPS data under a RAS header: the head is then turned by 180 degrees about the
        vertical axis (a rotation, so that no side is mirrored). The direction is taken in which
        the deep structures explain more of the intensities; the header's needs no evidence.

    Where memory is short the U-Net runs on overlapping blocks with blended borders. When a GPU's
    memory turns out to be too small, blocks are tried there, and then the CPU.
    """
    options = {'both_sides': both_sides, 'either_way': either_way}
    room = free_memory(device)
    if device == 'cpu':
        return _predict(scans, model, device, room, **options)
    for share in (1.0, 0.25):
        try:
            return _predict(scans, model, device, share * room, **options)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            _LOG.warning(
                'The memory of %s (%.1f GiB free) is too small for this scan; trying %s.',
                device,
                room,
                'smaller blocks' if share == 1 else 'the CPU',
            )
    return _predict(scans.cpu(), model, 'cpu', free_memory('cpu'), **options)


def free_memory(device: str) -> float:
    """Memory in GiB that the network may use on a device."""
    if device.startswith('cuda'):
        return float(torch.cuda.mem_get_info(device)[0] / GIB)
    return memory_limit().amount


@torch.inference_mode()
def _predict(
    scans: Tensor, model: Model, device: str, room: float, *, both_sides: bool, either_way: bool
) -> Prediction:
    """`predict` on one device with so many GiB of memory."""
    network = model.network.to(device, memory_format=torch.channels_last_3d)
    scans = scans.to(device)
    with exact():
        limit = int(_MEMORY_SHARE * room * GIB / _bytes_a_voxel(model, len(scans)))
        view, part = _glance(scans, model, limit, either_way=either_way)
        scans = scans[(slice(None), *part)]
        mirrored = _BACK_MIRRORED if view == _BACK else _AHEAD_MIRRORED
        views = (view, mirrored) if both_sides else (view,)
        looks = [_look(scans, model, v, limit) for v in views]
        background = _background(_mean_logits(looks), model)
        patch = network.config.patch
        remove_islands(background, spacing=patch * model.spacing)
        near = _near_brain(background)
        posteriors = _in_full(looks, near, model)
        labelled = posteriors[0] < posteriors[1:].amax(0)
        gone = islands(labelled, spacing=model.spacing)
        posteriors[:, gone] = 0
        posteriors[0, gone] = 1
        box = _scaled(_box(near), patch)
    # In full precision, since variances are small differences.
    redistribute(posteriors, scans[(slice(None), *box)], model.labels, spacing=model.spacing)
    return Prediction(posteriors, _shifted(box, part), turned=view == _BACK, device=device)


def _glance(scans: Tensor, model: Model, limit: int, *, either_way: bool) -> tuple[_View, Box]:
    """Find the head's direction and the part of the volume that holds the brain.

    One scan is enough, the last, which shows most of the head in the order that `inference`
    gives, and voxels `_WIDE` times as wide.
    """
    network = model.network
    small = F.avg_pool3d(scans[None, -1:], _WIDE, ceil_mode=True, count_include_pad=False)[0]
    size = small.shape[1:]
    room = [after - n for n, after in zip(size, network.config.fitting(size), strict=True)]
    small = F.pad(small, [n for after in reversed(room) for n in (0, after)])
    view = _AHEAD
    logits = _mean_logits([_look(small, model, view, limit)])
    if either_way:
        back = _mean_logits([_look(small, model, _BACK, limit)])
        patch = network.config.patch
        seen = F.avg_pool3d(small[None], patch)[0] if patch > 1 else small
        fit, fit_back = (deep_fit(_softmax(x, model), seen, model) for x in (logits, back))
        if fit_back - fit > _TURN_MARGIN:
            view, logits = _BACK, back
    patch = network.config.patch
    background = _background(logits, model)
    remove_islands(background, spacing=patch * _WIDE * model.spacing)
    return view, _part_with_brain(background, scans.shape[1:], patch * _WIDE, network)


def exact() -> AbstractContextManager[None]:
    """float32 without shortcuts, and the same bits every time.

    In bfloat16 another label was given to 0.3 to 0.8 % of the brain on CPUs and to 1.6 % on an
    H200, which was hardly faster with it (0.19 s a case against 0.20); the nodes of one cluster
    must agree.
    """
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, deterministic=True, allow_tf32=False
    )
    return flags


def _bytes_a_voxel(model: Model, scans: int) -> int:
    """Memory that the U-Net needs at its peak, bytes for each voxel of its grid."""
    config = model.network.config
    # At full size live the first level of every scan, thrice while it is computed, what the last
    # step up makes of their mean, and the logits of up to three views.
    last = config.encoder[0] + config.decoder[-1]
    width = 3 * scans * config.encoder[0] + 4 * last + 3 * config.labels
    return 4 * width  # type: ignore[no-any-return]


def _in_view(scans: Tensor, network: nn.Module, view: _View, limit: int) -> Tensor:
    """Features (F, *size / patch) in a view's axes; in blocks, if there are more than `limit`."""
    if len(scans) > 1:
        # Passes with several scans need most memory of all, in pieces of other sizes.
        give_back_freed_memory()
    x = view.turn(scans)[None]
    patch = network.config.patch
    size = [n // patch for n in x.shape[2:]]
    blocks = list(_overlapping(size, limit, network.config.multiple // patch))
    # Networks without a head have no features of their own to speak of.
    features = network.features if _pointwise(network) else network
    if len(blocks) == 1:
        return features(x)[0]  # type: ignore[no-any-return]
    total: Tensor | None = None
    weight = torch.zeros(size, device=x.device)
    for block in blocks:
        ramp = _ramp(block, size).to(x.device)
        weight[block] += ramp
        part = features(x[(..., *_scaled(block, patch))])[0] * ramp
        if total is None:
            total = part.new_zeros((len(part), *size))
        total[(slice(None), *block)] += part
    assert total is not None
    return total.div_(weight)


def _overlapping(size: Sequence[int], limit: int, multiple: int) -> Iterator[Box]:
    """Blocks of at most `limit` voxels (but at least `_SMALLEST` a side) that cover a volume."""
    length = list(size)
    while length[0] * length[1] * length[2] > limit:
        axis = max(range(3), key=length.__getitem__)
        shorter = max(_SMALLEST, multiple * int(0.75 * length[axis] / multiple))
        if shorter >= length[axis]:
            break
        length[axis] = shorter
    starts = []
    for n, width in zip(size, length, strict=True):
        step = max(multiple, (width - _OVERLAP) // multiple * multiple)
        first = list(range(0, n - width, step))
        starts.append([*first, n - width])
    for corner in product(*starts):
        yield tuple(slice(c, c + n) for c, n in zip(corner, length, strict=True))  # type: ignore[misc]


def _ramp(block: Box, size: Sequence[int]) -> Tensor:
    """Weights that rise from the block's inner faces over the overlap, and never reach zero."""
    ramp = torch.ones(())
    for s, n in zip(block, size, strict=True):
        length = s.stop - s.start
        index = torch.arange(length, dtype=torch.float32)
        low = (index + 1) / _OVERLAP if s.start else torch.ones(length)
        high = (length - index) / _OVERLAP if s.stop < n else torch.ones(length)
        ramp = ramp[..., None] * torch.minimum(low, high).clamp_max(1)
    return ramp


def _pointwise(network: nn.Module) -> bool:
    """Whether the last layer looks at single voxels."""
    return isinstance(network, GroupUNet) and bool(network.config.head)


@dataclass(frozen=True)
class _Look:
    """What the network saw in one view, in the scans' own axes and sides.

    Parameters
    ----------
    features : (F, *size / patch)
    weight, bias : (places * C, F) and (places * C,), what makes logits of them
    """

    features: Tensor
    weight: Tensor
    bias: Tensor


def _look(scans: Tensor, model: Model, view: _View, limit: int) -> _Look:
    """Look at scans (G, *size) in a view."""
    network = model.network
    features = view.turn(_in_view(scans, network, view, limit))
    if _pointwise(network):
        weight, bias = (x.flatten(1) if x.ndim > 1 else x for x in network.add[-1].folded())
    else:
        weight = torch.eye(len(features), device=features.device)
        bias = weight.new_zeros(len(weight))
    patch = network.config.patch
    # Places in a patch turn with the view, and in a mirrored one each label has the channel of
    # its partner.
    order = torch.arange(len(bias)).view(*[patch] * 3, -1)
    order = order.flip(view.flips) if view.flips else order
    if view.mirrored:
        order = order[..., model.labels.mirror_channels]
    order = order.flatten().to(bias.device)
    return _Look(features, weight[order], bias[order])


def _logits(looks: Sequence[_Look], block: Box) -> Tensor:
    """Mean logits (*block, places * C) of some looks."""
    seen = [x.features[(slice(None), *block)].movedim(0, -1) for x in looks]
    weight = torch.cat([x.weight for x in looks], dim=1) / len(looks)
    bias = torch.stack([x.bias for x in looks]).mean(0)
    return F.linear(torch.cat(seen, dim=-1), weight, bias)


def _mean_logits(looks: Sequence[_Look]) -> Tensor:
    """Mean logits (C, *size / patch) over looks and the places of each patch."""
    channels = len(label_table())
    averaged = [
        replace(
            x,
            weight=x.weight.unflatten(0, (-1, channels)).mean(0),
            bias=x.bias.unflatten(0, (-1, channels)).mean(0),
        )
        for x in looks
    ]
    everything = tuple(slice(0, n) for n in looks[0].features.shape[1:])
    return _logits(averaged, everything).movedim(-1, 0)  # type: ignore[arg-type]


def _softmax(logits: Tensor, model: Model) -> Tensor:
    """Posteriors of logits (C, *size), one channel after the other in memory."""
    # The logits of a voxel lie side by side. Turning that round as a matrix, then normalising, is
    # twice as fast as the other way round.
    channels = logits.movedim(0, -1).flatten(0, -2).t().contiguous().float()
    if model.temperature != 1:
        channels = channels / model.temperature
    return channels.softmax(0).unflatten(1, logits.shape[1:])


def _background(logits: Tensor, model: Model) -> Tensor:
    """Posterior of the background (*size) alone, of logits (C, *size)."""
    voxels = logits.movedim(0, -1)
    # An infinite sum is right, too: nothing is left for the background then.
    odds = (voxels - voxels[..., :1]).float().div_(model.temperature).exp_().sum(-1)
    return odds.reciprocal_()


def _near_brain(background: Tensor) -> Tensor:
    """(*size) bool: what is not surely background and what is near it, around likely brain."""
    return _grown(background < _SURE, _NEAR) & _grown(background < 0.5, _FAR)


def _grown(mask: Tensor, width: int) -> Tensor:
    """A mask (*size) and all that is at most `width` voxels away along every axis."""
    # One axis after the other, and what has grown by r, perhaps on one side of a border
    # only, grows by r + 1 at once.
    for axis, n in enumerate(mask.shape):
        reach = 0
        while reach < min(width, n - 1):
            step = min(reach + 1, width - reach, n - 1)
            grown = mask.clone()
            grown.narrow(axis, step, n - step).logical_or_(mask.narrow(axis, 0, n - step))
            grown.narrow(axis, 0, n - step).logical_or_(mask.narrow(axis, step, n - step))
            mask, reach = grown, reach + step
    return mask


def _box(mask: Tensor) -> Box:
    """Smallest box around a mask (*size); one voxel if it is empty."""
    box = []
    for axis in range(3):
        first, second = (a for a in (2, 1, 0) if a != axis)
        used = mask.any(first).any(second).nonzero()
        low, high = (int(used[0]), int(used[-1])) if len(used) else (0, 0)
        box.append(slice(low, high + 1))
    return tuple(box)  # type: ignore[return-value]


def _part_with_brain(
    background: Tensor, size: Sequence[int], factor: int, network: nn.Module
) -> Box:
    """The part of a volume that is looked at closely; all of it without a brain.

    Parameters
    ----------
    background : posterior (*size / factor), rounded up
    size : of the volume
    """
    near = _near_brain(background)
    if not bool(near.any()):
        return tuple(slice(0, n) for n in size)  # type: ignore[return-value]
    multiple = network.config.multiple
    part = []
    for s, n in zip(_scaled(_box(near), factor), size, strict=True):
        low, high = max(0, s.start - _AROUND), min(n, s.stop + _AROUND)
        width = min(n, multiple * -(-(high - low) // multiple))
        start = min(max(0, (low + high - width) // 2), n - width)
        part.append(slice(start, start + width))
    return tuple(part)  # type: ignore[return-value]


def _shifted(box: Box, part: Box) -> Box:
    """Where a box of a part of a volume lies in the volume."""
    return tuple(  # type: ignore[return-value]
        slice(b.start + p.start, b.stop + p.start) for b, p in zip(box, part, strict=True)
    )


def _scaled(box: Box, factor: int) -> Box:
    """The same box of a grid of so many times smaller voxels."""
    return tuple(slice(factor * s.start, factor * s.stop) for s in box)  # type: ignore[return-value]


def _in_full(looks: Sequence[_Look], near: Tensor, model: Model) -> Tensor:
    """Posteriors (C, *box of `near`) on the working grid.

    Done block by block, since what lies between the blocks costs nothing.

    Parameters
    ----------
    near : (*size / patch) bool, where to look
    """
    box, patch = _box(near), model.network.config.patch
    size = [patch * (s.stop - s.start) for s in box]
    out = _empty(len(model.labels), size, near.device)
    for block in _blocks(near, _BLOCK // patch**3):
        logits = from_patches(_logits(looks, block).movedim(-1, 0)[None], patch)[0]
        inner = _scaled(_within(block, box), patch)
        out[(slice(None), *inner)] = _softmax(logits, model)
    return out


def _empty(channels: int, size: Sequence[int], device: torch.device) -> Tensor:
    """Posteriors (C, *size) of nothing but background."""
    if device.type == 'cpu':
        # Unlike torch's, what nothing is written to takes neither time nor memory.
        out = torch.from_numpy(np.zeros((channels, *size), np.float32))
    else:
        out = torch.zeros((channels, *size), device=device)
    out[0] = 1
    return out


def _within(inner: Box, outer: Box) -> Box:
    """Where a box lies in a box that holds it."""
    return tuple(  # type: ignore[return-value]
        slice(i.start - o.start, i.stop - o.start) for i, o in zip(inner, outer, strict=True)
    )


def _blocks(near: Tensor, most: int) -> Iterator[Box]:
    """Blocks of at most so many voxels, as small as a mask (*size) that they cover allows."""
    waiting = [tuple(slice(0, n) for n in near.shape)]
    while waiting:
        whole = waiting.pop()
        if not bool(near[whole].any()):
            continue
        box = _shifted(_box(near[whole]), whole)  # type: ignore[arg-type]
        lengths = [s.stop - s.start for s in box]
        longest = max(range(3), key=lengths.__getitem__)
        if lengths[0] * lengths[1] * lengths[2] > most and lengths[longest] > _SHORTEST:
            middle = box[longest].start + lengths[longest] // 2
            for half in (slice(middle, box[longest].stop), slice(box[longest].start, middle)):
                waiting.append((*box[:longest], half, *box[longest + 1 :]))
            continue
        yield box


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


def remove_islands(background: Tensor, /, *, spacing: float) -> Tensor:
    """Give small or distant detached pieces of brain to the background, in place.

    Parameters
    ----------
    background : (*size), its posterior
    spacing : of the voxels, mm

    Returns
    -------
    (*size) bool: where those pieces were
    """
    gone = islands(background < 0.5, spacing=spacing, corners=True)
    background[gone] = 1
    return gone


def islands(brain: Tensor, /, *, spacing: float, corners: bool = False) -> Tensor:
    """Small or distant detached pieces of a mask, (*size) bool.

    Parameters
    ----------
    brain : (*size) bool
    spacing : of the voxels, mm
    corners : whether voxels that share no more than a corner hang together
    """
    neighbours = np.ones((3, 3, 3)) if corners else None
    found, count = ndimage.label(brain.cpu().numpy(), neighbours)
    if count < 2:
        return torch.zeros_like(brain)
    pieces = torch.from_numpy(found).long()
    sizes = pieces.flatten().bincount()
    sizes[0] = 0
    largest = sizes.argmax()
    around = _grown(pieces == largest, round(_ISLAND_MM / spacing))
    distant = torch.ones(count + 1, dtype=torch.bool)
    distant[pieces[around]] = False
    share = torch.where(distant, _FAR_ISLAND_SHARE, _ISLAND_SHARE)
    small = sizes < share * sizes[largest]
    small[0] = False
    return small[pieces].to(brain.device)
