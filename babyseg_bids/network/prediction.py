"""From prepared scans to posteriors on the working grid: tensors in, tensors out."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from babyseg_bids.network.boxes import (
    Box,
    box_around,
    covering,
    overlapping,
    ramp,
    scaled,
    shifted,
    within,
)
from babyseg_bids.network.layers import from_patches
from babyseg_bids.network.tissue import redistribute
from babyseg_bids.network.unet import GroupUNet
from babyseg_bids.network.weights import Model
from babyseg_bids.resources import GIB, give_back_freed_memory, memory_limit

_LOG = logging.getLogger(__name__)

# What is background by more than this is left out of the result, unless it is within so many
# voxels of the U-Net's grid of what is not; so is what is farther than `_FAR` from likely brain,
# such as a skull that the network is not sure about.
_SURE = 0.9
_NEAR = 1
_FAR = 4
# How many times as wide the voxels are in which the head is found. The network is trained on
# those, too.
WIDE = 2
# The box of the result where there is no brain.
_NOWHERE = (slice(0, 1), slice(0, 1), slice(0, 1))
# Voxels around what may be brain that are looked at closely, too.
_AROUND = 8
# Pieces of brain smaller than this share of the largest are taken for false detections, and so are
# those smaller than the second share that lie farther from the largest than this many mm: a neck
# or a shoulder. A cerebellum or a hemisphere is nearer, even where what joins it was not found.
_ISLAND_SHARE, _FAR_ISLAND_SHARE, _ISLAND_MM = 0.05, 0.5, 8.0
# Structures in the middle of the brain, whose place tells front from back.
_DEEP = (4, 10, 11, 12, 13, 14, 43, 49, 50, 51, 52)
_DEEP_VOXELS = 50
# How much better the turned head must fit. In 23 real scans of all ages the right direction fitted
# better by 0.10 to 0.53.
_TURN_MARGIN = 0.05
# Share of the free memory that the U-Net may plan with; images and libraries have the rest.
_MEMORY_SHARE = 0.5
# Posteriors are computed for so many voxels at once: small blocks stay in the cache and leave out
# more of the background.
_BLOCK = 300_000


@dataclass(frozen=True)
class Prediction:
    """Posteriors of one child.

    Parameters
    ----------
    posteriors : (C, *box), float32, background first
    box : part of the working grid that they cover; background is sure outside
    turned : whether the head faces backwards in the grid (see `predict`)
    """

    posteriors: Tensor
    box: Box
    turned: bool

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

    Where memory is short the U-Net runs on overlapping blocks with blended borders; when a GPU's
    turns out to be too small, smaller blocks are tried.

    Raises
    ------
    torch.OutOfMemoryError
        If they are too large as well.
    """
    options = {'both_sides': both_sides, 'either_way': either_way}
    room = free_memory(device)
    try:
        return _predict(scans, model, device, room, **options)
    except torch.OutOfMemoryError:
        if device == 'cpu':
            raise
        _LOG.warning('The memory of %s is too small for this scan; trying blocks.', device)
    # Not before: the error holds on to what was computed.
    torch.cuda.empty_cache()
    return _predict(scans, model, device, room / 4, **options)


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
    patch = network.config.patch
    scans = scans.to(device)
    with exact():
        limit = int(_MEMORY_SHARE * room * GIB / _bytes_a_voxel(model, len(scans)))
        view, part = _glance(scans, model, limit, either_way=either_way)
        scans = scans[(slice(None), *part)]
        mirrored = _BACK_MIRRORED if view == _BACK else _AHEAD_MIRRORED
        views = (view, mirrored) if both_sides else (view,)
        looks = [_look(scans, model, v, limit) for v in views]
        background = _background(_mean_logits(looks), model)
        background[islands(background < 0.5, spacing=patch * model.spacing)] = 1
        near = _near_brain(background)
        box = box_around(near) or _NOWHERE
        posteriors = _in_full(looks, near, box, model)
        labelled = posteriors[0] < posteriors[1:].amax(0)
        gone = islands(labelled, spacing=model.spacing)
        posteriors[:, gone] = 0
        posteriors[0, gone] = 1
        box = scaled(box, patch)
    # In full precision, since variances are small differences.
    redistribute(posteriors, scans[(slice(None), *box)], model.labels, spacing=model.spacing)
    return Prediction(posteriors, shifted(box, part), turned=view == _BACK)


