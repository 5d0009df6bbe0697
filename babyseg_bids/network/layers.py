"""Layers that act on groups of scans: tensors of shape (B, G, C, *size).

B is the batch, G the number of scans of one child, C the channels and `size` one to three spatial
dimensions. Every layer is equivariant to a permutation of the scans and defined for one scan.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from babyseg_bids.network.convolution import convolve, convolve_joined
from babyseg_bids.network.winograd import upsampled

_CONV_MODULE: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def flat(x: Tensor, /) -> Tensor:
    """(B, G, C, *size) as (B * G, C, *size)."""
    # Flattening a dimension of length one leaves a stride by which torch no longer knows the
    # channels-last layout, and every layer would convert.
    return x.squeeze(1) if x.shape[1] == 1 else x.flatten(0, 1)


def grouped(x: Tensor, groups: int, /) -> Tensor:
    """(B * G, C, *size) as (B, G, C, *size)."""
    return x.unsqueeze(1) if groups == 1 else x.unflatten(0, (-1, groups))


class GroupConv(nn.Module):
    """Group convolution with cross-talk between scans (BabySeg, arXiv 2512.05114).

    `out_g = (conv_b(x_g) + conv_m(mean over g of x)) / 2`, with 'same' padding. The convolution of
    the mean runs once for the group. With one scan both see the same input, so one convolution
    with the averaged weights gives the same result at half the cost. With several, `conv_b(x_g)`
    is that of the mean, which the same averaged weights take care of, and that of the difference
    from it; the differences add up to zero, so that the last one's follows from the others'. That
    makes one convolution a scan.

    Parameters
    ----------
    dim : number of spatial dimensions, 1 to 3
    inputs, outputs : channels
    kernel : odd width of the kernel along each dimension, voxels
    """

    def __init__(self, dim: int, inputs: int, outputs: int, *, kernel: int = 3) -> None:
        super().__init__()
        conv = _CONV_MODULE[dim]
        self.conv_b = conv(inputs, outputs, kernel, padding=kernel // 2)
        self.conv_m = conv(inputs, outputs, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, coarse: Tensor | None = None) -> Tensor:
        """Convolve features (B, G, C, *size) to (B, G, outputs, *size).

        Parameters
        ----------
        coarse : (B, G, C', *size / 2), which is up-sampled and joined behind `x`; C + C' are the
            inputs then
        """
        groups = x.shape[1]
        if groups == 1:
            weight, bias = self.folded()
            inputs = [flat(f) for f in (x, coarse) if f is not None]
            return grouped(convolve_joined(*inputs, weight=weight, bias=bias), 1)
        if not torch.is_grad_enabled():
            return self._each(x, coarse)
        if coarse is not None:
            x = concatenate(x, upsample(coarse))
        # Scaling the weights instead of the features saves passes over memory.
        own, common = self.conv_b, self.conv_m
        each = grouped(convolve(flat(x), own.weight / 2, own.bias / 2), groups)
        share = common.weight / (2 * groups)
        return each + convolve(total_over_scans(x), share, common.bias / 2)[:, None]

    def _each(self, x: Tensor, coarse: Tensor | None) -> Tensor:
        """`forward` of several scans without gradients."""
        groups = x.shape[1]
        inputs = [f for f in (x, coarse) if f is not None]
        # The means, for what all scans have in common; then the differences, in the same memory.
        parts = [mean_over_scans(f)[:, 0] for f in inputs]
        weight, bias = self.folded()
        size, outputs = x.shape[3:], len(weight)
        out = x.new_empty((len(x), groups, *size, outputs)).movedim(-1, 2)
        common = out[:, -1]
        convolve_joined(*parts, weight=weight, bias=bias, out=common)
        for scan in range(groups - 1):
            for f, part in zip(inputs, parts, strict=True):
                if scan:
                    part.add_(f[:, scan]).sub_(f[:, scan - 1])
                else:
                    torch.sub(f[:, 0], part, out=part)
            own = out[:, scan]
            convolve_joined(*parts, weight=self.conv_b.weight / 2, bias=None, out=own)
            own.add_(common)
        # Where what all have in common was kept is now the last scan's, since together they are as
        # many times that.
        common.mul_(groups)
        for scan in range(groups - 1):
            common.sub_(out[:, scan])
        return out

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution that does the same for one scan."""
        own, common = self.conv_b, self.conv_m
        return (own.weight + common.weight) / 2, (own.bias + common.bias) / 2


class InstanceNorm(nn.Module):
    """Normalise every channel of every scan over space, with learned scale and shift.

    A scan's statistics never depend on the other scans, so the group stays exchangeable.
    """

    def __init__(self, channels: int, *, eps: float = 1e-4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, G, C, *size) to the same shape."""
        groups, channels = x.shape[1:3]
        x = flat(x)
        if torch.is_grad_enabled() and x.device.type == 'cpu':
            y = _InstanceNorm.apply(x, self.weight, self.bias, self.eps)
        else:
            # One group a channel is instance normalisation. Unlike `F.instance_norm` this keeps
            # the channels-last layout, and unlike `F.batch_norm` its gradient is right in it.
            y = torch.group_norm(x, channels, self.weight, self.bias, self.eps)
        return grouped(y, groups)


class _InstanceNorm(torch.autograd.Function):
    """Instance normalisation with a faster gradient on CPUs than torch's own.

    torch's took a third of a training step in bfloat16.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        batch, channels = x.shape[:2]
        voxels = x[0, 0].numel()
        y, mean, scale = torch.native_group_norm(
            x, weight, bias, batch, channels, voxels, channels, eps
        )
        ctx.save_for_backward(x, weight, mean, scale)
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def, override]
        x, weight, mean, scale = ctx.saved_tensors
        exact = torch.promote_types(x.dtype, torch.float32)
        mean, scale = mean.to(exact), scale.to(exact)
        values, slopes = (t.movedim(1, -1).flatten(1, -2) for t in (x, gradient))
        voxels = values.shape[1]
        total = slopes.sum(1, dtype=exact)
        along = (slopes * values).sum(1, dtype=exact).sub_(mean * total).mul_(scale)
        # The gradient is linear in slope and value, with coefficients for each scan and channel.
        of_slope = weight * scale
        of_value = -of_slope * scale * along / voxels
        constant = -of_slope * total / voxels - of_value * mean
        of_slope, of_value, constant = (
            c.to(x.dtype)[:, None] for c in (of_slope, of_value, constant)
        )
        out = torch.addcmul(constant, slopes, of_slope).addcmul_(values, of_value)
        out = out.view(x.movedim(1, -1).shape).movedim(-1, 1)
        return out, along.sum(0), total.sum(0), None


