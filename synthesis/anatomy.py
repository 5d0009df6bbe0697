"""Draw an anatomy: whose brain, mixed with whose, deformed how, on the output's grid.

An output voxel is followed to the label map through

    output (mm) -> pose and size -> template -> flow -> one child's own shape -> its voxels

on a coarse grid. Only the end of that path is brought to full resolution, and labels are looked
up once, so that nothing is interpolated twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from babyseg_bids.errors import UsageError
from babyseg_bids.synthesis import operators
from babyseg_bids.synthesis.deformation import (
    integrate,
    random_linear,
    random_velocity,
    sample_field,
)
from babyseg_bids.synthesis.draws import Draws
from babyseg_bids.synthesis.maps import (
    CSF,
    DEPTH_STEPS,
    DISTANCE_STEP,
    FLOW_STEPS,
    SULCI_SPACING,
    ClassTable,
    Shape,
    TrainingMap,
)
from babyseg_bids.synthesis.settings import AnatomySettings, SynthesisSettings

# Distance of the points at which paths are followed, mm; all fields are smoother than that.
COARSE = 4.0
# Label maps are addressed by one float32 a voxel, which counts exactly up to here.
_LARGEST = 2**24


@dataclass(frozen=True)
class Anatomy:
    """A head on the output's grid.

    Parameters
    ----------
    classes : (*size) int32; zero is air, or everything outside the brain if it has no head
    distance : (*size) float32, signed distance to the brain's hull in mm of the output
    age : months, None if unknown
    has_head : whether `classes` holds what lies around the brain
    """

    classes: Tensor
    distance: Tensor
    age: float | None
    has_head: bool


@dataclass(frozen=True)
class Mixture:
    """Whose brain it is.

    Parameters
    ----------
    source : the map whose labels are shown
    others : maps that it is mixed with, the source among them, and their weights, (N,)
    """

    source: TrainingMap
    others: Sequence[TrainingMap]
    weights: np.ndarray

    @property
    def age(self) -> float | None:
        """Weighted mean age in months, None if one is unknown."""
        ages = [m.age for m in self.others]
        if any(a is None for a in ages):
            return None
        return float(np.dot(self.weights, [a for a in ages if a is not None]))


def choose(maps: Sequence[TrainingMap], settings: AnatomySettings, /, *, draws: Draws) -> Mixture:
    """Draw one brain, or several infants' to mix; adults are not mixed."""
    heads = [m for m in maps if m.has_head]
    brains = [m for m in maps if not m.has_head]
    adult = draws.chance('adult', settings.adult_share)
    pool = (heads or brains) if adult else (brains or heads)
    names = [m.name for m in pool]
    source = pool[names.index(draws.choice('map', names))]
    mixed = draws.chance('morph', settings.morph_probability)
    partners = [m for m in pool if m is not source and m.shape is not None]
    if not mixed or source.has_head or source.shape is None or not partners:
        return Mixture(source, [source], np.ones(1))
    count = draws.integer('partners', 1, min(settings.morph_children - 1, len(partners)))
    others = [source]
    for i in range(count):
        rest = [m.name for m in partners if m not in others]
        name = draws.choice(f'partner {i + 1}', rest)
        others.append(next(m for m in partners if m.name == name))
    return Mixture(source, others, draws.shares('weights', len(others)))


