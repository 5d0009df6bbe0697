"""Linear operations along single axes, as small matrices.

Whatever acts on each axis alone (blur, slices, truncation of k-space, ghosts, wrap-around,
resampling, up-sampling of a coarse field) is a matrix from the samples of an axis to its new
samples. Operations in a row are one product of small matrices, and the image is touched once an
axis, by a matrix product, which is the fastest thing that any processor does.
"""

import math
from collections.abc import Sequence

import torch
from scipy.special import ive
from torch import Tensor

# Weights below this are left out.
NEGLIGIBLE = 1e-8


def apply(x: Tensor, matrices: Sequence[Tensor | None], /) -> Tensor:
    """Apply one matrix (new, old) to each of the last axes of an array; None leaves one alone.

    Parameters
    ----------
    x : (..., *size)
    matrices : D matrices, for the last D axes

    Returns
    -------
    (..., *new size)
    """
    dim = len(matrices)
    shrink = [1.0 if m is None else m.shape[0] / m.shape[1] for m in matrices]
    # Axes that get shorter come first and those that grow come last: fewer voxels to touch.
    for axis in sorted(range(dim), key=lambda a: (shrink[a], a)):
        matrix = matrices[axis]
        if matrix is None:
            continue
        axis -= dim
        if axis == -1:
            x = x @ matrix.to(x).T
        else:
            rest = x.shape[axis + 1 :]
            flat = torch.matmul(matrix.to(x), x.reshape(*x.shape[: axis + 1], -1))
            x = flat.view(*flat.shape[:-1], *rest)
    return x


def positions(n: int, m: int, /) -> Tensor:
    """Where the centres of m samples that share n samples' extent lie on them, (m,) float64."""
    return (torch.arange(m, dtype=torch.float64) + 0.5) * n / m - 0.5


def gaussian(n: int, sd: float, /) -> Tensor:
    """Blur with a standard deviation in samples; edges are extended, (n, n)."""
    if sd <= 0:
        return torch.eye(n, dtype=torch.float64)
    at = torch.arange(n, dtype=torch.float64)
    reach = math.ceil(4 * sd) + 1
    padded = torch.arange(-reach, n + reach, dtype=torch.float64)
    # The discrete analogue of the Gaussian (Lindeberg, 1990) has exactly this width.
    distance = (padded[None, :] - at[:, None]).abs()
    weights = torch.from_numpy(ive(distance.numpy(), sd**2))
    # Tails would become denormal numbers, which make a matrix product several times slower.
    weights[weights < NEGLIGIBLE] = 0
    return _fold(weights / weights.sum(1, keepdim=True), n, reach)


def slices(n: int, m: int, /, *, share: float = 1.0) -> Tensor:
    """Means over m slabs that divide n samples, (m, n).

    Parameters
    ----------
    share : of each slab that is excited; the rest is the gap between slices
    """
    centre = positions(n, m)
    half = max(1.0, n / m * share) / 2
    edge = torch.arange(n, dtype=torch.float64)
    low = torch.maximum(edge[None] - 0.5, (centre - half)[:, None])
    high = torch.minimum(edge[None] + 0.5, (centre + half)[:, None])
    weights = (high - low).clamp_min(0)
    return weights / weights.sum(1, keepdim=True)


def linear(n: int, at: Tensor, /) -> Tensor:
    """Linear interpolation of n samples at positions (m,); edges are extended, (m, n)."""
    at = at.double().clamp(0, n - 1)
    low = at.floor().clamp_max(max(0, n - 2))
    weights = torch.zeros(len(at), n, dtype=torch.float64)
    rows = torch.arange(len(at))
    weights[rows, low.long()] = 1 - (at - low)
    if n > 1:
        weights[rows, low.long() + 1] = at - low
    return weights


def bspline(n: int, m: int, /) -> Tensor:
    """A smooth curve through the influence of n control points, at m samples, (m, n).

    Cubic B-splines with equal knots; the first and last sample lie on the outer control points'
    positions. Rows sum to 1.
    """
    at = torch.linspace(0, n - 1, m, dtype=torch.float64)
    padded = torch.arange(-1, n + 1, dtype=torch.float64)
    t = (at[:, None] - padded[None]).abs()
    weights = torch.where(
        t < 1, 2 / 3 - t**2 + t**3 / 2, torch.where(t < 2, (2 - t) ** 3 / 6, torch.zeros_like(t))
    )
    return _fold(weights / weights.sum(1, keepdim=True), n, 1)


def shift(n: int, distance: float, /) -> Tensor:
    """Move the content by a distance in samples, zeros from outside, (n, n)."""
    at = torch.arange(n, dtype=torch.float64) - distance
    inside = (at > -1) & (at < n)
    return linear(n, at) * inside[:, None]


def truncation(n: int, share: float, /) -> Tensor:
    """Keep the inner share of k-space, which rings at edges (Gibbs), (n, n)."""
    kept = max(1, round(share * n / 2))
    frequency = torch.fft.fftfreq(n, 1 / n).abs() <= kept
    eye = torch.eye(n, dtype=torch.complex128)
    return torch.fft.ifft(torch.fft.fft(eye, dim=0) * frequency[:, None], dim=0).real


def ghost(n: int, strength: float, copies: int, /) -> Tensor:
    """Faint copies of the content at n / copies, cyclic, (n, n)."""
    eye = torch.eye(n, dtype=torch.float64)
    total = sum(torch.roll(eye, round(n * i / copies), 0) for i in range(1, copies))
    return (1 - strength) * eye + strength / max(1, copies - 1) * total


def wrap(n: int, extent: int, offset: int, /) -> Tensor:
    """Fold what lies outside a field of view of `extent` samples back into it, (n, n).

    The field starts at sample `offset`; samples outside it are zero afterwards.
    """
    out = torch.zeros(n, n, dtype=torch.float64)
    columns = torch.arange(n)
    out[(columns - offset) % extent + offset, columns] = 1
    return out


def _fold(weights: Tensor, n: int, reach: int) -> Tensor:
    """Add the columns outside n samples to the outermost ones."""
    inner = weights[:, reach : reach + n].clone()
    inner[:, 0] += weights[:, :reach].sum(1)
    inner[:, -1] += weights[:, reach + n :].sum(1)
    return inner
