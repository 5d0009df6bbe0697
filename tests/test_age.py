"""Ages as people write them, and as the tables of real datasets contradict one another."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from babyseg_bids.age import AgeOverrides, DatasetTables, parse_age_option, resolve_age
from babyseg_bids.age_columns import age_columns
from babyseg_bids.age_values import parse_amount, parse_unit
from babyseg_bids.errors import UsageError
from babyseg_bids.records import Age

MONTHS_A_YEAR = 12
MONTHS_A_WEEK = 7 / (365.25 / 12)
IMAGE = 'sub-01/ses-A/anat/sub-01_ses-A_T1w.nii.gz'


def write(root: Path, files: Mapping[str, object]) -> None:
    """Write a dataset: tables as lists of rows, JSON files as dicts, the rest as text."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            path.write_text(json.dumps(content))
        elif isinstance(content, list):
            path.write_text('\n'.join('\t'.join(row.split()) for row in content) + '\n')
        else:
            path.write_text(str(content))


def resolve(
    root: Path, files: Mapping[str, object], *, session: str | None = 'A', **options: object
) -> tuple[Age, set[str]]:
    write(root, {IMAGE: '', **files})
    image = IMAGE if session else 'sub-01/anat/sub-01_T1w.nii.gz'
    age, flags = resolve_age(
        DatasetTables(root),
        '01',
        session,
        [image],
        **options,  # type: ignore[arg-type]
    )
    assert all(f.message.endswith('.') for f in flags)
    return age, {f.code for f in flags}


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('month', 'months'),
        ('Months', 'months'),
        ('mo', 'months'),
        ('y', 'years'),
        ('yrs', 'years'),
        ('days', 'days'),
        ('age in weeks', 'weeks'),
        ('gestational_weeks', 'gestational weeks'),
        ('weeks GA', 'gestational weeks'),
        ('weeks PMA', 'gestational weeks'),
        ('post-menstrual weeks', 'gestational weeks'),
        ('GW', 'gestational weeks'),
        ('', None),
        ('arbitrary', None),
        ('weeks or months', None),
    ],
)
def test_units_are_read_in_every_usual_spelling(text: str, expected: str | None) -> None:
    unit = parse_unit(text)
    assert (None if unit is None else str(unit)) == expected


@pytest.mark.parametrize(
    ('text', 'value', 'unit'),
    [
        ('6', 6, None),
        ('6.5', 6.5, None),
        ('6 ', 6, None),
        ('0', 0, None),
        ('6 years', 6, 'years'),
        ('6mo', 6, 'months'),
        ('006M', 6, 'months'),
        ('1 year 3 months', 15, 'months'),
        ('1y3m', 15, 'months'),
        ('P1Y2M', 14, 'months'),
        ('30 gestational_weeks', 30, 'gestational weeks'),
        ('38+2', 38 + 2 / 7, 'gestational weeks'),
        ('38w2d', 38 * 7 + 2, 'days'),
    ],
)
def test_values_are_read_with_the_unit_written_beside_them(
    text: str, value: float, unit: str | None
) -> None:
    amount = parse_amount(text)
    assert amount is not None
    assert amount.value == pytest.approx(value)
    assert (str(amount.unit) if amount.unit else None) == unit


@pytest.mark.parametrize(
    'text',
    ['', '3-4', '>5', '4,5', '89+', 'abc', '1e400', '6 7', '-', '3 months 1 year'],
)
def test_what_is_not_one_age_is_not_guessed_at(text: str) -> None:
    assert parse_amount(text) is None


