from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from babyseg_bids.errors import InputError, UsageError
from babyseg_bids.labels import label_table
from babyseg_bids.synthesis import artefacts, contrast, deformation, maps, surroundings
from babyseg_bids.synthesis.cli import main as synth_main
from babyseg_bids.synthesis.generator import draw_anatomy, draw_sample
from babyseg_bids.synthesis.settings import SynthesisSettings

TABLE = maps.class_table()
SETTINGS_2D = SynthesisSettings(size=(48, 56))
SETTINGS_3D = SynthesisSettings(size=(24, 24, 24), spacing=4.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def phantom(dim=2, side=90):
    """White matter inside cortex on both sides, with a ventricle on the left."""
    axes = np.meshgrid(*[np.arange(side) - (side - 1) / 2] * dim, indexing='ij')
    radius = np.sqrt(sum(a**2 for a in axes))
    left = axes[0] < 0
    numbers = np.where(radius < 32, np.where(left, 3, 42), 0)
    numbers = np.where(radius < 24, np.where(left, 2, 41), numbers)
    numbers = np.where((radius < 8) & left, 4, numbers)
    lut = np.zeros(10_000, np.uint8)
    lut[TABLE.numbers] = np.arange(len(TABLE))
    distance = np.clip(np.ceil(radius - 32), 0, 255).astype(np.uint8)
    return maps.TrainingMap('phantom', lut[numbers], distance, False)


def test_every_class_leads_to_a_label_and_mirrors_twice_to_itself():
    assert TABLE.channel.max() == len(label_table()) - 1
    np.testing.assert_array_equal(TABLE.mirror[TABLE.mirror], np.arange(len(TABLE)))
    mirrored = label_table().mirror_channels[TABLE.channel]
    np.testing.assert_array_equal(TABLE.channel[TABLE.mirror], mirrored)


def test_finer_source_labels_count_as_the_structure_they_belong_to():
    indices = label_table().indices
    for source, target in {5: 4, 63: 43, 46: 47, 1172: 8, 2077: 41, 24: 0, 85: 0}.items():
        assert indices[TABLE.channel[TABLE.of(source)[0]]] == target


@pytest.mark.parametrize('settings', [SETTINGS_2D, SETTINGS_3D])
def test_a_sample_has_images_in_range_and_labels_of_its_map(settings):
    source = phantom(len(settings.size))
    for seed in range(8):
        sample = draw_sample([source], seed=seed, settings=settings)
        assert sample.images.shape[1:] == sample.target.shape == settings.size
        assert sample.images.isfinite().all()
        assert sample.images.min() >= 0 and sample.images.max() <= 1
        present = set(label_table().indices[sample.target.unique()].tolist())
        # A mirrored ventricle is the right one.
        assert present <= {0, 2, 3, 4, 41, 42, 43}


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_sample():
    a, b, c = (draw_sample([phantom()], seed=s, settings=SETTINGS_2D) for s in (5, 5, 6))
    assert torch.equal(a.images, b.images) and torch.equal(a.target, b.target)
    assert a.record == b.record
    assert not torch.equal(a.target, c.target)


def test_left_labels_stay_left_whether_or_not_the_map_is_mirrored():
    settings = replace(SETTINGS_2D, rotation_deg=0, warp_sd=0, translation=0, shear=0)
    ventricle_sides = set()
    for seed in range(12):
        classes, _ = draw_anatomy(
            phantom(), settings=settings, table=TABLE, generator=generator(seed)
        )
        numbers = label_table().indices[TABLE.channel[classes.numpy()]]
        x = np.arange(numbers.shape[0])[:, None] - (numbers.shape[0] - 1) / 2
        assert (np.broadcast_to(x, numbers.shape)[np.isin(numbers, (2, 3, 4))] < 0.6).all()
        assert (np.broadcast_to(x, numbers.shape)[np.isin(numbers, (41, 42, 43))] > -0.6).all()
        ventricle_sides |= set(numbers[np.isin(numbers, (4, 43))].tolist())
    assert ventricle_sides == {4, 43}


@pytest.mark.parametrize('size', [(64, 48), (32, 40, 32)])
def test_warps_are_invertible_and_do_not_fold(size):
    velocity = 1.5 * deformation.smooth_field(
        size, points=4, channels=len(size), generator=generator()
    )
    there = deformation.integrate(velocity)
    back = deformation.integrate(-velocity)
    identity = deformation.grid(size)
    round_trip = there + deformation.sample_field(back, identity + there)
    inner = (slice(None), *[slice(8, -8)] * len(size))
    assert round_trip[inner].abs().max() < 0.1
    moved = (identity + there).numpy()
    jacobian = np.stack([np.stack(np.gradient(m), -1) for m in moved], -2)
    assert (np.linalg.det(jacobian) > 0).all()


def test_rotations_keep_lengths():
    for n in (1, 3):
        matrix = deformation.rotation(torch.rand(n))
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)))
        assert matrix.det() > 0


