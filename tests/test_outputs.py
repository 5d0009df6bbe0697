import itertools
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from babyseg_bids import citation
from babyseg_bids.alignment import Alignment
from babyseg_bids.errors import OutputError
from babyseg_bids.outputs import (
    Names,
    coarse_uncertainty,
    dseg_table,
    generated_by,
    input_record,
    is_done,
    like_reference,
    write_dataset_files,
)
from babyseg_bids.publish import publish_session, put
from babyseg_bids.records import Age, Scan, SessionInputs
from babyseg_bids.rigid import rotation_matrix
from babyseg_bids.settings import Settings


@pytest.fixture
def session(tmp_path):
    scans = []
    for suffix in ('T1w', 'T2w'):
        path = tmp_path / 'raw' / f'sub-01_ses-A_{suffix}.nii.gz'
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(suffix.encode())
        scans.append(Scan(str(path), f'sub-01/ses-A/anat/{path.name}', suffix))
    return SessionInputs('01', 'A', tuple(scans), Age(6.0))


@pytest.fixture
def settings(tmp_path):
    (tmp_path / 'raw').mkdir(exist_ok=True)
    return Settings(tmp_path / 'raw', tmp_path / 'out')


def publish(session, settings, **more):
    names = Names(session)
    files = {
        names.image('desc-aseg_dseg.nii.gz'): 'labels',
        names.report: 'page',
        **more,
    }
    ledger = {
        **session.to_dict(),
        'settings': settings.fingerprint(),
        'inputs': [input_record(s) for s in session.scans],
    }
    return publish_session(session, files, ledger, settings.output_dir)


def test_names_are_those_that_other_programs_look_for(session):
    names = Names(session)
    stem = 'sub-01/ses-A/anat/sub-01_ses-A'
    assert names.image('desc-aseg_dseg.nii.gz') == f'{stem}_space-T1w_desc-aseg_dseg.nii.gz'
    t2 = session.scans[1]
    assert names.transform(t2) == f'{stem}_from-T2w_to-T1w_mode-image_xfm.txt'
    assert names.transform(t2, inverse=True) == f'{stem}_from-T1w_to-T2w_mode-image_xfm.txt'
    assert names.ledger == f'{stem}_desc-inputs_ledger.json'


def test_names_of_a_dataset_without_sessions(session):
    names = Names(replace(session, session=None))
    assert names.ledger == 'sub-01/anat/sub-01_desc-inputs_ledger.json'
    assert names.report == 'sub-01.html'


def test_two_scans_of_one_contrast_have_transforms_of_their_own(session):
    again = Scan('/x', 'sub-01/ses-A/anat/x', 'T1w', {'run': '2'})
    names = Names(replace(session, scans=(*session.scans, again)))
    assert names.transform(again).endswith('_run-2_from-T1w_to-T1w_mode-image_xfm.txt')


@pytest.mark.parametrize('dtype', [np.uint8, np.int16, np.float32])
def test_results_have_the_exact_grid_header_of_the_reference(tmp_path, dtype):
    rng = np.random.default_rng(3)
    for flips in itertools.product((1, -1), repeat=3):
        affine = np.eye(4)
        affine[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] @ np.diag([0.8, 0.7, 3.3])
        affine[:3, :3] *= flips
        affine[:3, 3] = rng.normal(size=3) * 50
        reference = nib.Nifti1Image(rng.integers(0, 900, (5, 6, 7)).astype(np.int16), affine)
        reference.header.set_slope_inter(2.5, 7)
        reference.set_qform(affine, 2)
        reference.set_sform(affine @ np.diag([1, 1, 1, 1]), 1)
        reference.header.set_xyzt_units('mm', 'sec')
        reference.to_filename(tmp_path / 'reference.nii.gz')
        loaded = nib.load(tmp_path / 'reference.nii.gz')
        values = rng.integers(0, 60, (5, 6, 7)).astype(dtype)
        like_reference(values, loaded, dtype=dtype).to_filename(tmp_path / 'out.nii.gz')
        result = nib.load(tmp_path / 'out.nii.gz')
        np.testing.assert_array_equal(result.get_fdata(), values)
        for name in (
            'dim',
            'pixdim',
            'xyzt_units',
            'sform_code',
            'qform_code',
            'srow_x',
            'srow_y',
            'srow_z',
            'quatern_b',
            'quatern_c',
            'quatern_d',
            'qoffset_x',
        ):
            np.testing.assert_array_equal(result.header[name], loaded.header[name], name)
        np.testing.assert_array_equal(result.affine, loaded.affine)