def draw_anatomy(
    maps: Sequence[TrainingMap],
    /,
    *,
    settings: SynthesisSettings,
    table: ClassTable,
    draws: Draws,
) -> Anatomy:
    """Draw an anatomy, now and then mirrored with its labels swapped.

    An infant now and then gets the head of an adult in the maps around its brain.

    Raises
    ------
    UsageError
        If the output has more axes than the maps.
    """
    s = settings.anatomy
    mixture = choose(maps, s, draws=draws)
    source = mixture.source
    shape = source.placement
    dim = source.classes.ndim
    if len(settings.size) > dim:
        raise UsageError(f'size is {settings.size}; {source.name} has only {dim} axes.')
    # Two axes of a map with three are an axial slice.
    size = (*settings.size, *[1] * (dim - len(settings.size)))
    stretch = _mean_stretch(mixture)
    growth = abs(np.linalg.det(shape.matrix[:dim, :dim])) / abs(np.linalg.det(stretch))
    scale = s.scale_adult if source.has_head else s.scale_infant
    if dim == 3 and draws.scope('volume').chance('given', s.volume_probability):
        own = source.brain / growth
        smallest, largest = (float(np.cbrt(1000 * mL / own)) for mL in s.volume)
        scale = (smallest, largest)
    linear = random_linear(
        dim,
        rotation_deg=s.rotation_deg,
        scale=scale,
        stretch=s.stretch,
        shear=s.shear,
        draws=draws,
    ).to(draws.device)
    shift = draws.vector('translation', -s.translation, s.translation, dim)
    mirrored = draws.chance('mirrored', s.mirror_probability)

    points = _coarse_points(size, settings.spacing).to(draws.device)
    if mirrored:
        points[0] *= -1
    points = torch.einsum('ij,j...->i...', linear, points)
    to_template = torch.from_numpy(np.linalg.inv(stretch)).float().to(draws.device)
    points = torch.einsum('ij,j...->i...', to_template, points + _column(shift, points))
    points = _follow(points, mixture, s, draws=draws)

    own = points
    if len(mixture.others) > 1:
        own = _onwards(points, shape)
    voxels = _affine(
        shape.matrix, own * shape.template.spacing + _column(shape.template.origin, own)
    )
    if source.sulci is not None and draws.chance('sulci', s.sulci_probability):
        amount = draws.uniform('sulcal depth', *s.sulci)
        directions = torch.from_numpy(source.sulci).to(voxels.device)
        voxels = voxels + amount * sample_field(directions, voxels / SULCI_SPACING)

    flat = _addresses(voxels, size, source.classes.shape)
    classes = _look_up(source.classes, flat)
    inner = draws.scope('cortex')
    if inner.chance('moved', s.cortex_probability):
        depth = _look_up(source.depth, flat)
        classes = thin_cortex(classes, depth, inner.uniform('by, mm', *s.cortex), table)
    classes = classes.view(size)
    # The map's millimetres in the output's.
    unit = DISTANCE_STEP / (float(linear.det().abs()) * growth) ** (1 / dim)
    distance = _look_up(source.distance, flat).view(size).float().mul_(unit)
    has_head = source.has_head
    donors = [m for m in maps if m.has_head and m.shape is not None]
    borrows = source.shape is not None and not has_head and bool(donors)
    if borrows and draws.chance('donor', settings.surroundings.donor_probability):
        donor = donors[draws.integer('donor map', 0, len(donors) - 1)]
        draws.log['donor map'] = donor.name
        classes = _with_head(classes, distance, points, donor, size, table)
        has_head = True
    if mirrored:
        swap = torch.from_numpy(table.mirror).int().to(classes.device)
        classes = swap.index_select(0, classes.view(-1)).view(size)
    shown = settings.size
    return Anatomy(classes.view(shown), distance.view(shown), mixture.age, has_head)


def thin_cortex(classes: Tensor, depth: Tensor, amount: float, table: ClassTable, /) -> Tensor:
    """Let white matter reach further into the cortex, or less far.

    Half of the cortex always stays.

    Parameters
    ----------
    classes, depth : (V,) int32, of a map and its `depth`
    amount : mm; negative for a thicker cortex

    Returns
    -------
    (V,) int32
    """
    white, cortex = table.of(2, 41), table.of(3, 42)
    other = torch.arange(len(table), dtype=torch.int32)
    if amount > 0:
        other[cortex] = torch.tensor(white, dtype=torch.int32)
        moved = depth < DEPTH_STEPS * amount
    else:
        other[white] = torch.tensor(cortex, dtype=torch.int32)
        moved = depth > DEPTH_STEPS * amount
    swapped = other.to(classes.device).index_select(0, classes)
    return torch.where(moved, swapped, classes)


def _coarse_points(size: Sequence[int], spacing: float) -> Tensor:
    """Positions (D, *coarse) in mm about the grid's middle, from its first to its last voxel."""
    axes = []
    for n in size:
        m = max(2, int(np.ceil((n - 1) * spacing / COARSE)) + 1)
        axes.append(torch.linspace(-(n - 1) / 2, (n - 1) / 2, m) * spacing)
    return torch.stack(torch.meshgrid(*axes, indexing='ij'))


def _mean_stretch(mixture: Mixture) -> np.ndarray:
    """Size and proportions (D, D) of a mixture: the weighted mean of the logarithms."""
    total = 0.0
    for m, weight in zip(mixture.others, mixture.weights, strict=True):
        matrix = m.placement.matrix[:-1, :-1]
        values, vectors = np.linalg.eigh(matrix.T @ matrix)
        total = total + weight * (vectors * (np.log(values) / 2)) @ vectors.T
    values, vectors = np.linalg.eigh(total)
    return (vectors * np.exp(values)) @ vectors.T


