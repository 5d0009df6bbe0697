"""Grids far finer than any scan resolves, measured on fewer voxels."""

from math import floor

import numpy as np

# A scan of an infant does not resolve more than this, mm; reconstruction interpolates further.
FINEST_MM = 0.6


def thinning(affine: np.ndarray, /) -> tuple[slice, slice, slice]:
    """Every n-th voxel of each axis, n as large as leaves no step above `FINEST_MM`.

    Grids of 0.3 mm and coarser axes than that keep all their voxels along them.

    >>> thinning(np.diag([0.2, 0.5, 1.0, 1.0]))
    (slice(None, None, 3), slice(None, None, 1), slice(None, None, 1))
    """
    zooms = np.linalg.norm(np.asarray(affine, float)[:3, :3], axis=0)
    x, y, z = (slice(None, None, max(1, floor(FINEST_MM / size + 1e-3))) for size in zooms)
    return x, y, z


def thinned_affine(affine: np.ndarray, steps: tuple[slice, ...], /) -> np.ndarray:
    """Voxel to world of what is left, (4, 4)."""
    return np.asarray(affine, float) @ np.diag([*(s.step for s in steps), 1.0])
