"""From scans to a label map on the reference's own grid: arrays in, arrays out."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from babyseg_bids.errors import InputError
from babyseg_bids.network.device import choose_device, cpu_prefers_bfloat16
from babyseg_bids.network.grid import (
    WorkingGrid,
    foreground_box,
    from_grid,
    onto_grid,
    reference_box,
    working_grid,
)
from babyseg_bids.network.intensity import normalise
from babyseg_bids.network.official import conform
from babyseg_bids.network.weights import Model

# A channel is interpolated only where it reaches this probability.
_NEGLIGIBLE = 1e-3
# Brain components smaller than this share of the largest are taken for false detections.
_ISLAND_SHARE = 0.05
# Structures in the middle of the brain, whose place tells front from back.
_DEEP = (4, 10, 11, 12, 13, 14, 43, 49, 50, 51, 52)
_DEEP_VOXELS = 50
# How much better the turned head must fit; set on a few real scans with the first weights, where
# the right direction fitted better by 0.07 to 0.55.
_TURN_MARGIN = 0.05


@dataclass(frozen=True)
class Segmentation:
    """Result of `segment`, all on the reference's grid.

    Parameters
    ----------
    labels : (X, Y, Z) int16, FreeSurfer numbers
    uncertainty : (X, Y, Z) float32, 0..1: one minus the probability of the label given
    probabilities : (X, Y, Z, C) float16, or None
    soft_volumes : sum of a label's probabilities by FreeSurfer number, mm3
    confidence : mean probability inside each label; NaN where it is absent
    scan_weights : share that each scan had in the result, in the order given
    device, seconds : where the network ran, and the time of the whole call
    turned : whether the head faces backwards in the world of its header (see
        `predict_either_way`); the sides of the labels are then those of the child
    """

    labels: np.ndarray
    uncertainty: np.ndarray
    probabilities: np.ndarray | None
    soft_volumes: dict[int, float]
    confidence: dict[int, float]
    scan_weights: tuple[float, ...]
    device: str
    seconds: float
    turned: bool = False


def segment(
    scans: Sequence[tuple[np.ndarray, np.ndarray]],
    model: Model,
    *,
    device: str = 'auto',
    threads: int | None = None,
    keep_probabilities: bool = False,
) -> Segmentation:
    """Segment one child's aligned scans jointly.

    Parameters
    ----------
    scans : image (X, Y, Z) and its voxel-to-world affine (4, 4) in RAS mm, of each scan; the
        first is the reference, whose grid the result has. The others' affines lead into the same
        world, so that each scan is resampled once.
    device : `auto`, `cpu`, `cuda[:N]` or `mps`
    threads : of the CPU; None for torch's own choice

    Raises
    ------
    InputError
        If there is no scan, or one is not 3-D or not finite.
    """
    began = time.monotonic()
    _check(scans)
    if threads:
        torch.set_num_threads(threads)
    where = choose_device(device)
    image, affine = scans[0]
    turned = False
    with torch.inference_mode():
        if model.official:
            prepared, grid = conform(scans, device=where)
            posteriors = predict_official(prepared, model, device=where)
        else:
            prepared, grid = _prepare(scans, model, where)
            posteriors, turned = predict_either_way(prepared, model, device=where)
            remove_islands(posteriors)
        result = _to_reference(posteriors, grid, image.shape, affine, model, keep_probabilities)
    labels, uncertainty, probabilities, volumes, confidence = result
    return Segmentation(
        labels=labels,
        uncertainty=uncertainty,
        probabilities=probabilities,
        soft_volumes=volumes,
        confidence=confidence,
        scan_weights=tuple(1 / len(scans) for _ in scans),
        device=where,
        seconds=time.monotonic() - began,
        turned=turned,
    )


def _prepare(
    scans: Sequence[tuple[np.ndarray, np.ndarray]], model: Model, device: str
) -> tuple[Tensor, WorkingGrid]:
    """Scans (G, *size) in 0..1 on the model's grid of the first one."""
    image, affine = scans[0]
    grid = working_grid(
        affine,
        foreground_box(image),
        spacing=model.spacing,
        multiple=model.multiple,
    )
    prepared = [normalise(onto_grid(_tensor(x, device), a, grid)) for x, a in scans]
    return torch.stack(_in_fixed_order(prepared)), grid