def test_only_ages_at_scan_are_taken_for_ages() -> None:
    names = [
        'participant_id', 'age', 'Age', 'age_months', 'ageMonths', 'scan_age', 'age_at_scan_weeks',
        'mother_age', 'age_at_diagnosis', 'birth_age', 'gestational_age', 'bone_age', 'language',
        'corrected_age', 'pma_weeks', 'gestational_age_at_scan', 'stage', 'age_group',
    ]  # fmt: skip
    found = {c.name: str(c.unit) if c.unit else None for c in age_columns(names)}
    assert found == {
        'age': None,
        'Age': None,
        'age_months': 'months',
        'ageMonths': 'months',
        'scan_age': None,
        'age_at_scan_weeks': 'weeks',
        'pma_weeks': 'gestational weeks',
        'gestational_age_at_scan': 'gestational weeks',
    }


def participants(*rows: str, **sidecar: str) -> dict[str, object]:
    """A participants.tsv (columns separated by blanks), and what its JSON says of the ages."""
    files: dict[str, object] = {
        'participants.tsv': list(rows or ('participant_id age', 'sub-01 6'))
    }
    if sidecar:
        files['participants.json'] = dict.fromkeys(('age', 'age_weeks'), sidecar)
    return files


AGE = 'participant_id age'
IN_MONTHS = 'participant_id age_months'
TWO = 'participant_id age age_months'
WRITTEN = {'participants.tsv': 'participant_id\tage\nsub-01\t6 weeks\n'}


@pytest.mark.parametrize(
    ('files', 'months', 'codes'),
    [
        # The sidecar's unit, singular or plural.
        (participants(Units='month'), 6, set()),
        (participants(Units='months'), 6, set()),
        (participants(Units='week'), 6 * MONTHS_A_WEEK, set()),
        (participants(Units='day'), 6 / 7 * MONTHS_A_WEEK, set()),
        # A suffix of the column, of the value; the description; the default of BIDS.
        (participants('participant_id age_weeks', 'sub-01 26'), 26 * MONTHS_A_WEEK, set()),
        (WRITTEN, 6 * MONTHS_A_WEEK, set()),
        (participants(Description='Age in months'), 6, set()),
        (participants(AGE, 'sub-01 2'), 24, set()),
        (participants(AGE, 'sub-01 3'), 36, {'age-unit-default'}),
        (participants(), 72, {'age-unit-default', 'age-out-of-range'}),
        # The sidecar wins over everything that contradicts it, with a flag.
        (participants(Units='months', Description='Age in years'), 6, {'age-units-contradict'}),
        (
            participants('participant_id age_weeks', 'sub-01 6', Units='month'),
            6,
            {'age-units-contradict'},
        ),
        ({**participants(Units='month'), **WRITTEN}, 6, {'age-units-contradict'}),
        # A unit that cannot be read is not replaced by a guess.
        (
            participants(Units='moons'),
            None,
            {'age-units-unreadable', 'age-unreadable', 'age-unknown'},
        ),
        # Values that are none.
        (participants(AGE, 'sub-01 n/a'), None, {'age-unknown'}),
        (participants(AGE, 'sub-01 -3'), None, {'age-unreadable', 'age-unknown'}),
        (participants(AGE, 'sub-01 3-4'), None, {'age-unreadable', 'age-unknown'}),
        (participants(IN_MONTHS, 'sub-01 9999999'), None, {'age-unreadable', 'age-unknown'}),
        (participants('participant_id sex', 'sub-01 f'), None, {'age-unknown'}),
        ({}, None, {'age-unknown'}),
        # Labels: with and without prefix, numbers that lost their zeros.
        (participants(IN_MONTHS, '01 6'), 6, set()),
        (participants(IN_MONTHS, '1 6'), 6, {'table-label'}),
        (participants(IN_MONTHS, 'sub-001 6', '1 7'), None, {'table-label', 'age-unknown'}),
        # Several columns: the one with a unit in its name first.
        (participants(TWO, 'sub-01 1 14'), 14, set()),
        (participants(TWO, 'sub-01 2 6'), 6, {'age-contradiction'}),
        # Two rows for one subject.
        (participants(IN_MONTHS, 'sub-01 6', 'sub-01 9'), 6, {'age-contradiction'}),
    ],
)
def test_ages_of_participants_tsv(
    tmp_path: Path, files: Mapping[str, object], months: float | None, codes: set[str]
) -> None:
    age, found = resolve(tmp_path, files)
    assert age.months == (None if months is None else pytest.approx(months))
    assert found == codes
    assert (age.source == 'unknown') == (months is None)