def test_a_reference_without_any_form_keeps_having_none(tmp_path):
    header = nib.Nifti1Header()
    header.set_data_shape((4, 5, 6))
    header.set_zooms((1.5, 1.5, 2))
    reference = nib.Nifti1Image(np.zeros((4, 5, 6), np.float32), None, header)
    reference.to_filename(tmp_path / 'reference.nii')
    loaded = nib.load(tmp_path / 'reference.nii')
    like_reference(np.ones((4, 5, 6)), loaded, dtype=np.int16).to_filename(tmp_path / 'out.nii')
    result = nib.load(tmp_path / 'out.nii')
    assert int(result.header['sform_code']) == int(result.header['qform_code']) == 0
    np.testing.assert_array_equal(result.affine, loaded.affine)


def test_probabilities_get_a_fourth_dimension_of_unit_size():
    reference = nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.diag([2, 2, 3, 1]))
    image = like_reference(np.zeros((4, 5, 6, 28)), reference, dtype=np.float32)
    assert image.shape == (4, 5, 6, 28)
    assert image.header.get_zooms() == (2, 2, 3, 1)


def test_uncertainty_is_rounded_to_hundredths():
    x = np.array([0, 0.004, 0.296, 1], np.float32)
    np.testing.assert_allclose(coarse_uncertainty(x), [0, 0, 0.3, 1], atol=1e-6)


def test_a_published_session_is_done_until_its_inputs_or_settings_change(session, settings):
    assert not is_done(session, settings.output_dir, settings)
    publish(session, settings)
    assert is_done(session, settings.output_dir, settings)
    assert not is_done(session, settings.output_dir, settings.replace(random_seed=1))
    assert not is_done(replace(session, age=Age(7.0)), settings.output_dir, settings)
    fewer = replace(session, scans=session.scans[:1])
    assert not is_done(fewer, settings.output_dir, settings)
    Path(session.scans[0].path).write_bytes(b'another')
    assert not is_done(session, settings.output_dir, settings)


def test_a_copied_input_of_equal_content_is_still_done(session, settings):
    publish(session, settings)
    path = Path(session.scans[0].path)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    assert is_done(session, settings.output_dir, settings)


def test_a_session_that_lacks_an_output_or_has_a_broken_ledger_is_not_done(session, settings):
    ledger = publish(session, settings)
    (settings.output_dir / Names(session).report).unlink()
    assert not is_done(session, settings.output_dir, settings)
    publish(session, settings)
    ledger.write_text('{"settings":')
    assert not is_done(session, settings.output_dir, settings)


def test_results_of_another_reference_are_removed(session, settings):
    publish(session, settings)
    other = replace(session, scans=session.scans[::-1])
    publish(other, settings)
    maps = list(settings.output_dir.rglob('*_dseg.nii.gz'))
    assert [m.name for m in maps] == ['sub-01_ses-A_space-T2w_desc-aseg_dseg.nii.gz']


def tree(folder):
    return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def test_results_that_cannot_be_written_leave_the_earlier_ones_as_they_were(session, settings):
    publish(session, settings)
    before = tree(settings.output_dir)
    with pytest.raises(OutputError, match='cannot be written'):
        publish(session, settings, **{'sub-01/broken': Path('/nonexistent/file')})
    assert tree(settings.output_dir) == before
    assert is_done(session, settings.output_dir, settings)


def test_a_publication_that_ends_between_two_files_leaves_no_ledger(session, settings):
    publish(session, settings)
    (settings.output_dir / 'sub-01/in-the-way').mkdir(parents=True)
    with pytest.raises(OutputError, match='cannot be written'):
        publish(session, settings, **{'sub-01/in-the-way': 'a file'})
    assert not is_done(session, settings.output_dir, settings)
    assert not [p for p in tree(settings.output_dir) if p.name.startswith('.')]


def test_drafts_of_a_killed_run_go_with_the_next_publication(session, settings):
    publish(session, settings)
    before = tree(settings.output_dir)
    names = Names(session)
    for name in (names.ledger, names.report, names.image('desc-aseg_dseg.nii.gz')):
        path = settings.output_dir / name
        path.with_name(f'.{path.name}.0123abcd').write_text('half')
    other = settings.output_dir / '.sub-010_x.html.0123abcd'
    other.write_text("another's")
    publish(session, settings)
    assert tree(settings.output_dir).keys() == {*before, other}


def test_put_replaces_a_file_at_once(tmp_path):
    target = tmp_path / 'a' / 'b.json'
    put({'x': 1}, target)
    put('text', target)
    assert target.read_text() == 'text'
    assert [p.name for p in target.parent.iterdir()] == ['b.json']


