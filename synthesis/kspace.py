"""Artefacts of k-space that no single axis explains: motion, spikes, and lines of noise."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from babyseg_bids.synthesis import operators
from babyseg_bids.synthesis.deformation import rotation
from babyseg_bids.synthesis.draws import Draws


def motion(x: Tensor, /, *, moves: int, shift: float, rotation_deg: float, draws: Draws) -> Tensor:
    """Image (*size) of a child that moves `moves` times while k-space is filled.

    k-space is filled line after line along a random axis. Each stretch between two moves sees the
    child in another rigid position; the stretch that holds the centre of k-space sees it at
    rest, so that the labels stay where they are. Taking some lines of k-space is a matrix along
    that axis, so no transform of the whole image is needed.

    Parameters
    ----------
    shift : largest displacement along each axis, voxels
    rotation_deg : largest rotation about each axis
    """
    axis = draws.integer('motion axis', 0, x.ndim - 1)
    n = x.shape[axis]
    cuts = np.sort(draws.vector('motion times', 0, n, moves))
    segment = np.searchsorted(cuts, np.arange(n), side='right')
    rest = segment[n // 2]
    real, imaginary = x.clone(), torch.zeros_like(x)
    for s in range(moves + 1):
        lines = torch.from_numpy(np.fft.ifftshift(segment == s))
        inner = draws.scope(f'position {s}')
        offset = inner.vector('shift', -shift, shift, x.ndim)
        angles = inner.vector('rotation', -rotation_deg, rotation_deg, 1 if x.ndim == 2 else 3)
        if s == rest or not bool(lines.any()):
            continue
        difference = rigid(x, angles, offset) - x
        matrix = _select(lines)
        for part, target in ((matrix.real, real), (matrix.imag, imaginary)):
            steps: list[Tensor | None] = [None] * x.ndim
            steps[axis] = part
            target.add_(operators.apply(difference, steps))
    return torch.hypot(real, imaginary)


def _select(lines: Tensor) -> Tensor:
    """Matrix (n, n) that keeps some frequencies, (n,) bool in the order of the FFT."""
    eye = torch.eye(len(lines), dtype=torch.complex128)
    return torch.fft.ifft(torch.fft.fft(eye, dim=0) * lines[:, None], dim=0)


def rigid(x: Tensor, angles_deg: np.ndarray, offset: np.ndarray, /) -> Tensor:
    """Rotate (*size) about its middle and shift it by (D,) voxels; zeros from outside."""
    where = _rigid_grid(x.shape, angles_deg, offset).to(x.device)
    return F.grid_sample(x[None, None], where, align_corners=False)[0, 0]


def rigid_labels(
    volumes: Sequence[Tensor], angles_deg: np.ndarray, offset: np.ndarray, /
) -> list[Tensor]:
    """`rigid` of label maps or masks (*size) by the nearest voxel; zeros from outside."""
    shape = volumes[0].shape
    where = _rigid_grid(shape, angles_deg, offset)[0].to(volumes[0].device)
    address = torch.zeros(shape, dtype=torch.int32, device=where.device)
    inside = torch.ones(shape, dtype=torch.bool, device=where.device)
    for axis, n in enumerate(shape):
        # The grid counts its axes backwards and from -1 to 1.
        at = where[..., len(shape) - 1 - axis].add(1).mul_(n / 2).sub_(0.5).round_().int()
        inside &= (at >= 0) & (at < n)
        address = address * n + at.clamp_(0, n - 1)
    address = address.view(-1)
    return [
        v.reshape(-1).index_select(0, address).view(shape).mul_(inside)
        if v.dtype != torch.bool
        else v.reshape(-1).index_select(0, address).view(shape) & inside
        for v in volumes
    ]


def _rigid_grid(shape: Sequence[int], angles_deg: np.ndarray, offset: np.ndarray) -> Tensor:
    """Grid (1, *size, D) for `grid_sample` that rotates about the middle, then shifts."""
    size = np.array(shape, float)
    # The content turns forwards when the grid turns backwards.
    turn = rotation(torch.from_numpy(np.deg2rad(np.asarray(angles_deg, float)))).numpy().T
    matrix = turn * size[None, :] / size[:, None]
    move = -(turn @ np.asarray(offset, float)) * 2 / size
    # grid_sample counts the last axis first, in units of half the extent.
    out = torch.empty((1, *shape, len(shape)))
    axes = []
    for axis, n in enumerate(shape):
        view = [-1 if i == axis else 1 for i in range(len(shape))]
        axes.append(((torch.arange(n) + 0.5) * (2 / n) - 1).view(view))
    for axis, (row, start) in enumerate(zip(matrix, move, strict=True)):
        *others, last = (float(r) * a for r, a in zip(row, axes, strict=True))
        target = out[0, ..., len(shape) - 1 - axis]
        torch.add(sum(others, torch.tensor(float(start))), last, out=target)
    return out


def spikes(x: Tensor, /, *, amplitude: float, draws: Draws) -> Tensor:
    """Add the plane wave (*size) of a spike in k-space, relative to the brightest voxel."""
    wave = torch.ones((), dtype=torch.complex64, device=x.device)
    frequencies = draws.vector('spike', -0.5, 0.5, x.ndim)
    for axis, f in enumerate(frequencies):
        at = torch.arange(x.shape[axis], device=x.device) * float(2 * math.pi * f)
        phase = torch.polar(torch.ones_like(at), at)
        wave = wave[..., None] * phase
    return (x + wave.real * (amplitude * x.max())).abs()


def zipper(x: Tensor, /, *, strength: float, draws: Draws) -> Tensor:
    """Add planes of alternating noise to (*size), as from radio interference."""
    axis = draws.integer('zipper axis', 0, x.ndim - 1)
    out = x.clone()
    top = float(x.max())
    for _ in range(draws.integer('zippers', 1, 3)):
        at = int(draws.table(1)[0] * x.shape[axis])
        plane = out.select(axis, at)
        plane.add_(draws.noise(*plane.shape).abs_(), alpha=strength * top)
    return out