def _glance(scans: Tensor, model: Model, limit: int, *, either_way: bool) -> tuple[_View, Box]:
    """Find the head's direction and the part of the volume that holds the brain.

    One scan is enough, the last, which shows most of the head in the order that `inference`
    gives, and voxels `WIDE` times as wide.
    """
    network: GroupUNet = model.network  # type: ignore[assignment]
    patch = network.config.patch
    small = F.avg_pool3d(scans[None, -1:], WIDE, ceil_mode=True, count_include_pad=False)[0]
    size = small.shape[1:]
    room = [after - n for n, after in zip(size, network.config.fitting(size), strict=True)]
    small = F.pad(small, [n for after in reversed(room) for n in (0, after)])
    view = _AHEAD
    logits = _mean_logits([_look(small, model, view, limit)])
    if either_way:
        back = _mean_logits([_look(small, model, _BACK, limit)])
        seen = F.avg_pool3d(small[None], patch)[0]
        fit, fit_back = (deep_fit(_softmax(x, model), seen, model) for x in (logits, back))
        if fit_back - fit > _TURN_MARGIN:
            view, logits = _BACK, back
    background = _background(logits, model)
    background[islands(background < 0.5, spacing=patch * WIDE * model.spacing)] = 1
    return view, _part_with_brain(background, scans.shape[1:], patch * WIDE, network)


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
    # step up makes of their mean, and the features of two views with the logits of both.
    last = config.encoder[0] + config.decoder[-1]
    seen = 2 * config.head[-1] + config.labels
    width = 3 * scans * config.encoder[0] + 4 * last + seen
    return 4 * width  # type: ignore[no-any-return]


def _in_view(scans: Tensor, network: GroupUNet, view: _View, limit: int) -> Tensor:
    """Features (F, *size / patch) in a view's axes; in blocks, if there are more than `limit`."""
    if len(scans) > 1:
        # Passes with several scans need most memory of all, in pieces of other sizes.
        give_back_freed_memory()
    x = view.turn(scans)[None]
    patch = network.config.patch
    size = [n // patch for n in x.shape[2:]]
    blocks = list(overlapping(size, limit=limit, multiple=network.config.multiple // patch))
    if len(blocks) == 1:
        return network.features(x)[0]
    total = x.new_zeros((network.config.head[-1], *size))
    weight = x.new_zeros(size)
    for block in blocks:
        share = ramp(block, size).to(x.device)
        weight[block] += share
        total[(slice(None), *block)] += (
            network.features(x[(..., *scaled(block, patch))])[0] * share
        )
    return total.div_(weight)


@dataclass(frozen=True)
class _Look:
    """What the network saw in one view, in the scans' own axes and sides.

    Parameters
    ----------
    features : (F, *size / patch)
    weight, bias : (places, C, F) and (places, C), which make logits of them
    """

    features: Tensor
    weight: Tensor
    bias: Tensor


def _look(scans: Tensor, model: Model, view: _View, limit: int) -> _Look:
    """Look at scans (G, *size) in a view."""
    network: GroupUNet = model.network  # type: ignore[assignment]
    features = view.turn(_in_view(scans, network, view, limit))
    patch = network.config.patch
    # Places in a patch turn with the view, and in a mirrored one each label has the channel of
    # its partner.
    places = torch.arange(patch**3).view(patch, patch, patch).flip(view.flips).flatten()
    weight, bias = (x.unflatten(0, (patch**3, -1))[places] for x in network.classifier())
    if view.mirrored:
        partner = model.labels.mirror_channels
        weight, bias = weight[:, partner], bias[:, partner]
    return _Look(features, weight, bias)


def _logits(looks: Sequence[_Look], block: Box) -> Tensor:
    """Mean logits (places * C, *block) of some looks."""
    seen = torch.cat([x.features[(slice(None), *block)] for x in looks]).movedim(0, -1)
    weight = torch.cat([x.weight for x in looks], dim=-1).flatten(0, 1) / len(looks)
    bias = torch.stack([x.bias for x in looks]).mean(0).flatten()
    return F.linear(seen, weight, bias).movedim(-1, 0)


def _mean_logits(looks: Sequence[_Look]) -> Tensor:
    """Mean logits (C, *size / patch) over looks and the places of each patch."""
    mean = [
        replace(x, weight=x.weight.mean(0, keepdim=True), bias=x.bias.mean(0, keepdim=True))
        for x in looks
    ]
    return _logits(mean, (slice(None), slice(None), slice(None)))


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


def _part_with_brain(
    background: Tensor, size: Sequence[int], factor: int, network: GroupUNet
) -> Box:
    """The part of a volume that is looked at closely; all of it without a brain.

    Parameters
    ----------
    background : posterior (*size / factor), rounded up
    size : of the volume
    """
    near = box_around(_near_brain(background))
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


def _in_full(looks: Sequence[_Look], near: Tensor, box: Box, model: Model) -> Tensor:
    """Posteriors (C, *box) on the working grid.

    Done block by block, since what lies between the blocks costs nothing.

    Parameters
    ----------
    near : (*size / patch) bool, where to look
    box : around it
    """
    patch = model.network.config.patch
    size = [patch * (s.stop - s.start) for s in box]
    out = _empty(len(model.labels), size, near.device)
    for block in covering(near, _BLOCK // patch**3):
        logits = from_patches(_logits(looks, block)[None], patch)[0]
        inner = scaled(within(block, box), patch)
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


def islands(brain: Tensor, /, *, spacing: float) -> Tensor:
    """Small or distant detached pieces of a mask, (*size) bool.

    Parameters
    ----------
    brain : (*size) bool
    spacing : of the voxels, mm
    """
    found, count = ndimage.label(brain.cpu().numpy())
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
