"""The official BabySeg checkpoint from file to prepared scans, as its own program treats them.

The network's layers are those of `unet`; here are the grid that its scans are brought to (0.7 mm,
axes left, inferior, anterior), its intensity scale, and its labels. Unlike the official program,
which cuts off what exceeds 224 mm, the grid grows with the scan.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from babyseg_bids.errors import InputError, ModelError
from babyseg_bids.network.grid import WorkingGrid, onto_grid
from babyseg_bids.network.unet import official_network

SPACING = 0.7
MULTIPLE = 64
SMALLEST = 128
# The grid's axis along each RAS axis, and its direction: LIA.
_ALONG = {0: (0, -1.0), 1: (2, 1.0), 2: (1, -1.0)}


def read_official(path: Path, /) -> tuple[torch.nn.Module, int, int]:
    """The network of an official checkpoint, its number of labels, and what sizes must be.

    The file is a dictionary with the weights under `model`, or the weights themselves; the
    network's widths follow from their shapes.

    Returns
    -------
    module from scans (B, G, *size) to posteriors, number of its labels, and the number that sizes
    are multiples of

    Raises
    ------
    ModelError
        If the file cannot be read or holds something else.
    """
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError, ValueError) as e:
        raise ModelError(f'{path} cannot be read as a checkpoint ({e}); copy it again.') from e
    weights = state.get('model', state) if isinstance(state, dict) else None
    if not isinstance(weights, Mapping) or 'enc.0.0.conv_b.weight' not in weights:
        raise ModelError(
            f'{path} is no BabySeg checkpoint; give the official .pt file, or a .safetensors file '
            'that `babyseg-train export` wrote.'
        )
    config = _configuration(weights)
    try:
        network = official_network(config, weights)
    except ModelError as e:
        raise ModelError(f'{path}: {e}') from e
    return network.requires_grad_(False), config['out'], 2 ** len(config['enc'])


def _configuration(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The official configuration that weights of these shapes have."""

    def widths(part: str) -> list[int]:
        levels = {int(k.split('.')[1]) for k in weights if k.startswith(f'{part}.')}
        return [len(weights[f'{part}.{n}.0.conv_b.weight']) for n in sorted(levels)]

    first = {k for k in weights if k.startswith('enc.0.') and k.endswith('conv_b.weight')}
    return {
        'dim': weights['enc.0.0.conv_b.weight'].ndim - 2,
        'enc': widths('enc'),
        'dec': widths('dec'),
        'out': len(weights.get('add.0.conv_b.weight', ())),
        'rep': len(first),
    }


def conform(
    scans: Sequence[tuple[np.ndarray, np.ndarray]], /, *, device: str
) -> tuple[Tensor, WorkingGrid]:
    """Bring scans to the official grid: the first to its own box, the others onto the first.

    Parameters
    ----------
    scans : image (X, Y, Z) and affine (4, 4) of each

    Returns
    -------
    (G, *size) with the intensities of the scans, and the grid

    Raises
    ------
    InputError
        If the first scan is zero everywhere.
    """
    image, affine = scans[0]
    grid, filled = official_grid(image, affine)
    out = []
    for number, (x, a) in enumerate(scans):
        data = torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(device)
        moved = onto_grid(data, a, grid, antialias=False)
        if number == 0:
            # Its own box holds a whole number of voxels; nothing fades out beyond them.
            inner = torch.zeros_like(moved)
            inner[filled] = moved[filled]
            moved = inner
        out.append(moved)
    return torch.stack(out), grid


def official_grid(
    image: np.ndarray, affine: np.ndarray, /
) -> tuple[WorkingGrid, tuple[slice, ...]]:
    """The official grid of a scan (X, Y, Z), and the part of it that the scan's box fills."""
    inside = np.argwhere(image != 0)
    if not len(inside):
        raise InputError('The reference scan is zero everywhere; there is nothing to segment.')
    low, high = inside.min(0), inside.max(0) + 1
    zooms = nib.affines.voxel_sizes(affine)
    size, filled = [0, 0, 0], [slice(0)] * 3
    to_voxel = np.zeros((4, 4))
    to_voxel[3, 3] = 1
    for axis, (world, flip) in enumerate(nib.io_orientation(affine)):
        along, direction = _ALONG[int(world)]
        voxels = int(high[axis] - low[axis])
        extent = voxels * zooms[axis] / SPACING
        count = int(np.ceil(extent - 1e-4))
        whole = max(SMALLEST, MULTIPLE * -(-count // MULTIPLE))
        before = -(-(whole - count) // 2)
        forward = direction * flip > 0
        step = (1 if forward else -1) * SPACING / zooms[axis]
        # The official resampling centres by the ratio of the two voxel counts.
        first = before - 0.5 + 0.5 * count / voxels
        start = (low[axis] if forward else high[axis] - 1) - step * first
        size[along], filled[along] = whole, slice(before, before + count)
        to_voxel[axis, along], to_voxel[axis, 3] = step, start
    grid = WorkingGrid(
        tuple(size),  # type: ignore[arg-type]
        affine @ to_voxel,
        np.linalg.inv(to_voxel),
        fades=True,
    )
    return grid, tuple(filled)
