import csv
import json
import time

import pytest
from report_phantoms import WARNING, publish
from test_reports import check_page

from babyseg_bids.cli.verdicts import Verdict, record_verdicts
from babyseg_bids.errors import NoInputError
from babyseg_bids.records import Flag
from babyseg_bids.reports import files
from babyseg_bids.reports.group import write_group
from babyseg_bids.reports.people import RATINGS_FILE
from babyseg_bids.reports.subject import write_subject_report
from babyseg_bids.settings import Settings


def rows(path):
    with path.open(newline='') as stream:
        return list(csv.DictReader(stream, delimiter='\t'))


def test_a_folder_without_results_says_what_was_looked_for(tmp_path):
    (tmp_path / 'sub-01' / 'anat').mkdir(parents=True)
    with pytest.raises(NoInputError, match='participant level first'):
        write_group(tmp_path)
    assert not (tmp_path / 'group.html').exists()


def test_the_volumes_table_has_one_row_a_session_and_the_same_columns_for_all(tmp_path):
    publish(tmp_path, '01', 'A', months=1.5)
    publish(tmp_path, '01', 'B', months=None)
    folder = publish(tmp_path, '02', None, months=24.0)
    (path,) = folder.glob('*_morph.tsv')
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(''.join(lines[:1] + [ln for ln in lines[1:] if 'Thalamus' not in ln]))
    write_group(tmp_path)
    table = rows(tmp_path / 'group_desc-babyseg_morph.tsv')
    assert [(r['participant_id'], r['session_id'], r['age_months']) for r in table] == [
        ('sub-01', 'ses-A', '1.5'),
        ('sub-01', 'ses-B', 'n/a'),
        ('sub-02', 'n/a', '24'),
    ]
    assert all(None not in r and None not in r.values() and '' not in r.values() for r in table)
    assert table[0]['volume_mm3_left_thalamus'] != 'n/a'
    assert table[2]['volume_mm3_left_thalamus'] == 'n/a'
    assert table[2]['mean_confidence_3rd_ventricle'] == '0.9000'


def test_structures_add_up_to_the_brain_in_the_table(tmp_path):
    publish(tmp_path)
    write_group(tmp_path)
    (row,) = rows(tmp_path / 'group_desc-babyseg_morph.tsv')
    brain = float(row['segmented_brain_volume_mm3'])
    tissues = [v for k, v in row.items() if k.startswith('volume_mm3_tissue_')]
    parts = [
        v for k, v in row.items() if k.startswith('volume_mm3_') and 'volume_mm3_tissue_' not in k
    ]
    assert (len(tissues), len(parts)) == (6, 27)
    assert sum(map(float, tissues)) == pytest.approx(brain)
    assert sum(map(float, parts)) == pytest.approx(brain)


def test_every_column_is_explained_beside_its_table(tmp_path):
    publish(tmp_path)
    write_group(tmp_path)
    for name in ('morph', 'qc'):
        path = tmp_path / f'group_desc-babyseg_{name}.tsv'
        (row,) = rows(path)
        dictionary = json.loads(path.with_suffix('.json').read_text())
        assert list(dictionary) == list(row)
        assert all(column['Description'] for column in dictionary.values())


def test_the_quality_table_counts_flags_and_names_scans(tmp_path):
    flags = (WARNING, Flag('x', 'severe', 'Bad.'), Flag('y', 'info', 'Note.'))
    publish(tmp_path, flags=flags)
    write_group(tmp_path)
    (row,) = rows(tmp_path / 'group_desc-babyseg_qc.tsv')
    assert (row['flags_severe'], row['flags_warning'], row['flags_info']) == ('1', '1', '1')
    assert row['flags'] == 'x,age-contradiction,y'
    assert row['scans'] == 'T1w+T2w'
    assert row['scans_rejected'] == '1'
    assert row['uncertain_share'] == 'n/a'
    assert row['mean_confidence'] == '0.9'


def test_the_page_lists_every_session_with_its_report(tmp_path):
    publish(tmp_path, '01', 'A', months=1.0)
    publish(tmp_path, '01', 'B', months=6.0, scale=1.4, flags=(WARNING,))
    publish(tmp_path, '02', None, months=None)
    (tmp_path / 'sub-01_ses-A.html').write_text('')
    write_subject_report(tmp_path, '01')
    written = write_group(tmp_path)
    assert all(p.is_file() for p in written)
    page = check_page(tmp_path / 'group.html')
    links = {a['href'] for a in page.all('a')}
    assert {'sub-01_ses-A.html', 'sub-01.html', 'group_desc-babyseg_morph.tsv'} <= links
    assert 'sub-02.html' not in links
    assert '1 warning' in page.words
    assert 'Not drawn, because no age in months is known: sub-02.' in page.words
    assert 'age-contradiction' in page.words
    assert len(page.all('circle')) == 7 * 2


