"""Convolutions of features (B, C, *size), with fewer multiplications where that is exact algebra.

Without gradients on a CPU oneDNN is called directly. There a kernel of three dimensions is reduced
to one of two along the first axis (`_along_first`), and what was up-sampled just before a
convolution is convolved at its coarse size (`_add_upsampled`).
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_LINEAR = {1: 'linear', 2: 'bilinear', 3: 'trilinear'}
# What is up-sampled before a convolution is treated in blocks of so many voxels along each axis.
# With fewer channels than `_WORTH` the additions take what the multiplications save.
_BLOCK, _WORTH = 10, 64
# Winograd's F(4, 3): four outputs of a kernel 3 wide are the coefficients of a polynomial known at
# these points and at infinity, of three choices that were tried the one with the smallest rounding
# error (see `_transforms`).
_POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)
_TILE = 4
# It pays from so many multiplications a voxel and tap and from so many values on, and it works on
# so many bytes at a time, which stay in the cache.
_PAIRS, _VALUES, _CACHE = 1024, 2**19, 8 * 2**20


def _direct(x: Tensor) -> bool:
    """Whether oneDNN is called directly: in float32 on a CPU, without gradients."""
    on_cpu = x.device.type == 'cpu' and torch.backends.mkldnn.is_available()
    return on_cpu and x.dtype == torch.float32 and not torch.is_grad_enabled()


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor | None = None
) -> Tensor:
    """Convolve (B, C, *size) with a kernel (outputs, C, width, ...), 'same' padding.

    Parameters
    ----------
    out : where the result is written to, (B, outputs, *size), without gradients
    """
    found = _convolved(x, weight, bias, out)
    return found if out is None or found is out else out.copy_(found)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """`convolve`, whose result is in `out` only where that saves memory."""
    dim, width = x.ndim - 2, weight.shape[-1]
    padding = width // 2
    if _direct(x):
        pairs = weight.shape[0] * weight.shape[1]
        large = pairs >= _PAIRS and x.numel() >= _VALUES
        if large and len(x) == 1 and weight.shape[2:] == (3, 3, 3):
            return _along_first(x, weight, bias, out)
        # For a single image with few channels torch would choose a slow convolution that leaves
        # the channels-last layout.
        return torch.mkldnn_convolution(x, weight, bias, [padding] * dim, [1] * dim, [1] * dim, 1)
    if width == 1:
        # torch's convolution would convert layouts.
        return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
    return _CONV[dim](x, weight, bias, padding=padding)


def _transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Matrices with which a kernel 3 wide takes six multiplications for four outputs, not twelve.

    `outputs @ ((kernel @ g) * (inputs @ d))` are the four outputs of three weights `g` on six
    inputs `d` (Winograd, 1980; Lavin and Gray, CVPR 2016), by transposing the product of two
    polynomials, of degree 3 and 2, from their values at `_POINTS` and at infinity.

    Returns
    -------
    inputs (6, 6), kernel (6, 3), outputs (4, 6)
    """
    points = np.array(_POINTS)

    def values(coefficients: int) -> np.ndarray:
        finite = points[:, None] ** np.arange(coefficients)
        return np.vstack([finite, np.eye(coefficients)[-1]])

    solved = np.linalg.inv(values(_TILE + 2)).T
    # Powers of two round nothing. They bring what is multiplied to the size of the inputs.
    scale = 2 ** np.round(np.log2(np.abs(solved).sum(1, keepdims=True) / 2))
    matrices = (solved / scale, values(3) * scale, values(_TILE).T)
    inputs, kernel, outputs = (torch.from_numpy(m.astype(np.float32)) for m in matrices)
    return inputs, kernel, outputs


_INPUTS, _KERNEL, _OUTPUTS = _transforms()


