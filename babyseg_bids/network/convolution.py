"""Convolutions of features (B, C, *size), with fewer multiplications where that is exact algebra.

Without gradients, large convolutions of three dimensions on a CPU are those of `winograd`, and
oneDNN is called directly for others.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from babyseg_bids.network.winograd import add_upsampled, convolve_tiles, upsampled

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# Fewer multiplications pay from so many of them a voxel and tap and from so many values on.
_PAIRS, _VALUES = 1280, 2**19


def _direct(x: Tensor) -> bool:
    """Whether this is for oneDNN or `winograd`: in float32 on a CPU, without gradients."""
    on_cpu = x.device.type == 'cpu' and torch.backends.mkldnn.is_available()
    return on_cpu and x.dtype == torch.float32 and not torch.is_grad_enabled()


def _large(x: Tensor, weight: Tensor) -> bool:
    """Whether fewer multiplications pay."""
    pairs = weight.shape[0] * weight.shape[1]
    return weight.shape[2:] == (3, 3, 3) and pairs >= _PAIRS and x.numel() >= _VALUES


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor | None = None
) -> Tensor:
    """Convolve (B, C, *size) with a kernel (outputs, C, width, ...), 'same' padding.

    Parameters
    ----------
    out : where the result is written to, (B, outputs, *size), without gradients
    """
    if _direct(x) and len(x) == 1 and _large(x, weight):
        return convolve_tiles(x, weight, bias, out=out)
    found = _convolved(x, weight, bias)
    return found if out is None else out.copy_(found)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dim, width = x.ndim - 2, weight.shape[-1]
    padding = width // 2
    if _direct(x):
        # For a single image with few channels torch would choose a slow convolution that leaves
        # the channels-last layout.
        return torch.mkldnn_convolution(x, weight, bias, [padding] * dim, [1] * dim, [1] * dim, 1)
    if width == 1:
        # torch's convolution would convert layouts.
        return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
    return _CONV[dim](x, weight, bias, padding=padding)


def convolve_joined(
    x: Tensor,
    coarse: Tensor | None = None,
    /,
    *,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """`convolve` (B, C, *size) with (B, C', *size / 2), up-sampled, joined behind it.

    Parameters
    ----------
    weight : (outputs, C + C', 3, ...)
    """
    if coarse is None:
        return convolve(x, weight, bias, out=out)
    own, behind = weight.split((x.shape[1], coarse.shape[1]), dim=1)
    if not (_direct(x) and len(x) == 1 and _large(coarse, behind)):
        joined = torch.cat([x, upsampled(coarse)], dim=1)
        return convolve(joined, weight, bias, out=out)
    out = convolve(x, own, bias, out=out)
    add_upsampled(out, coarse, behind)
    return out
