"""Random spatial transforms: affine maps and smooth, invertible displacement fields.

Coordinates are voxel indices of the output grid unless said otherwise; fields have the shape
(D, *size) with one component a dimension, in voxels.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from babyseg_bids.synthesis import operators
from babyseg_bids.synthesis.draws import Draws


def resize(x: Tensor, size: Sequence[int], /) -> Tensor:
    """Resize (C, *size) linearly so that the corner voxels' centres stay in the corners."""
    steps = zip(x.shape[1:], size, strict=True)
    return operators.apply(
        x, [operators.linear(n, torch.linspace(0, n - 1, m).double()) for n, m in steps]
    )


def smooth_field(
    size: Sequence[int], /, *, points: int, channels: int = 1, draws: Draws
) -> Tensor:
    """Smooth random field (channels, *size) of unit variance, on average over its voxels.

    Parameters
    ----------
    points : control points of its cubic B-spline along the longest dimension, at least 2; the
        others get their share
    """
    longest = max(size)
    control = [max(2, round(points * s / longest)) for s in size]
    splines = [operators.bspline(n, m) for n, m in zip(control, size, strict=True)]
    power = math.prod(float((s**2).sum(1).mean()) for s in splines)
    return operators.apply(draws.noise(channels, *control) / math.sqrt(power), splines)


def grid(size: Sequence[int], /, *, device: torch.device | str = 'cpu') -> Tensor:
    """Voxel coordinates (D, *size) of a grid."""
    axes = [torch.arange(s, dtype=torch.float32, device=device) for s in size]
    return torch.stack(torch.meshgrid(*axes, indexing='ij'))


def sample_field(field: Tensor, where: Tensor, /) -> Tensor:
    """Linearly interpolate (C, *size) at voxel coordinates (D, *out); edges are extended."""
    size = torch.tensor(field.shape[1:], device=field.device)
    scaled = where * (2 / (size - 1)).view(-1, *[1] * (where.ndim - 1)) - 1
    points = scaled.movedim(0, -1).flip(-1)[None]
    return F.grid_sample(
        field[None], points, mode='bilinear', padding_mode='border', align_corners=True
    )[0]


def integrate(velocity: Tensor, /, *, steps: int = 5) -> Tensor:
    """Displacement (D, *size) of a stationary velocity field, by scaling and squaring.

    The result is the flow at time one (Arsigny et al., MICCAI 2006), invertible for smooth
    fields; the flow of `-velocity` is its inverse.
    """
    displacement = velocity / 2**steps
    identity = grid(velocity.shape[1:], device=velocity.device)
    for _ in range(steps):
        displacement = displacement + sample_field(displacement, identity + displacement)
    return displacement


def rotation(angles: Tensor, /) -> Tensor:
    """Rotation matrix (D, D) from one angle in 2-D or three in 3-D, radians."""
    if len(angles) == 1:
        c, s = torch.cos(angles[0]), torch.sin(angles[0])
        return torch.stack([torch.stack([c, -s]), torch.stack([s, c])])
    matrix = torch.eye(3, dtype=angles.dtype, device=angles.device)
    for axis, angle in enumerate(angles):
        i, j = [(1, 2), (0, 2), (0, 1)][axis]
        turn = torch.eye(3, dtype=angles.dtype, device=angles.device)
        turn[i, i] = turn[j, j] = torch.cos(angle)
        turn[i, j], turn[j, i] = -torch.sin(angle), torch.sin(angle)
        matrix = matrix @ turn
    return matrix


def random_linear(
    dim: int,
    /,
    *,
    rotation_deg: float,
    scale: tuple[float, float],
    stretch: float,
    shear: float,
    draws: Draws,
) -> Tensor:
    """Random linear map (D, D) from output to input space.

    Parameters
    ----------
    rotation_deg : largest angle about each axis, degrees
    scale : range of the isotropic size of the output relative to the input
    stretch : largest relative change of a single axis on top of it
    shear : largest off-diagonal element
    """
    angles = draws.vector('rotation', -rotation_deg, rotation_deg, 1 if dim == 2 else 3)
    axes = draws.uniform('scale', *scale) * draws.vector('stretch', 1 - stretch, 1 + stretch, dim)
    off = (draws.table(dim, dim) * 2 - 1) * shear * (1 - np.eye(dim))
    matrix = rotation(torch.from_numpy(np.deg2rad(angles))) @ torch.from_numpy(
        (np.eye(dim) + off) / axes
    )
    return matrix.float()


def random_velocity(
    size: Sequence[int], /, *, amplitude: float, points: Sequence[int], draws: Draws
) -> Tensor:
    """Random stationary velocity (D, *size) in voxels, of several scales at once.

    Amplitudes fall in proportion to the distance of the control points, so that fine scales fold
    no more than coarse ones.

    Parameters
    ----------
    amplitude : standard deviation at the coarsest scale, voxels
    points : control points along the longest dimension, one entry a scale
    """
    velocity = torch.zeros((len(size), *size), device=draws.device)
    for n in points:
        sd = amplitude * (min(points) - 1) / (n - 1) * (0.2 + 0.8 * float(draws.table(1)[0]))
        velocity.add_(smooth_field(size, points=n, channels=len(size), draws=draws), alpha=sd)
    return velocity


def random_displacement(
    size: Sequence[int], /, *, amplitude: float, points: Sequence[int], draws: Draws
) -> Tensor:
    """Random diffeomorphic displacement (D, *size) in voxels; see `random_velocity`.

    It is integrated at a quarter of the resolution.
    """
    coarse = [max(4, (s + 3) // 4) for s in size]
    ratio = max(coarse) / max(size)
    velocity = random_velocity(coarse, amplitude=amplitude * ratio, points=points, draws=draws)
    return resize(integrate(velocity), size) / ratio
