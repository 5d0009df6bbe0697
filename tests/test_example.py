"""The example dataset: valid BIDS, scans like those of infants, and clear refusals."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from babyseg_bids.discovery import find_sessions
from babyseg_bids.labels import label_table
from babyseg_bids.synthesis import example
from babyseg_bids.synthesis.draws import Draws
from babyseg_bids.synthesis.example import VISITS, class_means, main, scan_grid
from babyseg_bids.synthesis.maps import class_table

WHITE, CORTEX, CSF = (2, 41), (3, 42), (4, 43)


@pytest.fixture(scope='module')
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('example') / 'bids'
    assert main([str(out)]) == 0
    return out


def image(dataset: Path, number: int, suffix: str) -> nib.Nifti1Image:
    visit = VISITS[number]
    return nib.load(dataset / visit.folder / f'{visit.name}_{suffix}.nii.gz')


def truth(dataset: Path, number: int) -> nib.Nifti1Image:
    visit = VISITS[number]
    name = f'{visit.name}_space-T1w_desc-truth_dseg.nii.gz'
    return nib.load(dataset / 'derivatives/truth' / visit.folder / name)


def tissue_mean(dataset: Path, number: int, suffix: str, labels: tuple[int, ...]) -> float:
    """Mean of the scan inside true labels, which are carried to the scan's grid by anatomy."""
    scan, true = image(dataset, number, suffix), truth(dataset, number)
    assert suffix == 'T1w'
    return float(np.asarray(scan.dataobj)[np.isin(np.asarray(true.dataobj), labels)].mean())


def test_the_validator_finds_no_error_in_the_images_nor_in_the_truth(dataset: Path) -> None:
    validator = Path(sys.executable).with_name('bids-validator-deno')
    for folder in (dataset, dataset / 'derivatives/truth'):
        done = subprocess.run(
            [validator, '--json', folder], capture_output=True, text=True, check=False
        )
        issues = json.loads(done.stdout)['issues']['issues']
        errors = [i for i in issues if i['severity'] == 'error']
        assert not errors
        assert done.returncode == 0


def test_the_sessions_and_ages_are_found_as_they_were_drawn(dataset: Path) -> None:
    sessions = find_sessions(dataset)
    got = [(s.subject, s.session, s.age.months) for s in sorted(sessions, key=lambda s: s.name)]
    assert got == [('01', '3mo', 3.0), ('01', '9mo', 9.0), ('02', '18mo', 18.0)]
    for s in sessions:
        assert sorted(scan.suffix for scan in s.scans) == ['T1w', 'T2w']
        assert not [f for f in s.flags if f.severity != 'info']


def test_the_whole_dataset_is_small(dataset: Path) -> None:
    assert sum(p.stat().st_size for p in dataset.rglob('*') if p.is_file()) < 30e6


@pytest.mark.parametrize('number', range(len(VISITS)))
def test_the_two_scans_lie_on_different_oblique_grids(dataset: Path, number: int) -> None:
    t1, t2 = image(dataset, number, 'T1w'), image(dataset, number, 'T2w')
    np.testing.assert_allclose(t1.header.get_zooms(), (1, 1, 1), atol=1e-5)
    np.testing.assert_allclose(t2.header.get_zooms(), (0.9, 0.9, 2), atol=1e-5)
    assert t1.shape != t2.shape
    for scan in (t1, t2):
        assert scan.get_data_dtype() == np.int16
        assert np.abs(nib.affines.obliquity(scan.affine)).max() > np.deg2rad(0.5)
        # The matrices are rigid but for the voxel size, so that sform and qform agree.
        np.testing.assert_allclose(scan.get_qform(), scan.get_sform(), atol=1e-3)


@pytest.mark.parametrize('number', range(len(VISITS)))
def test_the_head_is_inside_the_field_of_view_of_both_scans(dataset: Path, number: int) -> None:
    for suffix in ('T1w', 'T2w'):
        scan = image(dataset, number, suffix)
        data = np.asarray(scan.dataobj).astype(float)
        head = data > 0.25 * np.quantile(data, 0.98)
        litres = head.sum() * np.prod(scan.header.get_zooms()) / 1e6
        assert 0.6 < litres < 3
        middle = np.array([w.mean() for w in np.nonzero(head)]) / data.shape
        assert (np.abs(middle - 0.5) < 0.12).all()


def test_the_child_moved_between_its_scans(dataset: Path) -> None:
    middles = []
    for suffix in ('T1w', 'T2w'):
        scan = image(dataset, 0, suffix)
        data = np.asarray(scan.dataobj).astype(float)
        head = np.argwhere(data > 0.25 * np.quantile(data, 0.98))
        middles.append(nib.affines.apply_affine(scan.affine, head.mean(0)))
    assert 0.5 < np.linalg.norm(middles[0] - middles[1]) < 20


