"""The generator as a whole, its settings, its files and its command."""

import json
import tomllib
from dataclasses import fields, replace

import nibabel as nib
import numpy as np
import pytest
import torch
from synthesis_phantoms import SETTINGS_2D, SETTINGS_3D, TABLE, phantom, quiet

from babyseg_bids.errors import InputError, UsageError
from babyseg_bids.labels import label_table
from babyseg_bids.synthesis import maps, proportions, train_cli
from babyseg_bids.synthesis.cli import main as synth_main
from babyseg_bids.synthesis.draws import Draws
from babyseg_bids.synthesis.gallery import one_by_one
from babyseg_bids.synthesis.generator import draw_sample
from babyseg_bids.synthesis.settings import (
    SECTIONS,
    AcquisitionSettings,
    SynthesisSettings,
    load_settings,
    preset_names,
    to_toml,
    update,
)

# What moves or hides anatomy may change the labels; everything else must not.
MOVES_LABELS = {
    'anatomy',
    'surroundings: crop',
    'surroundings: occlusion',
    'surroundings: hindbrain_missing',
    'surroundings: sloppy strip',
    'acquisition: wrap',
}


def test_finer_source_labels_count_as_the_structure_they_belong_to():
    indices = label_table().indices
    for source, target in {5: 4, 63: 43, 46: 47, 1172: 8, 2077: 41, 24: 0, 85: 0}.items():
        assert indices[TABLE.channel[TABLE.of(source)[0]]] == target


# Samples.


@pytest.mark.parametrize('settings', [SETTINGS_2D, SETTINGS_3D])
@pytest.mark.parametrize('preset', preset_names())
def test_a_sample_has_images_in_range_and_labels_of_its_map(settings, preset):
    settings = replace(load_settings(preset), size=settings.size, spacing=settings.spacing)
    source = phantom(len(settings.size))
    for seed in range(6):
        sample = draw_sample([source], seed=seed, settings=settings)
        assert sample.images.shape[1:] == sample.target.shape == settings.size
        assert sample.images.isfinite().all()
        assert sample.images.min() >= 0 and sample.images.max() <= 1
        present = set(label_table().indices[sample.target.unique()].tolist())
        # A mirrored ventricle is the right one.
        assert present <= {0, 2, 3, 4, 41, 42, 43}


@pytest.mark.parametrize('settings', [SETTINGS_2D, SETTINGS_3D])
def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(settings):
    source = phantom(len(settings.size))
    for seed in range(4):
        a, b, c = (
            draw_sample([source], seed=s, settings=settings) for s in (seed, seed, seed + 9)
        )
        assert torch.equal(a.images, b.images) and torch.equal(a.target, b.target)
        assert a.record == b.record
        assert a.images.shape != c.images.shape or not torch.equal(a.images, c.images)


def test_a_record_survives_json_and_draws_its_sample_again():
    settings = replace(SETTINGS_2D, group_shares=(0.0, 0.0, 1.0))
    sample = draw_sample([phantom()], seed=11, settings=settings)
    record = json.loads(json.dumps(sample.record))
    again = draw_sample([phantom()], seed=record['seed'], settings=settings)
    assert torch.equal(again.images, sample.images)
    assert record['scans'] == 3 and 'contrast' in record['scan 3']['contrast']
    assert record['anatomy']['map'] == 'phantom'


def test_two_axes_of_a_map_with_three_are_a_slice():
    # Voxels lie on those of the map; between two of them rounding would decide.
    flat = quiet(replace(SETTINGS_2D, size=(81, 81), spacing=1.0))
    whole = quiet(replace(SETTINGS_3D, size=(81, 81, 81), spacing=1.0))
    a, b = (draw_sample([phantom(3, 91)], seed=0, settings=s) for s in (flat, whole))
    assert torch.equal(a.target, b.target[:, :, 40])
    with pytest.raises(UsageError, match='only 2 axes'):
        draw_sample([phantom()], seed=0, settings=SETTINGS_3D)


