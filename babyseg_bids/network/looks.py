"""What the network makes of scans as they are or mirrored, in full or in blocks."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from babyseg_bids.network.boxes import Box, overlapping, ramp, scaled
from babyseg_bids.network.unet import GroupUNet
from babyseg_bids.network.weights import Model
from babyseg_bids.resources import GIB, give_back_freed_memory, memory_limit

_LOG = logging.getLogger(__name__)
_T = TypeVar('_T')

# Share of the free memory that the U-Net may plan with; images and libraries have the rest.
_MEMORY_SHARE = 0.5


def free_memory(device: str) -> float:
    """Memory in GiB that the network may use on a device."""
    if device.startswith('cuda'):
        return float(torch.cuda.mem_get_info(device)[0] / GIB)
    return memory_limit().amount


def in_room(device: str, work: Callable[[float], _T], /) -> _T:
    """Do what is given how many GiB of memory it may use; on a GPU, once more with a quarter.

    Raises
    ------
    torch.OutOfMemoryError
        If that is too much as well.
    """
    room = free_memory(device)
    try:
        return work(room)
    except torch.OutOfMemoryError:
        if device == 'cpu':
            raise
        _LOG.warning('The memory of %s is too small for this scan; trying blocks.', device)
    # Not before: the error holds on to what was computed.
    torch.cuda.empty_cache()
    return work(room / 4)


def most_voxels(room: float, model: Model, scans: int) -> int:
    """Voxels of the U-Net's grid that so many GiB are enough for."""
    return int(_MEMORY_SHARE * room * GIB / _bytes_a_voxel(model, scans))


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


def averaged_blocks(scan: Tensor, width: int, /) -> Tensor:
    """The mean of blocks of a scan (1, *size); those at its end may be smaller."""
    return F.avg_pool3d(scan[None], width, ceil_mode=True, count_include_pad=False)[0]


def fitted(scan: Tensor, network: GroupUNet, /) -> Tensor:
    """A scan (1, *size) with as much background behind it as the network asks for."""
    size = scan.shape[1:]
    beyond = [after - n for n, after in zip(size, network.config.fitting(size), strict=True)]
    return F.pad(scan, [n for after in reversed(beyond) for n in (0, after)])


def _bytes_a_voxel(model: Model, scans: int) -> int:
    """Memory that the U-Net needs at its peak, bytes for each voxel of its grid."""
    config = model.network.config
    # At full size live the first level of every scan, thrice while it is computed, what the last
    # step up makes of their mean, and the features of two views with the logits of both.
    last = config.encoder[0] + config.decoder[-1]
    seen = 2 * config.head[-1] + config.labels
    width = 3 * scans * config.encoder[0] + 4 * last + seen
    return 4 * width  # type: ignore[no-any-return]


def _features(scans: Tensor, network: GroupUNet, limit: int) -> Tensor:
    """Features (F, *size / patch); in blocks, if there are more than `limit`."""
    if len(scans) > 1:
        # Passes with several scans need most memory of all, in pieces of other sizes.
        give_back_freed_memory()
    x = scans[None]
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
class Look:
    """What the network saw, in the scans' own axes and sides.

    Parameters
    ----------
    features : (F, *size / patch)
    weight, bias : (places, C, F) and (places, C), which make logits of them
    """

    features: Tensor
    weight: Tensor
    bias: Tensor


def look(scans: Tensor, model: Model, limit: int, /, *, mirrored: bool = False) -> Look:
    """Look at scans (G, *size), as they are or mirrored."""
    network: GroupUNet = model.network  # type: ignore[assignment]
    patch = network.config.patch
    weight, bias = (x.unflatten(0, (patch**3, -1)) for x in network.classifier())
    if not mirrored:
        return Look(_features(scans, network, limit), weight, bias)
    # The places in a patch are mirrored, too, and each label has the channel of its partner.
    places = torch.arange(patch**3).view(patch, patch, patch).flip(0).flatten()
    partner = model.labels.mirror_channels
    features = _features(scans.flip(1), network, limit).flip(1)
    return Look(features, weight[places][:, partner], bias[places][:, partner])


def logits_of(looks: Sequence[Look], block: Box) -> Tensor:
    """Mean logits (places * C, *block) of some looks."""
    bias = torch.stack([x.bias for x in looks]).mean(0).flatten()
    # One matrix product after the other: joining the features first would copy all of them.
    size, logits = (), bias
    for x in looks:
        voxels = x.features[(slice(None), *block)].movedim(0, -1)
        size = voxels.shape[:-1]
        weight = x.weight.flatten(0, 1).t() / len(looks)
        logits = torch.addmm(logits, voxels.flatten(0, -2), weight)
    return logits.unflatten(0, size).movedim(-1, 0)


def mean_logits(looks: Sequence[Look]) -> Tensor:
    """Mean logits (C, *size / patch) over looks and the places of each patch."""
    mean = [
        replace(x, weight=x.weight.mean(0, keepdim=True), bias=x.bias.mean(0, keepdim=True))
        for x in looks
    ]
    return logits_of(mean, (slice(None), slice(None), slice(None)))


def softmax(logits: Tensor, model: Model) -> Tensor:
    """Posteriors of logits (C, *size), one channel after the other in memory."""
    # The logits of a voxel lie side by side. Turning that round as a matrix, then normalising, is
    # twice as fast as the other way round.
    channels = logits.movedim(0, -1).flatten(0, -2).t().contiguous().float()
    if model.temperature != 1:
        channels = channels / model.temperature
    return channels.softmax(0).unflatten(1, logits.shape[1:])


def background_of(logits: Tensor, model: Model) -> Tensor:
    """Posterior of the background (*size) alone, of logits (C, *size)."""
    voxels = logits.movedim(0, -1)
    # An infinite sum is right, too: nothing is left for the background then.
    odds = (voxels - voxels[..., :1]).float().div_(model.temperature).exp_().sum(-1)
    return odds.reciprocal_()
