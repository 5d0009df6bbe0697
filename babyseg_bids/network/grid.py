"""Geometry: the grid that the network works on, and the way there and back.

The grid has the reference scan's own axes, reordered and flipped to be nearest to RAS, so that the
way back is separable; where a head lies far from upright in them, the grid is turned with it.
Affines are (4, 4) arrays from voxel indices to world coordinates, RAS, mm.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# What is darker than this share of a scan's bright voxels does not decide where the head is.
_FOREGROUND = 0.05
# Border that is kept around the foreground, mm.
_BORDER = 8.0
# Deviation of the anti-aliasing blur as a share of the coarser voxel.
_ANTIALIAS = 0.42
# Voxels are averaged as long as a grid step still covers this many of the averages.
_STEP_COVERS = 1.5
# Grids whose axes leave a scan's by less than this over their length, voxels, count as parallel.
_PARALLEL = 1e-3
# What the inverse of a matrix may be off by, voxels.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class WorkingGrid:
    """The network's grid for one case.

    Parameters
    ----------
    size : voxels (3,)
    affine : (4, 4)
    from_reference : (4, 4), from voxel indices of the reference to those of the grid
    fades : whether values fade to zero beyond the grid instead of being extended
    """

    size: tuple[int, int, int]
    affine: np.ndarray
    from_reference: np.ndarray
    fades: bool = False

    def part(self, box: Sequence[slice]) -> 'WorkingGrid':
        """The grid of a box of this one."""
        start = nib.affines.from_matvec(np.eye(3), [s.start for s in box])
        return self._through(start, [s.stop - s.start for s in box])

    def turned(self, rotation: np.ndarray, low: np.ndarray, size: Sequence[int]) -> 'WorkingGrid':
        """A grid of voxels as large whose axes are turned against this one's.

        Parameters
        ----------
        rotation : (3, 3), takes an index of this grid to one along the new axes
        low : (3,), index along the new axes of the new grid's first voxel
        size : (3,), of the new grid
        """
        back = rotation.T
        return self._through(nib.affines.from_matvec(back, back @ low), size)

    def finer(self, ratio: float, size: Sequence[int]) -> 'WorkingGrid':
        """A grid about the same middle, of voxels `ratio` times as wide."""
        start = [(n - 1) / 2 - ratio * (m - 1) / 2 for n, m in zip(self.size, size, strict=True)]
        return self._through(nib.affines.from_matvec(ratio * np.eye(3), start), size)

    @property
    def spacing(self) -> float:
        """Size of a voxel, mm, without what rounding does to it in oblique affines."""
        return round(float(nib.affines.voxel_sizes(self.affine)[0]), 6)

    def _through(self, to_this: np.ndarray, size: Sequence[int]) -> 'WorkingGrid':
        """The grid whose indices a matrix (4, 4) takes to those of this one."""
        return replace(
            self,
            size=tuple(size),
            affine=self.affine @ to_this,
            from_reference=np.linalg.inv(to_this) @ self.from_reference,
        )


def foreground_box(x: np.ndarray, /) -> tuple[slice, slice, slice]:
    """Smallest box around what is not dark in (X, Y, Z); the whole scan if all is dark."""
    values = x[x > 0]
    if not len(values):
        return tuple(slice(0, s) for s in x.shape)  # type: ignore[return-value]
    step = max(1, len(values) // 100_000)
    bright = x > _FOREGROUND * np.quantile(values[::step], 0.99)
    box = []
    for axis in range(3):
        other = tuple(a for a in range(3) if a != axis)
        used = np.flatnonzero(bright.any(other))
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    return tuple(box)  # type: ignore[return-value]


def working_grid(
    affine: np.ndarray,
    box: Sequence[slice],
    /,
    *,
    spacing: float,
    multiple: int,
) -> WorkingGrid:
    """Grid of the given spacing (mm) over a box of the reference, with a border around it.

    Parameters
    ----------
    affine : (4, 4) of the reference
    box : voxels of the reference to cover
    multiple : sizes are rounded up to multiples of this; the box stays in the middle
    """
    orientation = nib.io_orientation(affine)
    if np.isnan(orientation).any():  # An affine with a zero axis; preflight rejects those files.
        orientation = np.array([[0, 1], [1, 1], [2, 1]])
    zooms = nib.affines.voxel_sizes(affine)
    size = [0, 0, 0]
    # Column a: step in reference voxels for one step along grid axis a.
    to_voxel = np.eye(4)
    to_voxel[:3, :3] = 0
    for axis in range(3):
        along, flip = int(orientation[axis, 0]), float(orientation[axis, 1])
        extent = (box[axis].stop - box[axis].start) * zooms[axis] + 2 * _BORDER
        size[along] = multiple * int(np.ceil(extent / spacing / multiple))
        middle = (box[axis].start + box[axis].stop - 1) / 2
        step = flip * spacing / zooms[axis]
        start = middle - step * (size[along] - 1) / 2
        to_voxel[axis, along] = step
        to_voxel[axis, 3] = start
    return WorkingGrid(tuple(size), affine @ to_voxel, np.linalg.inv(to_voxel))  # type: ignore[arg-type]


def averaged(
    x: np.ndarray, affine: np.ndarray, spacing: float, /
) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int]]:
    """A scan (X, Y, Z), blocks averaged where its voxels are far finer than `spacing` (mm).

    That bounds the memory that a scan of 0.2 mm takes. Scans of a third of the spacing and coarser
    stay as they are.

    Returns
    -------
    The scan, its affine, and how many voxels were averaged along each axis; what does not fill a
    block at the end of an axis is left out
    """
    zooms = nib.affines.voxel_sizes(affine)
    sizes = [
        min(n, max(1, int(spacing / (_STEP_COVERS * max(zoom, 1e-6)))))
        for n, zoom in zip(x.shape, zooms, strict=True)
    ]
    for axis, n in enumerate(sizes):
        if n > 1:
            x = x.swapaxes(0, axis)
            whole = len(x) // n * n
            total = x[:whole:n].astype(np.float32)
            for i in range(1, n):
                total += x[i:whole:n]
            x = np.divide(total, n, out=total).swapaxes(0, axis)
    scaling = np.diag([*sizes, 1.0])
    scaling[:3, 3] = (np.array(sizes) - 1) / 2
    return x, affine @ scaling, tuple(sizes)  # type: ignore[return-value]


def onto_grid(
    x: Tensor, affine: np.ndarray, grid: WorkingGrid, /, *, antialias: bool = True
) -> Tensor:
    """Resample a scan (X, Y, Z) onto the grid, linearly after an anti-aliasing blur if wanted.

    Returns (*grid.size); zero outside the scan.
    """
    from_grid = np.linalg.inv(affine) @ grid.affine
    # How many scan voxels one grid step covers along each scan axis.
    stride = np.abs(from_grid[:3, :3]).max(1)
    sigmas = np.where((stride > 1) & antialias, _ANTIALIAS * stride, 0)
    box = _needed(x.shape, from_grid, grid.size, margin=np.ceil(3 * sigmas) + 1)
    if any(s.start >= s.stop for s in box):
        return torch.zeros(grid.size, device=x.device)
    x = x[box]
    grid_axes = _parallel(from_grid, grid.size)
    if grid_axes is not None:
        # Blur and interpolation are one product along each axis.
        x = x.permute(grid_axes)
        for along, axis in enumerate(grid_axes):
            index = torch.arange(grid.size[along], dtype=torch.float64)
            index = from_grid[axis, along] * index + from_grid[axis, 3] - box[axis].start
            matrix = _interpolation(index, x.shape[along])
            if sigmas[axis]:
                matrix = matrix @ _gaussian(x.shape[along], sigmas[axis])
            x = along_axis(matrix.to(x), x, along)
        return x.contiguous()
    x = blur(x, sigmas.tolist())
    shift = nib.affines.from_matvec(np.eye(3), [-s.start for s in box])
    return _sample(x, shift @ from_grid, [slice(0, n) for n in grid.size])


def _sample(
    x: Tensor, matrix: np.ndarray, box: Sequence[slice], /, *, extended: bool = False
) -> Tensor:
    """Linearly interpolate (X, Y, Z) at the voxels that a matrix (4, 4) gives for a box's indices.

    Parameters
    ----------
    extended : continue the values at the border beyond it, instead of fading to zero
    """
    # grid_sample wants coordinates from -1 to 1 at the outer faces, last axis first.
    to_unit = torch.from_numpy(matrix[:3].copy())
    for axis in range(3):
        to_unit[axis, 3] += 0.5
        to_unit[axis] *= 2 / x.shape[axis]
        to_unit[axis, 3] -= 1
    to_unit = to_unit.float().to(x.device)
    axes = [torch.arange(s.start, s.stop, dtype=torch.float32, device=x.device) for s in box]
    where = (
        to_unit[:, 0] * axes[0][:, None, None, None]
        + to_unit[:, 1] * axes[1][None, :, None, None]
        + to_unit[:, 2] * axes[2][None, None, :, None]
        + to_unit[:, 3]
    )
    padding = 'border' if extended else 'zeros'
    return F.grid_sample(
        x[None, None], where.flip(-1)[None], padding_mode=padding, align_corners=False
    )[0, 0]


def _parallel(matrix: np.ndarray, size: Sequence[int], /) -> list[int] | None:
    """The axis behind a matrix (4, 4) that each axis of so many voxels runs along.

    None if one is oblique.
    """
    turns = np.abs(matrix[:3, :3])
    axes = turns.argmax(0).tolist()
    across = turns.copy()
    across[axes, range(3)] = 0
    # Voxels by which an axis leaves the one behind from one end to the other.
    if len(set(axes)) < 3 or (across @ np.array(size)).max() > _PARALLEL:
        return None
    return axes


def _interpolation(index: Tensor, n: int, /) -> Tensor:
    """Matrix (len(index), n) of linear interpolation at positions among n values; zero beyond."""
    # Each row holds the two weights of one voxel; a dense product beats gathering.
    return (1 - (index[:, None] - torch.arange(n)).abs()).clamp_min(0)


def _gaussian(n: int, sigma: float, /) -> Tensor:
    """Matrix (n, n) of a blur with a deviation in voxels; zero beyond the ends."""
    index = torch.arange(n, dtype=torch.float64)
    kernel = torch.exp(-0.5 * ((index[:, None] - index) / sigma) ** 2)
    return kernel / (sigma * np.sqrt(2 * np.pi))


def _needed(
    shape: Sequence[int], from_grid: np.ndarray, size: Sequence[int], *, margin: np.ndarray
) -> tuple[slice, ...]:
    """Scan voxels that the grid and a margin around it touch."""
    corners = np.array(np.meshgrid(*[(0, s - 1) for s in size])).reshape(3, -1).T
    points = nib.affines.apply_affine(from_grid, corners)
    low = np.floor(points.min(0) - margin).clip(0)
    high = (np.ceil(points.max(0) + margin) + 1).clip(0, shape)
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))


def blur(x: Tensor, sigmas: Sequence[float], /) -> Tensor:
    """Gaussian blur of (..., X, Y, Z), one deviation in voxels a dimension, zero for none."""
    for axis, sigma in enumerate(sigmas):
        if not sigma:
            continue
        # A product with a band matrix is far faster than torch's single-channel convolutions.
        x = along_axis(_gaussian(x.shape[axis - 3], sigma).to(x), x, axis)
    return x


def reference_box(
    box: Sequence[slice], grid: WorkingGrid, shape: Sequence[int], /
) -> tuple[slice, slice, slice]:
    """Reference voxels whose interpolation may touch a box of the grid."""
    ends = np.array(np.meshgrid(*[(s.start - 1, s.stop) for s in box])).reshape(3, -1).T
    points = nib.affines.apply_affine(np.linalg.inv(grid.from_reference), ends)
    out = []
    for axis, n in enumerate(shape):
        low = int(np.ceil(points[:, axis].min() - _ROUNDING))
        high = int(np.floor(points[:, axis].max() + _ROUNDING)) + 1
        low = min(max(low, 0), n)
        out.append(slice(low, max(low, min(high, n))))
    return tuple(out)  # type: ignore[return-value]


def from_grid(x: Tensor, grid: WorkingGrid, box: Sequence[slice], /) -> Tensor:
    """Linearly interpolate grid values (*grid.size) at the reference voxels of a box.

    Parameters
    ----------
    box : slices of the reference's axes

    Returns
    -------
    Tensor of the box's shape; values outside the grid are those of its border, or fade to zero
    """
    matrix = grid.from_reference
    if any(s.start >= s.stop for s in box):
        return x.new_zeros([s.stop - s.start for s in box])
    order = _parallel(matrix, [s.stop for s in box])
    if order is None:
        return _sample(x, matrix, box, extended=not grid.fades)
    x = x.permute(order)
    for axis, along in enumerate(order):
        n = x.shape[axis]
        index = torch.arange(box[axis].start, box[axis].stop, dtype=torch.float64)
        index = matrix[along, axis] * index + matrix[along, 3]
        if not grid.fades:
            index = index.clamp(0, n - 1)
        x = along_axis(_interpolation(index, n).to(x), x, axis)
    return x


def along_axis(matrix: Tensor, x: Tensor, axis: int, /) -> Tensor:
    """Apply a matrix (m, n) along axis 0, 1 or 2 of (..., X, Y, Z), whose length n becomes m."""
    if axis == 0:
        return (matrix @ x.flatten(-2)).unflatten(-1, x.shape[-2:])
    return matrix @ x if axis == 1 else x @ matrix.T
