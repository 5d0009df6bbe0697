"""What lies around the brain: layers of a head, stripped borders, and parts that are missing."""

import torch
from torch import Tensor

from babyseg_bids.synthesis.deformation import chance, smooth_field, uniform
from babyseg_bids.synthesis.maps import CSF, MARROW, MUSCLE, SCALP, SKULL, ClassTable


def add_layers(
    classes: Tensor, distance: Tensor, /, *, table: ClassTable, generator: torch.Generator
) -> Tensor:
    """Draw CSF rim, skull with marrow, scalp and soft tissue around a brain without a head.

    Parameters
    ----------
    classes : (*size) int64, zero outside the brain
    distance : (*size) float, distance to the brain, mm

    Returns
    -------
    (*size) int64
    """
    wobble = smooth_field(classes.shape, points=6, generator=generator)[0]
    outside = classes == 0
    csf, skull, marrow, scalp, muscle = table.of(CSF, SKULL, MARROW, SCALP, MUSCLE)
    csf_end = uniform(1, 5, 1, generator=generator) * (1 + 0.4 * wobble)
    skull_end = csf_end + uniform(1.5, 6, 1, generator=generator)
    # The middle third of the bone is marrow.
    third = (skull_end - csf_end) / 3
    scalp_end = skull_end + uniform(2, 8, 1, generator=generator) * (1 + 0.4 * wobble)
    out = classes.clone()
    out[outside & (distance <= scalp_end)] = scalp
    out[outside & (distance <= skull_end)] = skull
    out[outside & (distance <= skull_end - third) & (distance > csf_end + third)] = marrow
    out[outside & (distance <= csf_end)] = csf
    # Below the brain comes the soft tissue of face and neck, along a random direction.
    direction = torch.randn(classes.ndim, generator=generator, device=classes.device)
    direction = direction / direction.norm()
    ramp = sum(
        direction[i]
        * torch.linspace(-1, 1, s, device=classes.device).view(
            [-1 if j == i else 1 for j in range(classes.ndim)]
        )
        for i, s in enumerate(classes.shape)
    )
    start = uniform(0.2, 1.2, 1, generator=generator)
    out[(out == 0) & (ramp + 0.2 * wobble > start)] = muscle
    return out


def strip_skull(
    classes: Tensor, distance: Tensor, /, *, table: ClassTable, generator: torch.Generator
) -> Tensor:
    """Mask (*size) bool of what a brain extraction leaves: the whole brain, and now and then some
    of what lies around it, with a smooth wobble.
    """
    wobble = smooth_field(classes.shape, points=10, generator=generator)[0]
    kind = uniform(0, 1, 1, generator=generator)
    if kind < 0.4:  # The brain's own border.
        limit = 0.5 * wobble
    else:
        limit = uniform(0, 6, 1, generator=generator) * (1 + 0.5 * wobble)
    return (distance <= limit) | (table_brain(classes, table))


def table_brain(classes: Tensor, table: ClassTable) -> Tensor:
    """Where a class belongs to one of the network's structures, (*size) bool."""
    channel = torch.as_tensor(table.channel, device=classes.device)
    return channel[classes] > 0


def missing_parts(
    classes: Tensor, /, *, table: ClassTable, hindbrain: float, generator: torch.Generator
) -> Tensor:
    """Mask (*size) bool of voxels that the scan does not show.

    Parameters
    ----------
    classes : (*size) int64 in the map's own axes, the last one from inferior to superior
    hindbrain : probability that cerebellum and brainstem were cut away
    """
    missing = torch.zeros(classes.shape, dtype=torch.bool, device=classes.device)
    if chance(hindbrain, generator=generator):
        cerebellum = table.tissue('cerebellum') + table.of(15)
        gone = torch.isin(classes, torch.tensor(cerebellum, device=classes.device))
        stem = classes == table.of(16)[0]
        if chance(0.3, generator=generator) and stem.any():
            heights = stem.nonzero()[:, -1]
            cut = uniform(float(heights.min()), float(heights.max()), 1, generator=generator)
            below = torch.arange(classes.shape[-1], device=classes.device) < cut
            stem = stem & below
        missing |= gone | stem
    return missing
