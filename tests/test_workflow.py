"""The whole run on a small dataset: real files, real workflow, real network weights."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from babyseg_bids.alignment import Alignment
from babyseg_bids.discovery import find_sessions
from babyseg_bids.interfaces.session import after_alignment
from babyseg_bids.labels import label_table
from babyseg_bids.outputs import is_done
from babyseg_bids.records import Age, LedgerRow, Scan, SessionInputs
from babyseg_bids.settings import Settings
from babyseg_bids.synthesis.atlas import load_atlas, sample_label_map

AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
AFFINE[:3, 3] = -60


@cache
def brain():
    """Tissue of each voxel of 2 mm in a child of seven months who never was."""
    labels, _ = sample_label_map(load_atlas(), 7.0, seed=1)
    tissues = np.full(256, 2)
    for row in label_table().rows:
        kind = {'background': 0, 'ventricle': 1, 'cortex': 2, 'white-matter': 3}
        tissues[row.index] = kind.get(row.tissue, 2)
    return tissues[labels[::2, ::2, ::2]]


def head(contrast, seed=0):
    """A stripped scan with the grey values of fluid, grey matter and white matter."""
    image = np.array([0.0, *contrast])[brain()]
    noise = np.random.default_rng(seed).normal(0, 0.02, image.shape)
    return np.round(1000 * np.clip(image + noise, 0, None)).astype(np.int16)


def write(folder, name, data, affine=AFFINE):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bids')
    description = {'Name': 'heads', 'BIDSVersion': '1.10.0'}
    (folder / 'dataset_description.json').write_text(json.dumps(description))
    (folder / 'participants.tsv').write_text('participant_id\tage\nsub-01\t7\nsub-02\t9\n')
    (folder / 'participants.json').write_text('{"age": {"Units": "month"}}')
    (folder / 'sub-01').mkdir()
    sessions = 'session_id\tage\nses-A\t7\nses-B\t9\n'
    (folder / 'sub-01' / 'sub-01_sessions.tsv').write_text(sessions)
    (folder / 'sub-01' / 'sub-01_sessions.json').write_text('{"age": {"Units": "month"}}')
    t1, t2 = (0.1, 0.5, 0.7), (1.0, 0.6, 0.4)
    write(folder, 'sub-01/ses-A/anat/sub-01_ses-A_T1w.nii.gz', head(t1))
    write(folder, 'sub-01/ses-A/anat/sub-01_ses-A_T2w.nii.gz', head(t2))
    write(folder, 'sub-01/ses-B/anat/sub-01_ses-B_T2w.nii.gz', head(t2, 2))
    bad = folder / 'sub-02' / 'ses-A' / 'anat' / 'sub-02_ses-A_T1w.nii.gz'
    bad.parent.mkdir(parents=True)
    bad.write_bytes(b'not an image')
    return folder


def babyseg(*arguments, **environ):
    command = [sys.executable, '-m', 'babyseg_bids.cli.run', *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, **{k: str(v) for k, v in environ.items()}},
    )


@pytest.fixture(scope='module')
def templateflow(tmp_path_factory):
    """A TemplateFlow folder with cohort 3 of one template, a head like those of the dataset."""
    folder = tmp_path_factory.mktemp('templateflow')
    name = 'tpl-MNIInfant/cohort-3/tpl-MNIInfant_cohort-3_res-1_T1w.nii.gz'
    write(folder, name, head((0.1, 0.5, 0.7), 5))
    return folder


SPACES = ('--output-spaces', 'anat', 'MNIInfant:cohort-auto', 'UNCInfant:cohort-1')


@pytest.fixture(scope='module')
def run(dataset, templateflow, tmp_path_factory):
    output = tmp_path_factory.mktemp('derivatives')
    options = ('--save-probabilities', '--nprocs', 2, *SPACES)
    result = babyseg(dataset, output, 'participant', *options, TEMPLATEFLOW_HOME=templateflow)
    return result, output


def test_every_session_with_a_readable_image_gets_its_outputs(run):
    result, output = run
    assert result.returncode == 0, result.stderr
    stems = ['sub-01/ses-A/anat/sub-01_ses-A', 'sub-01/ses-B/anat/sub-01_ses-B']
    for stem, space in zip(stems, ('T1w', 'T2w'), strict=True):
        for what in (
            'desc-aseg_dseg',
            'desc-brain_mask',
            'desc-uncertainty_probseg',
            'desc-babyseg_probseg',
        ):
            for ending in ('nii.gz', 'json'):
                assert (output / f'{stem}_space-{space}_{what}.{ending}').is_file()
        assert (output / f'{stem}_space-{space}_desc-babyseg_morph.tsv').is_file()
        assert (output / f'{stem}_desc-babyseg_qc.json').is_file()
        assert (output / f'{stem}_desc-inputs_ledger.json').is_file()
    assert (output / 'sub-01_ses-A.html').stat().st_size > 10_000
    for direction in ('from-T2w_to-T1w', 'from-T1w_to-T2w'):
        assert (output / f'{stems[0]}_{direction}_mode-image_xfm.txt').is_file()


def test_the_session_without_a_usable_image_is_named(run):
    result, _ = run
    assert 'sub-02_ses-A' in result.stdout + result.stderr


def test_images_have_the_header_of_the_reference(run, dataset):
    _, output = run
    reference = nib.load(dataset / 'sub-01/ses-A/anat/sub-01_ses-A_T1w.nii.gz')
    for path in output.glob('sub-01/ses-A/anat/*_space-T1w_*.nii.gz'):
        image = nib.load(path)
        assert image.shape[:3] == reference.shape
        np.testing.assert_array_equal(image.affine, reference.affine)
        assert image.header['sform_code'] == reference.header['sform_code']


def test_volumes_agree_with_the_label_map(run):
    _, output = run
    stem = output / 'sub-01/ses-A/anat/sub-01_ses-A_space-T1w_desc'
    labels = np.asarray(nib.load(f'{stem}-aseg_dseg.nii.gz').dataobj)
    lines = [line.split('\t') for line in open(f'{stem}-babyseg_morph.tsv')]  # noqa: PTH123, SIM115
    column = lines[0].index('voxel-volume-mm3')
    for row in lines[1:]:
        expected = (labels == int(row[0])).sum() * abs(np.linalg.det(AFFINE))
        assert float(row[column].replace('n/a', '0')) == pytest.approx(expected, abs=0.01)


def test_each_query_of_nibabies_has_exactly_one_answer(run):
    from bids.layout import BIDSLayout

    _, output = run
    layout = BIDSLayout(output, validate=False, config=['bids', 'derivatives'])
    spaces = {'A': 'T1w', 'B': 'T2w'}
    queries = [
        (session, {'space': space, 'suffix': suffix, 'desc': desc, 'extension': '.nii.gz'})
        for session, space in spaces.items()
        for desc, suffix in (('aseg', 'dseg'), ('brain', 'mask'))
    ]
    queries += [
        ('A', {'from': start, 'to': end, 'suffix': 'xfm', 'extension': '.txt'})
        for start, end in (('T1w', 'T2w'), ('T2w', 'T1w'))
    ]
    for session, query in queries:
        found = layout.get(subject='01', session=session, **query)
        assert len(found) == 1, query


def test_sidecars_name_the_raw_images_they_were_made_from(run, dataset):
    _, output = run
    links = json.loads((output / 'dataset_description.json').read_text())['DatasetLinks']
    sidecars = list(output.glob('sub-*/ses-*/anat/*_space-*_desc-*.json'))
    for path in sidecars:
        for uri in json.loads(path.read_text()).get('Sources', []):
            kind, name, relative = uri.split(':', 2)
            assert kind == 'bids'
            assert links[name] == dataset.as_uri()
            assert (dataset / relative).is_file()
    assert any('Sources' in p.read_text() for p in sidecars)


def test_the_recorded_settings_given_back_yield_the_same_results(
    run, dataset, templateflow, tmp_path
):
    _, output = run
    (recorded,) = (output / 'sub-01' / 'log').glob('*/babyseg.toml')
    words = (dataset, tmp_path / 'again', 'participant', '--config-file', recorded)
    options = ('--session-label', 'A', '--no-report')
    again = babyseg(*words, *options, TEMPLATEFLOW_HOME=templateflow)
    assert again.returncode == 0, again.stderr
    for path in output.glob('sub-01/ses-A/anat/*.nii.gz'):
        twin = tmp_path / 'again' / path.relative_to(output)
        first, second = nib.load(path), nib.load(twin)
        assert first.header == second.header
        np.testing.assert_array_equal(np.asarray(first.dataobj), np.asarray(second.dataobj))
    for path in output.glob('sub-01/ses-A/anat/*_morph.tsv'):
        assert path.read_bytes() == (tmp_path / 'again' / path.relative_to(output)).read_bytes()


def test_the_validator_accepts_the_output(run):
    _, output = run
    program = Path(sys.executable).with_name('bids-validator-deno')
    command = [str(program), str(output), '--json']
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    issues = json.loads(result.stdout)['issues']['issues']
    errors = [i for i in issues if i.get('severity') == 'error']
    assert errors == []


def test_a_space_whose_template_is_there_is_written(run, templateflow):
    _, output = run
    anat = output / 'sub-01/ses-A/anat'
    stem = 'sub-01_ses-A_space-MNIInfant+3_desc-aseg_dseg'
    labels, sidecar = (
        nib.load(anat / f'{stem}.nii.gz'),
        json.loads((anat / f'{stem}.json').read_text()),
    )
    template = next(templateflow.rglob('*_T1w.nii.gz'))
    assert labels.shape == nib.load(template).shape
    np.testing.assert_array_equal(labels.affine, nib.load(template).affine)
    assert sidecar['SpatialReference'].endswith(template.name)
    for ends in ('from-T1w_to-MNIInfant+3', 'from-MNIInfant+3_to-T1w'):
        assert (anat / f'sub-01_ses-A_{ends}_mode-image_xfm.h5').is_file()


def test_a_space_without_a_template_is_flagged_and_the_rest_is_complete(run):
    _, output = run
    ledger = output / 'sub-01/ses-A/anat/sub-01_ses-A_desc-inputs_ledger.json'
    record = json.loads(ledger.read_text())
    assert [(r['asked'], r['missing']) for r in record['spaces']] == [
        ('MNIInfant:cohort-auto', False),
        ('UNCInfant:cohort-1', True),
    ]
    (flag,) = [f for f in record['flags'] if f['code'] == 'space-not-written']
    assert 'UNCInfant+1' in flag['message']
    assert not list(output.rglob('*UNCInfant*'))


def test_a_session_is_not_done_once_its_missing_template_is_there(
    run, dataset, tmp_path, monkeypatch
):
    _, output = run
    session = next(s for s in find_sessions(dataset) if s.name == 'sub-01_ses-A')
    settings = Settings(dataset, output, save_probabilities=True, output_spaces=SPACES[1:])
    for there in (False, True):
        if there:
            name = 'tpl-UNCInfant/cohort-1/tpl-UNCInfant_cohort-1_T1w.nii.gz'
            write(tmp_path, name, head((0.8, 0.1, 0.5, 0.7)))
        monkeypatch.setenv('TEMPLATEFLOW_HOME', str(tmp_path))
        assert is_done(session, output, settings) is not there


def test_a_second_run_skips_what_is_done(run, dataset, templateflow):
    _, output = run
    ledger = output / 'sub-01/ses-A/anat/sub-01_ses-A_desc-inputs_ledger.json'
    before = ledger.stat().st_mtime_ns
    options = ('--save-probabilities', '--nprocs', 2, *SPACES)
    again = babyseg(dataset, output, 'participant', *options, TEMPLATEFLOW_HOME=templateflow)
    assert again.returncode == 0
    assert ledger.stat().st_mtime_ns == before


def test_the_group_level_gathers_both_sessions(run):
    _, output = run
    result = babyseg(output.parent, output, 'group')
    assert result.returncode == 0, result.stderr
    lines = (output / 'group_desc-babyseg_morph.tsv').read_text().splitlines()
    assert len(lines) == 3
    assert (output / 'group.html').is_file()


def test_a_scan_that_cannot_be_aligned_is_left_out_with_a_flag():
    scans = tuple(Scan(f'/x/{s}.nii', f'anat/{s}.nii', s) for s in ('T1w', 'T2w'))
    rows = tuple(LedgerRow(s.relative_path, s.suffix, 'used', 'fine') for s in scans)
    session = SessionInputs('01', None, scans, Age(), rows)
    refused = Alignment(np.eye(4), 'refused', 1.0, 1.0, 90.0, 3.0, 'Left out: too far.')
    final, kept = after_alignment(session, [refused])
    assert [s.suffix for s in final.scans] == ['T1w']
    assert kept == []
    assert final.ledger[1].status == 'rejected'
    assert final.flags[0].code == 'alignment-refused'


def test_a_scan_aligned_with_doubt_is_used_with_a_flag():
    scans = tuple(Scan(f'/x/{s}.nii', f'anat/{s}.nii', s) for s in ('T1w', 'T2w'))
    session = SessionInputs('01', None, scans, Age())
    doubtful = Alignment(np.eye(4), 'rigid', 1.2, 1.0, 45.0, 3.0, 'Moved.', doubt='Turned far.')
    final, kept = after_alignment(session, [doubtful])
    assert final.scans == scans
    assert kept == [doubtful]
    assert [f.code for f in final.flags] == ['alignment-doubtful']
    assert 'Turned far.' in final.flags[0].message


def test_builders_only_wire(dataset, tmp_path):
    from babyseg_bids.workflows import init_babyseg_wf

    sessions = [s for s in find_sessions(dataset) if s.scans]
    settings = Settings(dataset, tmp_path / 'out', report=False)
    settings.output_dir.mkdir()
    workflow = init_babyseg_wf(sessions, settings)
    names = {n.fullname for n in workflow._get_all_nodes()}
    assert any(n.endswith('sub_01_ses_A_wf.segment') for n in names)
    assert not any(n.endswith('.report') for n in names)
    assert 'Hoffmann' in workflow.visit_desc()
