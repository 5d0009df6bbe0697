"""What the scanner does to an image: blur, slices, bias field, motion, noise, gamma."""

import torch
import torch.nn.functional as F
from torch import Tensor

from babyseg_bids.synthesis.deformation import resize, smooth_field, uniform


def blur(x: Tensor, sigmas: Tensor, /) -> Tensor:
    """Gaussian blur of (*size), one standard deviation in voxels a dimension; 0 for none."""
    for axis, sigma in enumerate(sigmas.tolist()):
        if sigma < 0.2:
            continue
        radius = max(1, round(2.5 * sigma))
        t = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
        kernel = torch.exp(-0.5 * (t / sigma) ** 2)
        kernel = kernel / kernel.sum()
        moved = x.movedim(axis, -1)
        flat = F.pad(moved.reshape(-1, 1, moved.shape[-1]), (radius, radius), mode='replicate')
        x = F.conv1d(flat, kernel[None, None]).view(moved.shape).movedim(-1, axis)
    return x.contiguous()


def thick_slices(x: Tensor, thickness: Tensor, /) -> Tensor:
    """Average (*size) over slices of the given thickness in voxels, then interpolate back.

    Parameters
    ----------
    thickness : (D,), at least 1; 1 leaves a dimension alone
    """
    size = x.shape
    coarse = [max(2, round(s / float(t))) for s, t in zip(size, thickness, strict=True)]
    if tuple(coarse) == tuple(size):
        return x
    pool = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
    low = pool[x.ndim](x[None, None], coarse)[0]
    return resize(low, size)[0]


def bias_field(x: Tensor, /, *, strength: float, generator: torch.Generator) -> Tensor:
    """Multiply (*size) by a smooth field; `strength` is the deviation of its logarithm."""
    points = int(uniform(2, 5, 1, generator=generator))
    field = smooth_field(x.shape, points=points, generator=generator)[0]
    return x * torch.exp(strength * field)


def motion(x: Tensor, /, *, moves: int, shift: float, generator: torch.Generator) -> Tensor:
    """Ghosting from translations during the acquisition of (*size).

    The child moves `moves` times; each segment of k-space along a random axis is acquired at
    another position, at most `shift` voxels away along each axis.
    """
    axis = int(torch.randint(x.ndim, (), generator=generator, device=x.device))
    space = torch.fft.fftn(x)
    n = x.shape[axis]
    order = torch.fft.fftfreq(n, device=x.device).argsort()
    cuts = torch.sort(torch.randint(n, (moves,), generator=generator, device=x.device)).values
    segment = torch.zeros(n, dtype=torch.long, device=x.device)
    segment[order] = torch.searchsorted(cuts, torch.arange(n, device=x.device), right=True)
    # The largest part of k-space stays at rest, so that the labels stay where they are.
    rest = segment[0]
    offsets = uniform(-shift, shift, moves + 1, x.ndim, generator=generator)
    offsets[rest] = 0
    phase = torch.zeros(x.shape, device=x.device)
    for d in range(x.ndim):
        frequency = torch.fft.fftfreq(x.shape[d], device=x.device)
        frequency = frequency.view([-1 if i == d else 1 for i in range(x.ndim)])
        step = offsets[segment, d].view([-1 if i == axis else 1 for i in range(x.ndim)])
        phase = phase - 2 * torch.pi * frequency * step
    return torch.fft.ifftn(space * torch.polar(torch.ones_like(phase), phase)).abs()


def rician(x: Tensor, /, *, sd: float, generator: torch.Generator) -> Tensor:
    """Magnitude of (*size) with Gaussian noise of deviation `sd` in both channels."""
    real = x + sd * torch.randn(x.shape, generator=generator, device=x.device)
    imaginary = sd * torch.randn(x.shape, generator=generator, device=x.device)
    return torch.hypot(real, imaginary)


def gamma(x: Tensor, exponent: float, /) -> Tensor:
    """Raise (*size), scaled to 0..1, to a power."""
    low, high = x.min(), x.max()
    return ((x - low) / (high - low).clamp_min(1e-6)).clamp(0, 1) ** exponent


def shift(x: Tensor, offset: Tensor, /) -> Tensor:
    """Translate (*size) by (D,) voxels with linear interpolation, zeros from outside."""
    theta = torch.eye(x.ndim, x.ndim + 1, device=x.device)
    size = torch.tensor(x.shape, device=x.device)
    theta[:, -1] = (2 * offset / size).flip(0)
    where = F.affine_grid(theta[None], (1, 1, *x.shape), align_corners=False)
    return F.grid_sample(x[None, None], where, align_corners=False)[0, 0]
