"""From scans to a label map on the reference's own grid: arrays in, arrays out."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from babyseg_bids.errors import InputError
from babyseg_bids.network.boxes import box_around
from babyseg_bids.network.device import choose_device
from babyseg_bids.network.grid import (
    WorkingGrid,
    averaged,
    foreground_box,
    from_grid,
    onto_grid,
    reference_box,
    working_grid,
)
from babyseg_bids.network.head import angle_of
from babyseg_bids.network.intensity import normalise
from babyseg_bids.network.looks import exact
from babyseg_bids.network.official import conform
from babyseg_bids.network.prediction import predict_upright
from babyseg_bids.network.weights import Model
from babyseg_bids.resources import freed_memory_kept

_LOG = logging.getLogger(__name__)

# A channel is interpolated only where it reaches this probability.
_NEGLIGIBLE = 1e-3
# Voxels of the reference that are labelled at once; a scan of 1 mm has less in its brain.
_SLAB = 16_000_000


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
    device, seconds : where the network ran, and the time of the whole call
    turned : whether the head stands upright but faces backwards in its scan's axes, as its header
        gives them; the sides of the labels are those of the child
    turn_degrees : by which the head was put upright, from those axes; 0 for a head that was left
        as it stands
    """

    labels: np.ndarray
    uncertainty: np.ndarray
    probabilities: np.ndarray | None
    soft_volumes: dict[int, float]
    confidence: dict[int, float]
    device: str
    seconds: float
    turned: bool = False
    turn_degrees: float = 0.0


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
    try:
        return _segment(scans, model, where, keep_probabilities, began)
    except torch.OutOfMemoryError:
        if where == 'cpu':
            raise
        _LOG.warning('The memory of %s is too small for this scan; trying the CPU.', where)
    torch.cuda.empty_cache()
    return _segment(scans, model, 'cpu', keep_probabilities, began)


def _segment(
    scans: Sequence[tuple[np.ndarray, np.ndarray]],
    model: Model,
    device: str,
    keep: bool,
    began: float,
) -> Segmentation:
    """`segment` on one device."""
    image, affine = scans[0]
    turned, degrees = False, 0.0
    with torch.inference_mode(), freed_memory_kept():
        if model.official:
            prepared, grid = conform(scans, device=device)
            posteriors = predict_official(prepared, model, device=device)
        else:
            small = [averaged(x, a, model.spacing) for x, a in scans]
            grid = _grid(affine, small[0], model)

            def prepare(target: WorkingGrid) -> Tensor:
                return _on(target, small, device)

            found, upright = predict_upright(prepare, grid, model, device=device)
            turn = np.linalg.inv(grid.affine[:3, :3]) @ upright.affine[:3, :3]
            turn *= grid.spacing / upright.spacing
            turned = bool(turn[1, 1] < -0.5 and turn[2, 2] > 0.5)
            degrees = angle_of(turn)
            posteriors, grid = found.posteriors, upright.part(found.box)
        labels, uncertainty, probabilities, volumes, confidence = _to_reference(
            posteriors, grid, image.shape, affine, model, keep
        )
    return Segmentation(
        labels=labels,
        uncertainty=uncertainty,
        probabilities=probabilities,
        soft_volumes=volumes,
        confidence=confidence,
        device=device,
        seconds=time.monotonic() - began,
        turned=turned,
        turn_degrees=degrees,
    )


# A scan, its affine, and how many voxels were averaged along each axis.
_Averaged = tuple[np.ndarray, np.ndarray, tuple[int, int, int]]


def _grid(affine: np.ndarray, small: _Averaged, model: Model) -> WorkingGrid:
    """The model's grid of a scan with that affine, in the scan's own axes."""
    x, _, sizes = small
    box = [slice(n * s.start, n * s.stop) for n, s in zip(sizes, foreground_box(x), strict=True)]
    return working_grid(affine, box, spacing=model.spacing, multiple=model.multiple)


def _on(grid: WorkingGrid, scans: Sequence[_Averaged], device: str) -> Tensor:
    """Scans (G, *size) in 0..1 on a grid, in an order of their own."""
    prepared = torch.stack(
        [normalise(onto_grid(_tensor(x, device), a, grid)) for x, a, _ in scans]
    )
    return prepared[_fixed_order(prepared)]


