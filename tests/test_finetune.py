from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from synthesis_phantoms import phantom

from babyseg_bids.errors import InputError
from babyseg_bids.network.unet import GroupUNet, NetworkConfig
from babyseg_bids.network.weights import load_model, new_model, save_model
from babyseg_bids.synthesis import finetune as module
from babyseg_bids.synthesis.atlas import load_atlas, sample_label_map
from babyseg_bids.synthesis.finetune import Comparison, finetune, read_corrections, read_ranking
from babyseg_bids.synthesis.train_cli import main

TINY = {'extent': (96, 96, 96), 'guards': ((6.0, 1),), 'companions': ((6.0, 2),), 'workers': 0}


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = NetworkConfig(labels=28, encoder=(4, 4), decoder=(4, 4), head=(4,), patch=2)
    about = {'name': 'tiny', 'version': '0', 'training': {'steps': 1}}
    return new_model(GroupUNet(config).eval(), spacing=4.0, **about)


@pytest.fixture
def corrections(tmp_path):
    labels, affine = sample_label_map(load_atlas(), 9.0, seed=5, spacing=2.0)
    folder = tmp_path / 'corrections' / 'sub-01'
    folder.mkdir(parents=True)
    nib.save(nib.Nifti1Image(labels, affine), folder / 'sub-01_desc-corrected_dseg.nii.gz')
    (folder / 'sub-01_T1w.nii.gz').write_bytes(b'not looked at')
    return tmp_path / 'corrections'


def test_corrections_of_any_voxel_size_are_read_at_1_mm(corrections):
    [correction] = read_corrections(corrections)
    assert correction.name == 'sub-01_desc-corrected_dseg'
    assert min(correction.classes.shape) > 80


def test_a_folder_without_label_maps_is_named(tmp_path):
    with pytest.raises(InputError, match='holds no label map'):
        read_corrections(tmp_path)
    nib.save(nib.Nifti1Image(np.zeros((9, 9, 9), np.int16), np.eye(4)), tmp_path / 'x_dseg.nii.gz')
    with pytest.raises(InputError, match=r'x_dseg\.nii\.gz: the map holds none'):
        read_corrections(tmp_path)


def test_finetuning_starts_from_the_model_and_compares_both(model, tmp_path):
    before = {k: v.clone() for k, v in model.network.state_dict().items()}
    adapted, comparison = finetune(
        model, [phantom(3)], tmp_path, steps=3, samples=1, rate=1e-3, **TINY
    )
    after = adapted.network.state_dict()
    difference = max(float((after[k] - before[k]).abs().max()) for k in before)
    assert 0 < difference < 0.05
    assert all(torch.equal(v, before[k]) for k, v in model.network.state_dict().items())
    assert all(0 <= dice <= 1 for dice in (*comparison.guards, *comparison.corrections))


@pytest.mark.parametrize(('guards', 'worse'), [((0.7, 0.68), True), ((0.7, 0.695), False)])
def test_a_loss_beyond_the_tolerance_is_worse(guards, worse):
    assert Comparison(guards, (0.5, 0.9)).worse is worse


@pytest.mark.parametrize('worse', [False, True])
def test_the_command_writes_the_model_only_if_it_is_not_worse(
    model, corrections, tmp_path, monkeypatch, capsys, worse
):
    def judged(model, *_, **__):
        return model, Comparison((0.7, 0.6) if worse else (0.7, 0.7), (0.5, 0.6))

    monkeypatch.setattr(module, 'finetune', judged)
    start, out = tmp_path / 'start.safetensors', tmp_path / 'mine.safetensors'
    save_model(start, model)
    threads = str(torch.get_num_threads())
    options = ['--steps', '2', '--threads', threads, '--model', str(start)]
    code = main(['finetune', '--corrections', str(corrections), '--out', str(out), *options])
    assert code == worse
    assert out.exists() is not worse
    if worse:
        assert 'was not written' in capsys.readouterr().err
    else:
        assert load_model(out).training['finetuned_steps'] == 2


def test_shares_repeat_a_correction():
    maps = [replace(phantom(3), name=n) for n in 'abc']
    repeated = module._repeated(maps, {'a': 0.2, 'b': 0.6})
    assert [m.name for m in repeated] == ['a', 'b', 'b', 'b', 'c']


def test_a_ranking_is_read_by_the_names_of_the_label_maps(tmp_path):
    path = tmp_path / 'ranking.tsv'
    path.write_text('rank\tscore\tdseg\n1\t0.8\tsub-01/anat/sub-01_desc-aseg_dseg.nii.gz\n')
    assert read_ranking(path) == {'sub-01_desc-aseg_dseg': 0.8}
    path.write_text('rank\n1\n')
    with pytest.raises(InputError, match=r'ranking\.tsv is no ranking'):
        read_ranking(path)
