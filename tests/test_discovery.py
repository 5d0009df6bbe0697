"""Pairs of a file listing and the choice that must come out; real files where content decides."""

import json
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from babyseg_bids.age import parse_age_option
from babyseg_bids.discovery import describe_age, find_sessions, ledger_rows
from babyseg_bids.discovery_choice import MAX_SCANS
from babyseg_bids.errors import NoInputError, UsageError
from babyseg_bids.records import SessionInputs

DESCRIPTION = {'Name': 'test', 'BIDSVersion': '1.10.0'}
T1, T2 = 'T1w.nii.gz', 'T2w.nii.gz'


def dataset(root: Path, files: Sequence[str] = ()) -> Path:
    """A dataset of empty files."""
    root.mkdir(parents=True, exist_ok=True)
    (root / 'dataset_description.json').write_text(json.dumps(DESCRIPTION))
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def image(
    path: Path, *, seed: int = 0, spacing: tuple[float, ...] = (3, 3, 3), size: int = 40
) -> Path:
    """A noisy box within an empty margin, whose size depends on the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.zeros((size, size, size), np.int16)
    rng = np.random.default_rng(seed)
    inner = data[4:-4, 4 : -4 - seed, 4:-4]
    inner[:] = rng.integers(100, 900, inner.shape)
    nib.save(nib.Nifti1Image(data, np.diag([*spacing, 1.0])), path)
    return path


def anat(*names: str, subject: str = '01', session: str | None = None) -> list[str]:
    """Paths of images of one session: `anat('acq-a_T1w.nii.gz')`."""
    folder = f'sub-{subject}/ses-{session}' if session else f'sub-{subject}'
    return [f'{folder}/anat/{folder.replace("/", "_")}_{n}' for n in names]


# Files of one subject without sessions, labels of the scans in order, and words of the reasons for
# which others are rejected.
MANIFEST: dict[str, tuple[list[str], list[str], dict[str, str]]] = {
    't1w only': ([T1], ['T1w'], {}),
    't2w only': ([T2], ['T2w'], {}),
    'plain nifti': (['T1w.nii'], ['T1w'], {}),
    'flair and pdw': (['PDw.nii.gz', 'FLAIR.nii.gz'], ['FLAIR', 'PDw'], {}),
    't1w leads t2w': ([T2, T1], ['T1w', 'T2w'], {}),
    'all contrasts': (
        ['T2starw.nii.gz', 'PDw.nii.gz', 'FLAIR.nii.gz', 'UNIT1.nii.gz', T2, T1],
        ['T1w', 'T2w', 'UNIT1', 'FLAIR', 'PDw', 'T2starw'], {},
    ),
    'runs in natural order': (
        ['run-10_T1w.nii.gz', 'run-2_T1w.nii.gz', 'run-1_T1w.nii.gz'],
        ['run-1_T1w', 'run-2_T1w', 'run-10_T1w'], {},
    ),
    'run-1 and run-01': (
        ['run-1_T1w.nii.gz', 'run-01_T1w.nii.gz', 'run-2_T1w.nii.gz'],
        ['run-01_T1w', 'run-2_T1w'], {'run-1_T1w.nii.gz': 'same image'},
    ),
    'variants': (
        ['rec-norm_T1w.nii.gz', 'acq-mprage_T1w.nii.gz', 'ce-gad_T1w.nii.gz', T1],
        ['T1w', 'acq-mprage_T1w', 'ce-gad_T1w', 'rec-norm_T1w'], {},
    ),
    'plain before variant': (['acq-a_T2w.nii.gz', T2], ['T2w', 'acq-a_T2w'], {}),
    'two forms of one image': ([T1, 'T1w.nii'], ['T1w'], {'T1w.nii': 'same image'}),
    'mp2rage with unit1': (
        ['UNIT1.nii.gz', 'inv-1_MP2RAGE.nii.gz', 'inv-2_part-phase_MP2RAGE.nii.gz',
         'T1map.nii.gz'],
        ['UNIT1'],
        {'inv-1_MP2RAGE.nii.gz': 'series', 'inv-2_part-phase_MP2RAGE.nii.gz': 'series',
         'T1map.nii.gz': 'quantitative map'},
    ),
    'unit1 beside t1w': (['UNIT1.nii.gz', T1], ['T1w', 'UNIT1'], {}),
    'inversion': (['inv-1_T1w.nii.gz', T2], ['T2w'], {'inv-1_T1w.nii.gz': 'inversion'}),
    'parts': (
        ['part-mag_T2w.nii.gz', 'part-phase_T2w.nii.gz', 'part-real_T2w.nii.gz'],
        ['part-mag_T2w'],
        {'part-phase_T2w.nii.gz': 'phase part', 'part-real_T2w.nii.gz': 'real part'},
    ),
    'inplane is not asked for': (
        [T1, 'inplaneT2.nii.gz'], ['T1w'],
        {'inplaneT2.nii.gz': 'asked for'},
    ),
    'inplane alone': (['inplaneT2.nii.gz'], [], {'inplaneT2.nii.gz': '--contrasts'}),
    'chunks beside a whole head': (
        ['chunk-1_T1w.nii.gz', 'chunk-2_T1w.nii.gz', T2], ['T2w'],
        {'chunk-1_T1w.nii.gz': 'part of the head', 'chunk-2_T1w.nii.gz': 'part of the head'},
    ),
    'chunks only': (
        ['chunk-1_T1w.nii.gz', 'chunk-2_T1w.nii.gz'], ['chunk-1_T1w', 'chunk-2_T1w'],
        {},
    ),
    'echoes': (['echo-2_T1w.nii.gz', 'echo-1_T1w.nii.gz'], ['echo-1_T1w', 'echo-2_T1w'], {}),
    'echoes beside what they were combined into': (
        ['echo-1_T1w.nii.gz', 'echo-2_T1w.nii.gz', 'rec-rms_T1w.nii.gz', 'echo-1_T2w.nii.gz'],
        ['rec-rms_T1w', 'echo-1_T2w'],
        {'echo-1_T1w.nii.gz': 'rec-rms_T1w.nii.gz combines', 'echo-2_T1w.nii.gz': 'one echo'},
    ),
    'echoes of another acquisition': (
        [T1, 'acq-me_echo-1_T1w.nii.gz'], ['T1w', 'acq-me_echo-1_T1w'], {},
    ),
    'gradient echoes and their phase': (
        [T1, 'echo-1_part-mag_MEGRE.nii.gz', 'echo-1_part-phase_MEGRE.nii.gz',
         'part-mag_T2starw.nii.gz', 'part-phase_T2starw.nii.gz'],
        ['T1w', 'part-mag_T2starw'],
        {'echo-1_part-mag_MEGRE.nii.gz': 'series', 'echo-1_part-phase_MEGRE.nii.gz': 'series',
         'part-phase_T2starw.nii.gz': 'phase part'},
    ),
    'only a series for a map': (
        ['flip-1_VFA.nii.gz', 'flip-2_VFA.nii.gz'], [],
        dict.fromkeys(('flip-1_VFA.nii.gz', 'flip-2_VFA.nii.gz'), 'series'),
    ),
    'multi-parameter mapping': (
        ['acq-T1w_echo-1_flip-2_mt-off_part-mag_MPM.nii.gz', 'inv-1_IRT1.nii.gz', T1,
         'echo-1_MESE.nii.gz', 'flip-1_mt-on_MTS.nii.gz', 'MTsat.nii.gz', 'R1map.nii.gz'],
        ['T1w'],
        {'acq-T1w_echo-1_flip-2_mt-off_part-mag_MPM.nii.gz': 'series',
         'inv-1_IRT1.nii.gz': 'series', 'echo-1_MESE.nii.gz': 'series',
         'flip-1_mt-on_MTS.nii.gz': 'series', 'MTsat.nii.gz': 'map', 'R1map.nii.gz': 'map'},
    ),
    'inversions and one UNIT1 of two': (
        ['acq-a_UNIT1.nii.gz', 'acq-a_inv-1_part-mag_MP2RAGE.nii.gz',
         'acq-a_inv-2_part-mag_MP2RAGE.nii.gz', 'rec-denoised_UNIT1.nii.gz'],
        ['acq-a_UNIT1', 'rec-denoised_UNIT1'],
        dict.fromkeys(('acq-a_inv-1_part-mag_MP2RAGE.nii.gz',
                       'acq-a_inv-2_part-mag_MP2RAGE.nii.gz'), 'series'),
    ),
    'inversions without a UNIT1': (
        ['inv-1_MP2RAGE.nii.gz', 'inv-2_MP2RAGE.nii.gz'], [],
        dict.fromkeys(('inv-1_MP2RAGE.nii.gz', 'inv-2_MP2RAGE.nii.gz'), 'series'),
    ),
    'FLASH of early BIDS': (
        ['run-1_echo-1_FLASH.nii.gz', T1, 'mod-T1w_defacemask.nii.gz'], ['T1w'],
        {'run-1_echo-1_FLASH.nii.gz': 'rename', 'mod-T1w_defacemask.nii.gz': 'mask'},
    ),
    'runs of an acquisition with contrast agent': (
        ['acq-a_ce-gd_run-2_T1w.nii.gz', 'acq-a_ce-gd_run-1_T1w.nii.gz', 'FLAIR.nii.gz'],
        ['acq-a_ce-gd_run-1_T1w', 'FLAIR', 'acq-a_ce-gd_run-2_T1w'], {},
    ),
    'every kind is used before a second of one': (
        [*(f'run-{i}_T2w.nii.gz' for i in range(1, 9)), 'FLAIR.nii.gz', 'PDw.nii.gz'],
        ['run-1_T2w', 'FLAIR', 'PDw', *(f'run-{i}_T2w' for i in range(2, 7))],
        dict.fromkeys(('run-7_T2w.nii.gz', 'run-8_T2w.nii.gz'), 'at most'),
    ),
    'other organs and modalities': (
        [T1, 'CT.nii.gz', 'angio.nii.gz', 'acq-render_photo.jpg', 'pial.surf.gii'], ['T1w'],
        {'CT.nii.gz': 'not an anatomical', 'angio.nii.gz': 'not an anatomical'},
    ),
    'other near-misses': (
        [T1, 'FLAIr.nii.gz', 'PDW.nii.gz', 'T2W.nii.gz', 'UNI.nii.gz', 'Mprage.nii.gz'], ['T1w'],
        {'FLAIr.nii.gz': 'FLAIR?', 'PDW.nii.gz': 'PDw?', 'T2W.nii.gz': 'T2w?',
         'UNI.nii.gz': 'UNIT1?', 'Mprage.nii.gz': 'T1w?'},
    ),
    'small letter': (['t1w.nii.gz', T2], ['T2w'], {'t1w.nii.gz': 'T1w?'}),
    'capital letter': (['T1W.nii.gz', T2], ['T2w'], {'T1W.nii.gz': 'T1w?'}),
    'bare t1': (['T1.nii.gz', T2], ['T2w'], {'T1.nii.gz': 'T1w?'}),
    'mprage as suffix': (['MPRAGE.nii.gz', T2], ['T2w'], {'MPRAGE.nii.gz': 'T1w?'}),
    'old suffixes': (
        [T1, 'PD.nii.gz', 'T2star.nii.gz'], ['T1w'],
        {'PD.nii.gz': 'ambiguous', 'T2star.nii.gz': 'ambiguous'},
    ),
    'unknown suffix': (
        [T1, 'angio.nii.gz'], ['T1w'],
        {'angio.nii.gz': 'not an anatomical contrast'},
    ),
    'capital extension': (['T1w.NII.GZ', T2], ['T2w'], {'T1w.NII.GZ': '.nii.gz'}),
    'other formats': (
        ['T1w.mgz', 'T1w.img', 'T1w.hdr', 'T1w.nii.bz2', T2], ['T2w'],
        dict.fromkeys(('T1w.mgz', 'T1w.img', 'T1w.hdr', 'T1w.nii.bz2'), 'only .nii and .nii.gz'),
    ),
    'half a download': (['T1w.nii.gz.part', T2], ['T2w'], {'T1w.nii.gz.part': 'only .nii'}),
    'dot in a label': (
        ['acq-0.8mm_T1w.nii.gz', T2], ['T2w'],
        {'acq-0.8mm_T1w.nii.gz': 'key-label'},
    ),
    'missing suffix': (['acq-mprage.nii.gz', T2], ['T2w'], {'acq-mprage.nii.gz': 'no suffix'}),
    'entity behind the suffix': (
        ['T1w_run-1.nii.gz', T2], ['T2w'],
        {'T1w_run-1.nii.gz': 'no suffix'},
    ),
    'an entity twice': (
        ['run-1_run-2_T1w.nii.gz', T2], ['T2w'],
        {'run-1_run-2_T1w.nii.gz': 'two entities'},
    ),
    'unknown entity': (
        ['defaced-1_T1w.nii.gz', T2], ['T2w'],
        {'defaced-1_T1w.nii.gz': 'no entity'},
    ),
    'derived images': (
        [T1, 'space-MNI152_T1w.nii.gz', 'desc-brain_T1w.nii.gz'], ['T1w'],
        {'space-MNI152_T1w.nii.gz': 'derived', 'desc-brain_T1w.nii.gz': 'derived'},
    ),
    'masks': (
        [T1, 'mod-T1w_defacemask.nii.gz', 'label-lesion_mask.nii.gz'], ['T1w'],
        {'mod-T1w_defacemask.nii.gz': 'mask', 'label-lesion_mask.nii.gz': 'derived'},
    ),
    'sidecars and system files': ([T1, 'T1w.json', 'scans.tsv', 'T1w.txt'], ['T1w'], {}),
    'too many repeats': (
        [*(f'run-{i}_T1w.nii.gz' for i in range(1, 11)), T2],
        ['run-1_T1w', 'T2w', *(f'run-{i}_T1w' for i in range(2, 8))],
        {f'run-{i}_T1w.nii.gz': f'at most {MAX_SCANS}' for i in (8, 9, 10)},
    ),
    'only what cannot be used': (
        ['T1map.nii.gz', 't1w.nii.gz'], [],
        {'T1map.nii.gz': 'map', 't1w.nii.gz': 'T1w?'},
    ),
}  # fmt: skip
LABELS = {name: f'{number:02d}' for number, name in enumerate(MANIFEST)}


@pytest.fixture(scope='module')
def chosen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SessionInputs]:
    """The choice for every listing of the manifest, one subject each."""
    root = tmp_path_factory.mktemp('manifest')
    for name, (files, _, _) in MANIFEST.items():
        dataset(root, anat(*files, subject=LABELS[name]))
    found = {s.subject: s for s in find_sessions(root, check_images=False)}
    return {name: found[label] for name, label in LABELS.items()}


@pytest.mark.parametrize('name', MANIFEST)
def test_a_listing_yields_the_choice(chosen: dict[str, SessionInputs], name: str) -> None:
    _, scans, rejected = MANIFEST[name]
    inputs = chosen[name]
    assert [s.label for s in inputs.scans] == scans
    rows = {
        Path(r.relative_path).name.partition('_')[2]: r.reason
        for r in inputs.ledger
        if r.status == 'rejected'
    }
    assert set(rows) == set(rejected)
    for file, word in rejected.items():
        assert word in rows[file]
    status = [r.status for r in inputs.ledger]
    assert status == sorted(status, key=['reference', 'used', 'rejected'].index)
    assert status.count('reference') == bool(scans)
    assert ('no-images' in {f.code for f in inputs.flags}) == (not scans)


# Whole trees: what each session uses, and words of the reasons for what it does not.
TREES: dict[str, tuple[list[str], dict[str, list[str]], list[str]]] = {
    'numeric sessions': (
        [*anat(T1, session='10'), *anat(T1, session='2'), *anat(T2, session='01')],
        {'sub-01_ses-01': ['T2w'], 'sub-01_ses-2': ['T1w'], 'sub-01_ses-10': ['T1w']}, [],
    ),
    'sessions with letters': (
        [*anat(T1, session='B'), *anat(T1, session='A'), *anat(T1, session='12mo')],
        {'sub-01_ses-12mo': ['T1w'], 'sub-01_ses-A': ['T1w'], 'sub-01_ses-B': ['T1w']}, [],
    ),
    'contrasts in different sessions are not merged': (
        [*anat(T1, session='1'), *anat(T2, session='2')],
        {'sub-01_ses-1': ['T1w'], 'sub-01_ses-2': ['T2w']}, [],
    ),
    'a session without anat beside one with it': (
        [*anat(T1, session='1'), 'sub-01/ses-2/pet/sub-01_ses-2_pet.nii.gz'],
        {'sub-01_ses-1': ['T1w']}, [],
    ),
    'a subject with and one without sessions': (
        [*anat(T1, session='1'), *anat(T1, subject='A00032875')],
        {'sub-01_ses-1': ['T1w'], 'sub-A00032875': ['T1w']}, [],
    ),
    'images in and beside sessions': (
        [*anat(T1, session='1'), *anat(T2)],
        {'sub-01': ['T2w'], 'sub-01_ses-1': ['T1w']}, [],
    ),
    'a session twice in the name': (
        ['sub-01/ses-1/anat/sub-01_ses-1_ses-2_T1w.nii.gz', *anat(T2, session='1')],
        {'sub-01_ses-1': ['T2w']}, ["two entities 'ses'"],
    ),
    'another session in the name': (
        ['sub-01/ses-1/anat/sub-01_ses-2_T1w.nii.gz', *anat(T2, session='1')],
        {'sub-01_ses-1': ['T2w']}, ['ses-1'],
    ),
    'no session in the name': (
        ['sub-01/ses-1/anat/sub-01_T1w.nii.gz', *anat(T2, session='1')],
        {'sub-01_ses-1': ['T2w']}, ['does not name the session'],
    ),
    'a session folder without a label': (
        ['sub-01/ses-/anat/sub-01_ses-_T1w.nii.gz', *anat(T1, subject='02')],
        {'sub-01': [], 'sub-02': ['T1w']}, ['letters and digits'],
    ),
    'anat in capitals': (
        ['sub-01/ANAT/sub-01_T1w.nii.gz', *anat(T2)], {'sub-01': ['T2w']}, ['anat folder'],
    ),
    'anat in another folder': (
        [*anat(T1), 'sub-01/old/anat/sub-01_T2w.nii.gz', 'sub-01/anat/old/sub-01_T2w.nii.gz'],
        {'sub-01': ['T1w']}, [],
    ),
    'subjects in capitals': (
        [*anat(T1, subject='Sub103'), 'SUB-02/anat/SUB-02_T1w.nii.gz'],
        {'sub-Sub103': ['T1w']}, [],
    ),
    'tables of the subject and of the session': (
        ['sub-01/sub-01_sessions.tsv', 'sub-01/ses-1/sub-01_ses-1_scans.tsv',
         'sub-01/sub-01_scans.tsv', *anat(T1, session='1')],
        {'sub-01_ses-1': ['T1w']}, [],
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', TREES)
def test_a_tree_yields_the_sessions(tmp_path: Path, name: str) -> None:
    files, expected, reasons = TREES[name]
    found = find_sessions(dataset(tmp_path, files), check_images=False)
    assert {s.name: [scan.label for scan in s.scans] for s in found} == expected
    said = [r.reason for s in found for r in s.ledger if r.status == 'rejected']
    assert len(said) == len(reasons)
    assert all(word in reason for word, reason in zip(reasons, said, strict=True))


def test_folders_that_look_like_subjects_are_named(tmp_path: Path) -> None:
    files = [*anat(T1), 'Sub-02/anat/Sub-02_T1w.nii.gz', 'sub03/anat/sub03_T1w.nii.gz']
    (found,) = find_sessions(dataset(tmp_path, files), check_images=False)
    (flag,) = [f for f in found.flags if f.code == 'folder-name']
    assert 'Sub-02, sub03' in flag.message


def names(sessions: Sequence[SessionInputs]) -> list[str]:
    return [s.name for s in sessions]


@pytest.fixture
def ragged(tmp_path: Path) -> Path:
    """Two subjects with unlike sessions, one without; other folders around."""
    return dataset(
        tmp_path / 'Größe 1 #%',
        [
            *anat(T1, T2, subject='01', session='2'),
            *anat(T1, subject='01', session='10'),
            *anat(T2, subject='02', session='A'),
            *anat(T1, subject='10'),
            'sub-02/ses-B/func/sub-02_ses-B_task-rest_bold.nii.gz',
            'sub-02/ses-C/anat/sub-02_ses-C_T1w.json',
            'derivatives/other/sub-01/ses-2/anat/sub-01_ses-2_desc-preproc_T1w.nii.gz',
            'sourcedata/sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz',
            'code/sub-99/anat/sub-99_T1w.nii.gz',
            'sub-01/ses-2/anat/._sub-01_ses-2_T1w.nii.gz',
            '.git/annex/sub-98/anat/sub-98_T1w.nii.gz',
        ],
    )


def test_sessions_come_in_natural_order_and_nothing_else_is_looked_at(ragged: Path) -> None:
    found = find_sessions(ragged, check_images=False)
    assert names(found) == ['sub-01_ses-2', 'sub-01_ses-10', 'sub-02_ses-A', 'sub-10']
    assert [len(s.scans) for s in found] == [2, 1, 1, 1]
    assert all(len(s.ledger) == len(s.scans) for s in found)
    scan = found[0].scans[0]
    assert Path(scan.path) == ragged / scan.relative_path
    assert SessionInputs.from_dict(json.loads(json.dumps(found[0].to_dict()))) == found[0]


@pytest.mark.parametrize(
    ('participants', 'sessions', 'expected'),
    [
        (['01'], [], ['sub-01_ses-2', 'sub-01_ses-10']),
        (['sub-02'], [], ['sub-02_ses-A']),
        ([], ['ses-A'], ['sub-02_ses-A']),
        (['01', '10'], ['10'], ['sub-01_ses-10']),
        (['10', '10'], [], ['sub-10']),
    ],
)
def test_participants_and_sessions_are_chosen_with_or_without_prefix(
    ragged: Path, participants: list[str], sessions: list[str], expected: list[str]
) -> None:
    found = find_sessions(ragged, participants=participants, sessions=sessions, check_images=False)
    assert names(found) == expected


def test_a_requested_participant_without_images_is_not_forgotten(ragged: Path) -> None:
    found = find_sessions(ragged, participants=['10', '77'], check_images=False)
    assert names(found) == ['sub-10', 'sub-77']
    assert [f.code for f in found[1].flags] == ['no-images']
    assert found[1].scans == ()
    assert ledger_rows(found)[-1].reason == 'no anatomical images'


@pytest.mark.parametrize(
    ('participants', 'sessions', 'words'),
    [
        (['3'], [], ['sub-3', 'sub-01', 'sub-10']),
        (['01'], ['A'], ['sub-01', 'ses-A', 'ses-2', 'ses-10']),
    ],
)
def test_nothing_found_says_what_was_sought_and_what_exists(
    ragged: Path, participants: list[str], sessions: list[str], words: list[str]
) -> None:
    with pytest.raises(NoInputError) as error:
        find_sessions(ragged, participants=participants, sessions=sessions)
    assert all(w in str(error.value) for w in words)
    assert error.value.exit_code == 3


def test_a_folder_that_is_no_dataset_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    for path, word in (
        ('gone', 'does not exist'),
        ('file', 'is a file'),
        ('.', 'no BIDS dataset'),
    ):
        with pytest.raises(UsageError, match=word):
            find_sessions(tmp_path / path)


def test_an_empty_dataset_has_no_input(tmp_path: Path) -> None:
    with pytest.raises(NoInputError, match='is empty'):
        find_sessions(tmp_path)
    with pytest.raises(NoInputError, match=r'no sub-\* folder'):
        find_sessions(dataset(tmp_path))
    (tmp_path / 'sub-01/func').mkdir(parents=True)
    with pytest.raises(NoInputError, match='sub-01_T1w'):
        find_sessions(tmp_path)


@pytest.mark.parametrize('content', [None, '{', '{"DatasetType": "derivative"}', '\udcff'])
def test_an_odd_description_of_the_dataset_is_flagged_and_stops_nothing(
    tmp_path: Path, content: str | None
) -> None:
    dataset(tmp_path, anat(T1))
    path = tmp_path / 'dataset_description.json'
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode('utf-8', 'surrogateescape'))
    (found,) = find_sessions(tmp_path, check_images=False)
    assert len(found.scans) == 1
    assert any(f.code.startswith('dataset-') for f in found.flags)


@pytest.mark.parametrize(
    'content', ['[1]', '{"DatasetType": "derivative", "GeneratedBy": {"Name": "x"}}']
)
def test_a_description_that_pybids_cannot_take_is_a_usage_error(
    tmp_path: Path, content: str
) -> None:
    dataset(tmp_path, anat(T1))
    (tmp_path / 'dataset_description.json').write_text(content)
    with pytest.raises(UsageError, match=r'dataset_description\.json'):
        find_sessions(tmp_path)


def test_images_at_a_wrong_place_are_named(tmp_path: Path) -> None:
    wrong = [
        'sub-01/sub-01_T1w.nii.gz',
        'sub-01/anat/sub-02_T1w.nii.gz',
        'sub-01/anat/sub-01_ses-A_T1w.nii.gz',
    ]
    (found,) = find_sessions(dataset(tmp_path, [*anat(T2), *wrong]), check_images=False)
    assert [s.label for s in found.scans] == ['T2w']
    assert {r.relative_path for r in found.ledger if r.status == 'rejected'} == set(wrong)
    assert sum(f.code == 'image-name' for f in found.flags) == len(wrong)
    files = ['sub-0-1/anat/sub-0-1_T1w.nii.gz', *anat(T1, subject='02')]
    odd, good = find_sessions(dataset(tmp_path / 'b', files), check_images=False)
    assert (odd.scans, len(good.scans)) == ((), 1)
    assert 'letters and digits' in odd.ledger[0].reason


def test_contrasts_restrict_and_allow_inplane_images(tmp_path: Path) -> None:
    root = dataset(tmp_path, anat(T1, T2, 'inplaneT2.nii.gz'))
    (found,) = find_sessions(root, contrasts=['t2w', 'inplaneT2'], check_images=False)
    assert [s.suffix for s in found.scans] == ['T2w', 'inplaneT2']
    (t1w,) = [r for r in found.ledger if r.status == 'rejected']
    assert '--contrasts' in t1w.reason
    with pytest.raises(UsageError, match="'bold'"):
        find_sessions(root, contrasts=['bold'])


MPRAGE = ('acq-mprage_run-1_T1w', 'acq-mprage_run-2_T1w')


@pytest.mark.parametrize(
    ('filters', 'expected'),
    [
        ({'t1w': {'acquisition': 'mprage'}}, ['T2w', *MPRAGE]),
        ({'T1w': {'acq': 'mprage', 'run': 2}}, ['T2w', MPRAGE[1]]),
        ({'t1w': {'run': ['01', 3]}}, ['T2w', MPRAGE[0]]),
        ({'t1w': {'acquisition': None}}, ['T2w', 'T1w']),
        ({'t1w': {'acquisition': '*'}}, ['T2w', *MPRAGE, 'acq-vnav_T1w']),
        ({'t1w': {'acquisition': 'Query.NONE'}}, ['T2w', 'T1w']),
        ({'t1w': {'acquisition': 'mp.*|vn.*', 'run': None}}, ['T2w', 'acq-vnav_T1w']),
        ({'t1w': {'acquisition': 'nav', 'regex_search': True}}, ['T2w', 'acq-vnav_T1w']),
        ({'anything': {'suffix': 'T1w', 'acquisition': 'vnav'}}, ['T2w', 'acq-vnav_T1w']),
        ({'anat': {'acquisition': None}}, ['T2w', 'T1w']),
        (
            {'bold': {'task': 'rest'}, 't1w': {'datatype': 'anat', 'acquisition': 'vnav'}},
            ['T2w', 'acq-vnav_T1w'],
        ),
        ({'t1w': {'session': 'ses-B'}}, ['T2w']),
        ({'t1w': {'reconstruction': None}, 't2w': {'run': '*'}}, ['T1w', *MPRAGE, 'acq-vnav_T1w']),
        ({'t1w': {'acquisition': ['vnav', None]}}, ['T2w', 'T1w', 'acq-vnav_T1w']),
    ],
)
def test_a_filter_file_restricts_by_entity(
    tmp_path: Path, filters: dict[str, dict[str, object]], expected: list[str]
) -> None:
    variants = [f'{label}.nii.gz' for label in (*MPRAGE, 'acq-vnav_T1w')]
    files = anat(T1, T2, *variants, session='A')
    (found,) = find_sessions(dataset(tmp_path, files), filters=filters, check_images=False)
    assert sorted(s.label for s in found.scans) == sorted(expected)
    assert all('filter' in r.reason for r in found.ledger if r.status == 'rejected')


@pytest.mark.parametrize('query', ['mprage', {'acquisitions': 'a'}, {'acq': '('}, {'acq': 1.5}])
def test_a_filter_that_cannot_be_understood_is_a_usage_error(
    tmp_path: Path, query: object
) -> None:
    with pytest.raises(UsageError, match="filter 't1w'"):
        find_sessions(dataset(tmp_path, anat(T1)), filters={'t1w': query})


@pytest.mark.parametrize(
    ('reference', 'expected'),
    [
        (None, 'T1w'),
        ('T2w', 'T2w'),
        ('t2w', 'T2w'),
        ('acq-vnav_T1w', 'acq-vnav_T1w'),
        ('FLAIR,T2w', 'T2w'),
        ('FLAIR', 'T1w'),
    ],
)
def test_the_reference_can_be_asked_for(
    tmp_path: Path, reference: str | None, expected: str
) -> None:
    root = dataset(tmp_path, anat(T1, T2, 'acq-vnav_T1w.nii.gz'))
    (found,) = find_sessions(root, reference=reference, check_images=False)
    assert found.scans[0].label == expected
    assert found.ledger[0].status == 'reference'
    assert ('reference-not-found' in {f.code for f in found.flags}) == (reference == 'FLAIR')


def test_a_reference_that_is_no_contrast_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='--reference-anat'):
        find_sessions(dataset(tmp_path, anat(T1)), reference='bold')


def test_one_bad_image_never_stops_a_session_nor_a_session_the_run(tmp_path: Path) -> None:
    root = dataset(tmp_path)
    good = anat('acq-a_T1w.nii.gz', T1, 'acq-b_T1w.nii.gz', T2)
    image(root / good[0], spacing=(2, 2, 8), size=50)
    (root / good[1]).write_bytes(image(root / good[1]).read_bytes()[:2000])
    image(root / good[2], seed=1)
    image(root / good[3], seed=2)
    bad = root / anat(T1, subject='02')[0]
    bad.parent.mkdir(parents=True)
    bad.symlink_to('../../.git/annex/objects/a/MD5E-s1--b.nii.gz')
    image(root / anat(T1, subject='03')[0], seed=3)
    first, second, third = find_sessions(root)
    # The plain T1w is truncated; of the others the one with the thinner slices leads.
    assert [s.label for s in first.scans] == ['acq-b_T1w', 'T2w', 'acq-a_T1w']
    assert [r.relative_path for r in first.ledger if r.status == 'rejected'] == [good[1]]
    assert 'truncated' in first.ledger[-1].reason
    assert {'image-rejected', 'thick-slices'} <= {f.code for f in first.flags}
    assert second.scans == ()
    assert 'datalad get' in second.ledger[0].reason
    assert len(third.scans) == 1


def test_the_reference_is_complete_before_it_is_fine(tmp_path: Path) -> None:
    root = dataset(tmp_path)
    slab, whole, coarse = anat('acq-a_T1w.nii.gz', 'acq-b_T1w.nii.gz', 'acq-c_T1w.nii.gz')
    image(root / slab, spacing=(1.5, 1.5, 1.5), seed=1)
    image(root / whole, spacing=(2.5, 2.5, 2.5), seed=2)
    image(root / coarse, spacing=(2, 2, 3), size=50, seed=3)
    (found,) = find_sessions(root)
    assert [s.relative_path for s in found.scans] == [whole, slab, coarse]


def test_of_two_forms_of_an_image_the_readable_one_is_used(tmp_path: Path) -> None:
    root = dataset(tmp_path, anat(T1))
    image(root / anat('T1w.nii')[0])
    (found,) = find_sessions(root)
    assert [s.relative_path for s in found.scans] == anat('T1w.nii')
    assert [(r.status, r.relative_path) for r in found.ledger] == [
        ('reference', anat('T1w.nii')[0]),
        ('rejected', anat(T1)[0]),
    ]
    assert 'empty' in found.ledger[1].reason


def test_copies_are_flagged_where_they_lie(tmp_path: Path) -> None:
    root = dataset(tmp_path)
    image(root / anat(T1, subject='01', session='A')[0])
    image(root / anat(T1, subject='02', session='A')[0])
    image(root / anat(T1, subject='03', session='A')[0], seed=1)
    codes = [{f.code for f in s.flags} for s in find_sessions(root)]
    assert ['image-copy' in c for c in codes] == [True, True, False]


def test_ages_reach_the_sessions(tmp_path: Path) -> None:
    root = dataset(tmp_path, [*anat(T1, session='A'), *anat(T1, subject='02')])
    (root / 'participants.tsv').write_text('participant_id\tage_months\nsub-01\t3\nsub-02\t4.5\n')
    found = find_sessions(root, check_images=False, ages=parse_age_option('sub-01=7'))
    assert [describe_age(s.age) for s in found] == ['7 months', '4.5 months']


def test_one_row_for_two_sessions_gives_no_age_even_when_one_is_asked_for(tmp_path: Path) -> None:
    root = dataset(tmp_path, [*anat(T1, session='A'), *anat(T1, session='B')])
    (root / 'participants.tsv').write_text('participant_id\tage_months\nsub-01\t3\n')
    (found,) = find_sessions(root, sessions=['A'], check_images=False)
    assert found.age.months is None
    assert 'age-one-for-many-sessions' in {f.code for f in found.flags}


def test_the_ledger_can_be_printed_row_by_row(tmp_path: Path) -> None:
    root = dataset(tmp_path, anat(T1, 'T1map.nii.gz'))
    rows = ledger_rows(find_sessions(root, check_images=False))
    assert [(r.session, r.contrast, r.status) for r in rows] == [
        ('sub-01', 'T1w', 'reference'),
        ('sub-01', 'T1map', 'rejected'),
    ]


def test_an_index_is_created_used_and_shared_between_participants(tmp_path: Path) -> None:
    root = dataset(tmp_path / 'data', [*anat(T1), *anat(T1, subject='02')])
    index = tmp_path / 'cache' / 'index'
    first = find_sessions(root, participants=['01'], database_dir=index, check_images=False)
    assert names(first) == ['sub-01']
    assert (index / 'layout_index.sqlite').is_file()
    assert list(index.parent.iterdir()) == [index]
    second = find_sessions(root, participants=['02'], database_dir=index, check_images=False)
    assert names(second) == ['sub-02']
    # A subject that came later is found when it is asked for.
    dataset(root, anat(T2, subject='03'))
    later = find_sessions(root, participants=['02', '03'], database_dir=index, check_images=False)
    assert names(later) == ['sub-02', 'sub-03']
    # The dataset may be mounted elsewhere than where it was indexed.
    moved = root.rename(tmp_path / 'moved')
    other = find_sessions(moved, database_dir=index, check_images=False)
    assert names(other) == ['sub-01', 'sub-02']
    assert all(Path(s.scans[0].path).is_relative_to(moved) for s in other)


def test_an_index_that_cannot_be_used_is_a_usage_error(tmp_path: Path) -> None:
    root = dataset(tmp_path / 'data', anat(T1))
    index = tmp_path / 'index'
    index.mkdir()
    (index / 'layout_index.sqlite').write_text('no database')
    with pytest.raises(UsageError, match='index'):
        find_sessions(root, database_dir=index)
    elsewhere = tmp_path / 'file' / 'index'
    (tmp_path / 'file').touch()
    with pytest.raises(UsageError, match='--bids-database-dir'):
        find_sessions(root, database_dir=elsewhere)


def test_links_and_relative_paths_lead_to_the_same_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = dataset(tmp_path / 'store', anat(T1, subject='02'))
    root = dataset(tmp_path / 'data', anat(T1))
    (root / 'sub-02').symlink_to(store / 'sub-02')
    (tmp_path / 'link').symlink_to(root)
    monkeypatch.chdir(root)
    for path in (root, tmp_path / 'link', Path(), Path('../data'), tmp_path / 'store/../data'):
        found = find_sessions(path, check_images=False)
        assert names(found) == ['sub-01', 'sub-02']
        assert all(Path(s.scans[0].path).is_file() for s in found)


def test_a_loop_of_folders_and_an_undecodable_name_are_passed_by(tmp_path: Path) -> None:
    root = dataset(tmp_path, anat(T1))
    (root / 'sub-01/anat/loop').symlink_to('..')
    (root / 'sub-02').symlink_to('sub-02')
    with (
        root / 'sub-01/anat' / b'sub-01_acq-\xff_T1w.nii.gz'.decode('utf-8', 'surrogateescape')
    ).open('w'):
        pass
    (found,) = find_sessions(root, check_images=False)
    assert [s.label for s in found.scans] == ['T1w']


BMEX_AGES = {
    # One value in years, with the sidecar saying so; for V02 only sessions.tsv speaks.
    'sub-0001_ses-V01': (72.0, None),
    'sub-0001_ses-V02': (72.0, None),
    'sub-0002_ses-V01': (23.0, None),
    # The only row of these tables names the image of sub-0002: whose age it is cannot be told.
    'sub-0003_ses-V01': (None, None),
    'sub-0004_ses-V01': (None, None),
    'sub-0005_ses-V01': (None, None),
    'sub-0006_ses-V01': (None, None),
    'sub-0007_ses-V01': (4.0, None),
    'sub-0008_ses-V01': (1.0, None),
    # A fetus: weeks of gestation, no months.
    'sub-0009_ses-V01': (None, 25.0),
}
BMEX_FLAGS = {
    'sub-0001_ses-V01': {'scans-path', 'table-stray', 'age-in-image-json', 'age-out-of-range'},
    'sub-0001_ses-V02': {'age-in-image-json', 'age-out-of-range', 'image-same-outline'},
    'sub-0002_ses-V01': {'scans-path', 'age-units-contradict', 'oblique'},
    'sub-0003_ses-V01': {'scans-foreign-file', 'age-unknown', 'oblique'},
    'sub-0004_ses-V01': {'scans-foreign-file', 'age-unknown', 'oblique'},
    'sub-0005_ses-V01': {'scans-foreign-file', 'age-unknown'},
    'sub-0006_ses-V01': {'scans-foreign-file', 'age-unknown', 'image-same-outline'},
    'sub-0007_ses-V01': {'scans-path', 'age-units-contradict', 'oblique'},
    'sub-0008_ses-V01': {'scans-path', 'age-units-contradict', 'oblique'},
    'sub-0009_ses-V01': {
        'scans-path', 'table-stray', 'age-units-contradict', 'age-contradiction',
        'age-gestational',
    },
}  # fmt: skip


@pytest.mark.needs_shared('data/ds-bmex')
def test_a_real_dataset_comes_out_whole_with_all_its_oddities_named(shared: Path) -> None:
    found = find_sessions(shared / 'data/ds-bmex')
    ages = {s.name: (s.age.months, s.age.gestational_weeks) for s in found}
    assert ages == BMEX_AGES
    flags = {s.name: {f.code for f in s.flags} for s in found}
    # README.md is an LFS pointer, which concerns every session alike.
    assert flags == {name: codes | {'dataset-readme'} for name, codes in BMEX_FLAGS.items()}
    suffixes = {s.name: [scan.suffix for scan in s.scans] for s in found}
    assert suffixes == {n: ['T2w' if n == 'sub-0009_ses-V01' else 'T1w'] for n in BMEX_AGES}
    assert all(r.status == 'reference' for s in found for r in s.ledger)
    foreign = next(f for f in found[3].flags if f.code == 'scans-foreign-file')
    assert '--age-months sub-0003_ses-V01=19' in foreign.message
    (contradiction,) = [f for f in found[-1].flags if f.code == 'age-contradiction']
    assert '25 gestational weeks' in contradiction.message
    assert '30 gestational weeks' in contradiction.message


@pytest.mark.needs_shared('data/ds-bmex')
def test_the_ages_of_a_real_dataset_can_be_given(shared: Path) -> None:
    ages = parse_age_option('sub-0003=19 sub-0004=11 sub-0005=9 sub-0006=6')
    found = find_sessions(shared / 'data/ds-bmex', ages=ages, check_images=False)
    assert [s.age.months for s in found[3:7]] == [19, 11, 9, 6]


@pytest.mark.needs_shared('data/ds-templates')
def test_real_pairs_come_out_with_their_ages(shared: Path) -> None:
    found = find_sessions(shared / 'data/ds-templates', check_images=False)
    assert [s.age.months for s in found] == [0, 6, 9, 12, 24]
    assert [[scan.suffix for scan in s.scans] for s in found] == [['T1w', 'T2w']] * 5
    assert all(s.flags == () for s in found)
    (motion,) = find_sessions(shared / 'data/ds-motion24', check_images=False)
    assert motion.age.months == pytest.approx(24)
    assert 'BIDS default' in motion.age.source
    assert [s.label for s in motion.scans] == ['acq-enhanced_T1w', 'acq-motion_T1w']