def test_the_most_specific_table_wins_and_the_others_are_compared(tmp_path: Path) -> None:
    files: dict[str, object] = {
        'participants.tsv': ['participant_id age_months', 'sub-01 20'],
        'sub-01/sub-01_sessions.tsv': ['session_id age_months', 'ses-A 8', 'ses-B 30'],
        'sub-01/ses-A/sub-01_ses-A_scans.tsv': [
            'filename age_months', 'anat/sub-01_ses-A_T1w.nii.gz 6',
        ],
    }  # fmt: skip
    age, codes = resolve(tmp_path, files)
    assert age.months == 6
    assert 'scans.tsv' in age.source
    assert codes == {'age-contradiction'}
    (tmp_path / 'sub-01/ses-A/sub-01_ses-A_scans.tsv').unlink()
    age, _ = resolve(tmp_path, {})
    assert age.months == 8
    assert 'sessions.tsv' in age.source
    (tmp_path / 'sub-01/sub-01_sessions.tsv').unlink()
    age, codes = resolve(tmp_path, {})
    assert age.months == 20
    assert codes == set()


@pytest.mark.parametrize('written', ['ses-A', 'A'])
def test_a_session_matches_with_and_without_its_prefix(tmp_path: Path, written: str) -> None:
    table = ['session_id age_months', f'{written} 7', 'B 9']
    assert resolve(tmp_path, {'sub-01/sub-01_sessions.tsv': table})[0].months == 7


def test_a_numeric_session_keeps_its_zeros_or_is_matched_with_a_flag(tmp_path: Path) -> None:
    image = 'sub-01/ses-01/anat/sub-01_ses-01_T1w.nii.gz'
    write(tmp_path, {'sub-01/sub-01_sessions.tsv': ['session_id age_months', '01 7', '1 9']})
    age, flags = resolve_age(DatasetTables(tmp_path), '01', '01', [image])
    assert (age.months, flags) == (7, ())
    write(tmp_path, {'sub-01/sub-01_sessions.tsv': ['session_id age_months', '1.0 7', '2.0 9']})
    age, flags = resolve_age(DatasetTables(tmp_path), '01', '01', [image])
    assert age.months == 7
    assert [f.code for f in flags] == ['table-label']


def test_ages_that_agree_after_rounding_are_no_contradiction(tmp_path: Path) -> None:
    files = {
        'participants.tsv': ['participant_id age', 'sub-01 1'],
        'sub-01/sub-01_sessions.tsv': ['session_id age_months', 'A 17.5'],
    }
    age, codes = resolve(tmp_path, files)
    assert age.months == 17.5
    assert codes == set()


def test_one_row_is_not_used_for_several_sessions(tmp_path: Path) -> None:
    files = {'participants.tsv': ['participant_id age_months', 'sub-01 6']}
    age, codes = resolve(tmp_path, files, n_sessions=2)
    assert age.months is None
    assert codes == {'age-one-for-many-sessions', 'age-unknown'}


def test_participants_tsv_may_have_a_row_for_each_session(tmp_path: Path) -> None:
    rows = ['participant_id session_id age_months', 'sub-01 ses-B 9', 'sub-01 ses-A 6', '02 A 1']
    age, codes = resolve(tmp_path, {'participants.tsv': rows}, n_sessions=2)
    assert (age.months, codes) == (6, set())