def test_scopes_do_not_disturb_each_other():
    """An artefact more or less changes neither the anatomy nor the other scans."""
    always = replace(AcquisitionSettings(), motion_probability=1.0)
    settings = replace(SETTINGS_2D, group_shares=(0.0, 1.0))
    a = draw_sample([phantom()], seed=2, settings=settings)
    b = draw_sample([phantom()], seed=2, settings=replace(settings, acquisition=always))
    assert a.record['anatomy'] == b.record['anatomy']
    assert a.record['scan 1']['contrast'] == b.record['scan 1']['contrast']
    one, two = Draws(1).scope('a'), Draws(1).scope('b')
    assert one.uniform('x', 0, 1) != two.uniform('x', 0, 1)
    assert Draws(1).scope('a').noise(3).tolist() == Draws(1).scope('a').noise(3).tolist()


def test_a_ruined_scan_is_written_down_and_leaves_the_others_as_they_were():
    settings = replace(SETTINGS_2D, group_shares=(0.0, 0.0, 1.0))
    never, always = (
        replace(settings, group=replace(settings.group, ruined_probability=p)) for p in (0.0, 1.0)
    )
    marked = set()
    for seed in range(16):
        a, b = (draw_sample([phantom()], seed=seed, settings=s) for s in (never, always))
        assert 'ruined scan' not in a.record['group']
        ruined = b.record['group']['ruined scan'] - 1
        assert torch.equal(a.target, b.target)
        same = torch.tensor([torch.equal(i, j) for i, j in zip(a.images, b.images, strict=True)])
        assert same.tolist() == [i != ruined for i in range(3)]
        marked.add(ruined)
    assert marked == {0, 1, 2}
    alone = replace(always, group_shares=(1.0,))
    assert 'ruined scan' not in draw_sample([phantom()], seed=0, settings=alone).record['group']


def test_each_thing_that_may_happen_changes_the_image_and_only_some_the_labels():
    settings = replace(SETTINGS_3D, size=(40, 44, 40), spacing=2.0)
    shown = dict(one_by_one(settings))
    source = phantom(3)
    seeds = range(5)
    start = [draw_sample([source], seed=s, settings=shown['nothing']) for s in seeds]
    # One phantom has no partners to be mixed with, no donors, folds or ventricle fields.
    needs_more = {'anatomy: morph', 'surroundings: donor', 'anatomy: sulci', 'anatomy: ventricles'}
    assert needs_more < shown.keys()
    for name in shown.keys() - needs_more - {'nothing'}:
        drawn = [draw_sample([source], seed=s, settings=shown[name]) for s in seeds]
        pairs = list(zip(start, drawn, strict=True))
        assert any(not torch.equal(a.images, b.images) for a, b in pairs), name
        same = all(torch.equal(a.target, b.target) for a, b in pairs)
        if name not in MOVES_LABELS and not name.startswith('anatomy'):
            assert same, name


def test_what_no_scan_shows_has_no_label():
    settings = quiet(
        replace(SETTINGS_2D, size=(80, 80), spacing=1.0),
        surroundings__crop_probability=1.0,
        acquisition__masked_probability=1.0,
    )
    for seed in range(4):
        sample = draw_sample([phantom()], seed=seed, settings=settings)
        whole = draw_sample(
            [phantom()],
            seed=seed,
            settings=quiet(replace(SETTINGS_2D, size=(80, 80), spacing=1.0)),
        )
        hidden = (whole.target > 0) & (sample.target == 0)
        assert hidden.any() and (sample.images[0][hidden] == 0).all()


def test_further_scans_may_lie_a_little_differently():
    settings = quiet(
        replace(SETTINGS_2D, size=(80, 80), spacing=1.0),
        group__misalign_probability=1.0,
        group__misalign=6.0,
        contrast__shares=(0.0, 0.0, 1.0, 0.0),
    )
    settings = replace(settings, group_shares=(0.0, 1.0))
    sample = draw_sample([phantom()], seed=5, settings=settings)
    offset = sample.record['scan 2']['misalignment, mm']
    assert 'misalignment, mm' not in sample.record['scan 1'] and len(offset) == 2
    edges = [(i.diff(dim=0).abs()[:, :-1] + i.diff(dim=1).abs()[:-1]) > 0.1 for i in sample.images]
    assert (edges[0] ^ edges[1]).sum() > 0.2 * edges[0].sum()


# Settings.


