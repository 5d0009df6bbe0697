from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from network_phantoms import CHANNEL, SideNetwork, Stand
from orientations import CODES, reorient
from scipy import ndimage

from babyseg_bids.errors import InputError, ModelError, UsageError
from babyseg_bids.labels import label_table
from babyseg_bids.network import (
    Model,
    boxes,
    choose_device,
    head,
    inference,
    load_model,
    looks,
    prediction,
    segment,
)
from babyseg_bids.network.grid import (
    averaged,
    foreground_box,
    from_grid,
    onto_grid,
    reference_box,
    working_grid,
)
from babyseg_bids.network.intensity import normalise
from babyseg_bids.network.prediction import predict
from babyseg_bids.network.tissue import redistribute
from babyseg_bids.network.unet import GroupUNet, NetworkConfig
from babyseg_bids.network.weights import new_model, save_model


@pytest.fixture(autouse=True)
def stands_upright(monkeypatch):
    """Stand-ins know too few structures to tell how a head stands (see test_head)."""
    monkeypatch.setattr(head, '_SURE', -2.0)


def posteriors(x, model, **options):
    """Posteriors (C, *size) of the whole grid."""
    result = predict(x, model, **options)
    whole = torch.zeros(len(label_table()), *x.shape[1:])
    whole[0] = 1
    whole[(slice(None), *result.box)] = result.posteriors
    return whole


@pytest.fixture
def sides():
    return Model('sides', '0', SideNetwork(), label_table(), 2.0, 16, {})


def phantom(spacing=2.0):
    """A bright ellipsoid in RAS, larger on the left (x < 0), and its affine."""
    size = (np.array([64, 72, 60]) / spacing).astype(int)
    affine = np.diag([spacing] * 3 + [1.0])
    affine[:3, 3] = -spacing * (size - 1) / 2
    x, y, z = np.meshgrid(
        *[affine[i, 3] + spacing * np.arange(s) for i, s in enumerate(size)], indexing='ij'
    )
    height = np.where(x < 0, 26, 18)
    image = 100.0 * ((x / 24) ** 2 + (y / 28) ** 2 + (z / height) ** 2 < 1)
    return image.astype(np.float32), affine


@pytest.mark.parametrize('codes', CODES)
def test_left_stays_left_in_all_48_orientations(sides, codes):
    image, affine = reorient(*phantom(), codes)
    result = segment([(image, affine)], sides, device='cpu')
    assert result.labels.shape == image.shape
    for number, sign in ((2, -1), (41, 1)):
        where = nib.affines.apply_affine(affine, np.argwhere(result.labels == number))
        assert (sign * where[:, 0] > -1.01).all()
    assert result.soft_volumes[2] > 1.2 * result.soft_volumes[41]


def test_all_orientations_give_the_same_volumes(sides):
    volumes = [
        segment([reorient(*phantom(), codes)], sides, device='cpu').soft_volumes[2]
        for codes in CODES
    ]
    assert max(volumes) / min(volumes) < 1.001


@pytest.mark.parametrize('angle', [-25, 12, 30])
@pytest.mark.parametrize('axis', [0, 1, 2])
def test_left_stays_left_under_an_oblique_header(sides, axis, angle):
    image, affine = phantom()
    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    i, j = [a for a in range(3) if a != axis]
    turn = np.eye(4)
    turn[i, i] = turn[j, j] = c
    turn[i, j], turn[j, i] = -s, s
    straight = segment([(image, affine)], sides, device='cpu')
    oblique = segment([(image, turn @ affine)], sides, device='cpu')
    np.testing.assert_array_equal(straight.labels, oblique.labels)


def test_the_label_map_follows_the_image_on_a_fine_anisotropic_grid(sides):
    image, affine = phantom(1.0)
    image, affine = image[:, ::3], affine @ np.diag([1, 3, 1, 1])
    result = segment([(image, affine)], sides, device='cpu')
    a, b = image > 50, result.labels > 0
    assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.93


def test_a_second_scan_on_another_grid_is_brought_onto_the_first(sides):
    image, affine = phantom()
    other, other_affine = reorient(*phantom(1.0), 'PIR')
    one = segment([(image, affine)], sides, device='cpu')
    two = segment([(image, affine), (other, other_affine)], sides, device='cpu')
    assert (one.labels != two.labels).mean() < 0.01


def test_order_of_further_scans_changes_no_bit(sides):
    rng = np.random.default_rng(0)
    image, affine = phantom()
    scans = [(image + rng.random(image.shape, np.float32), affine) for _ in range(4)]
    a = segment(scans, sides, device='cpu')
    b = segment([scans[0], *scans[:0:-1]], sides, device='cpu')
    np.testing.assert_array_equal(a.uncertainty, b.uncertainty)