def test_sidecars_are_inherited_from_the_top(tmp_path: Path) -> None:
    files = {
        'sub-01/ses-A/sub-01_ses-A_scans.tsv': ['filename age', 'anat/sub-01_ses-A_T1w.nii.gz 6'],
        'scans.json': {'age': {'Units': 'week'}},
    }
    age, codes = resolve(tmp_path, files)
    assert age.months == pytest.approx(6 * MONTHS_A_WEEK)
    assert codes == set()
    nearer = {'sub-01/ses-A/sub-01_ses-A_scans.json': {'age': {'Units': 'month'}}}
    assert resolve(tmp_path, nearer)[0].months == 6


def test_a_row_that_names_another_subject_is_not_used(tmp_path: Path) -> None:
    rows = ['filename age_months', 'sub-02_ses-A_T1w.nii.gz 6']
    age, codes = resolve(tmp_path, {'sub-01/ses-A/sub-01_ses-A_scans.tsv': rows})
    assert age.months is None
    assert codes == {'scans-foreign-file', 'age-unknown'}


def test_rows_of_scans_tsv_are_recognised_by_file_name(tmp_path: Path) -> None:
    rows = [
        'filename age_months',
        'sub-01_ses-A_T1w.nii 6',
        'anat/sub-01_ses-A_T2w.nii.gz 7',
        'func/sub-01_ses-A_task-rest_bold.nii.gz 8',
    ]
    age, codes = resolve(tmp_path, {'sub-01/ses-A/sub-01_ses-A_scans.tsv': rows})
    assert age.months == 6
    assert codes == {'scans-path', 'scans-missing-file'}


def test_a_subject_without_sessions_has_its_own_scans_tsv(tmp_path: Path) -> None:
    rows = ['filename age_months', 'anat/sub-01_T1w.nii.gz 6']
    age, codes = resolve(tmp_path, {'sub-01/sub-01_scans.tsv': rows}, session=None)
    assert (age.months, codes) == (6, set())


def test_the_reference_image_leads_when_scans_of_a_session_differ_in_age(tmp_path: Path) -> None:
    rows = [
        'filename age_months',
        'anat/sub-01_ses-A_T2w.nii.gz 9',
        'anat/sub-01_ses-A_T1w.nii.gz 6',
    ]
    write(tmp_path, {'sub-01/ses-A/sub-01_ses-A_scans.tsv': rows})
    images = [IMAGE, IMAGE.replace('T1w', 'T2w')]
    for order, months in ((images, 6), (images[::-1], 9)):
        age, flags = resolve_age(DatasetTables(tmp_path), '01', 'A', order)
        assert age.months == months
        assert [f.code for f in flags] == ['age-contradiction']


def test_gestational_ages_are_kept_apart(tmp_path: Path) -> None:
    files = {
        'sub-01/sub-01_sessions.tsv': ['session_id scan_age', 'A 42.5'],
        'sub-01/sub-01_sessions.json': {
            'scan_age': {'Units': 'weeks', 'Description': 'Post-menstrual age at scan'}
        },
    }
    age, codes = resolve(tmp_path, files)
    assert (age.months, age.gestational_weeks) == (None, 42.5)
    assert codes == {'age-gestational'}
    # An age since birth that fits completes it; one that cannot be the same child's does not.
    files['participants.tsv'] = ['participant_id age_weeks', 'sub-01 3']
    age, codes = resolve(tmp_path, files)
    assert age.months == pytest.approx(3 * MONTHS_A_WEEK)
    assert age.gestational_weeks == 42.5
    assert codes == set()
    age, codes = resolve(tmp_path, {'participants.tsv': ['participant_id age_years', 'sub-01 31']})
    assert (age.months, age.gestational_weeks) == (None, 42.5)
    assert 'age-contradiction' in codes


def test_a_stray_table_only_compares_unless_it_is_the_only_one(tmp_path: Path) -> None:
    stray = {
        'sub-01/ses-A/anat/sub-01_ses-A_scans.tsv': [
            'filename age_months', 'sub-01_ses-A_T1w.nii.gz 9',
        ],
    }  # fmt: skip
    age, codes = resolve(tmp_path, stray)
    assert age.months == 9
    assert codes == {'table-stray'}
    age, codes = resolve(tmp_path, {'participants.tsv': ['participant_id age_months', 'sub-01 6']})
    assert age.months == 6
    assert codes == {'table-stray', 'age-contradiction'}


