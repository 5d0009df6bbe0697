"""Estimate how brains turn into each other: one stationary velocity field for each label map.

All maps are registered to their common average by their labels. Velocities can be added, so any
convex mixture of them is a brain between those of the mixture, and their flow has an inverse.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from babyseg_bids.labels import label_table
from babyseg_bids.synthesis import operators
from babyseg_bids.synthesis.affine import fit_affine, mean_centroids, transform
from babyseg_bids.synthesis.deformation import grid, integrate, sample_field
from babyseg_bids.synthesis.maps import (
    FLOW_STEPS,
    ClassTable,
    Shape,
    Template,
    TrainingMap,
    class_table,
)

log = logging.getLogger(__name__)

SPACING = 4.0
# Empty border of the template around the brains, mm.
BORDER = 20.0
# Deviation of the Gaussian that keeps velocities smooth, template voxels.
SMOOTHNESS = 1.25
# Weight of the mean squared gradient of the velocity beside the mismatch of the labels.
STIFFNESS = 0.004
STEP = 0.08
ROUNDS = (40, 30)
STEPS_LATER = 60
# Distance over which the effect of wider ventricles fades out, mm.
FADING = 12.0


@dataclass
class _Brain:
    """A map on the template grid: matrix (4, 4), and label shares (C - 1, *size)."""

    source: TrainingMap
    matrix: np.ndarray
    shares: Tensor


def estimate_shapes(
    maps: Sequence[TrainingMap], /, *, held_out: Sequence[str] = (), rounds: Sequence[int] = ROUNDS
) -> list[TrainingMap]:
    """The maps with their `shape`, in the same order.

    The template is the average of the brains without a head that are not held out; all others
    are then registered to it.

    Parameters
    ----------
    maps : 3-D
    held_out : names of maps that must not influence the template
    rounds : steps of the optimiser in each round of template building
    """
    table = class_table()
    founders = [m for m in maps if not m.has_head and m.name not in held_out] or list(maps)
    reference = mean_centroids(np.array([_centroids(m, table) for m in founders]))
    matrices = {m.name: fit_affine(reference, _centroids(m, table)) for m in maps}
    origin, size = _extent(founders, matrices, table)
    brains = {m.name: _on_template(m, matrices[m.name], origin, size, table) for m in maps}

    average = torch.stack([brains[m.name].shares for m in founders]).mean(0)
    velocities: dict[str, Tensor] = {m.name: torch.zeros(3, *size) for m in maps}
    for number, steps in enumerate(rounds, start=1):
        for m in founders:
            velocities[m.name] = register(
                brains[m.name].shares, average, start=velocities[m.name], steps=steps
            )
        middle = torch.stack([velocities[m.name] for m in founders]).mean(0)
        for m in founders:
            velocities[m.name] = velocities[m.name] - middle
        warped = [warp(brains[m.name].shares, velocities[m.name]) for m in founders]
        average = torch.stack(warped).mean(0)
        log.info('Template round %d of %d.', number, len(rounds))
    template = Template(origin.astype(np.float32), SPACING, _ventricles(average))
    out = []
    for m in maps:
        velocity = velocities[m.name]
        if m not in founders:
            velocity = register(
                brains[m.name].shares, average, start=velocity, steps=sum(rounds) or STEPS_LATER
            )
        log.info(
            '%s: overlap with the template %.3f, before %.3f.',
            m.name,
            overlap(warp(brains[m.name].shares, velocity), average),
            overlap(brains[m.name].shares, average),
        )
        shape = Shape(template, matrices[m.name], (velocity * SPACING).numpy())
        out.append(replace(m, shape=shape))
    return out


def register(moving: Tensor, fixed: Tensor, /, *, start: Tensor, steps: int) -> Tensor:
    """Velocity (D, *size) in voxels whose flow brings label shares (C, *size) onto others.

    The mean squared difference, each label weighted by the inverse root of its volume, plus the
    stiffness is minimised with Adam in a space of smooth fields.
    """
    size = fixed.shape[1:]
    volume = fixed.flatten(1).sum(1).clamp_min(1)
    weight = (volume**-0.5 / (volume**-0.5).sum() * len(volume)).sqrt()
    weight = weight.view(-1, *[1] * len(size))
    moving, fixed = moving * weight, fixed * weight
    blur = [operators.gaussian(n, SMOOTHNESS).float() for n in size]
    # What is far from the brain stays where it is.
    border = _fade(size)
    free = torch.zeros_like(start, requires_grad=True)
    optimiser = torch.optim.Adam([free], lr=STEP)
    for _ in range(steps):
        velocity = start + operators.apply(free, blur) * border
        mismatch = (warp(moving, velocity) - fixed).square().sum(0).mean()
        bending = sum(velocity.diff(dim=d + 1).square().mean() for d in range(len(size)))
        loss = mismatch + STIFFNESS * bending
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        return start + operators.apply(free, blur) * border


def warp(shares: Tensor, velocity: Tensor, /) -> Tensor:
    """Label shares (C, *size) moved by the flow of a velocity (D, *size) in voxels."""
    where = grid(velocity.shape[1:]) + integrate(velocity, steps=FLOW_STEPS)
    return sample_field(shares, where)


def overlap(a: Tensor, b: Tensor, /) -> float:
    """Mean soft Dice of label shares (C, *size)."""
    a, b = a.flatten(1), b.flatten(1)
    both = torch.minimum(a, b).sum(1)
    return float((2 * both / (a.sum(1) + b.sum(1)).clamp_min(1e-6)).mean())


def _centroids(m: TrainingMap, table: ClassTable) -> np.ndarray:
    """Centroids (S, 3) of the structures; not a number where the map has none."""
    channels = table.channel[m.classes]
    present = np.arange(1, len(label_table()))
    with np.errstate(invalid='ignore'):
        return np.array(ndimage.center_of_mass(channels > 0, channels, present))


def _extent(
    maps: Sequence[TrainingMap], matrices: dict[str, np.ndarray], table: ClassTable
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Origin (3,) in mm and size of a grid, symmetric in x, that holds the brains."""
    corners = []
    for m in maps:
        brain = np.argwhere(table.channel[m.classes] > 0)[::50].T.astype(float)
        inside = transform(np.linalg.inv(matrices[m.name]), brain)
        corners += [inside.min(1) - BORDER, inside.max(1) + BORDER]
    low, high = np.min(corners, 0), np.max(corners, 0)
    low[0] = min(low[0], -high[0])
    high[0] = -low[0]
    size = np.ceil((high - low) / SPACING).astype(int) + 1
    return low, tuple(size.tolist())


