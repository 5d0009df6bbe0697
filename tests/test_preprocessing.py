"""Bias correction and denoising on a phantom with a known field and known noise."""

import nibabel as nib
import numpy as np
import pytest
from test_workflow import AFFINE, head

from babyseg_bids.preprocessing import preprocess

CONTRAST = (0.8, 0.1, 0.5, 0.7)
CLEAN = head(CONTRAST).astype(np.float32)
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
