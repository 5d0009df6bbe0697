"""The intensity scale that the network expects; training and inference share it."""

import torch
from torch import Tensor

# Quantiles of the non-zero voxels that become 0 and 1.
LOW, HIGH = 0.005, 0.995
# Quantiles of so many voxels are as good as of all, and much cheaper.
_ENOUGH = 500_000


def normalise(x: Tensor, /) -> Tensor:
    """Clip a scan (*size) at two quantiles of its non-zero voxels and scale it to 0..1.

    Zeros are taken for masked background: they do not count and stay zero unless the scan has
    negative values. A constant scan becomes zero.
    """
    # Every odd step meets all columns of a grid, whatever its size.
    step = max(1, x.numel() // _ENOUGH) | 1
    sample = x.reshape(-1)[::step]
    values = sample[sample != 0]
    if not len(values):
        values = x[x != 0]
    if not len(values):
        return torch.zeros_like(x)
    low, high = (values.kthvalue(1 + round(q * (len(values) - 1))).values for q in (LOW, HIGH))
    # With masked background the darkest tissue must not become the background's value.
    if (sample == 0).float().mean() > 0.05:
        low = torch.minimum(low, torch.zeros_like(low))
    if high <= low:
        return torch.zeros_like(x)
    return ((x - low) / (high - low)).clamp_(0, 1)
