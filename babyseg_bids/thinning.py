"""Very fine grids, measured on fewer voxels."""

from math import floor

import numpy as np
from nibabel.affines import voxel_sizes

# Steps in mm up to which grids are thinned: it bounds the time and memory of a scan of a gigabyte.
FINEST_MM = 0.6


def thinning(affine: np.ndarray, /) -> tuple[slice, slice, slice]:
    """Every n-th voxel of each axis, n as large as leaves no step above `FINEST_MM`.

    Axes with voxels of more than 0.3 mm keep all of them.

    >>> thinning(np.diag([0.2, 0.5, 1.0, 1.0]))
    (slice(None, None, 3), slice(None, None, 1), slice(None, None, 1))
    """
    steps = (max(1, floor(FINEST_MM / size + 1e-3)) for size in voxel_sizes(affine))
    x, y, z = (slice(None, None, step) for step in steps)
    return x, y, z


def thinned_affine(affine: np.ndarray, steps: tuple[slice, ...], /) -> np.ndarray:
    """Voxel to world of what is left, (4, 4)."""
    return np.asarray(affine, float) @ np.diag([*(s.step for s in steps), 1.0])