def _fixed_order(scans: Tensor) -> list[int]:
    """An order that makes the result independent of the order given, to the last bit."""
    if len(scans) == 1:
        return [0]
    keys = [(float(x.double().sum()), float(x.double().square().sum())) for x in scans]
    return sorted(range(len(keys)), key=keys.__getitem__)


def predict_official(scans: Tensor, model: Model, /, *, device: str = 'cpu') -> Tensor:
    """Posteriors (C, *size) float32 of conformed scans (G, *size), as the official program's."""
    network = model.network.to(device, memory_format=torch.channels_last_3d)
    with exact():
        return network(scans[_fixed_order(scans)][None])[0].float()


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
    sums, count, sureness = (np.zeros(len(indices)) for _ in range(3))
    probabilities = None
    if keep:
        probabilities = np.zeros((*shape, len(indices)), np.float16)
        probabilities[..., 0] = 1
    # Where the grid does not reach and where no structure is likely is background.
    brain = box_around(posteriors[0] < 1 - _NEGLIGIBLE / 2)
    boxes = _boxes(posteriors)
    for slab in _slabs(reference_box(brain, grid, shape)) if brain else ():
        best = from_grid(posteriors[0], grid, slab)
        if probabilities is not None:
            probabilities[(*slab, 0)] = best.cpu().numpy()
        channel = torch.zeros(best.shape, dtype=torch.uint8, device=best.device)
        for c, box in enumerate(boxes):
            if box is None or c == 0:
                continue
            target = _common(reference_box(box, grid, shape), slab)
            p = from_grid(posteriors[c], grid, target)
            sums[c] += float(p.sum(dtype=torch.float64))
            if probabilities is not None:
                probabilities[(*target, c)] = p.cpu().numpy()
            here = tuple(
                slice(t.start - s.start, t.stop - s.start)
                for t, s in zip(target, slab, strict=True)
            )
            better = p > best[here]
            channel[here].masked_fill_(better, c)
            torch.maximum(best[here], p, out=best[here])
        channels, sure = channel.cpu().numpy(), best.cpu().numpy()
        labels[slab] = indices[channels]
        uncertainty[slab] = 1 - sure
        count += np.bincount(channels.ravel(), minlength=len(indices))
        sureness += np.bincount(channels.ravel(), sure.ravel(), len(indices))
    volumes = dict(zip(indices.tolist(), (sums * voxel).tolist(), strict=True))
    volumes[0] = float(np.prod(shape)) * voxel - sum(volumes.values())
    with np.errstate(invalid='ignore'):
        confidence = dict(zip(indices.tolist(), (sureness / count).tolist(), strict=True))
    return labels, uncertainty, probabilities, volumes, confidence


def _slabs(box: tuple[slice, ...]) -> Iterator[tuple[slice, ...]]:
    """Parts of a box of the reference, as many slices of its first axis as memory allows."""
    first, *others = box
    area = int(np.prod([s.stop - s.start for s in others]))
    step = max(1, _SLAB // max(1, area))
    for start in range(first.start, first.stop, step):
        yield (slice(start, min(start + step, first.stop)), *others)


def _common(a: tuple[slice, ...], b: tuple[slice, ...]) -> tuple[slice, ...]:
    """The part of box `a` that lies in box `b`; of no length where they do not meet."""
    out = []
    for s, t in zip(a, b, strict=True):
        start = min(max(s.start, t.start), t.stop)
        out.append(slice(start, max(start, min(s.stop, t.stop))))
    return tuple(out)


def _boxes(posteriors: Tensor) -> list[tuple[slice, ...] | None]:
    """Where each channel of (C, *size) is more than negligible."""
    along_last, along_first = posteriors.amax(3), posteriors.amax(1)
    profiles = (along_last.amax(2), along_last.amax(1), along_first.amax(1))
    used = [(p > _NEGLIGIBLE).cpu().numpy() for p in profiles]
    boxes: list[tuple[slice, ...] | None] = []
    for c in range(len(posteriors)):
        ends = [np.flatnonzero(u[c]) for u in used]
        found = all(len(e) for e in ends)
        boxes.append(tuple(slice(int(e[0]), int(e[-1]) + 1) for e in ends) if found else None)
    return boxes
