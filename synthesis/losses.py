"""The training loss: soft Dice and cross-entropy, with one hand-written gradient for both."""

import torch
from torch import Tensor

# Keeps the Dice of a structure of a few voxels from jumping; voxels.
SMOOTH = 1.0


class _DiceCrossEntropy(torch.autograd.Function):
    """Loss of logits (V, C) and labels (V,); see `dice_cross_entropy`.

    Automatic differentiation through a one-hot target costs more than a small network; here
    forward and backward are three passes over the posteriors, without one.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, dice_weight: float) -> Tensor:  # type: ignore[override]
        classes = logits.shape[1]
        p = logits.softmax(1)
        p_true = p.gather(1, target[:, None])[:, 0]
        # In float32 a sum of ones stops at 2 ** 24, a batch of a few volumes.
        overlap = torch.bincount(target, p_true.double(), classes).float()
        count = torch.bincount(target, minlength=classes)
        present = (count > 0).float()
        # Several times faster than `p.sum(0)`, whose rows are short.
        size = p.new_ones(len(p)) @ p + count + SMOOTH
        dice = (2 * overlap + SMOOTH) / size
        share = dice_weight * present / present.sum()
        # d loss / d p[v, c] = a[c] + b[c] * (target[v] == c) for the Dice part.
        a = share * dice / size
        b = -2 * share / size
        ctx.save_for_backward(p, p_true, target, a, b)
        cross_entropy = -p_true.clamp_min(1e-7).log().mean()
        return cross_entropy + (share * (1 - dice)).sum()

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def, override]
        p, p_true, target, a, b = ctx.saved_tensors
        voxels = len(p)
        b_true = b[target] * p_true
        mean = p @ a + b_true
        # a + 1 / voxels - mean[:, None]: an outer product is faster than broadcasting.
        columns = torch.stack([torch.ones_like(mean), mean], dim=1)
        rows = torch.stack([a + 1 / voxels, torch.full_like(a, -1.0)])
        out = torch.mm(columns, rows * gradient).mul_(p)
        out.scatter_add_(1, target[:, None], (b_true - 1 / voxels)[:, None] * gradient)
        return out, None, None


def dice_cross_entropy(logits: Tensor, target: Tensor, /, *, dice_weight: float = 1.0) -> Tensor:
    """Mean cross-entropy plus `dice_weight` times (1 - mean soft Dice of the labels present).

    Parameters
    ----------
    logits : (B, C, *size)
    target : (B, *size) int64
    """
    flat = logits.movedim(1, -1).reshape(-1, logits.shape[1]).float()
    return _DiceCrossEntropy.apply(flat, target.reshape(-1), dice_weight)


def hard_dice(prediction: Tensor, target: Tensor, /, *, classes: int) -> Tensor:
    """Dice of each class (C,) between two label maps of any one shape; NaN where both lack it."""
    a = torch.bincount(prediction.reshape(-1), minlength=classes)
    b = torch.bincount(target.reshape(-1), minlength=classes)
    same = prediction[prediction == target].reshape(-1)
    return 2 * torch.bincount(same, minlength=classes) / (a + b)