def test_probabilities_agree_with_labels_volumes_and_uncertainty(sides):
    image, affine = phantom()
    result = segment([(image, affine)], sides, device='cpu', keep_probabilities=True)
    p = result.probabilities.astype(np.float32)
    np.testing.assert_allclose(p.sum(-1), 1, atol=0.01)
    np.testing.assert_allclose(1 - p.max(-1), result.uncertainty, atol=0.01)
    table = label_table().indices
    agree = table[p.argmax(-1)] == result.labels
    assert agree[result.uncertainty < 0.45].all()
    np.testing.assert_allclose(
        p[..., table.tolist().index(2)].sum() * 8, result.soft_volumes[2], rtol=0.01
    )
    total = sum(result.soft_volumes.values())
    np.testing.assert_allclose(total, image.size * 8, rtol=1e-3)


def test_confidence_is_the_mean_probability_inside_a_label(sides):
    result = segment([phantom()], sides, device='cpu')
    inside = result.labels == 2
    expected = (1 - result.uncertainty[inside]).mean()
    assert result.confidence[2] == pytest.approx(expected, abs=1e-4)
    assert np.isnan(result.confidence[17])


def test_bad_scans_are_refused(sides):
    image, affine = phantom()
    with pytest.raises(InputError, match='no scan'):
        segment([], sides)
    with pytest.raises(InputError, match='3-D'):
        segment([(image[0], affine)], sides)
    with pytest.raises(InputError, match='NaN'):
        segment([(np.where(image > 0, np.nan, image), affine)], sides)


def test_the_way_to_the_grid_and_back_recovers_a_smooth_image():
    image, affine = phantom(1.0)
    x = np.linspace(0, 3, image.shape[0])[:, None, None]
    image = (np.sin(x) + np.zeros_like(image)).astype(np.float32)
    image, affine = reorient(image, affine, 'SLP')
    box = foreground_box(np.ones_like(image))
    grid = working_grid(affine, box, spacing=1.5, multiple=8)
    there = onto_grid(torch.from_numpy(image.copy()), affine, grid)
    back = from_grid(there, grid, box).numpy()
    inner = tuple(slice(6, -6) for _ in range(3))
    np.testing.assert_allclose(back[inner], image[inner], atol=0.02)
    whole = tuple(slice(0, s) for s in grid.size)
    assert reference_box(whole, grid, image.shape) == box


@pytest.mark.parametrize('axes', ['RAS', 'SLP', 'PIR', 'AIL'])
def test_a_scan_parallel_to_the_grid_is_resampled_as_any_other(axes):
    """Against SciPy, with and without the blur, on a grid that reaches beyond the scan."""
    image = np.random.default_rng(0).random((21, 24, 27)).astype(np.float32)
    affine = nib.affines.from_matvec(np.diag([1.1, 0.9, 2.0]), [-10, 3, 7])
    box = foreground_box(np.ones_like(image))
    grid = working_grid(affine, box, spacing=1.5, multiple=8)
    scan, scan_affine = reorient(image, affine, axes)
    for antialias in (False, True):
        found = onto_grid(torch.from_numpy(scan.copy()), scan_affine, grid, antialias=antialias)
        where = np.linalg.inv(affine) @ grid.affine
        sigmas = np.where((abs(where[:3, :3]).max(1) > 1) & antialias, 0.42, 0)
        sigmas = sigmas * abs(where[:3, :3]).max(1)
        smooth = ndimage.gaussian_filter(image, sigmas, mode='constant', truncate=8)
        points = nib.affines.apply_affine(where, np.moveaxis(np.indices(grid.size), 0, -1))
        padded = np.pad(smooth, 1)  # As zeros beyond the scan, with which its border mixes.
        expected = ndimage.map_coordinates(
            padded, np.moveaxis(points + 1, -1, 0), order=1, mode='constant'
        )
        # The blur ends at three deviations.
        np.testing.assert_allclose(found.numpy(), expected, atol=5e-3 if antialias else 2e-5)


