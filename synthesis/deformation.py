"""Random spatial transforms: affine maps and smooth, invertible displacement fields.

Coordinates are voxel indices of the output grid unless said otherwise; fields have the shape
(D, *size) with one component a dimension, in voxels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_LINEAR = {1: 'linear', 2: 'bilinear', 3: 'trilinear'}


def uniform(low: float, high: float, /, *shape: int, generator: torch.Generator) -> Tensor:
    """Uniform random numbers between two bounds, (*shape)."""
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def chance(probability: float, /, *, generator: torch.Generator) -> bool:
    """True with the given probability."""
    return bool(torch.rand((), generator=generator, device=generator.device) < probability)


def resize(x: Tensor, size: Sequence[int], /) -> Tensor:
    """Resize (C, *size) linearly so that the corner voxels' centres stay in the corners."""
    return F.interpolate(x[None], tuple(size), mode=_LINEAR[x.ndim - 1], align_corners=True)[0]


def smooth_field(
    size: Sequence[int], /, *, points: int, channels: int = 1, generator: torch.Generator
) -> Tensor:
    """Smooth random field (channels, *size) of unit standard deviation at its control points.

    Parameters
    ----------
    points : control points along the longest dimension, at least 2; the others get their share
    """
    longest = max(size)
    shape = [max(2, round(points * s / longest)) for s in size]
    control = torch.randn((channels, *shape), generator=generator, device=generator.device)
    return resize(control, size)


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
    matrix = torch.eye(3, device=angles.device)
    for axis, angle in enumerate(angles):
        i, j = [(1, 2), (0, 2), (0, 1)][axis]
        turn = torch.eye(3, device=angles.device)
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
    generator: torch.Generator,
) -> Tensor:
    """Random linear map (D, D) from output to input space.

    Parameters
    ----------
    rotation_deg : largest angle about each axis, degrees
    scale : range of the isotropic size of the output relative to the input
    stretch : largest relative change of a single axis on top of it
    shear : largest off-diagonal element
    """
    device = generator.device
    angles = uniform(-1, 1, 1 if dim == 2 else 3, generator=generator)
    matrix = rotation(angles * rotation_deg * torch.pi / 180)
    size = uniform(*scale, 1, generator=generator)
    axes = size * (1 + uniform(-stretch, stretch, dim, generator=generator))
    off = uniform(-shear, shear, dim, dim, generator=generator)
    off = off * (1 - torch.eye(dim, device=device))
    return matrix @ (torch.eye(dim, device=device) + off) @ torch.diag(1 / axes)


def random_displacement(
    size: Sequence[int],
    /,
    *,
    amplitude: float,
    points: Sequence[int],
    generator: torch.Generator,
) -> Tensor:
    """Random diffeomorphic displacement (D, *size) in voxels, of several scales at once.

    Velocities are drawn at each number of control points with amplitudes that fall in proportion
    to the points' distance, and integrated on a grid of a quarter of the resolution.

    Parameters
    ----------
    amplitude : standard deviation at the coarsest scale, voxels
    points : control points along the longest dimension, one entry a scale
    """
    coarse = [max(4, (s + 3) // 4) for s in size]
    ratio = max(coarse) / max(size)
    velocity = torch.zeros((len(size), *coarse), device=generator.device)
    for n in points:
        sd = amplitude * ratio * (min(points) - 1) / (n - 1)
        strength = uniform(0.2, 1, 1, generator=generator)
        field = smooth_field(coarse, points=n, channels=len(size), generator=generator)
        velocity += sd * strength * field
    return resize(integrate(velocity), size) / ratio
