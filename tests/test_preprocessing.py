"""Bias correction and denoising on a phantom with a known field and known noise."""

import nibabel as nib
import numpy as np
import pytest

from babyseg_bids.preprocessing import preprocess

AFFINE = np.diag([2.5, 2.5, 2.5, 1.0])
AFFINE[:3, 3] = -60


def shells() -> np.ndarray:
    """A head of 2.5 mm voxels: scalp, fluid, cortex and white matter."""
    axes = np.meshgrid(*[np.arange(48) * 2.5 - 60] * 3, indexing='ij')
    radius = np.sqrt((axes[0] / 0.85) ** 2 + axes[1] ** 2 + (axes[2] / 0.8) ** 2)
    image = np.zeros(radius.shape)
    for limit, value in ((55, 800), (50, 100), (46, 500), (38, 700)):
        image[radius < limit] = value
    noise = np.random.default_rng(0).normal(0, 20, radius.shape)
    return np.round(np.clip(image + noise, 0, None)).astype(np.float32)


CLEAN = shells()
INNER = (CLEAN > 600) & (CLEAN < 800)


def variation(data: np.ndarray) -> float:
    """Standard deviation over mean in the innermost tissue."""
    inside = np.argwhere(INNER)
    ball = np.linalg.norm(inside - np.array(CLEAN.shape) / 2, axis=1) < 12
    values = data[tuple(inside[ball].T)]
    return float(values.std() / values.mean())


def image(data: np.ndarray) -> nib.Nifti1Image:
    # A sheared header must not matter: both methods look at neighbours only.
    sheared = AFFINE.copy()
    sheared[0, 1] = 0.1
    return nib.Nifti1Image(data.astype(np.float32), sheared)


FIELD = np.linspace(0.6, 1.6, CLEAN.shape[0])[:, None, None]


@pytest.mark.parametrize(
    ('data', 'options', 'share'),
    [
        (CLEAN * FIELD, {'bias_correction': 'n4'}, 0.5),
        (
            np.abs(CLEAN + np.random.default_rng(3).normal(0, 80, CLEAN.shape)) * (CLEAN > 0),
            {'denoise': True},
            0.7,
        ),
    ],
    ids=['n4', 'denoise'],
)
def test_what_was_added_is_taken_out(data: np.ndarray, options: dict, share: float) -> None:
    given = image(data)
    treated = preprocess(given, **options)
    out = np.asanyarray(treated.dataobj)
    assert variation(out) < share * variation(data)
    assert not out[data == 0].any()
    np.testing.assert_array_equal(treated.affine, given.affine)


def test_nothing_is_done_unless_asked_for() -> None:
    given = image(CLEAN)
    assert preprocess(given) is given
