"""Affine maps between brains, from the centroids of their structures."""

import numpy as np

from babyseg_bids.labels import label_table


def fit_affine(source: np.ndarray, target: np.ndarray, /) -> np.ndarray:
    """Affine (4, 4) that brings points (N, 3) nearest to others in the least-squares sense.

    Pairs of which a point is not a number, structures that a brain lacks, do not count.
    """
    known = np.isfinite(source).all(1) & np.isfinite(target).all(1)
    homogeneous = np.c_[source, np.ones(len(source))][known]
    matrix = np.eye(4)
    matrix[:3] = np.linalg.lstsq(homogeneous, target[known], rcond=None)[0].T
    return matrix


def log_scale(matrix: np.ndarray, /) -> np.ndarray:
    """Logarithm of the stretch along each axis, (3,), of an affine without its rotation."""
    values, vectors = np.linalg.eigh(matrix[:3, :3].T @ matrix[:3, :3])
    return np.diag(vectors @ np.diag(np.log(values) / 2) @ vectors.T)


def mean_centroids(centroids: np.ndarray, /, *, iterations: int = 20) -> np.ndarray:
    """Symmetric mean (S, 3) of configurations (N, S, 3) up to affine maps, of their mean size.

    A structure that a brain lacks is not a number there. One that all lack on either side is none
    in the mean.
    """
    mirror = label_table().mirror_channels[1:] - 1
    reference = _mean(centroids, 0) - _mean(centroids, (0, 1))
    for _ in range(iterations):
        reference = (reference + reference[mirror] * (-1, 1, 1)) / 2
        moved = [transform(fit_affine(c, reference), c.T).T for c in centroids]
        reference = _mean(np.array(moved), 0)
    reference = (reference + reference[mirror] * (-1, 1, 1)) / 2
    sizes = [log_scale(fit_affine(reference, c)).mean() for c in centroids]
    return (reference - _mean(reference, 0) * (0, 1, 1)) * np.exp(np.mean(sizes))


def _mean(x: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Mean of the numbers; not a number where there are none, which `np.nanmean` warns of."""
    return np.ma.masked_invalid(x).mean(axis).filled(np.nan)


def transform(matrix: np.ndarray, points: np.ndarray, /) -> np.ndarray:
    """Positions (3, ...) after an affine map (4, 4)."""
    shift = matrix[:3, 3].reshape(3, *[1] * (points.ndim - 1))
    return np.tensordot(matrix[:3, :3], points, 1) + shift
