"""The group-convolution U-Net: any number of scans of one child in, label logits out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from babyseg_bids.errors import ModelError
from babyseg_bids.network.layers import (
    Activation,
    GroupConv,
    InstanceNorm,
    concatenate,
    from_patches,
    max_pool,
    mean_over_scans,
    to_patches,
    upsample,
)


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of a `GroupUNet`.

    Parameters
    ----------
    labels : output channels
    encoder : channels of each encoder level; each level ends in a pooling by 2
    decoder : channels of each decoder level, coarsest first, as many as encoder levels; each level
        ends in an up-sampling by 2
    head : channels of the layers at full resolution that follow the merging of the scans
    repeats : convolutions a level
    dim : spatial dimensions
    norm : instance normalisation after each convolution but the last
    patch : voxels along each axis that the network takes in together and gives logits of their
        own, from one set of features; the levels then start at voxels so many times as wide
    """

    labels: int
    encoder: tuple[int, ...]
    decoder: tuple[int, ...]
    head: tuple[int, ...] = ()
    repeats: int = 2
    dim: int = 3
    norm: bool = True
    patch: int = 1

    def __post_init__(self) -> None:
        for name in ('encoder', 'decoder', 'head'):  # JSON gives lists.
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.encoder) != len(self.decoder):
            raise ModelError(
                f'The network has {len(self.encoder)} encoder but {len(self.decoder)} decoder '
                'levels; give as many of one as of the other.'
            )

        if self.patch > 1 and not self.head:
            raise ModelError('A network that takes in patches needs a head.')

    @property
    def multiple(self) -> int:
        """Input sizes must be multiples of this many voxels."""
        return self.patch * 2 ** len(self.encoder)

    def fitting(self, size: Sequence[float], /) -> tuple[int, ...]:
        """The smallest input size that holds so many voxels."""
        return tuple(self.multiple * max(1, ceil(n / self.multiple)) for n in size)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary, the arguments of this class."""
        return asdict(self)


def _level(config: NetworkConfig, inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(config.repeats):
        layers.append(GroupConv(config.dim, outputs if i else inputs, outputs))
        if config.norm:
            layers.append(InstanceNorm(outputs))
        layers.append(Activation())
    return nn.Sequential(*layers)


class GroupUNet(nn.Module):
    """U-Net of group convolutions (BabySeg, arXiv 2512.05114).

    Encoder levels keep their output as skip connection and pool by 2. Decoder levels convolve,
    up-sample and concatenate `[skip, up-sampled]`. At full resolution the scans are merged, and
    the head turns the result into logits. Without `norm` and `head` this is the published network,
    with its parameter names.

    Parameters
    ----------
    checkpointing : recompute the levels' activations in the backward pass instead of keeping them
    """

    def __init__(self, config: NetworkConfig, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = checkpointing
        self.enc = nn.ModuleList()
        self.dec = nn.ModuleList()
        channels = config.patch**config.dim
        for width in config.encoder:
            self.enc.append(_level(config, channels, width))
            channels = width
        for width, skip in zip(config.decoder, reversed(config.encoder), strict=True):
            self.dec.append(_level(config, channels, width))
            channels = width + skip
        head: list[nn.Module] = []
        for width in config.head:
            head.append(GroupConv(config.dim, channels, width))
            if config.norm:
                head.append(InstanceNorm(width))
            head.append(Activation())
            channels = width
        # A head of its own has seen the neighbourhood already; a pointwise layer is enough then.
        kernel = 1 if config.head else 3
        outputs = config.patch**config.dim * config.labels
        head.append(GroupConv(config.dim, channels, outputs, kernel=kernel))
        self.add = nn.Sequential(*head)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, labels, *size) of scans (B, G, *size) with values in 0..1.

        Raises
        ------
        ModelError
            If a spatial size is not a multiple of what the U-Net pools.
        """
        logits = self._last(self.add, x)
        return from_patches(logits, self.config.patch)

    def classifier(self) -> tuple[Tensor, Tensor]:
        """Weight (patch ** D * labels, C) and bias of the last layer, after a head."""
        weight, bias = self.add[-1].folded()
        return weight.flatten(1), bias

    def features(self, x: Tensor) -> Tensor:
        """All but the last layer, of scans (B, G, *size): (B, C, *size / patch)."""
        return self._last(self.add[:-1], x)

    def _last(self, layers: nn.Sequential, x: Tensor) -> Tensor:
        """The levels, and then some layers at full resolution: (B, C, *size / patch)."""
        # The mean over scans commutes with up-sampling and joining, and there is less of it.
        skip, x = (mean_over_scans(f) for f in self.levels(x))
        return self._run(layers, skip, x).squeeze(1)

    def levels(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """All but the last step up, of scans (B, G, *size).

        Returns
        -------
        the first level's features (B, G, C, *size / patch), and the last decoder level's, half
        that size
        """
        multiple = self.config.multiple
        if any(s % multiple for s in x.shape[2:]):
            raise ModelError(
                f'The network needs sizes that are multiples of {multiple}, '
                f'not {tuple(x.shape[2:])}; pad the scans first.'
            )
        # Nothing here holds on to a level's input while the level runs.
        skips = [self._run(self.enc[0], to_patches(x, self.config.patch))]
        for level in self.enc[1:]:
            skips.append(self._run(level, max_pool(skips[-1])))
        x = self._run(self.dec[0], max_pool(skips[-1]))
        for level in self.dec[1:]:
            x = self._run(level, skips.pop(), x)
        return skips.pop(), x

    def _run(self, level: nn.Sequential, x: Tensor, coarse: Tensor | None = None) -> Tensor:
        """A level; `coarse` is up-sampled and joined behind its input (see `GroupConv`)."""
        if self.checkpointing and torch.is_grad_enabled():
            if coarse is not None:
                x = concatenate(x, upsample(coarse))
            result: Tensor = checkpoint(level, x, use_reentrant=False)
            return result
        first, *others = level
        x = first(x, coarse)
        for layer in others:
            x = layer(x)
        return x


# The posteriors are computed for so many slices at once.
_SLAB = 2


class _Posteriors(nn.Module):
    """The official network with a softmax, as it gives posteriors."""

    def __init__(self, network: GroupUNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Posteriors (B, labels, *size) of scans (B, G, *size) of any intensities."""
        logits = self.network(rescale(x))
        if torch.is_grad_enabled():
            return logits.softmax(1)
        # Channels last, as they lie: along another dimension softmax would convert the layout.
        for part in logits.movedim(1, -1).split(_SLAB, dim=1):
            part.copy_(part.softmax(-1))
        return logits


def rescale(x: Tensor, /, *, low: float = 0.01, high: float = 0.99) -> Tensor:
    """Clip each scan of (B, G, *size) at two of its quantiles and scale it to 0..1.

    The quantiles are over all voxels; a constant scan becomes zero (official normalisation).
    """
    flat = x.flatten(2)
    n = flat.shape[-1]
    # torch.quantile is limited to 2**24 elements, a 256^3 volume has that many.
    bounds = []
    for q in (low, high):
        position = q * (n - 1)
        below = int(position)
        first, second = (flat.kthvalue(min(k, n)).values for k in (below + 1, below + 2))
        bounds.append(torch.lerp(first, second, position - below))
    low_value, high_value = (b[..., None] for b in bounds)
    span = high_value - low_value
    scaled = (flat.clamp(low_value, high_value) - low_value) / torch.where(span > 0, span, 1)
    return scaled.view_as(x)


def official_config(config: Mapping[str, Any], /) -> NetworkConfig:
    """Translate the official program's model configuration (`enc`, `dec`, `out`, ...)."""
    return NetworkConfig(
        labels=config['out'],
        encoder=config['enc'],
        decoder=config['dec'],
        head=config.get('add', ()),
        repeats=config.get('rep', 2),
        dim=config.get('dim', 3),
        norm=False,
    )


def official_network(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> nn.Module:
    """The published network with its weights.

    Parameters
    ----------
    config : the official configuration, with keys `dim`, `out`, `enc`, `dec`, `add`, `rep`
    state_dict : tensors under the official names (`enc.0.0.conv_b.weight`, ...)

    Returns
    -------
    module that maps scans (B, G, *size) to posteriors (B, labels, *size)

    Raises
    ------
    ModelError
        If names or shapes do not fit the configuration.
    """
    network = GroupUNet(official_config(config))
    try:
        network.load_state_dict(dict(state_dict))
    except RuntimeError as e:
        raise ModelError(f'The weights do not fit the official configuration: {e}') from e
    return _Posteriors(network).eval()
