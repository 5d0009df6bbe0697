"""Structures told apart once more, by the scans' own intensities.

The network's posteriors are the prior of a mixture of Gaussians (Van Leemput et al., IEEE TMI
18(10), 1999, without the field of the scanner, which local means make unnecessary). White matter
and cortex have means and a common variance that vary slowly over the brain; every other structure
is small and has one mean. The prior is softened first, by a fraction of a voxel: where a border
runs is better known from a clear scan than from a coarse network. Where a scan shows no contrast,
all likelihoods are alike and nothing else changes. The structures of the cerebrum and the
brainstem only exchange probability among each other: the brain's outline stays as it is.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from babyseg_bids.labels import LabelTable
from babyseg_bids.network.grid import blur

# White matter and cortex of each hemisphere.
PAIRS = ((2, 3), (41, 42))
# What does not take part: the cerebellum, which has two tissues of its own, and third and fourth
# ventricle, too thin to show an intensity of their own.
APART = (8, 14, 15, 47)
# Deviation of the window in which means and variance are estimated, mm.
WINDOW = 14.0
# Rounds in which the tissues of the window are estimated anew, on half the resolution; the window
# itself is wide enough for a quarter.
ROUNDS = 3
# Share of a voxel's prior that comes from each neighbour along an axis, for white matter and
# cortex, and for small structures.
SOFTENED, SOFTENED_SMALL = 0.25, 0.1
# How much the likelihoods of small structures count, as an exponent: their intensities are less
# uniform than one mean can say.
TRUST = 0.7
# The scans together make white matter against cortex, or a structure against the others, likelier
# by no more than this factor: the network has seen the intensities, too, and fluid in a sulcus may
# look like white matter.
MOST = 10.0
# Likelihood of what no tissue explains, relative to the peak of a Gaussian.
OUTLIER = 0.02
# Smallest deviation of the intensities, of their range 0..1.
LEAST_DEVIATION = 0.03
# How much the means of the whole brain count in a window, voxels of it.
_ANCHOR = 0.2
# From which probability of small structures together, and up to which, the exchange with them sets
# in.
_FEW, _MANY = 0.01, 0.05


def redistribute(
    posteriors: Tensor, scans: Tensor, labels: LabelTable, /, *, spacing: float
) -> None:
    """Exchange probability between the structures of the brain, in place.

    Parameters
    ----------
    posteriors : (C, *size), background first
    scans : (G, *size) in 0..1, on the same voxels
    spacing : of the voxels, mm
    """
    numbers = labels.indices.tolist()
    if not all(n in numbers for pair in PAIRS for n in pair) or min(posteriors.shape[1:]) < 3:
        return
    white, cortex = ([numbers.index(n) for n in tissue] for tissue in zip(*PAIRS, strict=True))
    apart = [c for c, n in enumerate(numbers) if c == 0 or n in APART]
    tissues = torch.stack([_sum(posteriors, c) for c in (white, cortex)])
    fields = _local_fields(tissues, scans, sigma=WINDOW / (4 * spacing))
    small = 1 - _sum(posteriors, apart).add_(tissues[0]).add_(tissues[1])
    others = [c for c in range(len(numbers)) if c not in {*white, *cortex, *apart}]
    exchanged = _with_small(posteriors, small, scans, fields, (others, white, cortex))
    share = _share_of_white(tissues, scans, fields)
    for a, b in zip(white, cortex, strict=True):
        both = posteriors[a] + posteriors[b]
        torch.mul(both, share, out=posteriors[a])
        torch.sub(both, posteriors[a], out=posteriors[b])
    if exchanged:
        exchanged.put_into(posteriors)


def _sum(posteriors: Tensor, channels: Sequence[int]) -> Tensor:
    """Of some channels, (*size), without a copy of each."""
    out = posteriors[channels[0]].clone()
    for c in channels[1:]:
        out += posteriors[c]
    return out


def _local_fields(tissues: Tensor, scans: Tensor, *, sigma: float) -> list[Tensor]:
    """Of each scan, local means of white matter and cortex and twice their variance: (3, *size).

    Parameters
    ----------
    tissues : (2, *size), prior of white matter and of cortex
    sigma : of the window, in voxels of a quarter of the resolution
    """
    white, cortex, *coarse = (_halved(x) for x in (*tissues, *scans))
    both, odds, share = white + cortex, white / cortex.clamp_min(1e-6), white
    for _ in range(ROUNDS):
        changed = odds * _ratio(coarse, [_fields(share, both, x, sigma) for x in coarse])
        share = both * changed / (1 + changed)
    return [_doubled(_fields(share, both, x, sigma), tissues.shape[1:]) for x in coarse]


def _fields(share: Tensor, both: Tensor, x: Tensor, sigma: float) -> Tensor:
    """Local means of white matter and of cortex, and twice the variance of both: (3, *size)."""
    weights = torch.stack([share, both - share])
    moments = _halved(torch.cat([weights, weights * x, weights * x.square()]))
    whole = moments.sum((1, 2, 3)).unflatten(0, (3, 2))
    anchor = _ANCHOR * whole / whole[0].clamp_min(1e-6)
    moments = blur(moments, [sigma] * 3) + anchor.flatten()[:, None, None, None]
    n, m, first, first_, second, second_ = moments
    white, cortex = first / n.clamp_min(1e-6), first_ / m.clamp_min(1e-6)
    spread = second - n * white.square() + second_ - m * cortex.square()
    variance = (spread / (n + m).clamp_min(1e-6)).clamp_min(LEAST_DEVIATION**2)
    return _doubled(torch.stack([white, cortex, 2 * variance]), share.shape)


def _share_of_white(tissues: Tensor, scans: Tensor, fields: Sequence[Tensor]) -> Tensor:
    """Share of white matter in white matter and cortex, (*size), from their prior (2, *size)."""
    white, cortex = _softened(tissues)
    white.mul_(_ratio(scans, fields))
    return white / cortex.add_(white).clamp_min_(1e-12)


def _ratio(scans: Sequence[Tensor] | Tensor, fields: Sequence[Tensor]) -> Tensor:
    """How much likelier white matter is than cortex, (*size), as far as `MOST` allows."""
    ratio = torch.ones_like(scans[0])
    for x, (white, cortex, variance) in zip(scans, fields, strict=True):
        ratio *= _likelihood(x, white, variance).div_(_likelihood(x, cortex, variance))
    return ratio.clamp_(1 / MOST, MOST)


def _likelihood(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Of intensities, relative to the peak; the variance is twice that of the tissue."""
    return (x - mean).square_().div_(variance).neg_().exp_().add_(OUTLIER)