def _in_fixed_order(scans: Sequence[Tensor]) -> list[Tensor]:
    """An order that makes the result independent of the order given, to the last bit."""
    return sorted(scans, key=lambda x: (float(x.double().sum()), float(x.double().square().sum())))


def predict_official(scans: Tensor, model: Model, /, *, device: str = 'cpu') -> Tensor:
    """Posteriors (C, *size) float32 of conformed scans (G, *size), as the official program's."""
    network = model.network.to(device, memory_format=torch.channels_last_3d)
    with _autocast(device):
        return network(torch.stack(_in_fixed_order(list(scans)))[None])[0].float()


def _autocast(device: str) -> torch.autocast:
    """bfloat16 where the processor gains from it: GPUs, and CPUs with matrix units."""
    half = device.startswith('cuda') or (device == 'cpu' and cpu_prefers_bfloat16())
    return torch.autocast(device.split(':')[0], torch.bfloat16, enabled=half)


def _check(scans: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    if not scans:
        raise InputError('There is no scan to segment; give at least one.')
    for i, (image, affine) in enumerate(scans):
        if image.ndim != 3:
            raise InputError(f'Scan {i} has the shape {image.shape}; give 3-D images.')
        if np.shape(affine) != (4, 4) or not np.isfinite(affine).all():
            raise InputError(f'Scan {i} has no usable affine; give a finite 4x4 matrix.')
        if not np.isfinite(image).all():
            raise InputError(f'Scan {i} has NaN or infinite voxels; replace them first.')


def _tensor(x: np.ndarray, device: str) -> Tensor:
    # Flipped views and foreign byte orders are fine for numpy but not for torch.
    return torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(device)


def predict(
    scans: Tensor, model: Model, /, *, device: str = 'cpu', both_sides: bool = True
) -> Tensor:
    """Posteriors (C, *size) float32 of prepared scans (G, *size) in 0..1, in RAS axes.

    Parameters
    ----------
    both_sides : average with the result of the mirrored scans, whose labels change sides. It
        costs a second pass, and takes away the network's own preference for a side.
    """
    network = model.network.to(device, memory_format=torch.channels_last_3d)
    with _autocast(device):
        posteriors = network(scans[None])[0].float().softmax(0)
    if both_sides:
        posteriors = (posteriors + mirrored_posteriors(scans, model, device=device)) / 2
    return posteriors


def predict_either_way(
    scans: Tensor, model: Model, /, *, device: str = 'cpu'
) -> tuple[Tensor, bool]:
    """Posteriors as `predict` gives them, for a head that may face backwards.

    A common mistake of conversion programs stores LPS data under a RAS header: the head is then
    turned by 180 degrees about the vertical axis (a rotation, so that no side is mirrored). Both
    directions are tried, and the one is taken in which the deep structures explain more of the
    intensities; the header's direction needs no evidence.

    Returns
    -------
    posteriors (C, *size), and whether the head was turned for them
    """
    ahead = predict(scans, model, device=device, both_sides=False)
    back = predict(scans.flip(1, 2), model, device=device, both_sides=False).flip(1, 2)
    gain = deep_fit(back, scans, model) - deep_fit(ahead, scans, model)
    turned = gain > _TURN_MARGIN
    posteriors = back if turned else ahead
    posteriors += mirrored_posteriors(scans, model, turned=turned, device=device)
    return posteriors.div_(2), turned


def deep_fit(posteriors: Tensor, scans: Tensor, model: Model, /) -> float:
    """Share of the intensity variance in the deep structures that their labels explain.

    This is the correlation ratio (eta squared), averaged over scans; 0 where there is too little
    to tell.

    Parameters
    ----------
    posteriors : (C, *size)
    scans : (G, *size)
    """
    labels = posteriors.argmax(0)
    indices = model.labels.indices.tolist()
    deep = [c for c, index in enumerate(indices) if index in _DEEP]
    inside = torch.isin(labels, torch.tensor(deep, device=labels.device))
    chosen = labels[inside]
    if len(chosen) < _DEEP_VOXELS:
        return 0.0
    count = torch.bincount(chosen, minlength=len(indices)).clamp_min(1)
    fits = []
    for scan in scans:
        values = scan[inside].double()
        means = torch.bincount(chosen, values, len(indices)) / count
        total = (values - values.mean()).square().sum()
        rest = (values - means[chosen]).square().sum()
        fits.append(float(1 - rest / total) if total > 0 else 0.0)
    return sum(fits) / len(fits)


def mirrored_posteriors(
    scans: Tensor, model: Model, /, *, turned: bool = False, device: str = 'cpu'
) -> Tensor:
    """Posteriors (C, *size) by way of the mirrored scans, whose labels change sides back.

    Parameters
    ----------
    turned : whether the head faces backwards
    """
    # Mirroring a turned head left to right leaves a flip from front to back alone.
    axis = 2 if turned else 1
    mirrored = predict(scans.flip(axis), model, device=device, both_sides=False).flip(axis)
    return mirrored[torch.from_numpy(model.labels.mirror_channels).to(mirrored.device)]


def remove_islands(posteriors: Tensor, /) -> None:
    """Give small detached pieces of brain to the background, in place.

    Parameters
    ----------
    posteriors : (C, *size), background first
    """
    brain = (posteriors[0] < 0.5).cpu().numpy()
    components, count = ndimage.label(brain, np.ones((3, 3, 3)))
    if count < 2:
        return
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    small = sizes < _ISLAND_SHARE * sizes.max()
    small[0] = False
    gone = torch.from_numpy(small[components]).to(posteriors.device)
    posteriors[:, gone] = 0
    posteriors[0, gone] = 1


def _to_reference(
    posteriors: Tensor,
    grid: WorkingGrid,
    shape: Sequence[int],
    affine: np.ndarray,
    model: Model,
    keep: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, dict[int, float], dict[int, float]]:
    """Interpolate channel by channel, keeping the best one: memory for two, not for all."""
    indices = model.labels.indices
    voxel = float(abs(np.linalg.det(affine[:3, :3])))
    labels = np.zeros(tuple(shape), np.int16)
    uncertainty = np.zeros(tuple(shape), np.float32)
    volumes = dict.fromkeys(indices.tolist(), 0.0)
    confidence = dict.fromkeys(indices.tolist(), float('nan'))
    probabilities = None
    if keep:
        probabilities = np.zeros((*shape, len(indices)), np.float16)
        probabilities[..., 0] = 1
    # Where the grid does not reach and where no structure is likely is background.
    brain = _box(posteriors[0] < 1 - _NEGLIGIBLE / 2)
    if brain is not None:
        whole = reference_box(brain, grid, shape)
        best = from_grid(posteriors[0], grid, whole)
        if probabilities is not None:
            probabilities[(*whole, 0)] = best.cpu().numpy()
        channel = torch.zeros(best.shape, dtype=torch.uint8, device=best.device)
        for c, index in enumerate(indices.tolist()):
            box = _box(posteriors[c] > _NEGLIGIBLE) if c else None
            if box is None:
                continue
            target = reference_box(box, grid, shape)
            p = from_grid(posteriors[c], grid, target)
            volumes[index] = float(p.sum(dtype=torch.float64)) * voxel
            if probabilities is not None:
                probabilities[(*target, c)] = p.cpu().numpy()
            here = tuple(
                slice(t.start - w.start, t.stop - w.start)
                for t, w in zip(target, whole, strict=True)
            )
            better = p > best[here]
            channel[here].masked_fill_(better, c)
            torch.maximum(best[here], p, out=best[here])
        labels[whole] = indices[channel.cpu().numpy()]
        uncertainty[whole] = 1 - best.cpu().numpy()
        for c, index in enumerate(indices.tolist()):
            inside = channel == c
            if bool(inside.any()):
                confidence[index] = float(best[inside].mean(dtype=torch.float64))
    volumes[0] = float(np.prod(shape)) * voxel - sum(volumes.values())
    return labels, uncertainty, probabilities, volumes, confidence


def _box(mask: Tensor) -> tuple[slice, ...] | None:
    if not bool(mask.any()):
        return None
    box = []
    for axis in range(3):
        other = [a for a in range(3) if a != axis]
        used = mask.any(other[1]).any(other[0]).nonzero()
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    return tuple(box)
