"""Draw training samples: a group of images of one random anatomy, and its label map."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from babyseg_bids.network.intensity import normalise
from babyseg_bids.synthesis import artefacts, contrast, surroundings
from babyseg_bids.synthesis.deformation import (
    chance,
    grid,
    random_displacement,
    random_linear,
    uniform,
)
from babyseg_bids.synthesis.maps import ClassTable, TrainingMap, class_table
from babyseg_bids.synthesis.settings import SynthesisSettings


@dataclass(frozen=True)
class Sample:
    """A group of images and their label map.

    Parameters
    ----------
    images : (G, *size) float32 in 0..1
    target : (*size) int64, network channels
    record : what is needed to draw it again: seed and map, and the choices made
    """

    images: Tensor
    target: Tensor
    record: dict[str, object]


def draw_sample(
    maps: Sequence[TrainingMap],
    /,
    *,
    seed: int,
    settings: SynthesisSettings | None = None,
    table: ClassTable | None = None,
) -> Sample:
    """Draw one sample; the same maps, settings and seed give the same bits.

    Parameters
    ----------
    maps : prepared maps to choose from
    seed : seed of all random choices
    """
    settings = settings or SynthesisSettings()
    table = table or class_table()
    generator = torch.Generator().manual_seed(seed)
    source = _choose(maps, settings, generator)
    classes, distance = draw_anatomy(source, settings=settings, table=table, generator=generator)

    if not source.has_head:
        classes = surroundings.add_layers(classes, distance, table=table, generator=generator)
    visible = torch.ones(classes.shape, dtype=torch.bool)
    stripped = not chance(settings.head_probability, generator=generator)
    if stripped:
        visible = surroundings.strip_skull(classes, distance, table=table, generator=generator)
    # Whoever keeps the skull rarely cuts the hindbrain away.
    hindbrain = settings.hindbrain_missing_probability * (1 if stripped else 0.1)
    visible &= ~surroundings.missing_parts(
        classes, table=table, hindbrain=hindbrain, generator=generator
    )
    if chance(settings.crop_probability, generator=generator):
        visible &= _slab(classes.shape, generator)
    target = torch.as_tensor(table.channel)[classes] * visible

    shares = torch.tensor(settings.group_shares)
    count = 1 + int(torch.multinomial(shares, 1, generator=generator))
    images = [
        draw_image(classes, visible, settings=settings, table=table, generator=generator)
        for _ in range(count)
    ]
    record = {'seed': seed, 'map': source.name, 'scans': count, 'stripped': stripped}
    return Sample(torch.stack(images), target, record)


def _choose(
    maps: Sequence[TrainingMap], settings: SynthesisSettings, generator: torch.Generator
) -> TrainingMap:
    heads = [m for m in maps if m.has_head]
    brains = [m for m in maps if not m.has_head]
    adult = chance(settings.adult_share, generator=generator)
    pool = (heads or brains) if adult else (brains or heads)
    return pool[int(torch.randint(len(pool), (), generator=generator))]


def draw_anatomy(
    source: TrainingMap,
    /,
    *,
    settings: SynthesisSettings,
    table: ClassTable,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Deform a map onto the output grid, now and then mirrored with its labels swapped.

    Returns
    -------
    classes (*size) int64 and distance to the brain (*size) float32 in mm of the output
    """
    dim = len(settings.size)
    scale = settings.scale_adult if source.has_head else settings.scale_infant
    linear = random_linear(
        dim,
        rotation_deg=settings.rotation_deg,
        scale=scale,
        stretch=settings.stretch,
        shear=settings.shear,
        generator=generator,
    )
    displacement = random_displacement(
        settings.size,
        amplitude=settings.warp_sd / settings.spacing,
        points=settings.warp_points,
        generator=generator,
    )
    middle = torch.tensor([(s - 1) / 2 for s in settings.size]).view(-1, *[1] * dim)
    moved = (grid(settings.size) - middle + displacement) * settings.spacing
    centre = torch.tensor([_centre(source.distance, axis) for axis in range(dim)])
    centre = centre + uniform(-1, 1, dim, generator=generator) * settings.translation
    where = torch.einsum('ij,j...->i...', linear, moved) + centre.view(middle.shape)

    mirrored = chance(0.5, generator=generator)
    if mirrored:
        where[0] = source.classes.shape[0] - 1 - where[0]
    nearest = where.round_().long()
    size = torch.tensor(source.classes.shape).view(middle.shape)
    inside = ((nearest >= 0) & (nearest < size)).all(0)
    flat = torch.zeros(settings.size, dtype=torch.long)
    for axis, s in enumerate(source.classes.shape):
        flat = flat * s + nearest[axis].clamp_(0, s - 1)
    classes = torch.from_numpy(source.classes).view(-1)[flat].long() * inside
    if mirrored:
        classes = torch.as_tensor(table.mirror)[classes]
    distance = torch.from_numpy(source.distance).view(-1)[flat].float()
    distance = torch.where(inside, distance, 255.0) / linear.det().abs() ** (1 / dim)
    return classes, distance