@dataclass(frozen=True)
class _Exchanged:
    """New posteriors of some voxels.

    Parameters
    ----------
    voxels : (n,) flattened indices
    channels : c of them
    values : (c, n)
    weights : (n,), how much they count, 0..1
    """

    voxels: Tensor
    channels: Sequence[int]
    values: Tensor
    weights: Tensor

    def put_into(self, posteriors: Tensor) -> None:
        """Mix them with what is there."""
        flat = posteriors.flatten(1)
        for channel, values in zip(self.channels, self.values, strict=True):
            flat[channel, self.voxels] = flat[channel, self.voxels].lerp_(values, self.weights)


def _with_small(
    posteriors: Tensor,
    small: Tensor,
    scans: Tensor,
    fields: Sequence[Tensor],
    channels: tuple[Sequence[int], Sequence[int], Sequence[int]],
) -> _Exchanged | None:
    """What the small structures exchange among each other and with white matter and cortex.

    Parameters
    ----------
    small : (*size), probability of small structures together
    fields : of each scan, see `_local_fields`
    channels : of small structures, white matter, and cortex
    """
    voxels = (small > _FEW).nonzero()
    if not len(voxels):
        return None
    size = small.shape
    here = _flattened(voxels, size)
    weights = ((small.flatten()[here] - _FEW) / (_MANY - _FEW)).clamp_(0, 1)
    others, white, cortex = channels
    everyone = [*others, *white, *cortex]
    flat = posteriors.flatten(1)
    prior = torch.stack([flat[c, here] for c in everyone])
    total = prior.sum(0)
    shares = prior[: len(others)] / prior[: len(others)].sum(1, keepdim=True).clamp_min(1e-6)
    # So few voxels that looking up their neighbours is faster than softening a box around them.
    prior = prior * (1 - 6 * SOFTENED_SMALL)
    for step in itertools.chain(torch.eye(3, dtype=torch.int64), -torch.eye(3, dtype=torch.int64)):
        there = _flattened(voxels + step.to(voxels), size)
        for row, c in zip(prior, everyone, strict=True):
            row.add_(flat[c, there], alpha=SOFTENED_SMALL)
    logs = torch.zeros_like(prior)
    for x, field in zip(scans, fields, strict=True):
        x, field = x.flatten()[here], field.flatten(1)[:, here]
        means = [(shares @ x)[:, None].expand(-1, len(here))]
        means += [f.expand(len(c), -1) for f, c in zip(field[:2], (white, cortex), strict=True)]
        logs += _likelihood(x, torch.cat(means), field[2]).log_().mul_(TRUST)
    average = (prior * logs.exp()).sum(0) / prior.sum(0).clamp_min(1e-12)
    logs -= average.clamp_min_(1e-12).log_()
    values = prior.mul_(logs.clamp_(-math.log(MOST), math.log(MOST)).exp_())
    values *= total / values.sum(0).clamp_min(1e-12)
    return _Exchanged(here, everyone, values, weights)


def _flattened(voxels: Tensor, size: Sequence[int]) -> Tensor:
    """Indices into a flattened volume of voxels (n, 3), those outside moved to its border."""
    x, y, z = (v.clamp(0, n - 1) for v, n in zip(voxels.T, size, strict=True))
    return (x * size[1] + y) * size[2] + z


def _softened(x: Tensor) -> Tensor:
    """A copy of (C, *size) in which neighbours have shared what they have."""
    for axis in (1, 2, 3):
        n = x.shape[axis] - 1
        mixed = x * (1 - 2 * SOFTENED)
        mixed.narrow(axis, 0, n).add_(x.narrow(axis, 1, n), alpha=SOFTENED)
        mixed.narrow(axis, 1, n).add_(x.narrow(axis, 0, n), alpha=SOFTENED)
        x = mixed
    return x


def _halved(x: Tensor) -> Tensor:
    """The mean of 2-wide blocks of (..., *size); an odd last voxel is a block of its own."""
    return F.avg_pool3d(x[None], 2, ceil_mode=True, count_include_pad=False)[0]


def _doubled(x: Tensor, size: Sequence[int]) -> Tensor:
    """(C, ...) at twice the resolution, linearly, without what goes beyond the size."""
    full = F.interpolate(x[None], scale_factor=2, mode='trilinear', align_corners=False)
    return full[0, :, : size[0], : size[1], : size[2]]