@pytest.mark.parametrize(
    ('value', 'months'), [('6 years', 72), ('006M', 6), ('6', None), (6, None), ([6], None)]
)
def test_an_age_in_the_image_json_is_the_last_resort_and_needs_a_unit(
    tmp_path: Path, value: object, months: float | None
) -> None:
    name = IMAGE.replace('.nii.gz', '.json')
    age, codes = resolve(tmp_path, {name: {'Age': value}})
    assert age.months == months
    assert ('age-in-image-json' in codes) == (not isinstance(value, list))


@pytest.mark.parametrize(
    ('content', 'code'),
    [
        (b'', 'table-unreadable'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', 'table-unreadable'),
        (b'participant_id,age\nsub-01,6\n', 'table-unreadable'),
        (b'\xff\xfe\x00\x01\x02', 'table-unreadable'),
        (b'participant_id\tage_months\tsite\nsub-01\t6\tM\xfcnchen\n', 'table-unreadable'),
        (b'participant_id\tage_months\nsub-01\t6\textra\n', 'table-unreadable'),
        (b'name\tage_months\nsub-01\t6\n', 'table-unreadable'),
    ],
)
def test_a_damaged_participants_tsv_is_named_and_stops_nothing(
    tmp_path: Path, content: bytes, code: str
) -> None:
    (tmp_path / 'participants.tsv').write_bytes(content)
    tables = DatasetTables(tmp_path)
    flags = tables.dataset_flags()
    assert {f.code for f in flags} == {code}
    assert 'participants.tsv' in flags[0].message
    age, _ = resolve_age(tables, '01', None, [])
    assert age.months == (6 if b'sub-01\t6' in content and b'name' not in content else None)


def test_spreadsheet_habits_are_understood(tmp_path: Path) -> None:
    content = '\ufeff"participant_id"\tage_months\r\n"sub-01"\t 6.50 \r\n\r\n'
    (tmp_path / 'participants.tsv').write_bytes(content.encode())
    tables = DatasetTables(tmp_path)
    age, flags = resolve_age(tables, '01', None, [])
    assert (age.months, flags, tables.dataset_flags()) == (6.5, (), [])


def test_a_broken_sidecar_is_named_and_stops_nothing(tmp_path: Path) -> None:
    files = {
        'participants.tsv': ['participant_id age_months', 'sub-01 6'],
        'participants.json': '{"age": {"Units": ',
    }
    assert resolve(tmp_path, files)[0].months == 6
    (flag,) = DatasetTables(tmp_path).dataset_flags()
    assert 'participants.json' in flag.message
    deep = '[' * 100_000
    (tmp_path / 'participants.json').write_text(deep)
    assert len(DatasetTables(tmp_path).dataset_flags()) == 1


def test_random_tables_never_raise(tmp_path: Path) -> None:
    seed = 7
    print(f'seed {seed}')
    rng = np.random.default_rng(seed)
    words = [
        'participant_id', 'session_id', 'age', 'age_weeks', 'sub-01', 'ses-A', '6', '-1', 'n/a',
        '1e999', '\t', '\t', '\t', '\n', '\n', '\0', '"', '\ufeff', '9' * 5000, '6 weeks', '+',
        'é', 'filename', 'anat/sub-01_ses-A_T1w.nii.gz', '../../x.nii.gz', '/etc/passwd', '{',
        'Units',
    ]  # fmt: skip
    names = [
        'participants.tsv', 'participants.json', 'sub-01/sub-01_sessions.tsv',
        'sub-01/ses-A/sub-01_ses-A_scans.tsv', 'sub-01/ses-A/anat/sub-01_scans.tsv',
    ]  # fmt: skip
    for _ in range(150):
        content = {n: ''.join(rng.choice(words, rng.integers(1, 40))) for n in names}
        age, _ = resolve(tmp_path, content)
        assert age.months is None or 0 <= age.months < 2000


@pytest.mark.parametrize(
    ('text', 'subject', 'session', 'months'),
    [
        ('6', '01', 'A', 6),
        ('6.5', '99', None, 6.5),
        ('26 weeks', '01', None, 26 * MONTHS_A_WEEK),
        ('sub-01=6', '01', 'A', 6),
        ('01=6,02=9', '02', 'A', 9),
        ('sub-01=6 sub-02=9', '03', None, None),
        ('sub-01=6 sub-01_ses-A=7', '01', 'A', 7),
        ('sub-01_ses-A=7 sub-01=6', '01', 'B', 6),
        ('01_A=7', '01', 'A', 7),
        ('01/A=7', '01', 'A', 7),
        ('ses-A=7', '05', 'A', 7),
        ('ses-A=7', '05', 'B', None),
        (['sub-01=1 year 3 months', 'sub-02=9'], '01', None, 15),
        ('', '01', None, None),
        (None, '01', None, None),
    ],
)
def test_the_option_takes_a_value_or_a_list(
    text: str | list[str] | None, subject: str, session: str | None, months: float | None
) -> None:
    age = parse_age_option(text).find(subject, session)
    assert (age.months if age else None) == (None if months is None else pytest.approx(months))


@pytest.mark.parametrize(
    'text',
    ['six', '6,5', 'sub-01=', 'sub-01=x', '=6', 'sub_01=6', 'sub-01=6 sub-01=7', 'x.tsv', '-3'],
)
def test_an_option_that_cannot_be_read_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match='--age-months'):
        parse_age_option(text)