@pytest.mark.parametrize('number', range(len(VISITS)))
def test_the_truth_lies_on_the_t1w_and_holds_every_structure(dataset: Path, number: int) -> None:
    true, scan = truth(dataset, number), image(dataset, number, 'T1w')
    assert true.shape == scan.shape
    np.testing.assert_array_equal(true.affine, scan.affine)
    assert set(np.unique(true.dataobj)) == {r.index for r in label_table().rows}
    # Right on the anatomy: ventricles are the darkest of a T1w's tissues.
    csf = tissue_mean(dataset, number, 'T1w', CSF)
    assert csf < 0.6 * min(
        tissue_mean(dataset, number, 'T1w', WHITE), tissue_mean(dataset, number, 'T1w', CORTEX)
    )


def test_white_matter_is_dark_in_a_young_infants_t1w_and_bright_in_a_toddlers(
    dataset: Path,
) -> None:
    young, old = 0, 2
    dark, bright = (tissue_mean(dataset, n, 'T1w', WHITE) for n in (young, old))
    assert dark < 0.95 * tissue_mean(dataset, young, 'T1w', CORTEX)
    assert bright > 1.15 * tissue_mean(dataset, old, 'T1w', CORTEX)


@pytest.mark.parametrize(('age', 'sign'), [(2.0, 1), (24.0, -1)])
def test_t2w_contrast_is_the_inverse_of_t1w_contrast(age: float, sign: int) -> None:
    table = class_table()
    difference = {}
    for suffix in ('T1w', 'T2w'):
        means = class_means(table, age, suffix, draws=Draws(0))
        white, cortex = means[table.of(*WHITE)], means[table.of(*CORTEX)]
        assert white[0] == white[1], 'both sides look alike'
        difference[suffix] = float(white[0] - cortex[0])
    assert np.sign(difference['T2w']) == sign
    assert np.sign(difference['T1w']) == -sign


def test_the_child_of_two_sessions_has_grown(dataset: Path) -> None:
    young, old = (np.count_nonzero(np.asarray(truth(dataset, n).dataobj)) for n in (0, 1))
    assert 1.1 < old / young < 1.7


def test_a_scan_grid_covers_the_image_and_keeps_its_middle() -> None:
    affine = np.diag([1.0, 1, 1, 1])
    affine[:3, 3] = (-20, -30, 5)
    shape, where = scan_grid((40, 60, 50), affine, (0.9, 0.9, 2.0), np.eye(4))
    assert np.all(np.array(shape) * (0.9, 0.9, 2.0) >= (40, 60, 50))
    middle = nib.affines.apply_affine(where, (np.array(shape) - 1) / 2)
    np.testing.assert_allclose(middle, (-0.5, -0.5, 29.5))


class TestRefusals:
    """Each refusal is one sentence, and leaves what is there alone."""

    @staticmethod
    def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
        assert main(arguments) == 2
        message = capsys.readouterr().err
        assert message.startswith('babyseg-example: ')
        assert message.count('\n') == 1
        assert 'Traceback' not in message
        return message

    def test_a_folder_that_is_not_empty(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / 'thesis.txt').write_text('mine')
        assert '--overwrite' in self.refused(capsys, str(tmp_path))
        assert [p.name for p in tmp_path.iterdir()] == ['thesis.txt']

    def test_overwriting_what_is_no_example(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / 'sub-01').mkdir()
        (tmp_path / 'sub-01' / 'scan').write_text('mine')
        (tmp_path / 'dataset_description.json').write_text('{"Name": "a real study"}')
        assert 'did not write' in self.refused(capsys, str(tmp_path), '--overwrite')
        assert (tmp_path / 'sub-01' / 'scan').read_text() == 'mine'

    def test_a_file_in_the_place_of_the_folder(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / 'file').write_text('')
        assert 'is a file' in self.refused(capsys, str(tmp_path / 'file'))

    def test_a_folder_that_cannot_be_made(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / 'file').write_text('')
        assert 'cannot be written' in self.refused(capsys, str(tmp_path / 'file' / 'out'))


def test_overwriting_replaces_the_example_and_keeps_other_files(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / 'bids'
    shutil.copytree(dataset, out)
    (out / 'sub-99').mkdir()
    (out / 'derivatives' / 'mine.txt').write_text('mine')
    monkeypatch.setattr(example, 'VISITS', VISITS[:1])
    assert main([str(out), '--overwrite', '--seed', '3']) == 0
    assert sorted(p.name for p in out.glob('sub-*')) == ['sub-01']
    assert (out / 'derivatives' / 'mine.txt').read_text() == 'mine'
    old, new = image(dataset, 0, 'T1w'), image(out, 0, 'T1w')
    assert old.shape != new.shape or not np.array_equal(old.dataobj, new.dataobj)


def test_a_seed_gives_the_same_scans_again(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, 'VISITS', VISITS[:1])
    assert main([str(tmp_path / 'bids')]) == 0
    for suffix in ('T1w', 'T2w'):
        old, new = image(dataset, 0, suffix), image(tmp_path / 'bids', 0, suffix)
        np.testing.assert_array_equal(old.affine, new.affine)
        np.testing.assert_array_equal(old.dataobj, new.dataobj)
