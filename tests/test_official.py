"""The official checkpoint end to end: its grid, its labels, and the reference results."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from babyseg_bids import BabySegPipeline
from babyseg_bids.cli.parser import parse_settings
from babyseg_bids.errors import InputError, ModelError
from babyseg_bids.labels import OFFICIAL, label_table, table_of
from babyseg_bids.network import load_model, segment
from babyseg_bids.network.official import SMALLEST, conform, official_grid
from babyseg_bids.network.unet import GroupUNet, NetworkConfig

VECTORS = Path(__file__).parents[2] / 'shared' / 'vectors'
needs_vectors = pytest.mark.skipif(not VECTORS.is_dir(), reason='no official vectors here')


def scan(number):
    image = nib.load(VECTORS / f'conform_in{number}.nii.gz')
    return np.asarray(image.dataobj).astype(np.float32), image.affine


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny network of the official kind, with random weights."""
    torch.manual_seed(0)
    config = NetworkConfig(labels=22, encoder=(1, 4), decoder=(4, 4), norm=False)
    path = tmp_path / 'babyseg.tiny.pt'
    torch.save({'model': GroupUNet(config).state_dict(), 'optimizer': {}}, path)
    return path


@pytest.fixture
def head():
    """An off-centre block in a scan of unequal voxels, oblique and right, posterior, superior."""
    data = np.zeros((30, 36, 20), np.float32)
    data[4:25, 6:30, 3:18] = np.random.default_rng(0).uniform(50, 200, (21, 24, 15))
    affine = np.diag([2.0, -1.5, 3.0, 1])
    turn = np.deg2rad(10)
    affine[:2, :2] = (
        np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ (affine[:2, :2])
    )
    affine[:3, 3] = -20, 30, -25
    return data, affine


@needs_vectors
def test_scans_are_conformed_as_by_the_official_program():
    scans = [scan(1), scan(2)]
    conformed, grid = conform(scans, device='cpu')
    for ours, name in zip(conformed, ('lead', 'second'), strict=True):
        theirs = nib.load(VECTORS / f'conform_{name}.nii.gz')
        np.testing.assert_allclose(ours, np.asarray(theirs.dataobj), atol=0.02)
        np.testing.assert_allclose(grid.affine, theirs.affine, atol=1e-4)


@needs_vectors
@pytest.mark.parametrize('count', [1, 2])
def test_the_official_results_come_out(count):
    model = load_model(VECTORS / 'e2e_checkpoint.pt')
    result = segment([scan(i + 1) for i in range(count)], model, keep_probabilities=True)
    theirs = np.asarray(nib.load(VECTORS / f'e2e_seg_{count}input.nii.gz').dataobj)
    assert (result.labels != theirs).mean() < 1e-4
    posteriors = np.load(VECTORS / f'e2e_prob_{count}input_sub.npz')['prob']
    # Ours are kept in half precision.
    np.testing.assert_allclose(result.probabilities[::3, ::3, ::2], posteriors, atol=1e-4)


def test_the_grid_is_left_inferior_anterior_and_holds_the_whole_box(head):
    data, affine = head
    grid, filled = official_grid(data, affine)
    assert nib.aff2axcodes(grid.affine) == ('L', 'I', 'A')
    np.testing.assert_allclose(nib.affines.voxel_sizes(grid.affine), 0.7)
    assert all(n % 64 == 0 and n >= SMALLEST for n in grid.size)
    inside = np.argwhere(data)
    there = nib.affines.apply_affine(np.linalg.inv(grid.affine) @ affine, inside)
    for axis, part in enumerate(filled):
        assert there[:, axis].min() > part.start - 1 and there[:, axis].max() < part.stop
    again = nib.affines.apply_affine(grid.from_reference, inside)
    np.testing.assert_allclose(again, there, atol=1e-6)


def test_large_scans_are_not_cut_off(head):
    _, affine = head
    grid, filled = official_grid(np.ones((150, 180, 90), np.float32), affine)
    assert max(grid.size) > 320
    assert sorted(f.stop - f.start for f in filled) == sorted(
        int(np.ceil(n * mm / 0.7)) for n, mm in ((150, 2), (180, 1.5), (90, 3))
    )


def test_a_checkpoint_goes_through_the_whole_python_api(checkpoint, head):
    pipeline = BabySegPipeline(model=checkpoint)
    assert pipeline.model.official and pipeline.model.multiple == 4
    result = pipeline.predict([head[0]], affine=head[1], keep_probabilities=True)
    assert set(np.unique(result.segmentation.dataobj)) <= set(OFFICIAL)
    assert result.volumes['index'].tolist() == [i for i in OFFICIAL if i]
    assert result.probabilities.shape == (*head[0].shape, 22)


def test_the_order_of_the_scans_changes_nothing_but_the_grid(checkpoint, head):
    data, affine = head
    other = data[::-1].copy()
    model = load_model(checkpoint)
    a = segment([(data, affine), (other, affine), (data + 1, affine)], model)
    b = segment([(data, affine), (data + 1, affine), (other, affine)], model)
    np.testing.assert_array_equal(a.labels, b.labels)


def test_official_labels_have_names_and_mirrors():
    table = table_of(OFFICIAL)
    assert table[169].mirror == 176 and table[169].hemisphere == 'L'
    np.testing.assert_array_equal(table.mirror_channels[table.mirror_channels], np.arange(22))
    shared = [r for r in table.rows if r.index in label_table().indices]
    assert len(shared) == 20


def test_other_files_are_refused_with_what_to_do(tmp_path, head):
    broken = tmp_path / 'broken.pt'
    broken.write_bytes(b'nothing')
    with pytest.raises(ModelError, match=r'broken\.pt cannot be read'):
        load_model(broken)
    other = tmp_path / 'other.pt'
    torch.save({'model': {'weight': torch.zeros(3)}}, other)
    with pytest.raises(ModelError, match='no BabySeg checkpoint; give the official'):
        load_model(other)
    config = NetworkConfig(labels=5, encoder=(2,), decoder=(2,), norm=False)
    torch.save(GroupUNet(config).state_dict(), other)
    with pytest.raises(ModelError, match='has 5 labels'):
        load_model(other)
    with pytest.raises(InputError, match='zero everywhere'):
        official_grid(np.zeros((4, 4, 4)), head[1])


def test_a_model_file_is_found_from_any_working_folder(checkpoint, monkeypatch):
    """Sessions run in processes that work elsewhere."""
    monkeypatch.chdir(checkpoint.parent)
    settings = parse_settings(['in', 'out', 'participant', '--model', checkpoint.name])
    assert settings.model == str(checkpoint)
    assert parse_settings(['in', 'out', 'participant', '--model', 'default']).model == 'default'