@pytest.mark.parametrize('preset', preset_names())
def test_presets_are_read_and_written_with_every_setting(preset):
    settings = load_settings(preset)
    assert update(SynthesisSettings(), tomllib.loads(to_toml(settings))) == settings
    assert (settings == SynthesisSettings()) == (preset == 'default')


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (
            '[acquisition]\nnoise = [0.1, 3]',
            r'acquisition\.noise .* two rising numbers from 0 to 1',
        ),
        ('[acquisition]\nnoise = [0.3, 0.1]', r'acquisition\.noise .* two rising numbers'),
        ('[acquisition]\nnoise = "much"', r'acquisition\.noise'),
        (
            '[acquisition]\nmotion_moves = 2.5',
            r'motion_moves is 2\.5; give a whole number from 1 to',
        ),
        ('[acquisition]\nmotion_probability = true', 'motion_probability is True; give a number'),
        (
            '[surroundings]\ncrop_probability = 1.5',
            r'surroundings\.crop_probability .* from 0 to 1',
        ),
        ('[contrast]\nshares = [1.0]', r'contrast\.shares .* 4 numbers'),
        ('[anatomy]\nrotation = 3', r'anatomy\.rotation is no setting; did you mean'),
        ('[moon]\nx = 1', 'moon is no setting; known are'),
        ('anatomy = 3', 'anatomy is 3; it is a section'),
        ('spacing = 0.0', r'spacing is 0\.0'),
        ('size = [64]', 'size is'),
        ('group_shares = [0.5, 0.1]', 'group_shares'),
    ],
)
def test_wrong_settings_are_named_with_what_is_allowed(tmp_path, text, message):
    path = tmp_path / 'mine.toml'
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        load_settings(path)
    assert 'mine.toml' in str(error.value)


def test_a_lab_adds_its_own_scanner_on_top_of_a_preset(tmp_path):
    path = tmp_path / 'ours.toml'
    path.write_text('base = "clinical"\n[acquisition]\nslices = [4.0, 4.5]\n')
    settings = load_settings(path)
    clinical = load_settings('clinical')
    assert settings.acquisition.slices == (4.0, 4.5)
    assert settings.acquisition.gap == clinical.acquisition.gap
    assert settings.group == clinical.group


def test_missing_and_broken_settings_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r'no settings file .* default'):
        load_settings('lunar')
    path = tmp_path / 'broken.toml'
    path.write_text('this is not TOML')
    with pytest.raises(InputError, match=r'broken\.toml is not a TOML file'):
        load_settings(path)


def test_every_setting_says_what_it_means():
    for kind in SECTIONS.values():
        for f in fields(kind):
            assert f.metadata['text'] and f.metadata['low'] < f.metadata['high']


# Prepared maps.


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
    assert (channel > 0).sum() == 24 * 28 * 24
    # The hull is a little larger than the brain, and negative inside.
    assert (prepared.distance[channel > 0] < 0).mean() > 0.95
    assert 0.9 < (prepared.distance < 0).sum() / (channel > 0).sum() < 1.3
    assert prepared.sulci.shape[0] == 3 and prepared.shape is None and prepared.age is None
    numbers = TABLE.numbers[prepared.classes]
    assert (numbers == maps.VERMIS_LEFT).sum() == (numbers == maps.VERMIS_RIGHT).sum() == 8
    x = np.arange(numbers.shape[0])[:, None, None] + np.zeros(numbers.shape)
    middle = numbers.shape[0] / 2
    assert (x[numbers == 2] < middle).all() and (x[numbers == 8] < middle).all()


def test_prepared_maps_survive_the_file_and_can_be_left_out(source_map, tmp_path):
    prepared = maps.prepare_map(source_map)
    path = tmp_path / 'maps.npz'
    template = maps.Template(np.zeros(3, np.float32), 4.0, np.zeros((3, 5, 6, 7), np.float32))
    velocity = np.full((3, 5, 6, 7), 0.5, np.float32)
    prepared = replace(prepared, age=5.0, shape=maps.Shape(template, np.eye(4), velocity))
    maps.save_maps(path, [prepared])
    (loaded,) = maps.load_maps(path)
    np.testing.assert_array_equal(loaded.classes, prepared.classes)
    np.testing.assert_array_equal(loaded.distance, prepared.distance)
    np.testing.assert_allclose(loaded.sulci, prepared.sulci, atol=0.006)
    np.testing.assert_array_equal(loaded.shape.velocity, velocity)
    assert loaded.age == 5.0 and loaded.shape.template.spacing == 4.0
    assert loaded.name == 'child'
    assert maps.load_maps(path, exclude=['child']) == []
    with pytest.raises(InputError, match=r'none\.npz does not exist'):
        maps.load_maps(tmp_path / 'none.npz')


