"""Convolutions of features (B, C, *size), with fewer multiplications where that is exact algebra.

Without gradients on a CPU oneDNN is called directly. There a kernel of three dimensions is reduced
to one of two along the first axis (`_along_first`), and what was up-sampled just before a
convolution is convolved at its coarse size (`convolve_upsampled`).
"""

import itertools

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
# these points and at infinity. They make the smallest rounding error (see `_transforms`).
_POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)
_TILE = 4
# It pays from so many multiplications a voxel and tap and from so many values on, and it works on
# so many bytes at a time, which stay in the cache.
_PAIRS, _VALUES, _CACHE = 1024, 2**19, 8 * 2**20


def _direct(x: Tensor) -> bool:
    """Whether oneDNN is called directly: on a CPU, without gradients."""
    on_cpu = x.device.type == 'cpu' and torch.backends.mkldnn.is_available()
    return on_cpu and not torch.is_grad_enabled()


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve (B, C, *size) with a kernel (outputs, C, width, ...), 'same' padding."""
    dim, width = x.ndim - 2, weight.shape[-1]
    padding = width // 2
    if _direct(x):
        pairs = weight.shape[0] * weight.shape[1]
        large = pairs >= _PAIRS and x.numel() >= _VALUES
        if large and len(x) == 1 and weight.shape[2:] == (3, 3, 3):
            return _along_first(x, weight, bias)
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


def _along_first(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`convolve` (1, C, X, Y, Z) with a kernel 3 x 3 x 3, in half the multiplications.

    Four neighbours along X follow from six convolutions along Y and Z (see `_transforms`). The
    rounding error is up to twice that of adding up all products.
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
    # With its batch from the start: one that is added later has a stride by which torch no longer
    # knows the channels-last layout.
    out = slices.new_empty((1, length, height, depth, outputs))
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
            part = out[0, start : start + _TILE, top:bottom].flatten(1)
            torch.mm(_OUTPUTS[: len(part)], made.flatten(1), out=part)
    return out.movedim(-1, 1)


def convolve_joined(
    x: Tensor, coarse: Tensor | None = None, /, *, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """`convolve` (B, C, *size) with (B, C', *size / 2), up-sampled, joined behind it.

    Parameters
    ----------
    weight : (outputs, C + C', 3, ...)
    """
    if coarse is None:
        return convolve(x, weight, bias)
    if not _direct(x) or coarse.shape[1] < _WORTH:
        return convolve(torch.cat([x, upsampled(coarse)], dim=1), weight, bias)
    own, behind = weight.split((x.shape[1], coarse.shape[1]), dim=1)
    out = convolve(x, own, bias)
    size = coarse.shape[2:]
    for corner in itertools.product(*(range(0, n, _BLOCK) for n in size)):
        # With the neighbours that interpolation and kernel reach.
        seen, inner, fine = [], [], []
        for start, n in zip(corner, size, strict=True):
            stop, low = min(start + _BLOCK, n), max(0, start - 1)
            seen.append(slice(low, min(n, stop + 1)))
            inner.append(slice(2 * (start - low), 2 * (stop - low)))
            fine.append(slice(2 * start, 2 * stop))
        out[(..., *fine)] += convolve_upsampled(coarse[(..., *seen)], behind)[(..., *inner)]
    return out


def upsampled(x: Tensor, /) -> Tensor:
    """Double (B, C, *size) along every spatial dimension, (bi-/tri-)linearly."""
    return F.interpolate(x, scale_factor=2, mode=_LINEAR[x.ndim - 2], align_corners=False)


def convolve_upsampled(x: Tensor, weight: Tensor, /) -> Tensor:
    """Up-sample (B, C, *size) as `upsample` does, then convolve with a kernel 3 wide, zero-padded.

    Both act on space and on channels separately, so the channels are mixed first, at the coarse
    size, once for each voxel of the kernel; then each axis in turn is up-sampled and its three
    shifts are added. In three dimensions that is an eighth of the multiplications. It pays on
    blocks that stay in the processor's cache.

    Parameters
    ----------
    weight : (outputs, C, 3, ...)

    Returns
    -------
    (B, outputs, *twice the size)
    """
    dim = x.ndim - 2
    taps = weight.movedim((0, 1), (-2, -1)).reshape(-1, x.shape[1])
    # In one piece, or torch would multiply row by row.
    y = F.linear(x.movedim(1, -1).contiguous(), taps)
    for axis in range(dim):
        y = _shifts_upsampled(y.unflatten(-1, (3, -1)).movedim(1 + axis, 0)).movedim(0, 1 + axis)
    return y.movedim(-1, 1)


def _shifts_upsampled(x: Tensor) -> Tensor:
    """(N, ..., 3, C), up-sampled along the first axis, shifted by one either way, and added.

    The result is (2 N, ..., C): element m is that of the first of three at m - 1, of the second at
    m and of the third at m + 1, where there are such.
    """
    first, middle, last = x.unbind(-2)
    out = first.new_empty((len(x), 2, *first.shape[1:]))
    even, odd = out.unbind(1)
    torch.add(middle, last, out=even).mul_(0.75).add_(first, alpha=0.25)
    even[1:].add_(first[:-1], alpha=0.75).add_(middle[:-1], alpha=0.25)
    even[:-1].add_(last[1:], alpha=0.25)
    torch.add(first, middle, out=odd).mul_(0.75).add_(last, alpha=0.25)
    odd[1:].add_(first[:-1], alpha=0.25)
    odd[:-1].add_(middle[1:], alpha=0.25).add_(last[1:], alpha=0.75)
    # At the ends up-sampling extends the values, and beyond them is zero.
    even[:1].add_(middle[:1], alpha=0.25).sub_(first[:1], alpha=0.25)
    even[-1:].add_(last[-1:], alpha=0.25)
    odd[:1].add_(first[:1], alpha=0.25)
    odd[-1:].add_(middle[-1:], alpha=0.25).sub_(last[-1:], alpha=0.25)
    return out.flatten(0, 1)
