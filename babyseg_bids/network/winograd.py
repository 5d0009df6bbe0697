"""Three-dimensional convolutions in a quarter of the multiplications, on a CPU in float32.

Four outputs in a row of a kernel 3 wide take twelve multiplications, and with Winograd's F(4, 3)
six (Winograd, 1980; Lavin and Gray, CVPR 2016). Here that is done along the first two axes. Along
the third what is left are products of matrices, of which each voxel takes part in three.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Four outputs are the coefficients of a polynomial that is known at these points and at infinity,
# of three choices that were tried the one with the smallest rounding error.
_POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)
_TILE = 4
# So many tiles along the second axis are treated at a time. With one the products are often too
# small, and with more the zeros in the matrices of `_Block` cost more than is gained.
_BESIDE = 2
_ROWS = _BESIDE * _TILE
# Products with so many outputs, or a multiple of them, are up to twice as fast as with others.
_LANES = 8


def _transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Matrices with which a kernel 3 wide takes six multiplications for four outputs, not twelve.

    `outputs @ ((kernel @ g) * (inputs @ d))` are the four outputs of three weights `g` on six
    inputs `d`, by transposing the product of two polynomials, of degree 3 and 2, from their values
    at `_POINTS` and at infinity.

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


_LINEAR = {1: 'linear', 2: 'bilinear', 3: 'trilinear'}


def upsampled(x: Tensor, /) -> Tensor:
    """Double (B, C, *size) along every spatial dimension, (bi-/tri-)linearly."""
    return F.interpolate(x, scale_factor=2, mode=_LINEAR[x.ndim - 2], align_corners=False)


def _phases() -> Tensor:
    """(2, 3, 3): how much of a kernel's places act on a voxel's neighbours where it is up-sampled.

    For both voxels that are made of one, the voxels before it, it and the one behind it.
    """
    fine = upsampled(torch.eye(5)[None])[0].t()
    return torch.stack([fine[3 + phase : 6 + phase, 1:4].t() for phase in range(2)])


# At the ends of an axis up-sampling repeats the outermost voxel, and the kernel meets zeros. With
# zeros for what lies before the first voxel, this is what `_phases` lack there.
_END = torch.tensor([[-0.25, 0.25, 0.0], [0.25, 0.0, 0.0]])


class _Block:
    """A kernel, and room for the block of tiles that it is applied to.

    A block is one tile along X, `_BESIDE` tiles along Y and all of Z. All its steps are batches of
    matrix products, which torch shares among threads, as it does not a single small one.

    Parameters
    ----------
    weight : (outputs, C, 3, 3, 3)
    depth : voxels along Z of what is convolved
    doubled : whether it is up-sampled first
    """

    def __init__(self, weight: Tensor, depth: int, *, doubled: bool) -> None:
        self.outputs, channels = weight.shape[:2]
        outputs = -(-self.outputs // _LANES) * _LANES
        weight = F.pad(weight, (0,) * 9 + (outputs - self.outputs,))
        points, line = len(_INPUTS), 1 + depth
        # Places along Z, points along X and Y, channels, voxels made of each along Z, outputs.
        phases = _phases() if doubled else torch.eye(3)[None]
        self.phases = len(phases)
        kernels = torch.einsum('pa,qb,fzd,ocabd->zpqcfo', _KERNEL, _KERNEL, phases, weight)
        self.kernels = kernels.flatten(4).flatten(1, 2).contiguous()
        self.ends = []
        if doubled:
            for place, end in ((0, _END), (depth - 1, _END.flip(0, 1))):
                kernel = torch.einsum('pa,qb,fd,ocabd->pqcfo', _KERNEL, _KERNEL, end, weight)
                self.ends.append((place, kernel.flatten(3).flatten(0, 1).contiguous()))
        # The transform of all tiles along Y at once; in its columns points come before tiles.
        outward = torch.einsum('hq,jk->jhqk', _OUTPUTS, torch.eye(_BESIDE))
        self.along_y = _repeated(outward.flatten(2).flatten(0, 1), points)
        self.along_x = _repeated(_OUTPUTS, _ROWS)
        # Each row along Z begins with a zero, which also ends the row before.
        self.seen = weight.new_zeros((points, _ROWS + 2, line, channels))
        self.between = weight.new_empty((_ROWS + 2, points, line * channels))
        # Two more rows for the neighbours along Z of the last tile.
        places = _BESIDE * line
        values = weight.new_zeros((points**2 * places + 2) * channels)
        self.shifted = [
            values[start * channels :][: points**2 * places * channels].view(-1, places, channels)
            for start in range(3)
        ]
        self.products = weight.new_empty((points**2, places, self.phases * outputs))
        self.back = weight.new_empty((points, _ROWS, line * self.phases * outputs))
        self.made = weight.new_empty((_ROWS, _TILE, line * self.phases, outputs))

    def convolved(self, along_x: Tensor, along_y: Tensor) -> Tensor:
        """(4, rows, Z, outputs) of what is `seen`, under matrices of `_groups`."""
        points, rows = len(_INPUTS), along_y.shape[2]
        seen = self.seen[: along_x.shape[2], :rows].flatten(2).transpose(0, 1)
        between = self.between[:rows]
        torch.bmm(along_x[:rows], seen, out=between)
        values = self.shifted[0].view(points, -1, between.shape[2])
        torch.bmm(along_y, between.transpose(0, 1), out=values)
        torch.bmm(self.shifted[0], self.kernels[0], out=self.products)
        for values, kernel in zip(self.shifted[1:], self.kernels[1:], strict=True):
            self.products.baddbmm_(values, kernel)
        for place, kernel in self.ends:
            values, products = (
                t.unflatten(1, (_BESIDE, -1))[:, :, place]
                for t in (self.shifted[1], self.products)
            )
            products += torch.bmm(values, kernel)
        products = self.products.view(points, -1, self.back.shape[2])
        torch.bmm(self.along_y, products, out=self.back)
        torch.bmm(self.along_x, self.back.transpose(0, 1), out=self.made.flatten(2))
        return self.made[:, :, : -self.phases, : self.outputs].transpose(0, 1)


def _repeated(matrix: Tensor, times: int) -> Tensor:
    return matrix.expand(times, -1, -1).contiguous()


def _groups(
    length: int, tiles: int, *, doubled: bool, times: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Divide an axis of `length` voxels into groups of tiles.

    Yields
    ------
    voxels that a group makes, voxels that it sees, and the matrix (6 * tiles, seen) from these to
    its points, repeated as often as `_Block` needs it
    """
    step = tiles * _TILE
    voxels = upsampled(torch.eye(length // 2)[None])[0].t() if doubled else torch.eye(length)
    padded = F.pad(voxels, (0, 0, 1, step))
    for start in range(0, length, step):
        rows = padded[start : start + step + 2]
        seen = rows.any(0).nonzero()
        image = slice(int(seen[0]), int(seen[-1]) + 1)
        windows = rows[:, image].unfold(0, len(_INPUTS), _TILE)
        matrix = torch.einsum('qi,jsi->qjs', _INPUTS, windows).flatten(0, 1)
        yield slice(start, start + step), image, _repeated(matrix, times)


def _in_tiles(
    sums: Tensor, x: Tensor, weight: Tensor, *, doubled: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Convolve (1, C, X, Y, Z), up-sampled first if `doubled`, block by block.

    Yields
    ------
    part of `sums` (X, Y, Z, outputs), and what belongs there
    """
    slices = x[0].movedim(0, -1)
    length, height = sums.shape[:2]
    block = _Block(weight, slices.shape[2], doubled=doubled)
    across = list(_groups(length, 1, doubled=doubled, times=_ROWS + 2))
    for rows, beside, along_y in _groups(height, _BESIDE, doubled=doubled, times=len(_INPUTS)):
        for tile, image, along_x in across:
            found = slices[image, beside]
            block.seen[: len(found), : found.shape[1], 1:] = found
            part = sums[tile, rows]
            yield part, block.convolved(along_x, along_y)[: len(part), : part.shape[1]]


def convolve_tiles(
    x: Tensor, weight: Tensor, bias: Tensor | None, /, *, out: Tensor | None = None
) -> Tensor:
    """Convolve (1, C, X, Y, Z) with a kernel (outputs, C, 3, 3, 3), 'same' padding.

    The largest rounding error was 0.9 to 1.5 times that of oneDNN's convolution of three
    dimensions (30x34x27 to 192x64x256 voxels, 32 to 128 channels).

    Parameters
    ----------
    x, weight, bias : float32 on the CPU, without gradients
    out : where the result is written to, (1, outputs, X, Y, Z)
    """
    if out is None:
        # With its batch from the start: one that is added later has a stride by which torch no
        # longer knows the channels-last layout.
        out = x.new_empty((1, *x.shape[2:], len(weight))).movedim(-1, 1)
    for part, made in _in_tiles(out[0].movedim(0, -1), x, weight, doubled=False):
        if bias is None:
            part.copy_(made)
        else:
            torch.add(made, bias, out=part)
    return out


def add_upsampled(out: Tensor, x: Tensor, weight: Tensor, /) -> None:
    """Add to `out` (1, outputs, X, Y, Z) the convolution of (1, C, *half the size), up-sampled.

    Along X and Y up-sampling is part of the transforms, and along Z of the kernel, so that nothing
    else is ever as large as the result.

    Parameters
    ----------
    out, x, weight : as for `convolve_tiles`
    """
    for part, made in _in_tiles(out[0].movedim(0, -1), x, weight, doubled=True):
        part.add_(made)
