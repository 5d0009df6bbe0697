import numpy as np
import pytest
from report_phantoms import brain, ras_affine

from babyseg_bids.surfaces import (
    closed_hull,
    cortex_measures,
    gyrification_index,
    hemisphere_measures,
    surface,
    surface_area,
    triangle_areas,
)


def distance(size, zooms=(1.0, 1.0, 1.0)):
    """Distance in mm of each voxel from the middle of the image."""
    axes = [(np.arange(n) - (n - 1) / 2) * z for n, z in zip(size, zooms, strict=True)]
    return np.sqrt(sum(a**2 for a in np.meshgrid(*axes, indexing='ij')))


@pytest.mark.parametrize('zooms', [(1, 1, 1), (0.8, 1, 1.25)], ids=str)
def test_the_area_of_a_sphere_is_right_within_two_percent(zooms):
    size = tuple(int(46 / z) for z in zooms)
    area = surface_area(distance(size, zooms) < 20, np.diag([*zooms, 1]))
    assert area == pytest.approx(4 * np.pi * 20**2, rel=0.02)


def test_a_surface_lies_in_the_world_whatever_the_orientation():
    affine = np.array([[0, -1.0, 0, 5], [1.0, 0, 0, 6], [0, 0, 1.0, 7], [0, 0, 0, 1]])
    triangles, _ = surface(distance((25, 25, 25)) < 8, affine)
    middle = affine @ [12, 12, 12, 1]
    assert triangles.reshape(-1, 3).mean(0) == pytest.approx(middle[:3], abs=0.1)
    radii = np.linalg.norm(triangles.reshape(-1, 3) - middle[:3], axis=1)
    assert radii.mean() == pytest.approx(8, abs=0.3)


@pytest.mark.parametrize('thickness', [2, 3, 4])
def test_a_shell_has_its_areas_within_two_and_its_thickness_within_three_percent(thickness):
    r = distance((56, 56, 56))
    inner, outer = 22, 22 + thickness
    found = hemisphere_measures(r < inner, (r >= inner) & (r < outer), np.eye(4))
    assert found.white_area_mm2 == pytest.approx(4 * np.pi * inner**2, rel=0.02)
    assert found.pial_area_mm2 == pytest.approx(4 * np.pi * outer**2, rel=0.02)
    assert found.thickness_mm == pytest.approx(thickness, rel=0.03)
    assert found.gyrification_index == pytest.approx(1, abs=0.02)


def test_a_half_shell_leaves_out_the_wall_without_cortex():
    r = distance((50, 50, 50))
    half = np.arange(50)[:, None, None] < 25
    found = hemisphere_measures((r < 20) & half, (r >= 20) & (r < 23) & half, np.eye(4))
    assert found.white_area_mm2 == pytest.approx(2 * np.pi * 20**2, rel=0.06)
    assert found.thickness_mm == pytest.approx(3, rel=0.06)


def test_gyrification_is_the_area_of_the_folds_over_that_of_the_hull():
    # A cylinder whose radius waves: its side has the length of the curve, not of the circle.
    axes = np.meshgrid(np.arange(80) - 39.5, np.arange(80) - 39.5, np.arange(60), indexing='ij')
    radius, angle = np.hypot(axes[0], axes[1]), np.arctan2(axes[1], axes[0])
    deep = radius < 28 + 5 * np.cos(10 * angle)
    mask = deep & (axes[2] >= 5) & (axes[2] < 55)
    t = np.linspace(0, 2 * np.pi, 20_001)
    r = 28 + 5 * np.cos(10 * t)
    curve = np.hypot(np.diff(r * np.cos(t)), np.diff(r * np.sin(t))).sum()
    ends = 2 * np.pi * (28**2 + 5**2 / 2)
    assert surface_area(mask, np.eye(4)) == pytest.approx(50 * curve + ends, rel=0.05)
    hull, room = closed_hull(mask, np.eye(4))
    assert hull[room:-room, room:-room, room:-room][mask].all()
    # The hull lies between the smooth cylinder and the prism around the crests.
    prism = 50 * 20 * 33 * np.sin(np.pi / 10) + 10 * 33**2 * np.sin(np.pi / 5)
    smooth = 50 * 2 * np.pi * 28 + 2 * np.pi * 28**2
    area = 50 * curve + ends
    assert 0.95 * area / prism < gyrification_index(mask, np.eye(4)) < area / smooth


def test_the_two_sides_of_a_symmetric_brain_measure_alike():
    found = cortex_measures(brain(), ras_affine())
    left, right = found['L'], found['R']
    assert left.pial_area_mm2 == pytest.approx(right.pial_area_mm2, rel=1e-3)
    assert left.volume_mm3 == right.volume_mm3
    # Half an ellipsoid of 50, 60 and 42.5 mm, by Thomsen's formula.
    a, b, c = (np.array([20, 24, 17]) * 2.5) ** 1.6075
    whole = 4 * np.pi * ((a * b + a * c + b * c) / 3) ** (1 / 1.6075)
    assert left.pial_area_mm2 == pytest.approx(whole / 2, rel=0.1)


def test_without_a_cortex_nothing_is_measured():
    labels = np.where(np.isin(brain(), (3,)), 0, brain())
    found = cortex_measures(labels, ras_affine())
    assert np.isnan(found['L'].thickness_mm)
    assert np.isfinite(found['R'].thickness_mm)


def test_the_area_of_a_triangle_is_half_the_cross_product():
    assert triangle_areas(np.array([[[0, 0, 0], [2, 0, 0], [0, 3, 0]]])) == pytest.approx(3)
