"""From prepared scans to posteriors on the working grid: tensors in, tensors out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from babyseg_bids.network.boxes import Box, box_around, covering, scaled, shifted, within
from babyseg_bids.network.grid import WorkingGrid
from babyseg_bids.network.head import enlarged, find_head, put_upright
from babyseg_bids.network.layers import from_patches
from babyseg_bids.network.looks import (
    Look,
    background_of,
    exact,
    in_room,
    logits_of,
    look,
    mean_logits,
    most_voxels,
    softmax,
)
from babyseg_bids.network.masks import islands, near_brain, without_specks
from babyseg_bids.network.tissue import redistribute
from babyseg_bids.network.weights import Model

# The box of the result where there is no brain.
_NOWHERE = (slice(0, 1), slice(0, 1), slice(0, 1))
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
    """

    posteriors: Tensor
    box: Box

    def channels(self, size: Sequence[int]) -> Tensor:
        """The likeliest channel of every voxel of the whole grid, int64 (*size)."""
        labels = torch.zeros(tuple(size), dtype=torch.int64, device=self.posteriors.device)
        labels[self.box] = self.posteriors.argmax(0)
        return labels


def predict(
    scans: Tensor,
    model: Model,
    /,
    *,
    device: str = 'cpu',
    both_sides: bool = True,
    part: Box | None = None,
) -> Prediction:
    """Posteriors of prepared scans (G, *size) in 0..1, in axes nearest to RAS.

    Parameters
    ----------
    both_sides : average with the result of the mirrored scans, whose labels change sides. It
        costs a second pass, and takes away the network's own preference for a side.
    part : that holds the brain and is looked at closely (see `head.find_head`); found if None

    Where memory is short the U-Net runs on overlapping blocks with blended borders; when a GPU's
    turns out to be too small, smaller blocks are tried.

    Raises
    ------
    torch.OutOfMemoryError
        If they are too large as well.
    """
    part = part or find_head(scans, model, device=device).part
    return in_room(device, lambda room: _predict(scans, part, model, device, room, both_sides))


def predict_upright(
    prepare: Callable[[WorkingGrid], Tensor],
    grid: WorkingGrid,
    model: Model,
    /,
    *,
    device: str = 'cpu',
    both_sides: bool = True,
) -> tuple[Prediction, WorkingGrid]:
    """Find the head, put it upright, enlarge a small brain, and `predict` it.

    Parameters
    ----------
    prepare, grid : see `head.put_upright`

    Returns
    -------
    posteriors, and the grid of the upright head whose part `box` they cover
    """
    standing = put_upright(prepare, grid, model, device=device)
    standing = enlarged(standing, prepare, model)
    found = predict(
        standing.scans,
        replace(model, spacing=standing.grid.spacing),
        device=device,
        both_sides=both_sides,
        part=standing.head.part,
    )
    return found, standing.grid


@torch.inference_mode()
def _predict(
    scans: Tensor, part: Box, model: Model, device: str, room: float, both_sides: bool
) -> Prediction:
    """`predict` on one device with so many GiB of memory."""
    model.network.to(device, memory_format=torch.channels_last_3d)
    patch = model.network.config.patch
    scans = scans.to(device)[(slice(None), *part)]
    limit = most_voxels(room, model, len(scans))
    with exact():
        looks = [look(scans, model, limit)]
        if both_sides:
            looks.append(look(scans, model, limit, mirrored=True))
        background = background_of(mean_logits(looks), model)
        background[islands(background < 0.5, spacing=patch * model.spacing)] = 1
        near = near_brain(background)
        box = box_around(near) or _NOWHERE
        posteriors = _in_full(looks, near, box, model)
        labelled = posteriors[0] < posteriors[1:].amax(0)
        gone = islands(labelled, spacing=model.spacing)
        posteriors[:, gone] = 0
        posteriors[0, gone] = 1
        box = scaled(box, patch)
    # In full precision, since variances are small differences.
    redistribute(posteriors, scans[(slice(None), *box)], model.labels, spacing=model.spacing)
    without_specks(posteriors, model.labels, spacing=model.spacing)
    return Prediction(posteriors, shifted(box, part))


def _in_full(looks: Sequence[Look], near: Tensor, box: Box, model: Model) -> Tensor:
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
        logits = from_patches(logits_of(looks, block)[None], patch)[0]
        inner = scaled(within(block, box), patch)
        out[(slice(None), *inner)] = softmax(logits, model)
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
