"""What all steps that use ANTs share: repeatable runs, and the way between its world and ours."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

# ITK's world axes point left and back where nibabel's point right and front.
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])
_THREADS = 'ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS'


@contextmanager
def deterministic_ants(seed: int) -> Iterator[Any]:
    """ANTs, with sampling that `seed` fixes for as long as the block lasts.

    It repeats itself only with one thread.
    """
    # ANTsPy seeds numpy's global generator, which is not ours to change.
    before, state = os.environ.get(_THREADS), np.random.get_state()  # noqa: NPY002
    os.environ[_THREADS] = '1'
    import ants

    # 0 means "take the clock" to ITK.
    ants.config.set_ants_deterministic(True, seed_value=seed + 1)
    try:
        yield ants
    finally:
        ants.config.set_ants_deterministic(False, seed_value=None)
        np.random.set_state(state)  # noqa: NPY002
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before


def ants_image(ants: Any, data: np.ndarray, affine: np.ndarray) -> Any:
    """An ANTs image of `data` (X, Y, Z); `affine` is in RAS mm and has no shear."""
    affine = FLIP @ affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return ants.from_numpy(
        data.astype(np.float32),
        origin=affine[:3, 3].tolist(),
        spacing=spacing.tolist(),
        direction=affine[:3, :3] / spacing,
    )


def affine_of(transform: Any) -> np.ndarray:
    """The matrix (4, 4) in RAS mm of a linear ANTs transform: a point of the fixed image to one
    of the moving image.
    """
    values, centre = np.array(transform.parameters), np.array(transform.fixed_parameters)
    pull = np.eye(4)
    pull[:3, :3] = values[:9].reshape(3, 3)
    pull[:3, 3] = values[9:] + centre - pull[:3, :3] @ centre
    return FLIP @ pull @ FLIP
