import csv
import json
import time

import pytest
from report_phantoms import WARNING, publish
from test_reports import check_page

from babyseg_bids.errors import NoInputError
from babyseg_bids.records import Flag
from babyseg_bids.reports.group import write_group
from babyseg_bids.reports.subject import write_subject_report


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


def test_a_hundred_sessions_take_seconds(tmp_path):
    for number in range(100):
        publish(tmp_path, f'{number:03d}', 'A', months=number / 4, scale=1 + number / 100)
    began = time.process_time()
    write_group(tmp_path)
    assert time.process_time() - began < 5
    assert (tmp_path / 'group.html').stat().st_size < 1e6
