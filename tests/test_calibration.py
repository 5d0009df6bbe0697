import pytest
import torch

from babyseg_bids.morphometry import predicted_dice
from babyseg_bids.network.prediction import Prediction
from babyseg_bids.synthesis.calibration import (
    Voxels,
    calibration_error,
    dice_pairs,
    draw_voxels,
    expected_error,
    fit_temperature,
    review_coverage,
)
from babyseg_bids.synthesis.evaluate import Case


def drawn(sharpness, *, voxels=40_000, classes=4):
    """Voxels whose truth is drawn from the posteriors, which are then sharpened."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(voxels, classes, generator=generator)
    target = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return Voxels((sharpness * logits).softmax(1), target)


@pytest.mark.parametrize('sharpness', [0.7, 1.0, 2.0])
def test_the_fitted_temperature_undoes_over_and_under_confidence(sharpness):
    voxels = drawn(sharpness)
    temperature = fit_temperature(voxels)
    assert temperature == pytest.approx(sharpness, rel=0.06)
    tempered = Voxels(voxels.tempered(temperature), voxels.target)
    assert expected_error(tempered) < 0.012
    if sharpness != 1:
        assert expected_error(voxels) > 0.05


def test_calibration_error_is_the_mean_gap():
    confidence = torch.tensor([0.9, 0.9, 0.5, 0.5])
    correct = torch.tensor([True, True, False, False])
    assert calibration_error(confidence, correct) == pytest.approx((2 * 0.1 + 2 * 0.5) / 4)


def test_the_review_mask_holds_more_errors_than_brain():
    table = review_coverage(drawn(1.0))
    assert (table['errors covered'] > table['brain in mask']).all()
    assert table['brain in mask'].is_monotonic_decreasing


def test_predicted_dice_is_what_calibrated_probabilities_promise():
    generator = torch.Generator().manual_seed(1)
    p = torch.rand(60, 60, 60, generator=generator) ** 4
    truth = torch.rand(p.shape, generator=generator) < p
    label = p > 0.5
    dice = 2 * (truth & label).sum() / (truth.sum() + label.sum())
    promise = predicted_dice(float(p[label].mean()), int(label.sum()), float(p.sum()))
    assert promise == pytest.approx(float(dice), abs=0.01)


def case():
    target = torch.zeros(8, 8, 8, dtype=torch.long)
    target[2:6, 2:6, 2:6] = 1
    p = torch.zeros(3, 6, 6, 6)
    p[0] = 0.9
    p[1] = 0.1
    p[:, 1:5, 1:5, 1:5] = torch.tensor([0.2, 0.8, 0.0]).view(3, 1, 1, 1)
    prediction = Prediction(p, (slice(1, 7),) * 3)
    return Case('child', target, prediction)


def test_voxels_are_those_of_the_brain_in_the_predictions_box():
    voxels = draw_voxels(case())
    assert len(voxels.target) == 64
    assert (voxels.target == 1).all() and (voxels.posteriors[:, 1] > 0.7).all()


def test_dice_pairs_compare_promise_and_truth_of_structures_found():
    [(predicted, true)] = dice_pairs(case())
    assert true == 1
    assert predicted == pytest.approx(2 * 0.8 * 64 / (64 + 0.8 * 64 + 0.1 * 152))
