import numpy as np
import pytest
from report_phantoms import brain, morphometry, ras_affine, scan
from scipy import ndimage

from babyseg_bids.labels import label_table
from babyseg_bids.qc import session_qc
from babyseg_bids.qc_flags import LIMITS, PLAUSIBLE_VOLUME, Limit
from babyseg_bids.qc_image import (
    bias_field_percent,
    edge_width_mm,
    flat_cut_share,
    ghost_share,
    noise_sigma,
    scan_agreement,
    smoothness_mm,
    stripe_ratio,
)
from babyseg_bids.records import Age

SIZE = (32, 32, 32)
EVERYWHERE = np.ones(SIZE, bool)


@pytest.fixture
def rng():
    return np.random.default_rng(4)


def flags_of(image, months=12.0, predicted_dice=0.9, **measures):
    """Codes and severities of a scan of the phantom."""
    labels, affine = brain(), ras_affine()
    morph = morphometry(labels, affine)
    morph['predicted-dice'] = predicted_dice
    _, flags = session_qc(labels, None, image, affine, morph, Age(months), **measures)
    return {f.code: f.severity for f in flags}


@pytest.mark.parametrize('sigma', [1.0, 5.0])
def test_noise_is_measured_within_three_percent_beside_a_gradient(rng, sigma):
    image = 100 + np.arange(32)[:, None, None] * 2 + rng.normal(0, sigma, SIZE)
    assert noise_sigma(image, EVERYWHERE) == pytest.approx(sigma, rel=0.03)
    assert np.isnan(noise_sigma(image, np.zeros(SIZE, bool)))


def test_the_field_is_measured_and_not_the_contrast_of_the_tissues(rng):
    tissues = 1 + (rng.random(SIZE) > 0.5).astype(int)
    image = np.where(tissues == 1, 80.0, 120.0) * np.exp(rng.normal(0, 0.02, SIZE))
    assert bias_field_percent(tissues, image, np.eye(4)) < 2
    x = np.linspace(-0.5, 0.5, 32)[:, None, None]
    found = bias_field_percent(tissues, image * np.exp(x), np.eye(4))
    low, high = np.quantile(x, [0.05, 0.95])
    assert found == pytest.approx(100 * (np.exp(high - low) - 1), rel=0.1)


def test_blur_widens_the_border_of_the_tissues_and_contrast_does_not():
    white = np.arange(32)[:, None, None] * np.ones(SIZE) < 16
    sharp, soft = (ndimage.gaussian_filter(white * 50.0, s) + 100 for s in (1, 2))
    widths = [edge_width_mm(white, ~white, x, np.eye(4)) for x in (sharp, 3 * sharp, soft)]
    assert widths[1] == pytest.approx(widths[0])
    assert widths[2] > 1.5 * widths[0]
    assert np.isnan(edge_width_mm(white, ~white, np.full(SIZE, 7.0), np.eye(4)))


def test_smoothness_is_that_of_the_blur_in_millimetres(rng):
    image = ndimage.gaussian_filter(rng.normal(size=SIZE), 1.5)
    found = smoothness_mm(image, EVERYWHERE, np.diag([2.0, 2.0, 2.0, 1.0]))
    assert found == pytest.approx(2 * 1.5 * 2.355, rel=0.1)


def test_stripes_along_one_axis_raise_the_ratio_and_noise_does_not(rng):
    image = rng.normal(0, 1, SIZE)
    assert stripe_ratio(image, EVERYWHERE) < 1.2
    assert stripe_ratio(image + 4 * (-1.0) ** np.arange(32), EVERYWHERE) > 5


def test_a_ghost_is_told_from_even_noise_in_the_air(rng):
    x, y, z = np.meshgrid(*(np.arange(48) - 24,) * 3, indexing='ij')
    brain_mask = x**2 + y**2 + z**2 < 10**2
    clean = 100.0 * brain_mask + np.abs(rng.normal(0, 1, brain_mask.shape))
    assert abs(ghost_share(clean, brain_mask)) < 0.01
    ghost = clean + 8 * np.roll(brain_mask, 24, 1)
    assert 0.01 < ghost_share(ghost, brain_mask) < 0.08
    assert np.isnan(ghost_share(100.0 * brain_mask, brain_mask))


def test_a_missing_part_is_a_flat_end_wherever_the_image_ends():
    labels, affine = brain() > 0, ras_affine()
    assert flat_cut_share(labels, affine) < 0.15
    fissure = labels & (np.abs(np.arange(labels.shape[0]) - 23.5) > 1)[:, None, None]
    assert flat_cut_share(fissure, affine) < 0.15
    emptied = labels.copy()
    emptied[:, :, :14] = False
    assert flat_cut_share(emptied, affine) > 0.3
    assert flat_cut_share(emptied[:, :, 14:], affine) > 0.3


def test_a_scan_of_another_brain_disagrees_and_what_it_does_not_show_takes_no_part():
    table, labels = label_table(), brain()
    other = np.roll(labels, 9, axis=1)
    partial = np.where(np.arange(labels.shape[2]) < 20, -1, labels)
    found = scan_agreement({'1': labels, '2': partial, '3': other}, table)
    assert found['3'] < 0.2
    assert found['1'] == pytest.approx((1 + found['3']) / 2, abs=0.1)
    assert scan_agreement({'1': labels, '2': partial}, table) == {'1': 1.0, '2': 1.0}
    assert scan_agreement({'1': labels}, table) == {}


@pytest.mark.parametrize(
    ('noise', 'severity'), [(3, None), (12, 'warning'), (30, 'severe')], ids=str
)
def test_noise_is_flagged_by_its_share_of_the_white_matter(noise, severity):
    assert flags_of(scan(brain(), noise=noise)).get('noisy') == severity


def test_disagreement_and_predicted_dice_are_flagged_when_they_are_known():
    image = scan(brain())
    found = flags_of(image, agreement={'1': 0.9, '2': 0.5}, predicted_dice=0.4)
    assert found == {'scans-disagree': 'warning', 'low-predicted-dice': 'warning'}


def test_a_value_that_is_normal_at_an_age_is_a_remark_there_only():
    limit = Limit('x', 1, 2, expected_months=(3, 10))
    assert [limit.severity(3.0, m) for m in (2, 3, 10, 11, None)] == [
        'severe',
        'info',
        'info',
        'severe',
        'severe',
    ]


def test_every_limit_is_stricter_when_severe_and_the_bounds_of_volumes_grow():
    for limit in LIMITS.values():
        if limit.severe is not None:
            assert (limit.severe < limit.warning) == limit.below
    assert PLAUSIBLE_VOLUME.at(1.5) == (220.0, 875.0)
    assert PLAUSIBLE_VOLUME.at(900)[1] == PLAUSIBLE_VOLUME.at(60)[1]