def _along_first(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """`convolve` (1, C, X, Y, Z) with a kernel 3 x 3 x 3, in half the multiplications.

    Four neighbours along X follow from six convolutions along Y and Z (see `_transforms`). The
    largest rounding error was 1.4 to 2.4 times that of oneDNN's convolution of three dimensions
    (48x64x64 to 96x96x128 voxels, 32 to 96 channels).
    """
    slices = x[0].movedim(0, -1).contiguous()
    length, height, depth, channels = slices.shape
    outputs = len(weight)
    kernels = [
        k.contiguous(memory_format=torch.channels_last)
        for k in torch.tensordot(_KERNEL, weight, ([1], [2]))
    ]
    # At the point 1 a value counts once in each output.
    biases = [bias if point == 1 else None for point in (*_POINTS, np.inf)]
    products = len(kernels)
    if out is None:
        # With its batch from the start: one that is added later has a stride by which torch no
        # longer knows the channels-last layout.
        out = slices.new_empty((1, length, height, depth, outputs)).movedim(-1, 1)
    sums = out[0].movedim(0, -1)
    # Rows of Y that are in the cache together, with one before and one after them.
    row = depth * (channels + outputs) * products * slices.element_size()
    blocks = -(-height // max(1, _CACHE // row))
    rows = -(-height // blocks)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        first, last = max(0, top - 1), min(height, bottom + 1)
        seen = slices.new_zeros((products, bottom - top + 2, depth, channels))
        inner = seen.flatten(1)[:, (first - top + 1) * depth * channels :]
        inner = inner[:, : (last - first) * depth * channels]
        made = slices.new_empty((products, bottom - top, depth, outputs))
        for start in range(0, length, _TILE):
            before, after = max(0, start - 1), min(length, start + _TILE + 1)
            tile = slices[before:after, first:last].flatten(1)
            torch.mm(_INPUTS[:, before - start + 1 : after - start + 1], tile, out=inner)
            for image, kernel, shift, product in zip(seen, kernels, biases, made, strict=True):
                image = image.movedim(-1, 0)[None]
                image = torch.mkldnn_convolution(image, kernel, shift, [0, 1], [1, 1], [1, 1], 1)
                product.copy_(image[0].movedim(0, -1))
            part = sums[start : start + _TILE, top:bottom]
            torch.mm(_OUTPUTS[: len(part)], made.flatten(1), out=part.view(len(part), -1))
    return out


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
    if not _direct(x) or x.ndim < 5 or coarse.shape[1] < _WORTH:
        joined = torch.cat([x, upsampled(coarse)], dim=1)
        return convolve(joined, weight, bias, out=out)
    own, behind = weight.split((x.shape[1], coarse.shape[1]), dim=1)
    out = convolve(x, own, bias, out=out)
    for sums, one in zip(out, coarse, strict=True):
        _add_upsampled(sums, one, behind)
    return out


def upsampled(x: Tensor, /) -> Tensor:
    """Double (B, C, *size) along every spatial dimension, (bi-/tri-)linearly."""
    return F.interpolate(x, scale_factor=2, mode=_LINEAR[x.ndim - 2], align_corners=False)


def _add_upsampled(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add to `out` (outputs, *twice the size) the convolution of (C, *size), up-sampled.

    Up-sampling and kernel both act on space and on channels separately, so the channels are mixed
    first, at the coarse size, once for each voxel of the kernel; then each axis in turn is
    up-sampled and shifted. In three dimensions that is an eighth of the multiplications. It pays
    on blocks that stay in the processor's cache.

    Parameters
    ----------
    weight : (outputs, C, 3, 3, 3)
    """
    fine, coarse = out.movedim(0, -1), x.movedim(0, -1)
    size = coarse.shape[:3]
    # As the blocks need them: places along Y, along X, channels, then along Z with the outputs.
    taps = weight.permute(3, 2, 1, 4, 0).flatten(3).contiguous()
    along = [_shifted_upsampling(n) for n in size]
    for corner in itertools.product(*(range(0, n, _BLOCK) for n in size)):
        made, seen, matrices = [], [], []
        for start, n, matrix in zip(corner, size, along, strict=True):
            stop = min(start + _BLOCK, n)
            made.append(slice(2 * start, 2 * stop))
            # With the neighbours that interpolation and kernel reach.
            seen.append(slice(max(0, start - 1), min(n, stop + 1)))
            matrices.append(matrix[made[-1], :, seen[-1]])
        fine[tuple(made)] += _convolved_block(coarse[tuple(seen)], taps, matrices)


def _convolved_block(block: Tensor, taps: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """A block (X, Y, Z, C) for `_add_upsampled`, with the `_shifted_upsampling` of each axis."""
    length, height, depth, channels = block.shape
    first, second, third = matrices
    mixed = torch.matmul(block.reshape(-1, channels), taps)
    wide = torch.matmul(first.flatten(1), mixed.view(3, 3 * length, -1)).transpose(0, 1)
    wide = torch.matmul(second.flatten(1), wide.reshape(len(first), 3 * height, -1))
    wide = wide.view(len(first), len(second), 3 * depth, -1)
    return torch.matmul(third.transpose(1, 2).flatten(1), wide)


def _shifted_upsampling(n: int) -> Tensor:
    """Matrix (2 n, 3, n) that up-samples n values and shifts them by one back, none, and one on.

    What is shifted in is zero.
    """
    doubled = upsampled(torch.eye(n)[None])[0].t()
    return F.pad(doubled, (0, 0, 1, 1)).unfold(0, 2 * n, 1).movedim(-1, 0)