@pytest.mark.parametrize('order', ['C', 'F'])
def test_blocks_of_a_very_fine_scan_are_averaged_where_they_are(order):
    coarse = np.random.default_rng(0).random((5, 6, 7)).astype(np.float32)
    affine = nib.affines.from_matvec(np.diag([0.6, 0.6, -0.5]), [1, 2, 3])
    fine = np.asarray(np.kron(coarse, np.ones((3, 3, 1), np.float32)), order=order)
    shift = nib.affines.from_matvec(np.diag([1 / 3, 1 / 3, 1]), [-1 / 3, -1 / 3, 0])
    small, small_affine, sizes = averaged(fine, affine @ shift, 1.0)
    assert sizes == (3, 3, 1)
    np.testing.assert_allclose(small, coarse, rtol=1e-6)
    np.testing.assert_allclose(small_affine, affine, atol=1e-9)
    same, _, sizes = averaged(coarse, affine, 1.0)
    assert same is coarse
    assert sizes == (1, 1, 1)


def test_a_very_fine_scan_is_labelled_on_its_own_grid_in_slabs(sides, monkeypatch):
    image, affine = phantom()
    fine = np.repeat(np.repeat(np.repeat(image, 4, 0), 4, 1), 4, 2)
    shift = nib.affines.from_matvec(np.eye(3) / 4, [-0.375] * 3)
    whole = segment([(fine, affine @ shift)], sides, keep_probabilities=True)
    coarse = segment([(image, affine)], sides)
    # The labels of 2 mm are those of the voxels in the middle of each block.
    same = whole.labels[1::4, 1::4, 1::4] == coarse.labels
    assert same.mean() > 0.99
    for index, volume in coarse.soft_volumes.items():
        assert whole.soft_volumes[index] == pytest.approx(volume, rel=0.02, abs=1)
    monkeypatch.setattr(inference, '_SLAB', 100_000)
    slabs = segment([(fine, affine @ shift)], sides, keep_probabilities=True)
    assert (slabs.labels == whole.labels).mean() > 0.9999
    np.testing.assert_allclose(slabs.uncertainty, whole.uncertainty, atol=1e-6)
    np.testing.assert_allclose(slabs.probabilities, whole.probabilities, atol=1e-3)
    assert slabs.soft_volumes == pytest.approx(whole.soft_volumes)
    assert slabs.confidence == pytest.approx(whole.confidence, nan_ok=True)


def test_normalise_ignores_masked_background():
    x = torch.zeros(20, 20, 20)
    x[5:15, 5:15, 5:15] = torch.linspace(50, 150, 1000).view(10, 10, 10)
    y = normalise(x)
    assert y[0, 0, 0] == 0 and y.max() == 1
    assert y[5, 5, 5] == pytest.approx(50 / 150, abs=0.02)
    assert (normalise(torch.full((4, 4, 4), 3.0)) == 0).all()
    mask = (x > 0).float()
    assert (normalise(7 * mask) == mask).all()
    assert (normalise(torch.zeros(4, 4, 4)) == 0).all()


def test_no_island_comes_back_in_the_result():
    class Bright(Stand):
        """Everything bright is white matter, of either side."""

        def forward(self, x):
            logits = torch.full((1, 28, *x.shape[2:]), -20.0)
            logits[:, 0] = 0
            logits[:, [1, 16]] = 40 * x - 20
            return logits

    scan = torch.zeros(1, 48, 48, 48)
    scan[:, 4:32, 4:32, 4:32] = 1
    scan[:, 34:36, 4:8, 4:8] = 1  # Inside the box that the near brain has.
    about = {'name': '', 'version': '', 'spacing': 1.0, 'training': {}}
    model = new_model(Bright(), **about)
    found = predict(scan, model).channels(scan.shape[1:])
    assert not found[33:37].any()
    assert found[6:30, 6:30, 6:30].all()


def test_a_saved_model_loads_and_describes_itself(tmp_path):
    config = NetworkConfig(labels=28, encoder=(2,), decoder=(2,), head=(2,), patch=3)
    path = tmp_path / 'tiny.safetensors'
    network = GroupUNet(config)
    about = {'name': 'tiny', 'version': '1', 'spacing': 2.5, 'temperature': 1.5}
    about['training'] = {'steps': 3}
    save_model(path, new_model(network, **about))
    model = load_model(path)
    assert {k: getattr(model, k) for k in about} == about
    assert model.multiple == 6
    weight = network.enc[0][0].conv_b.weight
    torch.testing.assert_close(model.network.enc[0][0].conv_b.weight, weight, atol=1e-3, rtol=0)


def test_a_missing_or_damaged_model_is_named(tmp_path):
    with pytest.raises(ModelError, match='no model'):
        load_model('nothing-of-that-name')
    bad = tmp_path / 'bad.safetensors'
    bad.write_bytes(b'nonsense')
    with pytest.raises(ModelError, match=r'bad\.safetensors cannot be read'):
        load_model(bad)


def test_the_shipped_model_has_all_labels():
    model = load_model()
    assert model.name == 'default'
    assert model.network.config.labels == len(label_table()) == 28