def test_the_option_takes_a_table(tmp_path: Path) -> None:
    path = tmp_path / 'ages of all.tsv'
    path.write_text(
        'participant_id\tsession_id\tage_weeks\n01\tA\t10\nsub-01\tses-B\t20\n02\tn/a\t30\n03\tA\tn/a\n'
    )
    ages = parse_age_option(str(path))
    assert ages.find('01', 'B').months == pytest.approx(20 * MONTHS_A_WEEK)  # type: ignore[union-attr]
    assert ages.find('02', 'Z').months == pytest.approx(30 * MONTHS_A_WEEK)  # type: ignore[union-attr]
    assert ages.find('03', 'A') is None
    assert ages.unknown_subjects(['01']) == ('02',)
    path.write_text('participant_id\tage\n01\t10\n')
    assert parse_age_option(str(path)).find('01', None).months == 10  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ('content', 'word'),
    [
        ('subject_name\tage\n01\t6\n', 'participant_id'),
        ('participant_id\tsex\n01\tf\n', 'age_months'),
        ('participant_id\tage\n01\tsix\n', 'line 2'),
        ('participant_id\tage\n01\t6\n01\t7\n', 'two different ages'),
        ('participant_id,age\n01,6\n', 'tabs'),
    ],
)
def test_a_table_that_cannot_be_used_is_a_usage_error(
    tmp_path: Path, content: str, word: str
) -> None:
    path = tmp_path / 'ages.tsv'
    path.write_text(content)
    with pytest.raises(UsageError, match=word):
        parse_age_option(str(path))


def test_the_option_wins_over_tables_and_contradictions_are_noted(tmp_path: Path) -> None:
    files = {'participants.tsv': ['participant_id age_months', 'sub-01 6']}
    age, codes = resolve(tmp_path, files, overrides=parse_age_option('sub-01=9'))
    assert age.months == 9
    assert '--age-months' in age.source
    assert codes == {'age-contradiction'}
    age, codes = resolve(tmp_path, files, overrides=parse_age_option('sub-01=6.4'))
    assert (age.months, codes) == (6.4, set())
    age, codes = resolve(tmp_path, files, overrides=AgeOverrides())
    assert (age.months, codes) == (6, set())
