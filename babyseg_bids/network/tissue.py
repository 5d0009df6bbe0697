"""White matter and cortex told apart once more, by the scans' own intensities.

The network's posteriors are the prior of a mixture of two Gaussians whose means and common
variance vary slowly over the brain (Van Leemput et al., IEEE TMI 18(10), 1999, without the field
of the scanner, which local means make unnecessary). Thin gyral white matter that a coarse network
blurs comes back where a scan shows it. Where a scan shows no contrast both likelihoods are alike
and nothing changes, and the two tissues of a hemisphere only exchange probability: every other
structure, the brain's outline and the sides stay as they are.
"""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from babyseg_bids.labels import LabelTable
from babyseg_bids.network.grid import blur

# White matter and cortex of each hemisphere.
PAIRS = ((2, 3), (41, 42))
# Deviation of the window in which means and variance are estimated, mm.
WINDOW = 14.0
# Rounds in which the tissues of the window are estimated anew, on half the resolution; the window
# itself is wide enough for a quarter.
ROUNDS = 3
# The scans together change the odds by no more than this factor: the network has seen the
# intensities, too, and fluid in a sulcus may look like white matter.
MOST = 10.0
# Likelihood of what neither tissue explains, relative to the peak of a Gaussian.
OUTLIER = 0.02
# Smallest deviation of the intensities, of their range 0..1.
LEAST_DEVIATION = 0.03
# How much the means of the whole brain count in a window, voxels of it.
_ANCHOR = 0.2


def redistribute(
    posteriors: Tensor, scans: Tensor, labels: LabelTable, /, *, spacing: float
) -> None:
    """Exchange probability between white matter and cortex, in place.

    Parameters
    ----------
    posteriors : (C, *size), background first
    scans : (G, *size) in 0..1, on the same voxels
    spacing : of the voxels, mm
    """
    numbers = labels.indices.tolist()
    if not all(n in numbers for pair in PAIRS for n in pair) or min(posteriors.shape[1:]) < 3:
        return
    channels = [(numbers.index(a), numbers.index(b)) for a, b in PAIRS]
    white, cortex = (posteriors[list(c)].sum(0) for c in zip(*channels, strict=True))
    factor = _likelihood_ratio(white, cortex, scans, sigma=WINDOW / (4 * spacing)).exp_()
    for a, b in channels:
        total = posteriors[a] + posteriors[b]
        odds = posteriors[a] * factor
        posteriors[a] = total * odds / (odds + posteriors[b]).clamp_min_(1e-12)
        posteriors[b] = (total - posteriors[a]).clamp_min_(0)


def _likelihood_ratio(white: Tensor, cortex: Tensor, scans: Tensor, *, sigma: float) -> Tensor:
    """Logarithm of how much likelier white matter is, (*size), from the priors (*size)."""
    coarse = [_halved(x) for x in (white, cortex, *scans)]
    prior, both = coarse[0], coarse[0] + coarse[1]
    odds = prior / coarse[1].clamp_min(1e-6)
    share = prior
    for _ in range(ROUNDS):
        ratio = _bounded((x, _fields(share, both, x, prior.shape, sigma)) for x in coarse[2:])
        changed = odds * ratio.exp_()
        share = both * changed / (1 + changed)
    fields = [_fields(share, both, x, prior.shape, sigma) for x in coarse[2:]]
    return _bounded(
        (x, _doubled(each, white.shape)) for x, each in zip(scans, fields, strict=True)
    )


def _fields(share: Tensor, both: Tensor, x: Tensor, size: Sequence[int], sigma: float) -> Tensor:
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
    return _doubled(torch.stack([white, cortex, 2 * variance]), size)


def _bounded(scans: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The log likelihood ratios of scans and their fields together, as far as `MOST` allows."""
    ratios = []
    for x, (white, cortex, variance) in scans:
        likelihoods = [
            (x - mean).square_().div_(variance).neg_().exp_().add_(OUTLIER)
            for mean in (white, cortex)
        ]
        ratios.append((likelihoods[0] / likelihoods[1]).log_())
    limit = math.log(MOST)
    return torch.stack(ratios).sum(0).clamp_(-limit, limit)


def _halved(x: Tensor) -> Tensor:
    """The mean of 2-wide blocks of (..., *size); an odd last voxel is a block of its own."""
    return F.avg_pool3d(x[None], 2, ceil_mode=True, count_include_pad=False)[0]


def _doubled(x: Tensor, size: Sequence[int]) -> Tensor:
    """(C, ...) at twice the resolution, linearly, without what goes beyond the size."""
    full = F.interpolate(x[None], scale_factor=2, mode='trilinear', align_corners=False)
    return full[0, :, : size[0], : size[1], : size[2]]