class Activation(nn.Module):
    """Exponential linear unit, in place where no gradient is asked for.

    In place with gradients, autograd would copy every view that the group layers make.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape."""
        return F.elu(x, inplace=not torch.is_grad_enabled())


def total_over_scans(x: Tensor, /) -> Tensor:
    """Sum over the scans of (B, G, C, *size)."""
    # Scan after scan: torch's own sum over the scans takes a quarter of the U-Net's time.
    first, *others = x.unbind(1)
    if not others:
        return first
    total = first + others[0]
    for scan in others[1:]:
        total += scan
    return total


def mean_over_scans(x: Tensor, /) -> Tensor:
    """Mean over the scans of (B, G, C, *size) as a group of one, (B, 1, C, *size)."""
    groups = x.shape[1]
    return x if groups == 1 else total_over_scans(x).div_(groups)[:, None]


def max_pool(x: Tensor, /) -> Tensor:
    """Halve (B, G, C, *size) along every spatial dimension by the maximum of each 2-wide block."""
    return grouped(_MAX_POOL[x.ndim - 3](flat(x), 2), x.shape[1])


def upsample(x: Tensor, /) -> Tensor:
    """Double (B, G, C, *size) along every spatial dimension, (bi-/tri-)linearly."""
    return grouped(upsampled(flat(x)), x.shape[1])


def concatenate(*tensors: Tensor) -> Tensor:
    """Join tensors (B, G, C_i, *size) along the channels."""
    # Concatenating six dimensions would lose the channels-last layout of the scans.
    return grouped(torch.cat([flat(t) for t in tensors], dim=1), tensors[0].shape[1])


def single_channel(x: Tensor, /) -> Tensor:
    """Insert the channel dimension into scans (B, G, *size), in channels-last layout."""
    # With one channel both layouts are the same bytes and torch takes it for contiguous, which
    # would make every layer that follows convert. The stride of the channel tells it apart.
    x = x.contiguous()[:, :, None]
    stride = list(x.stride())
    stride[2] = 1
    return x.as_strided(x.shape, stride)


def to_patches(x: Tensor, patch: int, /) -> Tensor:
    """Scans (B, G, *size) as (B, G, patch ** D, *size / patch), channels last: voxels as channels.

    Each channel is one place in the patch, the last axis changing fastest.
    """
    if patch == 1:
        return single_channel(x)
    dim = x.ndim - 2
    for axis in range(dim):
        x = x.unflatten(2 + 2 * axis, (-1, patch))
    places = [3 + 2 * axis for axis in range(dim)]
    x = x.movedim(places, list(range(-dim, 0))).flatten(-dim)
    return grouped(x.flatten(0, 1).movedim(-1, 1), x.shape[1])


def from_patches(x: Tensor, patch: int, /) -> Tensor:
    """Channels (B, patch ** D * C, *size) of places in patches as (B, C, *patch * size).

    Of the channels, those of one place lie together; see `to_patches` for the order of the places.
    """
    if patch == 1:
        return x
    dim = x.ndim - 2
    x = x.movedim(1, -1).unflatten(-1, (*[patch] * dim, -1))
    places = list(range(1 + dim, 1 + 2 * dim))
    x = x.movedim(places, [2 + 2 * axis for axis in range(dim)])
    for axis in range(dim):
        x = x.flatten(1 + axis, 2 + axis)
    return x.movedim(-1, 1)