def test_broken_and_unfinished_sessions_are_listed_and_stop_nothing(tmp_path):
    publish(tmp_path, '01', 'A')
    no_ledger = publish(tmp_path, '02', 'A')
    next(no_ledger.glob('*_ledger.json')).unlink()
    no_table = publish(tmp_path, '03', 'A')
    next(no_table.glob('*_morph.tsv')).unlink()
    broken = publish(tmp_path, '04', 'A')
    next(broken.glob('*_ledger.json')).write_text('{"age": ')
    next(broken.glob('*_morph.tsv')).write_text('index\tname\n2\tx\n')
    next(broken.glob('*_qc.json')).write_text('[1, 2]')
    odd = publish(tmp_path, '05', 'A', age='six', scans='T1w', ledger=None, inputs=[3])
    next(odd.glob('*_qc.json')).write_text('{"flags": ["odd", {"severity": "awful"}]}')
    write_group(tmp_path)
    table = {r['participant_id']: r for r in rows(tmp_path / 'group_desc-babyseg_qc.tsv')}
    assert len(table) == 5
    assert table['sub-01']['problem'] == 'n/a'
    assert 'not completed' in table['sub-02']['problem']
    assert 'no volumes table' in table['sub-03']['problem']
    assert 'cannot be read' in table['sub-04']['problem']
    assert table['sub-05']['flags_warning'] == '2'
    page = check_page(tmp_path / 'group.html')
    assert 'Incomplete or unreadable: sub-02_ses-A, sub-03_ses-A, sub-04_ses-A' in page.words


def test_an_image_that_is_in_two_sessions_and_mixed_models_are_pointed_out(tmp_path):
    same = [{'path': 'x', 'sha256': 'abc'}]
    publish(tmp_path, '01', 'A', inputs=same)
    publish(tmp_path, '06', 'A', inputs=same, model='other 2')
    write_group(tmp_path)
    words = check_page(tmp_path / 'group.html').words
    assert 'belongs to several sessions: sub-01_ses-A, sub-06_ses-A.' in words
    assert 'made by different versions' in words


def test_text_of_derivatives_shows_as_text(tmp_path):
    evil = '<script>alert(1)</script>\t"\'><b>'
    publish(tmp_path, flags=(Flag(evil, 'warning', evil),), model=evil)
    write_group(tmp_path)
    page = check_page(tmp_path / 'group.html')
    assert len(page.all('script')) == 1
    assert len(page.all('b')) == 0
    (row,) = rows(tmp_path / 'group_desc-babyseg_qc.tsv')
    assert row['seconds'] == '12.5'


def test_writing_again_gives_the_same_tables_and_leaves_no_drafts(tmp_path):
    publish(tmp_path)
    write_group(tmp_path)
    first = {p.name: p.read_bytes() for p in tmp_path.glob('group_*')}
    write_group(tmp_path)
    assert first == {p.name: p.read_bytes() for p in tmp_path.glob('group_*')}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith('.')] == []


def test_a_session_far_from_the_curve_is_named_with_its_reason(tmp_path):
    for number in range(14):
        scale = 1 + number / 20 + 0.02 * (-1) ** number
        publish(tmp_path, f'{number:02d}', 'A', months=number, scale=scale)
    publish(tmp_path, '20', 'A', months=6.0, scale=2.6)
    write_group(tmp_path)
    table = {r['participant_id']: r for r in rows(tmp_path / 'group_desc-babyseg_qc.tsv')}
    assert 'Segmented brain +98 %' in table['sub-20']['outliers']
    assert [p for p, r in table.items() if r['outliers'] != 'n/a'] == ['sub-20']
    page = check_page(tmp_path / 'group.html')
    assert len([c for c in page.all('circle') if c.get('class') == 'outlier']) == 7
    ratings = 'participant_id\tsession_id\trating\nsub-20\tses-A\texclude\n02\tA\tmaybe\n'
    (tmp_path / RATINGS_FILE).write_text(ratings)
    write_group(tmp_path)
    words = check_page(tmp_path / 'group.html').words
    assert 'ratings that are not accept, review or exclude: sub-02_ses-A (maybe)' in words
    ranked = rows(tmp_path / 'group_desc-babyseg_annotation.tsv')
    assert 'sub-20' not in {r['participant_id'] for r in ranked}