def test_dataset_files_describe_the_folder(settings):
    settings.output_dir.mkdir()
    write_dataset_files(settings, 'methods')
    description = json.loads((settings.output_dir / 'dataset_description.json').read_text())
    assert description['DatasetType'] == 'derivative'
    assert not any(
        line.endswith('/') for line in (settings.output_dir / '.bidsignore').read_text().split()
    )
    assert (settings.output_dir / 'logs' / 'CITATION.md').read_text() == 'methods'
    rows = dseg_table().splitlines()
    assert len(rows) == 29
    assert rows[1].split('\t')[:3] == ['0', 'Background', 'BG']


@pytest.mark.parametrize(
    ('environ', 'container'),
    [
        ({}, None),
        ({'BABYSEG_IMAGE': 'babyseg:1'}, {'Type': 'docker', 'Tag': 'babyseg:1'}),
        ({'APPTAINER_CONTAINER': '/x/b.sif'}, {'Type': 'apptainer', 'Tag': 'b.sif'}),
        (
            {'SINGULARITY_CONTAINER': '/x/b.sif', 'BABYSEG_IMAGE': 'babyseg:1'},
            {'Type': 'apptainer', 'Tag': 'babyseg:1'},
        ),
    ],
)
def test_the_container_of_a_run_is_recorded(environ, container):
    assert generated_by(environ).get('Container') == container


@pytest.mark.parametrize('doi', [None, '10.18112/openneuro.ds000001.v1.0.0'])
def test_the_source_dataset_is_recorded(settings, doi):
    raw = {'Name': 'raw', **({'DatasetDOI': doi} if doi else {})}
    (settings.bids_dir / 'dataset_description.json').write_text(json.dumps(raw))
    settings.output_dir.mkdir()
    write_dataset_files(settings, '')
    description = json.loads((settings.output_dir / 'dataset_description.json').read_text())
    (source,) = description['SourceDatasets']
    assert source['URL'] == description['DatasetLinks']['raw'] == settings.bids_dir.as_uri()
    assert source.get('DOI') == doi


def test_the_methods_text_tells_of_what_was_done(session, settings):
    single = replace(session, scans=session.scans[:1])
    alone = citation.methods([single], settings)
    assert 'mutual information' not in alone
    assert 'studholme1999nmi' not in citation.bibliography(alone)
    both = citation.methods([single, session], settings)
    assert 'rigidly aligned' in both
    assert both.count('segmented jointly') == both.count('- Hoffmann') == 1
    assert citation.bibliography(both).count('@article') == 4
    # Results of an earlier run in the same folder were aligned.
    settings.output_dir.mkdir()
    write_dataset_files(settings, both)
    assert citation.methods([single], settings) == both
    official = citation.methods([session], settings.replace(model='/x/net.pt'))
    assert 'that its authors published' in official


def test_written_transforms_carry_a_landmark_to_its_place(session, tmp_path):
    """A bright corner of the T2w scan lands where the T1w scan has it, and back."""
    ants = pytest.importorskip('ants')
    from babyseg_bids.interfaces.session import PublishSession

    movement = rotation_matrix((25, -10, 15), np.array([5.0, 0, 0]))
    movement[:3, 3] += (12, -8, 5)
    affines = {
        'T2w': np.diag([2.0, 2, 2, 1]),
        'T1w': np.array([[0, -1.5, 0, 90.0], [1.5, 0, 0, -30], [0, 0, 1.5, -40], [0, 0, 0, 1]]),
    }
    landmark = {'T2w': np.array([20.0, 30, 40, 1])}
    landmark['T1w'] = movement @ landmark['T2w']
    for name, affine in affines.items():
        axes = np.stack(np.meshgrid(*[np.arange(90)] * 3, indexing='ij'), -1)
        world = axes @ affine[:3, :3].T + affine[:3, 3]
        data = np.exp(-((world - landmark[name][:3]) ** 2).sum(-1) / 50).astype(np.float32)
        nib.save(nib.Nifti1Image(data, affine), tmp_path / f'{name}.nii.gz')
    alignment = Alignment(movement, 'rigid', 1.5, 1.1, 30.0, 15.0, '')
    files = PublishSession()._transforms(session, [alignment], tmp_path)
    for moving, fixed in (('T2w', 'T1w'), ('T1w', 'T2w')):
        (path,) = [p for n, p in files.items() if f'from-{moving}_to-{fixed}_' in n]
        images = [ants.image_read(str(tmp_path / f'{n}.nii.gz')) for n in (fixed, moving)]
        moved = ants.apply_transforms(*images, transformlist=[str(path)]).numpy()
        brightest = np.array([*np.unravel_index(moved.argmax(), moved.shape), 1])
        assert moved.max() > 0.9
        distance = np.linalg.norm(affines[fixed] @ brightest - landmark[fixed])
        assert distance < 2


def test_an_unwritable_folder_is_named(settings):
    settings.output_dir.write_text('a file')
    with pytest.raises(OutputError, match='another output folder'):
        write_dataset_files(settings, '')
