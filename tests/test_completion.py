import nibabel as nib
import numpy as np
import pytest

from babyseg_bids.errors import InputError
from babyseg_bids.labels import label_table
from babyseg_bids.synthesis.atlas import load_atlas, sample_label_map
from babyseg_bids.synthesis.completion import PERMITTED, restrict
from babyseg_bids.synthesis.maps import CSF
from babyseg_bids.synthesis.train_cli import main

NUMBERS = label_table().indices
TISSUES = {'white-matter': 1, 'ventricle': 2, 'cerebellum': 3, 'cortex': 5, 'deep-grey': 6}
MEDIAL = (17, 18, 53, 54)


def posteriors(*shares):
    """Probabilities (1, 1, V, C) from one {number: share} a voxel."""
    out = np.zeros((1, 1, len(shares), len(NUMBERS)), np.float32)
    for i, each in enumerate(shares):
        for number, share in each.items():
            out[0, 0, i, NUMBERS.tolist().index(number)] = share
    return out


def test_the_likeliest_permitted_label_wins():
    tissues = np.array([[[1, 1, 5, 6, 7, 4, 0]]])
    found = posteriors(
        {3: 0.6, 2: 0.3, 41: 0.1},  # The model says cortex where the tissue is white matter.
        {2: 0.2, 41: 0.8},
        {2: 0.9, 42: 0.1},
        {3: 0.5, 12: 0.3, 13: 0.2},
        {16: 0.4, 28: 0.6},
        {3: 1.0},
        {2: 1.0},
    )
    labels = restrict(tissues, found, NUMBERS)
    assert labels.ravel().tolist() == [2, 41, 42, 12, 28, CSF, 0]


def test_where_the_model_sees_nothing_the_nearest_voxel_of_the_tissue_decides():
    tissues = np.array([[[1, 1, 1, 1, 5, 1]]])
    unseen = {0: 1.0}
    found = posteriors({2: 1.0}, unseen, unseen, unseen, {3: 1.0}, {41: 1.0})
    assert restrict(tissues, found, NUMBERS).ravel().tolist() == [2, 2, 2, 41, 3, 41]
    with pytest.raises(InputError, match='tissue 3'):
        restrict(np.full((1, 1, 1), 3), posteriors({0: 1.0}), NUMBERS)


@pytest.fixture(scope='module')
def drawn():
    """Labels of a brain of 3 months and the tissues that an atlas would tell apart in it."""
    labels, affine = sample_label_map(load_atlas(), 3.0, seed=1)
    tissues = np.zeros(labels.shape, np.int16)
    for row in label_table().structures:
        tissues[labels == row.index] = TISSUES.get(row.tissue, 7)
    tissues[np.isin(labels, MEDIAL)] = 5
    tissues[np.isin(labels, (28, 60))] = 7
    return labels, tissues, affine


def test_tissues_of_a_brain_become_its_structures(drawn, tmp_path):
    labels, tissues, affine = drawn
    folders = [tmp_path / name for name in ('GA36', 'GA40')]
    for folder in folders:
        folder.mkdir()
        nib.save(nib.Nifti1Image(tissues, affine), folder / 'parcellation.nii.gz')
    out = tmp_path / 'out'
    args = [str(f / 'parcellation.nii.gz') for f in folders]
    assert main(['complete', *args, '--out', str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ['GA36.nii.gz', 'GA40.nii.gz']
    image = nib.load(out / 'GA36.nii.gz')
    found = np.asarray(image.dataobj)
    np.testing.assert_allclose(image.affine, affine)
    for tissue, permitted in PERMITTED.items():
        assert np.isin(found[tissues == tissue], permitted).all()
    assert not found[tissues == 0].any()
    for number, least in ((2, 0.97), (41, 0.97), (10, 0.85), (49, 0.85), (12, 0.75), (51, 0.75)):
        a, b = labels == number, found == number
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > least, number


def test_what_is_no_map_of_tissues_is_named(tmp_path, capsys):
    wrong = tmp_path / 'wrong.nii.gz'
    nib.save(nib.Nifti1Image(np.full((4, 4, 4), 42, np.int16), np.eye(4)), wrong)
    assert main(['complete', str(wrong), '--out', str(tmp_path / 'out')]) != 0
    assert 'wrong.nii.gz is no map of tissues' in capsys.readouterr().err
    broken = tmp_path / 'broken.nii.gz'
    broken.write_bytes(b'no image')
    assert main(['complete', str(broken), '--out', str(tmp_path / 'out')]) != 0
    assert 'broken.nii.gz cannot be read' in capsys.readouterr().err
    twice = [str(wrong), str(wrong)]
    assert main(['complete', *twice, '--out', str(tmp_path / 'out')]) != 0
    assert 'one name' in capsys.readouterr().err