def test_few_sessions_have_no_curve(tmp_path):
    publish(tmp_path)
    write_group(tmp_path)
    words = check_page(tmp_path / 'group.html').words
    assert 'curve needs at least 12 sessions' in words


def test_covariates_are_joined_though_the_dataset_is_gone(tmp_path):
    publish(tmp_path, '01', 'A')
    publish(tmp_path, '02', 'A')
    (tmp_path / 'logs').mkdir()
    text = 'participant_id\tsex\tage_months\nsub-01\tF\t5\n03\tM\tn/a\n'
    (tmp_path / 'logs' / 'participants.tsv').write_text(text)
    about = {'sex': {'Description': 'Sex at birth', 'Levels': {'F': 'female'}}}
    (tmp_path / 'logs' / 'participants.json').write_text(json.dumps(about))
    write_group(tmp_path, tmp_path / 'gone')
    one, two = rows(tmp_path / 'group_desc-babyseg_morph.tsv')
    assert (one['sex'], one['age_months'], one['participants_age_months']) == ('F', '6', '5')
    assert two['sex'] == 'n/a'
    dictionary = json.loads((tmp_path / 'group_desc-babyseg_morph.json').read_text())
    assert dictionary['sex'] == about['sex']
    words = check_page(tmp_path / 'group.html').words
    assert 'sub-03 missing Listed in participants.tsv' in words


def test_failed_sessions_are_listed_until_they_succeed(tmp_path):
    publish(tmp_path, '01', 'A')
    settings = Settings(bids_dir=tmp_path, output_dir=tmp_path, level='participant')
    verdicts = [
        Verdict('sub-01_ses-A', 'failed', 'Out of memory.'),
        Verdict('sub-02', 'no usable image', 'No scan.'),
        Verdict('sub-03', 'done'),
    ]
    record_verdicts(verdicts, settings)
    write_group(tmp_path)
    words = check_page(tmp_path / 'group.html').words
    assert 'sub-02 no usable image No scan.' in words
    assert 'Out of memory' not in words
    assert not (tmp_path / 'sub-03').exists()


def test_what_would_teach_most_is_unsure_unlike_others_and_not_twice_the_same(tmp_path):
    for number in range(30):
        folder = publish(tmp_path, f'{number:02d}', 'A', months=number / 2, scale=1 + number / 30)
        unsure = 0.5 if number in (4, 5, 25) else 0.1 + number / 1000
        qc = json.dumps({'mean_uncertainty': unsure, 'mean_confidence': 1 - unsure})
        next(folder.glob('*_qc.json')).write_text(qc)
    write_group(tmp_path)
    ranked = rows(tmp_path / 'group_desc-babyseg_annotation.tsv')
    assert [int(r['rank']) for r in ranked] == list(range(1, 31))
    order = [int(r['participant_id'].removeprefix('sub-')) for r in ranked]
    assert order[0] == 4
    # As unsure as the first, and like it.
    assert order.index(5) > 5
    assert order.index(25) < min(order.index(24), order.index(26))
    scores = [float(r['score']) for r in ranked]
    assert scores[0] == max(scores)
    assert min(scores) >= 0


def test_only_new_and_changed_sessions_are_read_again(tmp_path, monkeypatch):
    publish(tmp_path, '01', 'A')
    changed = publish(tmp_path, '02', 'A')
    write_group(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.glob('group_*')}
    seen = []
    read = files._read_files
    monkeypatch.setattr(files, '_read_files', lambda *a: seen.append(a[1]) or read(*a))
    write_group(tmp_path)
    assert seen == []
    assert before == {p.name: p.read_bytes() for p in tmp_path.glob('group_*')}
    publish(tmp_path, '03', 'A')
    next(changed.glob('*_qc.json')).write_text('{"mean_confidence": 0.25}')
    write_group(tmp_path)
    assert seen == ['02', '03']
    table = rows(tmp_path / 'group_desc-babyseg_qc.tsv')
    assert [r['mean_confidence'] for r in table] == ['0.9', '0.25', '0.9']
    (tmp_path / 'logs' / 'group_index.json.gz').write_bytes(b'broken')
    write_group(tmp_path)
    assert len(seen) == 5


def test_a_hundred_sessions_take_seconds(tmp_path):
    for number in range(100):
        publish(tmp_path, f'{number:03d}', 'A', months=number / 4, scale=1 + number / 100)
    began = time.process_time()
    write_group(tmp_path)
    assert time.process_time() - began < 5
    assert (tmp_path / 'group.html').stat().st_size < 1e6
