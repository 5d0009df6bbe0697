"""The probability atlas: what it is made of, its file, and the brains drawn from it."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from babyseg_bids.errors import InputError
from babyseg_bids.labels import label_table
from babyseg_bids.synthesis import atlas as atlas_module
from babyseg_bids.synthesis.affine import (
    fit_affine,
    log_scale,
    mean_centroids,
    transform,
)
from babyseg_bids.synthesis.atlas import Atlas, load_atlas, main, sample_label_map
from babyseg_bids.synthesis.atlas_build import MIN_CHILDREN, age_weights, build, local_line

LARGE = (2, 3, 8, 41, 42, 47, 16, 10, 49)


def phantom(scale: float, *, rotation_deg: float = 0.0) -> np.ndarray:
    """A crude brain of all 27 structures, (X, Y, Z) FreeSurfer numbers, 1 mm, RAS."""
    size = np.array([64, 72, 64])
    points = np.moveaxis(np.indices(size), 0, -1) - (size - 1) / 2
    t = np.deg2rad(rotation_deg)
    turn = np.array([[np.cos(t), -np.sin(t), 0], [np.sin(t), np.cos(t), 0], [0, 0, 1]])
    x, y, z = np.moveaxis(points @ turn / scale, -1, 0)
    radius = np.sqrt((x / 20) ** 2 + (y / 24) ** 2 + (z / 18) ** 2)
    labels = np.zeros(size, int)
    pairs = [(r.index, r.mirror) for r in label_table().structures if r.hemisphere == 'L']
    left = x < 0
    labels[radius < 1] = np.where(left, 3, 42)[radius < 1]
    labels[radius < 0.8] = np.where(left, 2, 41)[radius < 0.8]
    # Every other paired structure is a ball of its own, on a ring in the white matter.
    others = [p for p in pairs if p[0] not in (2, 3)]
    for i, (one, other) in enumerate(others):
        angle = 2 * np.pi * i / len(others)
        centre = np.array([8.0, 12 * np.cos(angle), 9 * np.sin(angle)])
        ball = (np.abs(x) - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2 < 5
        labels[ball] = np.where(left, one, other)[ball]
    for index, middle in ((14, 8), (15, -8), (16, 0)):
        labels[(np.abs(x) < 2.2) & (np.abs(y - middle) < 2.5) & (np.abs(z) < 2.5)] = index
    return labels


def write_maps(folder: Path, ages: dict[int, float]) -> None:
    """Phantoms named by age, each with its scale and a slightly different pose."""
    for i, (age, scale) in enumerate(ages.items()):
        labels = phantom(scale, rotation_deg=3.0 * i - 4)
        nib.save(
            nib.Nifti1Image(labels.astype(np.int16), np.eye(4)), folder / f'{age:02d}mo.nii.gz'
        )


@pytest.fixture(scope='module')
def shipped() -> Atlas:
    return load_atlas()


@pytest.fixture(scope='module')
def small(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    folder = tmp_path_factory.mktemp('maps')
    write_maps(folder, {1: 0.9, 4: 0.97, 8: 1.03, 24: 1.1})
    return build(folder, nodes=(2, 12), same_child={}, rounds=((5, 0, 0),))


@pytest.fixture(scope='module')
def grown(shipped: Atlas) -> dict[float, tuple[np.ndarray, np.ndarray]]:
    """One individual at three ages."""
    return {age: sample_label_map(shipped, age, seed=7, spacing=1.5) for age in (1.0, 6.0, 24.0)}


def volumes(labels: np.ndarray, affine: np.ndarray) -> dict[int, float]:
    voxel = abs(np.linalg.det(affine[:3, :3]))
    return {r.index: voxel * (labels == r.index).sum() for r in label_table().structures}


@pytest.mark.parametrize('node', [1, 3, 6, 12, 24])
def test_every_age_counts_at_least_three_children_and_no_child_for_most(node: float) -> None:
    ages = np.array([1, 2, 3, 4, 5, 6, 7, 8, 12, 24, 36.0])
    children = ['a', 'b', 'c', 'a', 'd', 'e', 'f', 'g', 'h', 'i', 'j']
    weights = age_weights(ages, children, node)
    each = {c: sum(w for w, k in zip(weights, children, strict=True) if k == c) for c in children}
    assert sum(each.values()) == pytest.approx(1)
    assert 1 / sum(w**2 for w in each.values()) >= MIN_CHILDREN - 1e-5
    assert max(each.values()) < 0.5


def test_two_maps_of_one_child_do_not_count_as_two_children() -> None:
    ages = np.array([1, 4, 8.0])
    assert len(age_weights(ages, ['a', 'b', 'c'], 4)) == 3
    with pytest.raises(InputError, match='at least 3 children'):
        age_weights(ages, ['a', 'a', 'c'], 4)


def test_a_map_without_one_of_the_structures_is_refused_by_name(tmp_path: Path) -> None:
    labels = phantom(1.0)
    labels[labels == 18] = 2
    nib.save(nib.Nifti1Image(labels.astype(np.int16), np.eye(4)), tmp_path / '03mo.nii.gz')
    with pytest.raises(InputError, match=r'03mo\.nii\.gz has no voxel of Left-Amygdala'):
        build(tmp_path)


def test_a_folder_without_label_maps_gives_one_sentence_and_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(['build', str(tmp_path), str(tmp_path / 'a.npz')]) == 1
    assert capsys.readouterr().err.count('\n') == 1


def test_log_scale_sees_stretch_and_not_rotation() -> None:
    t = 0.4
    turn = np.array([[np.cos(t), -np.sin(t), 0], [np.sin(t), np.cos(t), 0], [0, 0, 1]])
    matrix = np.eye(4)
    matrix[:3, :3] = turn @ np.diag([1.2, 0.9, 1.0])
    np.testing.assert_allclose(np.exp(log_scale(matrix)), [1.2, 0.9, 1.0], atol=1e-12)


def test_fit_affine_recovers_a_known_affine() -> None:
    rng = np.random.default_rng(3)
    matrix = np.eye(4)
    matrix[:3] += 0.2 * rng.standard_normal((3, 4))
    source = rng.standard_normal((10, 3))
    target = source @ matrix[:3, :3].T + matrix[:3, 3]
    np.testing.assert_allclose(fit_affine(source, target), matrix, atol=1e-12)


def symmetric_centroids() -> np.ndarray:
    """Positions (S, 3) of structures, those of the right mirroring those of the left."""
    mirror = label_table().mirror_channels[1:] - 1
    base = np.random.default_rng(4).standard_normal((len(mirror), 3))
    return (base + base[mirror] * (-1, 1, 1)) / 2


def test_mean_centroids_are_symmetric_and_of_the_geometric_mean_size() -> None:
    base, mirror = symmetric_centroids(), label_table().mirror_channels[1:] - 1
    mean = mean_centroids(np.array([0.8 * base + 5, 1.25 * base - 3]))
    np.testing.assert_allclose(mean, mean[mirror] * (-1, 1, 1), atol=1e-9)
    ratio = np.linalg.norm(mean[:, 0]) / np.linalg.norm(base[:, 0])
    assert ratio == pytest.approx(1, abs=1e-6)


def test_mean_centroids_of_brains_of_which_one_lacks_a_structure_are_those_of_the_whole() -> None:
    base = symmetric_centroids()
    brains = np.array([0.8 * base + 5, 1.25 * base - 3])
    lacking = brains.copy()
    lacking[0, 3] = np.nan
    # The brain that has the structure says where it is; the mean is defined up to affine maps.
    mean, whole = mean_centroids(lacking), mean_centroids(brains)
    np.testing.assert_allclose(transform(fit_affine(mean, whole), mean.T).T, whole, atol=1e-6)
    own, known = fit_affine(lacking[0], base), fit_affine(brains[0], base)
    np.testing.assert_allclose(own, known, atol=1e-12)


@pytest.mark.filterwarnings('error')
def test_a_structure_that_all_brains_lack_is_none_in_the_mean_and_changes_no_other() -> None:
    base, mirror = symmetric_centroids(), label_table().mirror_channels[1:] - 1
    brains = np.array([0.8 * base + 5, 1.25 * base - 3])
    brains[:, 3] = np.nan
    mean = mean_centroids(brains)
    absent = np.zeros(len(mirror), bool)
    absent[[3, mirror[3]]] = True
    assert np.array_equal(np.isnan(mean).any(1), absent)
    fitted = transform(fit_affine(mean, base), mean[~absent].T).T
    np.testing.assert_allclose(fitted, base[~absent], atol=1e-6)


def test_a_line_in_log_age_is_read_exactly_whatever_the_weights() -> None:
    ages = np.array([1, 2, 4, 8.0])
    values = np.c_[np.log2(ages), 3 - np.log2(ages)]
    got = local_line(ages, values, 4, np.array([0.7, 0.1, 0.1, 0.1]))
    np.testing.assert_allclose(got, [2, 1], atol=1e-9)


def test_a_built_atlas_is_symmetric_and_its_probabilities_sum_to_one(small: Atlas) -> None:
    dense = small.dense(4)
    np.testing.assert_allclose(dense.sum(0), 1, atol=0.04)
    np.testing.assert_array_equal(dense, dense[label_table().mirror_channels, ::-1])


def test_a_built_atlas_keeps_the_growth_and_the_sides_of_its_children(small: Atlas) -> None:
    # The phantoms grow by 1.1 / 0.9 from 1 to 24 months, in a straight line over log age.
    growth = np.exp(small.log_scale[1] - small.log_scale[0]).mean()
    expected = np.exp(np.log(1.1 / 0.9) * np.log(6) / np.log(24))
    assert growth == pytest.approx(expected, abs=0.02)
    labels, affine = sample_label_map(small, 4, seed=0, spacing=1.5)
    x = np.indices(labels.shape)[0] * affine[0, 0] + affine[0, 3]
    assert x[labels == 2].mean() < 0 < x[labels == 41].mean()
    assert set(np.unique(labels)) == {r.index for r in label_table().rows}


def test_an_atlas_file_holds_all_that_sampling_needs(small: Atlas, tmp_path: Path) -> None:
    small.save(tmp_path / 'sub' / 'a.npz')
    again = load_atlas(tmp_path / 'sub' / 'a.npz')
    for a, b in zip(
        sample_label_map(small, 5, seed=2, spacing=2),
        sample_label_map(again, 5, seed=2, spacing=2),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('content', [None, b'nothing', b''])
def test_a_missing_or_damaged_atlas_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / 'broken.npz'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r'broken\.npz'):
        load_atlas(path)


def test_an_atlas_of_another_format_is_refused(
    small: Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.save(tmp_path / 'a.npz')
    monkeypatch.setattr(atlas_module, 'FORMAT', 99)
    with pytest.raises(InputError, match='another version'):
        load_atlas(tmp_path / 'a.npz')


def test_the_shipped_atlas_is_small(root: Path) -> None:
    files = list((root / 'babyseg_bids' / 'data' / 'atlas').iterdir())
    assert files
    assert sum(f.stat().st_size for f in files) <= 3_000_000


def test_a_sampled_brain_has_every_structure_on_its_own_side(grown: dict) -> None:
    for labels, affine in grown.values():
        assert labels.dtype == np.int16
        assert set(np.unique(labels)) == {r.index for r in label_table().rows}
        x = np.indices(labels.shape)[0] * affine[0, 0] + affine[0, 3]
        middle = x[labels > 0].mean()
        for row in label_table().structures:
            if row.hemisphere == 'L':
                assert x[labels == row.index].mean() < middle < x[labels == row.mirror].mean()


def test_sampled_structures_hang_together(grown: dict) -> None:
    labels, _ = grown[6.0]
    for index in LARGE:
        components, count = ndimage.label(labels == index, np.ones((3, 3, 3)))
        sizes = np.bincount(components.ravel())[1:]
        assert count >= 1
        assert sizes.max() > 0.9 * sizes.sum(), label_table()[index].name


def test_a_sampled_cortex_is_a_folded_ribbon(grown: dict) -> None:
    labels, affine = grown[6.0]
    cortex = np.isin(labels, (3, 42))
    # A smooth shell would have far less surface: cortex is thin and folded. The depth of a voxel
    # below the nearest other tissue bounds half the ribbon's thickness.
    depth = ndimage.distance_transform_edt(cortex) * affine[0, 0]
    assert np.quantile(depth[cortex], 0.95) < 6
    hull = ndimage.binary_fill_holes(ndimage.binary_closing(labels > 0, iterations=6))
    shell = ndimage.distance_transform_edt(hull) * affine[0, 0]
    assert np.quantile(shell[cortex], 0.9) > 10, 'no cortex in the depth of the sulci'


def test_a_child_grows_and_stays_the_same_child(grown: dict, shipped: Atlas) -> None:
    sizes = [sum(volumes(*grown[age]).values()) for age in (1.0, 6.0, 24.0)]
    assert sizes[0] < sizes[1] < sizes[2]
    assert 1.6 < sizes[2] / sizes[0] < 2.6
    again, affine = sample_label_map(shipped, 6.0, seed=7, spacing=1.5)
    np.testing.assert_array_equal(again, grown[6.0][0])
    np.testing.assert_array_equal(affine, grown[6.0][1])
    other, _ = sample_label_map(shipped, 6.0, seed=8, spacing=1.5)
    assert other.shape != again.shape or (other != again).mean() > 0.02


def test_voxel_size_changes_the_grid_and_not_the_brain(shipped: Atlas, grown: dict) -> None:
    fine = volumes(*grown[6.0])
    coarse = volumes(*sample_label_map(shipped, 6.0, seed=7, spacing=2.5))
    for index in LARGE:
        assert coarse[index] == pytest.approx(fine[index], rel=0.06)


def test_ages_beyond_the_atlas_take_the_nearest_one(shipped: Atlas) -> None:
    for age, node in ((0.0, 0), (200.0, -1)):
        weights = shipped.blend(age)
        assert weights[node] == 1
        assert weights.sum() == 1


@pytest.mark.needs_shared('data/label-maps/infant')
@pytest.mark.parametrize(('age', 'stem'), [(3.0, '03mo'), (6.0, '06mo'), (12.0, '12mo')])
def test_sampled_volumes_are_those_of_children_of_the_age(
    shared: Path, shipped: Atlas, age: float, stem: str
) -> None:
    real = nib.load(shared / 'data/label-maps/infant' / f'{stem}.nii.gz')
    channels = label_table().channels(np.asarray(real.dataobj))
    expected = np.bincount(channels.ravel(), minlength=len(label_table()))
    labels, affine = sample_label_map(shipped, age, seed=1, spacing=1.5)
    got = volumes(labels, affine)
    assert sum(got.values()) == pytest.approx(expected[1:].sum(), rel=0.2)
    tissue = {r.index: r.tissue for r in label_table().rows}
    for name in ('white-matter', 'cortex', 'deep-grey', 'cerebellum'):
        rows = label_table().rows
        want = sum(expected[c] for c, r in enumerate(rows) if r.tissue == name)
        have = sum(v for i, v in got.items() if tissue[i] == name)
        assert have == pytest.approx(want, rel=0.35), name
