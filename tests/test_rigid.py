"""Rigid transforms as matrices."""

import numpy as np
import pytest

from babyseg_bids.rigid import distance, rms_displacement, rotation_angle, rotation_matrix


def test_displacement_of_a_pure_shift_is_its_length():
    shift = np.eye(4)
    shift[:3, 3] = [3, 4, 0]
    assert rms_displacement(shift, np.array([10.0, 20, 30])) == pytest.approx(5)


def test_two_turns_about_the_head_differ_by_the_angle_between_them():
    centre = np.array([10.0, 20, 30])
    one, other = (rotation_matrix((angle, 0, 0), centre) for angle in (12, 9))
    assert rotation_angle(np.linalg.inv(other) @ one) == pytest.approx(3)
    # Of a uniform ball, the root mean square distance from an axis is sqrt(2/5) of the radius.
    expected = 60 * np.sqrt(2 / 5) * 2 * np.sin(np.radians(1.5))
    assert distance(one, other, centre) == pytest.approx(expected)
    assert distance(one, one, centre) == pytest.approx(0, abs=1e-9)
