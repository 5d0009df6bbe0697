"""Which way a head lies: a small network that knows heads in every direction.

It labels the quarters of the brain: above or below, in front or behind. Where they lie tells the
rotation; left and right follow, since no head is mirrored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from babyseg_bids.labels import LabelTable
from babyseg_bids.network.layout import (
    quarter_turned,
    quarter_turns,
    rotation_between,
    upright_labels,
)
from babyseg_bids.network.looks import averaged_blocks, exact, fitted
from babyseg_bids.network.masks import islands
from babyseg_bids.network.unet import GroupUNet, NetworkConfig
from babyseg_bids.network.weights import read_network

WEIGHTS, FORMAT = 'data/compass.safetensors', 'babyseg-compass-1'
COMPASS_NETWORK = NetworkConfig(
    labels=5, encoder=(16, 32, 64), decoder=(64, 48, 32), head=(32,), patch=2
)
# Width of the voxels in which it looks, mm.
SPACING = 4.0
# Voxels along each axis of what it looks at closely, as in training, and the quarter turns after
# which it does.
_EXTENT, _VIEWS = 48, (0, 5, 10, 18)
# About where the quarters of a brain have their centres: below behind, above behind, ...
_CENTRES = np.array([[0.0, y, z] for y in (-1, 1) for z in (-1, 1)]) * [0, 40, 28]
# Share of the scatter of a label map's structures that may stay unexplained by an average head.
_MISFIT = 0.1


def quarters(channels: Tensor, labels: LabelTable, /, *, spacing: float) -> Tensor | None:
    """Quarters of a map of channels (*size): 0 outside the brain, 1 to 4 in it, int64.

    The brain is divided at the middle of its white matter and cortex, along the axes of the
    upright head. None where too little of it is there to tell those.
    """
    rotation, misfit = upright_labels(channels.numpy(), labels, spacing)
    if misfit > _MISFIT:
        return None
    middle = np.isin(labels.indices, (2, 3, 41, 42))
    cerebrum = torch.from_numpy(middle)[channels].nonzero().double().mean(0)
    brain = (channels > 0).nonzero(as_tuple=True)
    along = (torch.stack(brain, -1) - cerebrum) @ torch.from_numpy(rotation[1:].T)
    out = torch.zeros_like(channels)
    out[brain] = 1 + ((along > 0) * torch.tensor([2, 1])).sum(1)
    return out


@dataclass(frozen=True)
class Reading:
    """Which way a head lies.

    Parameters
    ----------
    rotation : (3, 3), from the volume's axes to those of the upright head
    misfit : share of the scatter of the brain's quarters that this leaves unexplained, 0..1;
        1 without a brain
    inside : (N, 3), voxel indices in the brain
    """

    rotation: np.ndarray
    misfit: float
    inside: np.ndarray

    @property
    def quarter_turn(self) -> np.ndarray:
        """The quarter turn (3, 3) that is nearest to the rotation."""
        return max(quarter_turns(), key=lambda t: float((t * self.rotation).sum()))


@torch.inference_mode()
def read_compass(
    scan: Tensor, network: GroupUNet | None = None, /, *, spacing: float, device: str = 'cpu'
) -> Reading:
    """Which way the head lies in a prepared scan (1, *size) in 0..1.

    The network, which was trained on volumes of one extent around the brain, finds the brain in
    the whole scan, once more around what it found, and then quarters it.

    Parameters
    ----------
    network : the shipped one if None
    spacing : of the scan's voxels, mm
    """
    network = (network or _shipped()).to(device, memory_format=torch.channels_last_3d)
    factor = max(1, round(SPACING / spacing))
    small = averaged_blocks(scan.to(device), factor)
    seen, start = small, torch.zeros(3, dtype=torch.int64)
    for turns in (quarter_turns()[:1], quarter_turns()[:1], [quarter_turns()[i] for i in _VIEWS]):
        posteriors = _posteriors(seen, network, turns)
        brain = posteriors[0] < 0.5
        brain &= ~islands(brain, spacing=factor * spacing)
        inside = brain.nonzero().cpu() + start
        if not len(inside):
            return Reading(np.eye(3), 1.0, np.zeros((0, 3)))
        shares = posteriors[1:, brain].double().cpu()
        seen, start = _around(small, inside.double().mean(0))
    mass = shares.sum(1)
    centres = shares @ inside.double() / mass.clamp_min(1e-12)[:, None]
    found = rotation_between(centres.numpy(), _CENTRES, mass.numpy())
    return Reading(*found, factor * (inside.numpy() + 0.5) - 0.5)


def _around(scan: Tensor, middle: Tensor) -> tuple[Tensor, Tensor]:
    """A cube of a scan (1, *size), as large as in training, and its first voxel."""
    start = (middle - _EXTENT / 2).round().long()
    padded = F.pad(scan, [_EXTENT] * 6)
    x, y, z = (int(s) + _EXTENT for s in start)
    return padded[:, x : x + _EXTENT, y : y + _EXTENT, z : z + _EXTENT], start


def _posteriors(scan: Tensor, network: GroupUNet, turns: Sequence[np.ndarray]) -> Tensor:
    """Mean posteriors (5, *size) of a scan (1, *size) that is seen after some quarter turns."""
    x, y, z = scan.shape[1:]
    scan = fitted(scan, network)
    total = None
    with exact():
        for turn in turns:
            logits = network(quarter_turned(scan, turn).contiguous()[None])[0]
            seen = quarter_turned(logits.softmax(0), turn.T)
            total = seen if total is None else total + seen
    assert total is not None
    return (total / len(turns))[:, :x, :y, :z]


@cache
def _shipped() -> GroupUNet:
    return read_network(Path(str(files('babyseg_bids').joinpath(WEIGHTS))), FORMAT)[0]
