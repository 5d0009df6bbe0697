"""Where the brain may be, and what of it is too small or too far off to be believed."""

import torch
from scipy import ndimage
from torch import Tensor

from babyseg_bids.labels import LabelTable

# What is background by more than this is left out of the result, unless it is within so many
# voxels of the U-Net's grid of what is not; so is what is farther than `_FAR` from likely brain,
# such as a skull that the network is not sure about.
_SURE = 0.9
_NEAR = 1
_FAR = 4
# Pieces of brain smaller than this share of the largest are taken for false detections, and so are
# those smaller than the second share that lie farther from the largest than this many mm: a neck
# or a shoulder. A cerebellum or a hemisphere is nearer, even where what joins it was not found.
_ISLAND_SHARE, _FAR_ISLAND_SHARE, _ISLAND_MM = 0.05, 0.5, 8.0
# Structures smaller than this in all are false detections, mm3. The smallest in the children's
# maps, an accumbens at 2 months, has 60; that of a fetus of 28 weeks is smaller.
_SPECK = 20.0
# The same for some, by FreeSurfer number: a fetus of 21 weeks has a brainstem of 1600 mm3, and the
# midbrain that was left of that of a child of 1 month has 900.
_SPECKS = {16: 400.0}


def near_brain(background: Tensor) -> Tensor:
    """(*size) bool: what is not surely background and what is near it, around likely brain."""
    return grown(background < _SURE, _NEAR) & grown(background < 0.5, _FAR)


def grown(mask: Tensor, width: int) -> Tensor:
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
    around = grown(pieces == largest, round(_ISLAND_MM / spacing))
    distant = torch.ones(count + 1, dtype=torch.bool)
    distant[pieces[around]] = False
    share = torch.where(distant, _FAR_ISLAND_SHARE, _ISLAND_SHARE)
    small = sizes < share * sizes[largest]
    small[0] = False
    return small[pieces].to(brain.device)


def without_specks(posteriors: Tensor, labels: LabelTable, /, *, spacing: float) -> None:
    """Give the voxels of structures of next to no volume to what is likeliest besides, in place.

    Parameters
    ----------
    posteriors : (C, *size), background first
    spacing : of the voxels, mm
    """
    # Counting one channel after the other takes about a third of the time of `argmax` over them.
    most = posteriors.amax(0)
    for channel, number in enumerate(labels.indices.tolist()[1:], start=1):
        where = posteriors[channel] == most
        if 0 < int(where.count_nonzero()) * spacing**3 < _SPECKS.get(number, _SPECK):
            posteriors[channel, where] = 0
            rest = posteriors[:, where].sum(0)
            posteriors[0, where] += (rest == 0).to(posteriors.dtype)
            posteriors[:, where] /= rest.where(rest > 0, 1)