def test_mixture_has_the_means_that_were_asked_for():
    classes = torch.arange(3).repeat_interleave(10_000).view(3, 100, 100)
    means = torch.tensor([0.1, 0.5, 0.9])
    image = contrast.render(classes, means, sd=0.05, texture=0, generator=generator())
    torch.testing.assert_close(image.mean((1, 2)), means, atol=0.003, rtol=0)
    assert (image.std((1, 2)) <= 0.051).all()


@pytest.mark.parametrize('weighting', contrast.WEIGHTINGS)
def test_weightings_order_the_tissues_as_named(weighting):
    draws = torch.stack(
        [
            contrast.tissue_means(TABLE, weighting=weighting, generator=generator(s))
            for s in range(40)
        ]
    ).mean(0)
    white, grey, fluid = (draws[TABLE.of(n)[0]] for n in (2, 3, 4))
    if weighting == 'adult T1':
        assert white > grey > fluid
    elif weighting.endswith('T2'):
        assert fluid > grey and fluid > white
        assert (white > grey) == (weighting == 'newborn T2')
    else:
        assert fluid < min(white, grey)


def test_sides_have_the_same_intensity_most_of_the_time():
    same = [
        torch.equal(m[TABLE.of(2)], m[TABLE.of(41)])
        for m in (contrast.random_means(TABLE, generator=generator(s)) for s in range(60))
    ]
    assert 45 <= sum(same) < 60


def test_blur_has_the_asked_for_width_and_keeps_the_sum():
    x = torch.zeros(41, 41)
    x[20, 20] = 1
    y = artefacts.blur(x, torch.tensor([2.0, 0.0]))
    assert y.sum() == pytest.approx(1, abs=1e-4)
    position = torch.arange(41) - 20.0
    assert (y.sum(1) * position**2).sum().sqrt() == pytest.approx(2, abs=0.1)
    assert y[:, 20].sum() == pytest.approx(1, abs=1e-4)


def test_thick_slices_smooth_along_their_axis_only():
    x = torch.rand(24, 24, generator=generator())
    y = artefacts.thick_slices(x, torch.tensor([3.0, 1.0]))
    assert y.shape == x.shape
    assert y.diff(dim=0).abs().mean() < 0.5 * x.diff(dim=0).abs().mean()
    assert torch.equal(artefacts.thick_slices(x, torch.ones(2)), x)


def test_rician_noise_has_rayleigh_background():
    y = artefacts.rician(torch.zeros(300, 300), sd=0.1, generator=generator())
    assert y.mean() == pytest.approx(0.1 * np.sqrt(np.pi / 2), rel=0.02)


def test_motion_changes_the_image_but_leaves_the_object_in_place():
    x = torch.zeros(64, 64)
    x[20:44, 24:40] = 1
    y = artefacts.motion(x, moves=3, shift=4, generator=generator())
    assert (y - x).abs().mean() > 0.005
    assert y[20:44, 24:40].mean() > 3 * y[:, :12].mean()
    torch.testing.assert_close(
        artefacts.motion(x, moves=3, shift=0, generator=generator()), x, atol=1e-5, rtol=0
    )


def test_shift_moves_by_the_asked_for_voxels():
    x = torch.zeros(9, 9)
    x[4, 4] = 1
    y = artefacts.shift(x, torch.tensor([0.0, -2.0]))
    assert y[4, 6] == pytest.approx(1, abs=1e-4)


def test_gamma_and_bias_keep_shape_and_sign():
    x = torch.rand(12, 12, generator=generator())
    torch.testing.assert_close(artefacts.gamma(x, 1.0).max(), torch.tensor(1.0))
    y = artefacts.bias_field(x, strength=0.3, generator=generator())
    assert (y >= 0).all() and not torch.equal(x, y)
    assert torch.equal(artefacts.bias_field(x, strength=0, generator=generator()), x)


def test_layers_surround_the_brain_from_inside_out():
    source = phantom()
    classes = torch.from_numpy(source.classes).long()
    distance = torch.from_numpy(source.distance).float()
    out = surroundings.add_layers(classes, distance, table=TABLE, generator=generator())
    brain = classes > 0
    assert torch.equal(out[brain], classes[brain])
    depth = [distance[out == c].mean() for c in TABLE.of(maps.CSF, maps.SKULL, maps.SCALP)]
    assert depth[0] < depth[1] < depth[2]