def _follow(
    points: Tensor, mixture: Mixture, settings: AnatomySettings, *, draws: Draws
) -> Tensor:
    """Template positions in mm -> template voxels after the random flow, (D, *coarse)."""
    shape = mixture.source.placement
    spacing = shape.template.spacing
    velocity = random_velocity(
        shape.velocity.shape[1:],
        amplitude=settings.warp_sd / spacing,
        points=[int(n) for n in settings.warp_points],
        draws=draws,
    )
    if len(mixture.others) > 1:
        # Back from the mixture to the template; the source's own flow follows later.
        for m, weight in zip(mixture.others, mixture.weights, strict=True):
            theirs = torch.from_numpy(m.placement.velocity).to(velocity)
            velocity.sub_(theirs, alpha=float(weight) / spacing)
    if draws.chance('ventricles', settings.ventricles_probability):
        amount = draws.uniform('ventricle width', *settings.ventricles)
        wider = torch.from_numpy(shape.template.ventricles).to(velocity)
        velocity.add_(wider, alpha=amount / spacing)
    where = (points - _column(shape.template.origin, points)) / spacing
    return where + sample_field(integrate(velocity, steps=FLOW_STEPS), where)


def _onwards(points: Tensor, shape: Shape) -> Tensor:
    """Template voxels (D, *coarse) -> where a map's own shape has the same part."""
    flow = torch.from_numpy(shape.flow).to(points.device)
    return points + sample_field(flow, points)


def _affine(matrix: np.ndarray, points: Tensor) -> Tensor:
    dim = points.shape[0]
    rows = torch.from_numpy(matrix[:dim, :dim]).to(points)
    return torch.einsum('ij,j...->i...', rows, points) + _column(matrix[:dim, dim], points)


def _column(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.as_tensor(np.asarray(values)).to(like).view(-1, *[1] * (like.ndim - 1))


def _addresses(
    voxels: Tensor, size: Sequence[int], shape: Sequence[int], low: Sequence[int] | None = None
) -> Tensor:
    """Flat addresses (V,) int32 of the nearest voxels at full resolution.

    Positions outside lead to the outermost voxel, which the preparation keeps empty.

    Parameters
    ----------
    voxels : (D, *coarse)
    size : of the output
    shape : of the map
    low : first voxel that an axis may lead to
    """
    if int(np.prod(shape)) > _LARGEST:
        raise ValueError(f'A map of {tuple(shape)} voxels is too large.')
    steps = [
        operators.linear(n, torch.linspace(0, n - 1, m).double()).float()
        for n, m in zip(voxels.shape[1:], size, strict=True)
    ]
    out = torch.zeros(1, device=voxels.device)
    for axis, n in enumerate(shape):
        full = operators.apply(voxels[axis], steps)
        full = full.round_().clamp_(low[axis] if low else 0, n - 1)
        out = full if axis == 0 else full.add_(out, alpha=n)
    return out.view(-1).int()


def _look_up(values: np.ndarray, addresses: Tensor) -> Tensor:
    flat = torch.from_numpy(values).view(-1).to(addresses.device)
    return flat.index_select(0, addresses).int()


def _with_head(
    classes: Tensor,
    distance: Tensor,
    points: Tensor,
    donor: TrainingMap,
    size: Sequence[int],
    table: ClassTable,
) -> Tensor:
    """Put a donor's head around a brain; what is brain only in the donor becomes CSF."""
    shape = donor.placement
    own = _onwards(points, shape)
    template = shape.template
    voxels = _affine(shape.matrix, own * template.spacing + _column(template.origin, own))
    # The neck goes on below the donor's map.
    lowest = int(np.flatnonzero(donor.classes.any((0, 1)))[0])
    flat = _addresses(voxels, size, donor.classes.shape, low=(0, 0, lowest))
    head = _look_up(donor.classes, flat).view(size)
    csf = table.of(CSF)[0]
    brain = torch.from_numpy(table.channel > 0).to(head.device).index_select(0, head.view(-1))
    # Inside the brain's hull there is nothing but fluid between the structures.
    head.masked_fill_(brain.view(size) | (distance < 0), csf)
    return torch.where(classes == 0, head, classes)