def test_an_absent_device_is_refused_with_the_option_to_change():
    assert choose_device('cpu') == 'cpu'
    with pytest.raises(UsageError, match='--device'):
        choose_device('cuda:99')
    with pytest.raises(UsageError, match='abacus'):
        choose_device('abacus')


def test_a_network_that_prefers_one_side_is_balanced_by_the_mirrored_pass():
    class Lopsided(SideNetwork):
        def forward(self, x):
            logits = super().forward(x)
            logits[:, CHANNEL[2]] += 3
            return logits

    model = Model('lopsided', '0', Lopsided(), label_table(), 2.0, 16, {})
    x = torch.rand(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    p = posteriors(x, model)
    q = posteriors(x.flip(1), model)
    mirror = torch.from_numpy(label_table().mirror_channels)
    torch.testing.assert_close(p, q.flip(1)[mirror])
    assert not torch.allclose(posteriors(x, model, both_sides=False), p, atol=1e-3)


@pytest.fixture
def patches():
    """A small random model that takes in 2 x 2 x 2 voxels together."""
    torch.manual_seed(0)
    config = NetworkConfig(labels=28, encoder=(4, 4), decoder=(4, 4), head=(4,), patch=2)
    network = GroupUNet(config).eval().requires_grad_(False)
    return Model('patches', '0', network, label_table(), 1.0, 8, {})


@pytest.mark.parametrize('scans', [1, 3])
def test_posteriors_in_blocks_equal_the_whole(patches, scans, monkeypatch):
    x = torch.rand(scans, 48, 40, 56)
    whole = predict(x, patches)
    monkeypatch.setattr('babyseg_bids.network.prediction._BLOCK', 8000)
    blocks = predict(x, patches)
    assert whole.box == blocks.box
    torch.testing.assert_close(whole.posteriors, blocks.posteriors, atol=1e-5, rtol=0)
    mirror = torch.from_numpy(label_table().mirror_channels)
    for both_sides in (False, True):
        result = predict(x, patches, both_sides=both_sides)
        with torch.inference_mode():
            logits = patches.network(x[None])[0]
            if both_sides:
                logits = (logits + patches.network(x.flip(1)[None])[0].flip(1)[mirror]) / 2
            expected = logits.softmax(0)[(slice(None), *result.box)].contiguous()
            seen = x[(slice(None), *result.box)]
            redistribute(expected, seen, label_table(), spacing=1.0)
        torch.testing.assert_close(result.posteriors, expected, atol=1e-4, rtol=0)


def test_blocks_cover_what_is_near_the_brain_once(monkeypatch):
    monkeypatch.setattr(boxes, '_SHORTEST', 8)
    near = torch.zeros(40, 52, 34, dtype=torch.bool)
    near[3:9, 2:50, 5:30] = near[20:38, 10:30, 1:33] = True
    done = torch.zeros(near.shape, dtype=torch.int)
    for block in boxes.covering(near, 2500):
        done[block] += 1
    assert (done[near] == 1).all() and done.max() == 1
    # Less than the box around both parts is computed.
    assert done.sum() < 0.7 * 35 * 48 * 32


class Bright(Stand):
    """Calls bright voxels the brainstem, and remembers the sizes that it saw."""

    config = NetworkConfig(labels=28, encoder=(1,), decoder=(1,), head=(28,))

    def __init__(self):
        super().__init__()
        self.sizes = []
        self.scans = []

    def forward(self, x):
        self.sizes.append(tuple(x.shape[2:]))
        self.scans.append(x.shape[1])
        logits = x.new_full((1, 28, *x.shape[2:]), -9.0)
        logits[:, 0] = 4.0
        logits[:, int(np.flatnonzero(label_table().indices == 16)[0])] = x.mean(1)
        return logits


def test_further_passes_see_the_brain_and_its_surroundings_only():
    network = Bright()
    model = Model('bright', '0', network, label_table(), 2.0, 2, {})
    x = torch.zeros(1, 80, 60, 64)
    x[:, 50:60, 4:20, 30:34] = 9.0
    result = predict(x, model)
    first, *others = network.sizes
    # The head is found at a glance, in voxels twice as wide.
    assert first == (40, 30, 32)
    # Its size, two voxels on each side that may be brain, and eight more, where there are any.
    assert others == [(30, 30, 24)] * 2
    found = result.channels(x.shape[1:]) > 0
    assert torch.equal(found, x[0] > 1)


def test_one_scan_finds_the_head_and_all_are_segmented():
    network = Bright()
    model = Model('bright', '0', network, label_table(), 2.0, 2, {})
    x = torch.zeros(3, 40, 40, 40)
    x[:, 10:20, 4:20, 20:24] = torch.tensor([6.0, 9.0, 9.0])[:, None, None, None]
    predict(x, model)
    assert network.scans == [1, 3, 3]
    assert network.sizes[0] == (20, 20, 20)
    assert len(set(network.sizes[1:])) == 1


def test_without_a_brain_everything_is_looked_at_and_nothing_labelled():
    network = Bright()
    model = Model('bright', '0', network, label_table(), 2.0, 2, {})
    result = predict(torch.zeros(1, 24, 20, 16), model)
    assert network.sizes == [(12, 10, 8), *[(24, 20, 16)] * 2]
    assert not result.channels((24, 20, 16)).any()


def test_a_mirrored_head_gives_the_mirrored_result_in_patches(patches):
    x = torch.rand(2, 32, 32, 32)
    mirror = torch.from_numpy(label_table().mirror_channels)
    p, q = posteriors(x, patches), posteriors(x.flip(1), patches)
    torch.testing.assert_close(p, q.flip(1)[mirror], atol=1e-5, rtol=0)


def test_the_temperature_softens_the_posteriors(patches):
    x = torch.rand(1, 32, 32, 32)
    hot = replace(patches, temperature=4.0)
    assert posteriors(x, hot).max(0).values.mean() < posteriors(x, patches).max(0).values.mean()


def test_the_unet_in_blocks_where_memory_is_short(monkeypatch):
    class Local(Stand):
        """Logits that depend on their own voxel alone: blocks must give the same."""

        config = NetworkConfig(labels=28, encoder=(1,), decoder=(1,), head=(28,))

        def forward(self, x):
            steps = torch.arange(28.0).view(1, -1, 1, 1, 1)
            return 9 * torch.cos(steps * x.mean(1, keepdim=True))

    # Rounding decides whether a structure of two voxels is a speck.
    monkeypatch.setattr(prediction, 'without_specks', lambda *_, **__: None)
    model = Model('local', '0', Local(), label_table(), 2.0, 2, {})
    x = torch.rand(2, 40, 52, 34)
    whole = posteriors(x, model)
    monkeypatch.setattr('babyseg_bids.network.boxes._SMALLEST', 16)
    monkeypatch.setattr('babyseg_bids.network.boxes._OVERLAP', 8)
    monkeypatch.setattr(looks, 'free_memory', lambda _: 0.01)
    torch.testing.assert_close(posteriors(x, model), whole, atol=1e-5, rtol=0)


def test_too_small_a_gpu_tries_blocks_then_the_cpu_and_says_so(patches, monkeypatch, caplog):
    tried = []
    find, real = head._find, prediction._predict

    def small(scans, part, model, device, room, both_sides):
        tried.append((device, room))
        if device != 'cpu':
            raise torch.OutOfMemoryError
        return real(scans, part, model, device, room, both_sides)

    read = head.read_compass
    monkeypatch.setattr(head, 'read_compass', lambda x, *, spacing, **_: read(x, spacing=spacing))
    monkeypatch.setattr(head, '_find', lambda x, model, _, room: find(x, model, 'cpu', room))
    monkeypatch.setattr(prediction, '_predict', small)
    monkeypatch.setattr(looks, 'free_memory', lambda _: 2.0)
    monkeypatch.setattr(inference, 'choose_device', lambda _: 'cuda:0')
    prepare = inference._on
    monkeypatch.setattr(inference, '_on', lambda g, s, _: prepare(g, s, 'cpu'))
    scan = (np.random.default_rng(0).random((20, 24, 16)), np.eye(4))
    result = segment([scan], patches, device='cuda')
    assert tried == [('cuda:0', 2.0), ('cuda:0', 0.5), ('cpu', 2.0)]
    assert result.device == 'cpu' and result.seconds > 0
    assert 'trying blocks' in caplog.text and 'trying the CPU' in caplog.text


def test_a_gpu_too_small_for_the_scans_themselves_leaves_them_to_the_cpu(
    patches, monkeypatch, caplog
):
    real = inference._on

    def small(grid, scans, device):
        if device != 'cpu':
            raise torch.OutOfMemoryError
        return real(grid, scans, device)

    monkeypatch.setattr(inference, '_on', small)
    monkeypatch.setattr(inference, 'choose_device', lambda _: 'cuda:0')
    scan = (np.random.default_rng(0).random((20, 24, 16)), np.eye(4))
    assert segment([scan], patches, device='cuda').device == 'cpu'
    assert 'trying the CPU' in caplog.text