def test_a_stripped_scan_keeps_the_whole_brain():
    source = phantom()
    classes = torch.from_numpy(source.classes).long()
    distance = torch.from_numpy(source.distance).float()
    for seed in range(5):
        mask = surroundings.strip_skull(classes, distance, table=TABLE, generator=generator(seed))
        assert mask[classes > 0].all()
        assert not mask.all()


def test_a_hindbrain_that_was_cut_away_is_missing_as_a_whole():
    cerebellum, stem, cortex = TABLE.of(8, 16, 3)
    classes = torch.full((10, 10), cortex)
    classes[:4, :4], classes[5:, :4] = cerebellum, stem
    missing = surroundings.missing_parts(
        classes, table=TABLE, hindbrain=1.0, generator=generator()
    )
    assert missing[classes == cerebellum].all()
    assert not missing[classes == cortex].any()
    none = surroundings.missing_parts(classes, table=TABLE, hindbrain=0.0, generator=generator())
    assert not none.any()


@pytest.mark.parametrize(
    'wrong',
    [
        {'crop_probability': 1.5},
        {'spacing': 0.0},
        {'group_shares': (0.5, 0.1)},
        {'scale_infant': (1.2, 0.8)},
    ],
)
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SynthesisSettings(**wrong)


@pytest.fixture
def source_map(tmp_path):
    numbers = np.zeros((40, 44, 40), np.int16)
    numbers[8:20, 8:36, 8:32], numbers[20:32, 8:36, 8:32] = 41, 2  # LAS: x grows to the left.
    numbers[14:20, 14:20, 10:16], numbers[20:26, 14:20, 10:16] = 47, 8
    numbers[18:22, 16:18, 12:14] = 172
    numbers[10, 10, 10] = 2  # A speck on the wrong side.
    path = tmp_path / 'child.nii.gz'
    nib.save(nib.Nifti1Image(numbers, np.diag([-1, 1, 1, 1])), path)
    return path


def test_preparing_a_map_splits_the_vermis_and_removes_specks(source_map):
    prepared = maps.prepare_map(source_map)
    assert not prepared.has_head
    channel = TABLE.channel[prepared.classes]
    assert (prepared.distance == 0).sum() == (channel > 0).sum() == 24 * 28 * 24
    numbers = TABLE.numbers[prepared.classes]
    assert (numbers == maps.VERMIS_LEFT).sum() == (numbers == maps.VERMIS_RIGHT).sum() == 8
    x = np.arange(numbers.shape[0])[:, None, None] + np.zeros(numbers.shape)
    middle = numbers.shape[0] / 2
    assert (x[numbers == 2] < middle).all() and (x[numbers == 8] < middle).all()


def test_prepared_maps_survive_the_file_and_can_be_left_out(source_map, tmp_path):
    prepared = maps.prepare_map(source_map)
    path = tmp_path / 'maps.npz'
    maps.save_maps(path, [prepared])
    (loaded,) = maps.load_maps(path)
    np.testing.assert_array_equal(loaded.classes, prepared.classes)
    assert loaded.name == 'child'
    assert maps.load_maps(path, exclude=['child']) == []
    with pytest.raises(InputError, match=r'none\.npz does not exist'):
        maps.load_maps(tmp_path / 'none.npz')


def test_unreadable_or_coarse_maps_are_refused(tmp_path):
    bad = tmp_path / 'bad.nii.gz'
    bad.write_bytes(b'no image')
    with pytest.raises(InputError, match=r'bad\.nii\.gz cannot be read'):
        maps.prepare_map(bad)
    coarse = tmp_path / 'coarse.nii.gz'
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.int16), np.diag([2, 2, 2, 1])), coarse)
    with pytest.raises(InputError, match='1 mm'):
        maps.prepare_map(coarse)


def test_the_command_writes_samples_and_a_gallery(source_map, tmp_path):
    path = tmp_path / 'maps.npz'
    maps.save_maps(path, [maps.prepare_map(source_map)])
    size = ['--size', '24', '24', '24', '--spacing', '3']
    assert synth_main(['sample', str(path), '--out', str(tmp_path / 's'), *size]) == 0
    labels = nib.load(tmp_path / 's' / 'sample-0_dseg.nii.gz')
    assert labels.shape == (24, 24, 24)
    picture = tmp_path / 'g.png'
    arguments = ['gallery', str(path), '--out', str(picture), '--count', '3', *size]
    assert synth_main(arguments) == 0
    assert picture.stat().st_size > 10_000
    assert synth_main(['sample', str(tmp_path / 'no.npz'), '--out', str(tmp_path)]) == 1
