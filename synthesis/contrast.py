"""Contrast: an intensity for every class, drawn at random or ordered by tissue as in real MRI."""

import torch
from torch import Tensor

from babyseg_bids.synthesis.deformation import chance, smooth_field, uniform
from babyseg_bids.synthesis.maps import ClassTable

# Typical intensities (0..1) of white matter, cortex, deep grey, ventricle, cerebellum, brainstem
# for weightings that a child's scan may have; each is jittered, so they only set the order.
WEIGHTINGS = {
    'adult T1': (0.85, 0.55, 0.65, 0.12, 0.60, 0.80),
    'newborn T1': (0.45, 0.60, 0.62, 0.15, 0.60, 0.65),
    'isointense T1': (0.60, 0.58, 0.64, 0.15, 0.60, 0.72),
    'adult T2': (0.35, 0.55, 0.45, 0.95, 0.52, 0.40),
    'newborn T2': (0.75, 0.48, 0.42, 0.95, 0.48, 0.42),
    'FLAIR': (0.50, 0.65, 0.60, 0.10, 0.62, 0.52),
}
TISSUE_ORDER = ('white-matter', 'cortex', 'deep-grey', 'ventricle', 'cerebellum', 'brainstem')


def random_means(table: ClassTable, /, *, generator: torch.Generator) -> Tensor:
    """Mean intensity of each class, (N,) in 0..1, the two sides mostly alike.

    All classes are independent (BabySeg's scheme); now and then sides differ too.
    """
    means = torch.rand(len(table), generator=generator, device=generator.device)
    if chance(0.9, generator=generator):
        mirror = torch.as_tensor(table.mirror, device=means.device)
        means = torch.where(
            mirror < torch.arange(len(means), device=means.device), means[mirror], means
        )
    return means


def tissue_means(
    table: ClassTable, /, *, weighting: str | None = None, generator: torch.Generator
) -> Tensor:
    """Mean intensity of each class, (N,), structures of one tissue close to each other.

    Parameters
    ----------
    weighting : a key of `WEIGHTINGS`; None for random tissue intensities
    """
    means = random_means(table, generator=generator)
    if weighting is None:
        levels = torch.rand(len(TISSUE_ORDER), generator=generator, device=means.device)
        # Cerebellum and brainstem resemble cortex and white matter in any contrast.
        levels[4] = levels[1] + uniform(-0.1, 0.1, 1, generator=generator)
        levels[5] = levels[0] + uniform(-0.2, 0.2, 1, generator=generator)
    else:
        levels = torch.tensor(WEIGHTINGS[weighting], device=means.device)
        levels = levels + 0.06 * torch.randn(len(levels), generator=generator, device=means.device)
    # Real contrast between tissues is often a small part of the range, above all around birth.
    solid = torch.tensor([0, 1, 2, 4, 5], device=means.device)
    middle = levels[solid].mean()
    levels[solid] = middle + uniform(0.25, 1, 1, generator=generator) * (levels[solid] - middle)
    offset = uniform(0.02, 0.12, 1, generator=generator)
    for level, tissue in zip(levels, TISSUE_ORDER, strict=True):
        members = table.tissue(tissue)
        means[members] = level + offset * (2 * means[members] - 1)
    means[table.of(24)] = levels[3]  # CSF looks as it does in the ventricles.
    # White matter within the cerebellum looks like white matter (labels 7 and 46).
    means[table.of(7, 46)] = levels[0]
    return means.clamp(0, 1.2)


def render(
    classes: Tensor, means: Tensor, /, *, sd: float, texture: float, generator: torch.Generator
) -> Tensor:
    """Image (*size) of a Gaussian mixture with a smooth variation inside the tissues.

    Parameters
    ----------
    classes : (*size) int64
    means : (N,)
    sd : largest standard deviation of a class; each class draws its own
    texture : largest amplitude of the smooth variation of a class; each class draws its own
    """
    n, device = len(means), means.device
    deviations = sd * torch.rand(n, generator=generator, device=device)
    amplitudes = texture * torch.rand(n, generator=generator, device=device)
    noise = torch.randn(classes.shape, generator=generator, device=device)
    image = torch.addcmul(means[classes], noise, deviations[classes])
    if texture:
        points = int(uniform(3, 12, 1, generator=generator))
        field = smooth_field(classes.shape, points=points, generator=generator)[0]
        image.addcmul_(field, amplitudes[classes])
    return image
