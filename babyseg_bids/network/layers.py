"""Layers that act on groups of scans: tensors of shape (B, G, C, *size).

B is the batch, G the number of scans of one child, C the channels and `size` one to three spatial
dimensions. Every layer is equivariant to a permutation of the scans and defined for one scan.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_MODULE: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
# What is up-sampled before a convolution is treated in blocks of so many voxels along each axis.
# With fewer channels than `_WORTH` the additions take what the multiplications save.
_BLOCK, _WORTH = 10, 64
_LINEAR = {1: 'linear', 2: 'bilinear', 3: 'trilinear'}


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
        inputs = [f for f in (x, coarse) if f is not None]
        # The means, for what all scans have in common; then the differences, in the same memory.
        parts = [mean_over_scans(f)[:, 0] for f in inputs]
        weight, bias = self.folded()
        common = convolve_joined(*parts, weight=weight, bias=bias)
        out = common.new_empty((*x.shape[:2], *common.shape[2:], common.shape[1])).movedim(-1, 2)
        last = out[:, -1].copy_(common)
        for scan in range(x.shape[1] - 1):
            for f, part in zip(inputs, parts, strict=True):
                if scan:
                    part.add_(f[:, scan]).sub_(f[:, scan - 1])
                else:
                    torch.sub(f[:, 0], part, out=part)
            own = convolve_joined(*parts, weight=self.conv_b.weight / 2, bias=None)
            torch.add(own, common, out=out[:, scan])
            last.sub_(own)
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
    total, *others = x.unbind(1)
    for scan in others:
        total = total + scan
    return total


def mean_over_scans(x: Tensor, /) -> Tensor:
    """Mean over the scans of (B, G, C, *size) as a group of one, (B, 1, C, *size)."""
    groups = x.shape[1]
    return x if groups == 1 else total_over_scans(x)[:, None] / groups


def _direct(x: Tensor) -> bool:
    """Whether oneDNN is called directly: on a CPU, without gradients."""
    on_cpu = x.device.type == 'cpu' and torch.backends.mkldnn.is_available()
    return on_cpu and not torch.is_grad_enabled()


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve (B, C, *size) with a kernel (outputs, C, width, ...), 'same' padding."""
    dim, width = x.ndim - 2, weight.shape[-1]
    padding = width // 2
    if _direct(x):
        # For a single image with few channels torch would choose a slow convolution that leaves
        # the channels-last layout.
        return torch.mkldnn_convolution(x, weight, bias, [padding] * dim, [1] * dim, [1] * dim, 1)
    if width == 1:
        # torch's convolution would convert layouts.
        return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
    return _CONV[dim](x, weight, bias, padding=padding)


def convolve_joined(
    x: Tensor, coarse: Tensor | None = None, /, *, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """`convolve` (B, C, *size) with (B, C', *size / 2), up-sampled, joined behind it.

    Parameters
    ----------
    weight : (outputs, C + C', 3, ...)
    """
    if coarse is None:
        return convolve(x, weight, bias)
    if not _direct(x) or coarse.shape[1] < _WORTH:
        fine = concatenate(x[:, None], upsample(coarse[:, None]))
        return convolve(flat(fine), weight, bias)
    own, upsampled = weight.split((x.shape[1], coarse.shape[1]), dim=1)
    out = convolve(x, own, bias)
    size = coarse.shape[2:]
    for corner in itertools.product(*(range(0, n, _BLOCK) for n in size)):
        # With the neighbours that interpolation and kernel reach.
        seen, inner, fine = [], [], []
        for start, n in zip(corner, size, strict=True):
            stop, low = min(start + _BLOCK, n), max(0, start - 1)
            seen.append(slice(low, min(n, stop + 1)))
            inner.append(slice(2 * (start - low), 2 * (stop - low)))
            fine.append(slice(2 * start, 2 * stop))
        out[(..., *fine)] += convolve_upsampled(coarse[(..., *seen)], upsampled)[(..., *inner)]
    return out


def max_pool(x: Tensor, /) -> Tensor:
    """Halve (B, G, C, *size) along every spatial dimension by the maximum of each 2-wide block."""
    return grouped(_MAX_POOL[x.ndim - 3](flat(x), 2), x.shape[1])


def upsample(x: Tensor, /) -> Tensor:
    """Double (B, G, C, *size) along every spatial dimension, (bi-/tri-)linearly."""
    y = F.interpolate(flat(x), scale_factor=2, mode=_LINEAR[x.ndim - 3], align_corners=False)
    return grouped(y, x.shape[1])


def convolve_upsampled(x: Tensor, weight: Tensor, /) -> Tensor:
    """Up-sample (B, C, *size) as `upsample` does, then convolve with a kernel 3 wide, zero-padded.

    Both act on space and on channels separately, so the channels are mixed first, at the coarse
    size, once for each voxel of the kernel; then each axis in turn is up-sampled and its three
    shifts are added. In three dimensions that is an eighth of the multiplications. It pays on
    blocks that stay in the processor's cache.

    Parameters
    ----------
    weight : (outputs, C, 3, ...)

    Returns
    -------
    (B, outputs, *twice the size)
    """
    dim = x.ndim - 2
    taps = weight.movedim((0, 1), (-2, -1)).reshape(-1, x.shape[1])
    # In one piece, or torch would multiply row by row.
    y = F.linear(x.movedim(1, -1).contiguous(), taps)
    for axis in range(dim):
        y = _shifts_upsampled(y.unflatten(-1, (3, -1)).movedim(1 + axis, 0)).movedim(0, 1 + axis)
    return y.movedim(-1, 1)


def _shifts_upsampled(x: Tensor) -> Tensor:
    """(N, ..., 3, C), up-sampled along the first axis, shifted by one either way, and added.

    The result is (2 N, ..., C): element m is that of the first of three at m - 1, of the second at
    m and of the third at m + 1, where there are such.
    """
    first, middle, last = x.unbind(-2)
    out = first.new_empty((len(x), 2, *first.shape[1:]))
    even, odd = out.unbind(1)
    torch.add(middle, last, out=even).mul_(0.75).add_(first, alpha=0.25)
    even[1:].add_(first[:-1], alpha=0.75).add_(middle[:-1], alpha=0.25)
    even[:-1].add_(last[1:], alpha=0.25)
    torch.add(first, middle, out=odd).mul_(0.75).add_(last, alpha=0.25)
    odd[1:].add_(first[:-1], alpha=0.25)
    odd[:-1].add_(middle[1:], alpha=0.25).add_(last[1:], alpha=0.75)
    # At the ends up-sampling extends the values, and beyond them is zero.
    even[:1].add_(middle[:1], alpha=0.25).sub_(first[:1], alpha=0.25)
    even[-1:].add_(last[-1:], alpha=0.25)
    odd[:1].add_(first[:1], alpha=0.25)
    odd[-1:].add_(middle[-1:], alpha=0.25).sub_(last[-1:], alpha=0.25)
    return out.flatten(0, 1)


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
