"""From an ideal image to a scan: what the scanner does, in the order in which it does it.

Everything that acts along single axes (blur, slices, ringing, ghosts, wrap-around, resolution) is
one matrix an axis, see `operators`. It leads to the grid of the acquisition, where motion and
noise belong, and a second one leads back to the output grid.
"""

import math

import torch
from torch import Tensor

from babyseg_bids.synthesis import kspace, operators
from babyseg_bids.synthesis.deformation import smooth_field
from babyseg_bids.synthesis.draws import Draws
from babyseg_bids.synthesis.settings import AcquisitionSettings

# Standard deviation of a Gaussian of unit width at half maximum.
SD = 1 / 2.3548
# Standard deviation of a box one voxel wide: each voxel averages over its own volume, so that
# borders between tissues are mixed even where nothing else blurs.
VOXEL_SD = 12**-0.5
# Grey levels of a curve that is no deliberate quantisation: 12 bits, as scanners have.
LEVELS = 4096


def acquire(
    image: Tensor, settings: AcquisitionSettings, /, *, spacing: float, draws: Draws
) -> tuple[Tensor, Tensor | None]:
    """Scan an ideal image.

    Parameters
    ----------
    image : (*size), not negative
    spacing : its voxel size, mm

    Returns
    -------
    scan : (*size), not negative, with the same voxels
    view : (*size) bool, what the field of view holds; None for everything
    """
    s = settings
    image = bias_field(image, sd=draws.uniform('bias', *s.bias), draws=draws)
    there, back, view = axis_operators(image.shape, s, spacing=spacing, draws=draws)
    low = operators.apply(image, there)
    if draws.chance('motion', s.motion_probability):
        voxel = spacing * max(a / b for a, b in zip(image.shape, low.shape, strict=True))
        low = kspace.motion(
            low.clamp_min(0),
            moves=draws.integer('moves', 1, s.motion_moves),
            shift=s.motion_shift / voxel,
            rotation_deg=s.motion_rotation,
            draws=draws,
        )
    if draws.chance('spike', s.spike_probability):
        low = kspace.spikes(low, amplitude=draws.uniform('spike size', *s.spike), draws=draws)
    if draws.chance('zipper', s.zipper_probability):
        low = kspace.zipper(low, strength=draws.uniform('zipper size', *s.zipper), draws=draws)
    low = rician(low, sd=draws.uniform('noise', *s.noise), draws=draws)
    scan = operators.apply(low, back).clamp_min_(0)
    return intensity_curve(scan, s, draws=draws), view


def axis_operators(
    size: torch.Size, settings: AcquisitionSettings, /, *, spacing: float, draws: Draws
) -> tuple[list[Tensor], list[Tensor | None], Tensor | None]:
    """Draw what acts along single axes.

    Returns
    -------
    Matrices to the acquisition's grid and back from it, one an axis (None: nothing to do), and the
    field of view (*size) bool, None if it holds everything.
    """
    s, dim = settings, len(size)
    low_size = list(size)
    gap = 0.0
    sliced = -1
    if draws.chance('resolution', s.resolution_probability):
        voxel = max(draws.uniform('voxel', *s.resolution), spacing)
        low_size = [max(8, round(n * spacing / voxel)) for n in size]
    if draws.chance('slices', s.slices_probability):
        sliced = draws.integer('slice axis', 0, dim - 1)
        distance = max(draws.uniform('slice distance', *s.slices), spacing)
        low_size[sliced] = max(4, round(size[sliced] * spacing / distance))
        gap = draws.uniform('gap', *s.gap)
    fwhm = draws.uniform('blur', *s.blur_fwhm) * draws.vector('blur by axis', 0.6, 1, dim)
    there: list[Tensor] = []
    back: list[Tensor | None] = []
    for axis, (n, m) in enumerate(zip(size, low_size, strict=True)):
        matrix = operators.gaussian(n, math.hypot(float(fwhm[axis]) * SD / spacing, VOXEL_SD))
        if m < n:
            share = 1 - gap if axis == sliced else 1.0
            matrix = operators.slices(n, m, share=share) @ matrix
        there.append(matrix)
        # The output's voxels lie between the acquired ones.
        back.append(operators.linear(m, operators.positions(m, n)) if m < n else None)
    _k_space(there, s, draws=draws)
    view = None
    if draws.chance('wrap', s.wrap_probability):
        axis = draws.integer('wrap axis', 0, dim - 1)
        n = size[axis]
        extent = max(4, round(n * draws.uniform('wrap share', *s.wrap)))
        offset = int(draws.table(1)[0] * (n - extent + 1))
        there[axis] = there[axis] @ operators.wrap(n, extent, offset)
        at = torch.arange(n)
        inside = (at >= offset) & (at < offset + extent)
        view = inside.view([-1 if i == axis else 1 for i in range(dim)]).expand(*size)
    return [m.float() for m in there], [m if m is None else m.float() for m in back], view


