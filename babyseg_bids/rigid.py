"""Rigid transforms as 4x4 matrices, in mm."""

from collections.abc import Sequence

import numpy as np

# Radius in mm of the sphere over which the difference of two transforms is averaged; a head is
# about 40 mm (preterm) to 75 mm (five years) in radius.
HEAD_RADIUS_MM = 60.0


def rms_displacement(matrix: np.ndarray, centre: np.ndarray, /) -> float:
    """Root mean square displacement over a head-sized sphere at `centre`, mm (Jenkinson 1999)."""
    change = matrix[:3, :3] - np.eye(3)
    shift = matrix[:3, 3] + change @ centre
    spread = HEAD_RADIUS_MM**2 / 5 * np.trace(change.T @ change)
    return float(np.sqrt(spread + shift @ shift))


def rotation_angle(matrix: np.ndarray, /) -> float:
    """Angle in degrees of the rotation in a rigid 4x4 matrix."""
    cosine = (np.trace(matrix[:3, :3]) - 1) / 2
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def rotation_matrix(degrees: Sequence[float], centre: np.ndarray, /) -> np.ndarray:
    """Rigid 4x4 matrix that turns about x, then y, then z through the point `centre`."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        c, s = np.cos(angle), np.sin(angle)
        i, j = [(1, 2), (2, 0), (0, 1)][axis]
        step = np.eye(3)
        step[i, i], step[i, j], step[j, i], step[j, j] = c, -s, s, c
        turn = step @ turn
    matrix = np.eye(4)
    matrix[:3, :3] = turn
    matrix[:3, 3] = centre - turn @ centre
    return matrix


def distance(one: np.ndarray, other: np.ndarray, centre: np.ndarray, /) -> float:
    """Difference of two rigid transforms in mm, for a head at `centre` in the moving world."""
    return rms_displacement(np.linalg.inv(other) @ one, centre)