def _centre(distance: np.ndarray, axis: int) -> float:
    other = tuple(a for a in range(distance.ndim) if a != axis)
    extent = (distance == 0).any(other).nonzero()[0]
    return float(extent[0] + extent[-1]) / 2


def _slab(size: Sequence[int], generator: torch.Generator) -> Tensor:
    """Field of view (*size) bool that ends before the grid does, at one side of one axis."""
    axis = int(torch.randint(len(size), (), generator=generator))
    position = torch.arange(size[axis]).view([-1 if i == axis else 1 for i in range(len(size))])
    width = int(size[axis] * float(uniform(0.55, 0.9, 1, generator=generator)))
    if chance(0.5, generator=generator):
        position = size[axis] - 1 - position
    return (position < width).expand(*size)


def draw_image(
    classes: Tensor,
    visible: Tensor,
    /,
    *,
    settings: SynthesisSettings,
    table: ClassTable,
    generator: torch.Generator,
) -> Tensor:
    """Draw one scan (*size) in 0..1 of an anatomy, with a contrast and artefacts of its own.

    Parameters
    ----------
    classes : (*size) int64
    visible : (*size) bool, what the scan shows
    """
    s, dim = settings, classes.ndim
    kind = float(uniform(0, 1, 1, generator=generator))
    if kind < s.random_contrast_probability:
        means = contrast.random_means(table, generator=generator)
    else:
        weighting = None
        if kind >= s.random_contrast_probability + s.tissue_contrast_probability:
            names = list(contrast.WEIGHTINGS)
            weighting = names[int(torch.randint(len(names), (), generator=generator))]
        means = contrast.tissue_means(table, weighting=weighting, generator=generator)
    if chance(0.7, generator=generator):
        means[0] = 0  # Air.
    x = contrast.render(
        classes, means, sd=s.noise_in_class, texture=s.texture, generator=generator
    )
    x = x * visible

    sigma = uniform(0.1, 1, 1, generator=generator) * s.blur_max / s.spacing
    x = artefacts.blur(x, sigma * uniform(0.5, 1, dim, generator=generator))
    if chance(s.slices_probability, generator=generator):
        thickness = torch.ones(dim)
        axis = int(torch.randint(dim, (), generator=generator))
        mm = uniform(s.spacing, max(s.slices_max, s.spacing), 1, generator=generator)
        thickness[axis] = float(mm) / s.spacing
        x = artefacts.thick_slices(x, thickness)
    if chance(s.misalign_probability, generator=generator):
        x = artefacts.shift(x, uniform(-1, 1, dim, generator=generator) * s.misalign / s.spacing)
    if chance(s.motion_probability, generator=generator):
        moves = 1 + int(torch.randint(s.motion_moves, (), generator=generator))
        x = artefacts.motion(x, moves=moves, shift=s.motion_shift / s.spacing, generator=generator)
    x = artefacts.bias_field(
        x, strength=float(uniform(0, s.bias_max, 1, generator=generator)), generator=generator
    )
    x = artefacts.rician(
        x, sd=float(uniform(0, s.noise_max, 1, generator=generator)), generator=generator
    )
    exponent = torch.exp(s.gamma_log_sd * torch.randn(1, generator=generator))
    x = artefacts.gamma(x, float(exponent))
    if not bool(visible.all()) and chance(s.masked_probability, generator=generator):
        x = x * visible
    return normalise(x)