def _k_space(matrices: list[Tensor], settings: AcquisitionSettings, /, *, draws: Draws) -> None:
    """Add ringing and ghosts to the matrices of some axes."""
    s = settings
    if draws.chance('gibbs', s.gibbs_probability):
        axis = draws.integer('gibbs axis', 0, len(matrices) - 1)
        cut = operators.truncation(len(matrices[axis]), draws.uniform('gibbs share', *s.gibbs))
        matrices[axis] = cut @ matrices[axis]
    if draws.chance('ghost', s.ghost_probability):
        axis = draws.integer('ghost axis', 0, len(matrices) - 1)
        copies = draws.integer('ghosts', 2, 4)
        strength = draws.uniform('ghost size', *s.ghost)
        matrices[axis] = operators.ghost(len(matrices[axis]), strength, copies) @ matrices[axis]


def bias_field(x: Tensor, /, *, sd: float, draws: Draws) -> Tensor:
    """Multiply (*size) by a smooth positive field; `sd` is the deviation of its logarithm."""
    field = smooth_field(x.shape, points=draws.integer('bias points', 2, 4), draws=draws)[0]
    return field.mul_(sd).exp_().mul_(x)


def rician(x: Tensor, /, *, sd: float, draws: Draws) -> Tensor:
    """Magnitude of (*size) with Gaussian noise of deviation `sd` in both channels."""
    real = draws.noise(*x.shape).mul_(sd).add_(x)
    return torch.hypot(real, draws.noise(*x.shape).mul_(sd))


def intensity_curve(x: Tensor, settings: AcquisitionSettings, /, *, draws: Draws) -> Tensor:
    """Change the intensities of (*size), scaled to 0..1, by one random curve.

    A power, and now and then saturation, a smooth random bend and few grey levels; all together
    are one table, so that each voxel is looked up once.
    """
    s = settings
    t = torch.linspace(0, 1, LEVELS, dtype=torch.float64)
    if draws.chance('clip', s.clip_probability):
        t = (t / draws.uniform('clip at', *s.clip)).clamp_max(1)
    t = t ** float(torch.exp(torch.tensor(draws.normal('log gamma', s.gamma_sd))))
    if draws.chance('remap', s.remap_probability):
        bend = torch.from_numpy(draws.table(6, normal=True)) * s.remap
        t = (t + operators.bspline(6, LEVELS) @ bend * t.sqrt()).clamp(0, 1)
    if draws.chance('quantise', s.quantise_probability):
        steps = round(draws.uniform('levels', *s.quantise)) - 1
        t = (t * steps).round() / steps
    low, high = x.aminmax()
    scale = (LEVELS - 1) / (high - low).clamp_min(1e-6)
    index = x.sub(low).mul_(scale).round_().int()
    return t.float().to(x.device).index_select(0, index.view(-1)).view(x.shape)