def _on_template(
    m: TrainingMap,
    matrix: np.ndarray,
    origin: np.ndarray,
    size: tuple[int, ...],
    table: ClassTable,
) -> _Brain:
    """Share of each label in each template voxel, counted over 27 points in it."""
    count = len(label_table())
    out = np.zeros((count, int(np.prod(size))), np.float32)
    points = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing='ij')).astype(float)
    limit = np.array(m.classes.shape).reshape(3, 1, 1, 1)
    for corner in np.ndindex(3, 3, 3):
        step = (np.array(corner).reshape(3, 1, 1, 1) - 1) / 3
        at = transform(matrix, (points + step) * SPACING + origin.reshape(3, 1, 1, 1))
        where = np.rint(at).astype(int)
        inside = ((where >= 0) & (where < limit)).all(0)
        labels = table.channel[m.classes[tuple(np.clip(where, 0, limit - 1))]] * inside
        out[labels.ravel(), np.arange(out.shape[1])] += 1 / 27
    return _Brain(m, matrix, torch.from_numpy(out[1:].reshape(count - 1, *size)))


def _fade(size: Sequence[int]) -> Tensor:
    """One inside, falling to zero over the outer three voxels, (*size)."""
    out = torch.ones(tuple(size))
    for axis, n in enumerate(size):
        at = torch.arange(n)
        edge = torch.minimum(at, n - 1 - at) / 3
        out = out * edge.clamp_max(1).view([-1 if i == axis else 1 for i in range(len(size))])
    return out


def _ventricles(average: Tensor) -> np.ndarray:
    """Velocity (3, *size) in mm that widens the lateral ventricles of label shares."""
    left, right = (int(c) - 1 for c in label_table().channels(np.array([4, 43])))
    share = (average[left] + average[right]).numpy()
    inside = share > 0.4 * share.max()
    distance = ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(inside)
    outward = np.stack(np.gradient(ndimage.gaussian_filter(distance, 1.0)))
    outward /= np.maximum(np.linalg.norm(outward, axis=0), 0.3)
    effect = np.exp(-np.abs(distance) * SPACING / FADING)
    # The flow reads where a point came from: wider ventricles look further inside.
    return (-outward * effect * _fade(share.shape).numpy()).astype(np.float32)