def test_unreadable_and_unlabelled_maps_are_refused(tmp_path):
    bad = tmp_path / 'bad.nii.gz'
    bad.write_bytes(b'no image')
    with pytest.raises(InputError, match=r'bad\.nii\.gz cannot be read'):
        maps.prepare_map(bad)
    foreign = tmp_path / 'foreign.nii.gz'
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.int16), np.diag([2, 2, 2, 1])), foreign)
    with pytest.raises(InputError, match=r'foreign\.nii\.gz: the map holds none of the labels'):
        maps.prepare_map(foreign)


def test_only_maps_whose_age_is_known_get_the_published_white_matter(tmp_path, capsys):
    """A cube of white matter in one of cortex, as a child's, a fetus' and somebody's."""
    numbers = np.zeros((40, 40, 40), np.int16)
    numbers[4:36, 4:36, 4:36] = 3
    numbers[10:30, 10:30, 10:30] = 2
    paths = [tmp_path / f'{name}.nii.gz' for name in ('06mo', 'GA30', 'child')]
    for path in paths:
        nib.save(nib.Nifti1Image(numbers, np.eye(4)), path)
    out = tmp_path / 'maps.npz'
    arguments = ['prepare', *map(str, paths), '--no-morphing', '--grow-white-matter']
    assert train_cli.main([*arguments, '--out', str(out)]) == 0
    shares = [proportions.white_matter_share(m) for m in maps.load_maps(out)]
    assert shares == pytest.approx([0.40, 0.244, 0.244], abs=0.02)
    assert '06mo: white matter 0.244 -> 0.' in capsys.readouterr().out


# The command.


@pytest.fixture
def maps_file(source_map, tmp_path):
    path = tmp_path / 'maps.npz'
    maps.save_maps(path, [maps.prepare_map(source_map)])
    return str(path)


SMALL = ['--size', '24', '24', '24', '--spacing', '3']


def test_the_command_writes_samples(maps_file, tmp_path):
    out = tmp_path / 's'
    assert synth_main(['sample', maps_file, '--out', str(out), '--count', '2', *SMALL]) == 0
    labels = nib.load(out / 'sample-1_dseg.nii.gz')
    image = nib.load(out / 'sample-1_scan-1.nii.gz')
    assert labels.shape == image.shape == (24, 24, 24)
    np.testing.assert_allclose(labels.affine @ [11.5, 11.5, 11.5, 1], [0, 0, 0, 1])
    assert set(np.unique(labels.dataobj)) <= set(label_table().indices.tolist())
    assert json.loads((out / 'sample-1.json').read_text())['seed'] == 1


def test_the_command_writes_galleries_that_need_no_other_file(maps_file, tmp_path):
    for name, extra in (('a', ['--count', '3']), ('b', ['--by-setting'])):
        page = tmp_path / f'{name}.html'
        assert synth_main(['gallery', maps_file, '--out', str(page), *extra, *SMALL]) == 0
        text = page.read_text()
        assert text.count('data:image/png') >= 3
        assert 'http' not in text
    assert 'acquisition: zipper' in text
    flat = tmp_path / 'flat.html'
    assert synth_main(['gallery', maps_file, '--out', str(flat), '--size', '24', '24']) == 0


def test_the_command_prints_settings_and_names_what_is_wrong(maps_file, tmp_path, capsys):
    assert synth_main(['settings', '--settings', 'newborn']) == 0
    assert tomllib.loads(capsys.readouterr().out)['anatomy']['adult_share'] == 0.1
    out = ['--out', str(tmp_path / 'x')]
    assert synth_main(['sample', str(tmp_path / 'no.npz'), *out]) == 1
    assert synth_main(['sample', maps_file, *out, '--settings', 'lunar']) == 1
    assert 'lunar is no settings file' in capsys.readouterr().err
    assert synth_main(['sample', maps_file, *out, '--count', '0']) == 2
