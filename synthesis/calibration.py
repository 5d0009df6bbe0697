"""Make a model's probabilities mean what they say, and measure how far they do."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from babyseg_bids.morphometry import predicted_dice
from babyseg_bids.synthesis.evaluate import Case
from babyseg_bids.synthesis.losses import hard_dice

# Voxels kept of each case: a hundred thousand are enough for a curve of fifteen bins.
_KEPT = 100_000
_BINS = 15
_TEMPERATURES = np.geomspace(0.5, 3, 61)
_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class Voxels:
    """Voxels of the brain (true or found), drawn from some cases.

    Parameters
    ----------
    posteriors : (V, C)
    target : (V,) channels
    """

    posteriors: Tensor
    target: Tensor

    def tempered(self, temperature: float) -> Tensor:
        """Posteriors (V, C) with logits divided by a temperature."""
        return (self.posteriors.clamp_min(1e-12).log() / temperature).softmax(1)


def draw_voxels(case: Case, /, *, seed: int = 0) -> Voxels:
    """Keep some of a case's brain voxels; background far from the brain says nothing."""
    target = case.target[case.prediction.box].flatten()
    p = case.prediction.posteriors.flatten(1)
    brain = ((target > 0) | (p.argmax(0) > 0)).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    chosen = brain[torch.randperm(len(brain), generator=generator)[:_KEPT]]
    return Voxels(p[:, chosen].T.clone(), target[chosen])


def join(voxels: Sequence[Voxels], /) -> Voxels:
    """Voxels of several cases as one."""
    return Voxels(torch.cat([v.posteriors for v in voxels]), torch.cat([v.target for v in voxels]))


def fit_temperature(voxels: Voxels, /) -> float:
    """Temperature with the lowest negative log-likelihood (Guo et al., ICML 2017)."""
    truth = voxels.target[:, None]
    losses = [
        float(-voxels.tempered(t).gather(1, truth).clamp_min(1e-12).log().mean())
        for t in _TEMPERATURES
    ]
    return float(_TEMPERATURES[int(np.argmin(losses))])


def calibration_error(confidence: Tensor, correct: Tensor, /) -> float:
    """Expected calibration error: mean gap of confidence and accuracy over equal-width bins.

    Parameters
    ----------
    confidence : (V,) probability of the label given
    correct : (V,) whether it is the true one
    """
    bins = (confidence * _BINS).long().clamp(0, _BINS - 1)
    gap = torch.zeros(_BINS, dtype=torch.float64)
    gap.index_add_(0, bins, confidence.double() - correct.double())
    return float(gap.abs().sum() / len(confidence))


def expected_error(voxels: Voxels, /) -> float:
    """`calibration_error` of the label given to each voxel."""
    confidence, labels = voxels.posteriors.max(1)
    return calibration_error(confidence, labels == voxels.target)


def review_coverage(voxels: Voxels, /) -> pd.DataFrame:
    """What the review mask catches, by the uncertainty above which a voxel belongs to it.

    Returns
    -------
    threshold, share of the wrong voxels that are in the mask, share of the brain that is
    """
    confidence, labels = voxels.posteriors.max(1)
    wrong = labels != voxels.target
    rows = []
    for threshold in _THRESHOLDS:
        mask = 1 - confidence > threshold
        rows.append(
            {
                'threshold': threshold,
                'errors covered': float(mask[wrong].float().mean()),
                'brain in mask': float(mask.float().mean()),
            }
        )
    return pd.DataFrame(rows)


def dice_pairs(case: Case, /) -> list[tuple[float, float]]:
    """Predicted and true Dice of every structure in the case's label map."""
    p = case.prediction.posteriors
    true = hard_dice(case.prediction.channels(case.target.shape), case.target, classes=len(p))
    best, channel = p.flatten(1).max(0)
    voxels = torch.bincount(channel, minlength=len(p))
    inside = torch.zeros(len(p)).index_add_(0, channel, best)
    return [
        (
            predicted_dice(float(inside[c] / voxels[c]), int(voxels[c]), float(p[c].sum())),
            float(true[c]),
        )
        for c in range(1, len(p))
        if voxels[c]
    ]
