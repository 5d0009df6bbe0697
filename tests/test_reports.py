import base64
import gzip
import html.parser
import re
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from report_phantoms import WARNING, brain, morphometry, publish, ras_affine, scan, session

from babyseg_bids.errors import OutputError
from babyseg_bids.labels import label_table
from babyseg_bids.longitudinal import Visit, group_volumes, growth_flags, growth_table, visit_flags
from babyseg_bids.morphometry import structure_name
from babyseg_bids.qc import session_qc
from babyseg_bids.records import Age, Flag
from babyseg_bids.reports import figures, viewer, wording
from babyseg_bids.reports.against_age import against_age, group_table_of
from babyseg_bids.reports.charts import Point, growth_chart, ticks
from babyseg_bids.reports.files import collect, unique_flags, write_atomic
from babyseg_bids.reports.review import places_to_review
from babyseg_bids.reports.session import (
    MEASURE_NAMES,
    NOT_SHOWN,
    SessionReportData,
    _quality_rows,
    write_session_report,
)
from babyseg_bids.reports.subject import write_subject_report

VOID = {'meta', 'link', 'img', 'input', 'br', 'hr'}


class Page(html.parser.HTMLParser):
    """Text, tags and errors of nesting of a page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.wrong = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ('style', 'script'):
            self.text.append(data)

    @property
    def words(self):
        return ' '.join(' '.join(self.text).split())

    def all(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


def check_page(path):
    """A page that is well-formed, accessible in its basics and fetches nothing."""
    text = path.read_text('utf-8')
    page = Page(text)
    assert page.wrong == []
    assert page.open == []
    for tag, attrs in page.tags:
        for name in ('src', 'srcset', 'poster'):
            assert attrs.get(name, 'data:').startswith('data:'), (tag, attrs[name][:60])
        if tag == 'link':
            assert attrs['href'].startswith('data:')
    assert not re.search(r'@import|url\(', text)
    assert all(attrs.get('alt') for attrs in page.all('img'))
    assert all(attrs.get('scope') for attrs in page.all('th'))
    ids = [attrs['id'] for _, attrs in page.tags if 'id' in attrs]
    assert len(ids) == len(set(ids))
    targets = [a['href'][1:] for a in page.all('a') if a['href'].startswith('#')]
    assert set(targets) <= set(ids)
    assert 'prefers-color-scheme: dark' in text
    assert '@media print' in text
    return page


def report_data(folder, affine=None, labels=None, **changes):
    """The report of a phantom whose images lie in `folder`."""
    folder.mkdir(exist_ok=True)
    affine = ras_affine() if affine is None else affine
    labels = brain() if labels is None else labels
    uncertainty = np.where(labels == 3, 0.5, 0.05).astype(np.float32)
    arrays = {'image': scan(labels), 'labels': labels, 'uncertainty': uncertainty}
    for name, array in arrays.items():
        nib.save(nib.Nifti1Image(array, affine), folder / f'{name}.nii.gz')
    inputs = session()
    morph = morphometry(labels, affine)
    qc, flags = session_qc(labels, uncertainty, arrays['image'], affine, morph, inputs.age)
    values = {
        'inputs': inputs,
        'morph': morph,
        'qc': qc,
        'flags': flags,
        'reference_image': folder / 'image.nii.gz',
        'labels': folder / 'labels.nii.gz',
        'uncertainty': folder / 'uncertainty.nii.gz',
        'figures_dir': folder / 'figures',
        'transforms': ({'scan': 'T2w', 'status': 'rigid', 'rotation_deg': 4.25},),
        'model': 'small 1.2',
        'device': 'cpu',
        'seconds': 75.0,
        'version': '0.1.0',
        'boilerplate': '# Methods\n\nFirst line\nsecond line.\n\n- An item\n',
    }
    return SessionReportData(**{**values, **changes})


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    """The page of a phantom session with some flags, and its folder."""
    folder = tmp_path_factory.mktemp('report')
    flags = (
        Flag('remark', 'info', 'A remark.'),
        Flag('bad', 'severe', 'Something is wrong.'),
        WARNING,
        WARNING,
    )
    write_session_report(folder / 'page.html', report_data(folder, flags=flags))
    return check_page(folder / 'page.html'), folder


def test_a_session_page_is_small_and_needs_no_network(report):
    _, folder = report
    assert (folder / 'page.html').stat().st_size < 5e6


def test_a_session_page_tells_what_was_done(report):
    page, _ = report
    for text in (
        'sub-01_ses-A', '6 months', 'from: participants.tsv', 'small 1.2', '1 min 15 s', 'on cpu',
        'turned by 4.2°', 'the file is truncated', 'Neurological convention',
        'First line second line.', 'Segmented brain volume',
    ):  # fmt: skip
        assert text in page.words, text
    assert 'TIV' not in page.words


def test_each_measure_is_judged_by_its_own_limit_and_has_a_name(report):
    _, folder = report
    data = report_data(folder)
    qc = {**data.qc, 'anterior_axis': -0.98, 'superior_axis': 0.99, 'edge_share': 0.0}
    rows = {r['name']: r for r in _quality_rows(replace(data, qc=qc))}
    verdicts = {n.partition(' axis')[0]: r['verdict'] for n, r in rows.items() if ' axis' in n}
    assert verdicts['Back-to-front'] == 'severe'
    assert verdicts['Bottom-to-top'] == 'fine'
    numbers = {k for k, v in data.qc.items() if isinstance(v, (int, float))}
    assert numbers - set(NOT_SHOWN) <= set(MEASURE_NAMES)


def test_labels_that_contradict_the_header_are_not_called_neurological(tmp_path):
    data = report_data(tmp_path)
    write_session_report(
        tmp_path / 'page.html', replace(data, qc={**data.qc, 'left_right_axis': -1.0})
    )
    page = Page((tmp_path / 'page.html').read_text())
    assert "contradict the scan's header" in page.words
    assert 'Neurological convention' not in page.words


def test_a_session_is_compared_with_its_cohort_once_there_is_one(tmp_path):
    anat = tmp_path / 'sub-01' / 'ses-A' / 'anat'
    anat.mkdir(parents=True)
    labels = anat / 'labels.nii.gz'
    assert group_table_of(labels) is None
    months = np.linspace(1, 24, 12)
    rows = [f'{m}\t{300_000 + 200_000 * np.log1p(m)}' for m in months]
    text = '\n'.join(['age_months\tsegmented_brain_volume_mm3', *rows])
    (tmp_path / 'group_desc-babyseg_morph.tsv').write_text(text)
    table = group_table_of(labels)
    volumes = {2: 500_000.0, 41: 300_000.0}
    found = against_age(volumes, 9.0, table, 'sub-01_ses-A')
    expected = 300 + 200 * np.log(10)
    assert found.sessions == 12
    ((name, volume, curve, percent, _),) = found.rows
    assert (name, volume) == ('Segmented brain', '800.0')
    assert float(curve) == pytest.approx(expected, abs=0.1)
    assert percent == f'{100 * (800 / expected - 1):+.0f}'.replace('-', '−')
    (chart,) = found.charts
    assert float(chart.x_ticks[-1][1]) >= 24
    assert against_age(volumes, 90.0, table, 'x').rows == ()
    assert against_age(volumes, None, table, 'x') is None


def test_flags_stand_once_and_the_worst_first(report):
    page, _ = report
    places = [
        page.words.index(t) for t in ('Something is wrong.', 'Two ages disagree.', 'A remark.')
    ]
    assert places == sorted(places)
    assert page.words.count('Two ages disagree.') == 1
    assert 'something is probably wrong' in page.words


def test_the_pictures_lie_beside_the_page_as_files(report):
    _, folder = report
    names = sorted(p.name for p in (folder / 'figures').iterdir())
    kinds = ('axial', 'coronal', 'sagittal', 'uncertainty')
    assert names == [f'sub-01_ses-A_desc-{what}_dseg.png' for what in kinds]
    for name in names:
        picture = Image.open(folder / 'figures' / name)
        assert picture.width > 1000
        assert np.asarray(picture.convert('L')).std() > 10


def test_every_structure_has_its_volume_and_swatch(report):
    page, _ = report
    swatches = [a for a in page.all('span') if a.get('class') == 'swatch']
    sides = [row for row in label_table().structures if row.hemisphere != 'R']
    assert len(swatches) >= 2 * len(sides)
    for row in sides:
        assert structure_name(row.name) in page.words


def test_text_from_outside_shows_as_text(tmp_path):
    evil = '<script>alert("x")</script><img src=x onerror=alert(1)>'
    data = report_data(
        tmp_path,
        flags=(Flag('x', 'warning', evil),),
        model=evil,
        boilerplate=f'# {evil}\n\n{evil}',
    )
    write_session_report(tmp_path / 'page.html', data)
    page = check_page(tmp_path / 'page.html')
    assert page.words.count('alert("x")') == 4
    assert len(page.all('script')) == 3
    assert all('onerror' not in attrs for attrs in page.all('img'))


def test_a_page_without_uncertainty_and_without_a_brain_is_still_written(tmp_path):
    empty = np.zeros((20, 22, 24), np.int16)
    data = report_data(tmp_path, labels=empty, uncertainty=None)
    write_session_report(tmp_path / 'page.html', data)
    page = check_page(tmp_path / 'page.html')
    assert 'No brain was found' in page.words
    assert not (tmp_path / 'figures' / 'sub-01_ses-A_desc-uncertainty_dseg.png').exists()


def test_a_page_that_cannot_be_written_names_itself(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OutputError, match=r'Cannot write .*page\.html'):
        write_atomic(tmp_path / 'file' / 'page.html', 'text')
    assert [p.name for p in tmp_path.iterdir()] == ['file']


def stored(folder, codes):
    """Phantom files with a bright block in the left front top, stored with other axes."""
    labels, image = brain(), scan(brain(), noise=0)
    image[8:14, 40:46, 26:30] = 300
    want = nib.orientations.axcodes2ornt(codes)
    now = nib.io_orientation(ras_affine())
    folder.mkdir()
    for name, array in {'labels': labels, 'image': image}.items():
        turned = nib.Nifti1Image(array, ras_affine()).as_reoriented(
            nib.orientations.ornt_transform(now, want)
        )
        nib.save(turned, folder / f'{name}.nii.gz')
    return figures.load_volume(folder / 'image.nii.gz', folder / 'labels.nii.gz')


@pytest.mark.parametrize('codes', ['LAS', 'PIR', 'SLA'])
def test_pictures_do_not_depend_on_how_the_file_stores_its_axes(tmp_path, codes):
    one, other = stored(tmp_path / 'a', 'RAS'), stored(tmp_path / 'b', codes)
    np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_array_equal(one.image, other.image)
    np.testing.assert_allclose(one.affine, other.affine)


def test_the_left_is_on_the_left_the_front_and_the_top_are_up(tmp_path):
    volume = stored(tmp_path / 'a', 'LPS')
    left, front, top = np.argwhere(volume.image > 250).mean(0) / volume.image.shape
    assert left < 0.4
    assert front > 0.6
    assert top > 0.5
    axis_index = [int(i) for i in np.argwhere(volume.image > 250)[0]]
    expected = {
        'axial': (2, 1 - front, left),
        'coronal': (1, 1 - top, left),
        'sagittal': (0, 1 - top, front),
    }
    for plane, (axis, row, column) in expected.items():
        picture = figures.cut(volume.image, plane, axis_index[axis])
        found = np.argwhere(picture > 250).mean(0) / picture.shape
        np.testing.assert_allclose(found, (row, column), atol=0.05)


def test_tiles_keep_the_proportions_of_the_head(tmp_path):
    labels = brain()[:, :, ::3]
    affine = ras_affine() @ np.diag([1, 1, 3, 1])
    nib.save(nib.Nifti1Image(labels, affine), tmp_path / 'labels.nii.gz')
    volume = figures.load_volume(tmp_path / 'labels.nii.gz', tmp_path / 'labels.nii.gz')
    extent = np.array(volume.labels.shape) * volume.zooms
    layout = figures.lay_out(volume, [('coronal', 2), ('sagittal', 2)], 2)
    for plane, _, _, _, width, height in layout.tiles:
        _, across, up, _ = figures.GEOMETRY[plane]
        assert width / height == pytest.approx(extent[across] / extent[up], rel=0.02)


def test_slices_stay_inside_the_brain():
    labels = np.zeros((10, 10, 100), np.int16)
    labels[:, :, 40:61] = 3
    places = figures.slice_positions(labels, 2, 5)
    assert places == sorted(places)
    assert places[0] >= 40
    assert places[-1] <= 60
    assert 48 <= places[2] <= 52


def test_slices_go_where_the_structures_are():
    labels = np.zeros((40, 40, 60), np.int16)
    labels[5:35, 5:35, 5:55] = 3
    for number, middle in {10: 22, 17: 36}.items():
        labels[18:22, 18:22, middle - 1 : middle + 2] = number
    places = figures.slice_positions(labels, 2, 6)
    shown = np.unique(labels[:, :, places])
    assert {3, 10, 17} <= set(shown)


def test_enlarged_labels_keep_their_place_and_number():
    labels = np.zeros((20, 30), np.int16)
    labels[5:15, 10:20] = 42
    labels[8:12, 13:17] = 10
    large = figures.smooth_labels(labels, (120, 80))
    assert large.shape == (80, 120)
    assert set(np.unique(large)) == {0, 10, 42}
    assert large[40, 60] == 10
    assert large[24, 60] == 42
    assert (large > 0).sum() == pytest.approx((labels > 0).sum() * 16, rel=0.1)


def test_an_outline_follows_the_border_and_leaves_the_inside_free():
    labels = np.zeros((12, 12), np.int16)
    labels[3:9, 3:9] = 7
    edge = figures.outline(labels)
    assert edge[3, 3:9].all()
    assert not edge[4:8, 4:8].any()
    assert not edge[labels == 0].any()


def test_the_grey_window_ignores_a_bright_scalp():
    labels = brain()
    image = scan(labels)
    image[:3] = 5000
    low, high = figures.grey_range(image, labels)
    assert high < 200
    assert low < 35


def test_another_scan_is_drawn_where_its_alignment_puts_it(tmp_path):
    volume = stored(tmp_path / 'a', 'RAS')
    moved = ras_affine()
    moved[0, 3] += 5.0
    image = nib.load(tmp_path / 'a' / 'image.nii.gz')
    nib.save(nib.Nifti1Image(image.get_fdata(), moved), tmp_path / 'moved.nii.gz')
    back = np.eye(4)
    back[0, 3] = -5.0
    other = figures.add_scan(volume, 'T2w', tmp_path / 'moved.nii.gz', back).others['T2w']
    inside = volume.labels > 0
    np.testing.assert_allclose(other[inside], volume.image[inside], atol=1)


def test_the_viewer_gets_small_volumes_in_the_same_place(tmp_path):
    volume = figures.load_volume(*(report_data(tmp_path).labels,) * 2)
    fine = replace(
        volume,
        image=np.kron(volume.image, np.ones((3, 3, 3), np.float32)),
        labels=np.kron(volume.labels, np.ones((3, 3, 3), np.int16)),
        affine=volume.affine @ np.diag([1 / 3, 1 / 3, 1 / 3, 1]),
    )
    table = label_table()
    packed = viewer.viewer_data(fine, 'T1w', table)
    data = gzip.decompress(base64.b64decode(packed['labels']))
    image = nib.Nifti1Image.from_bytes(data)
    labels = np.asanyarray(image.dataobj)
    assert labels.size <= viewer.MAX_VOXELS < fine.labels.size
    assert len(packed['structures']) == labels.max() == 27
    place = [r.index for r in table.structures].index(10) + 1
    found = image.affine @ [*np.argwhere(labels == place).mean(0), 1]
    true = fine.affine @ [*np.argwhere(fine.labels == 10).mean(0), 1]
    np.testing.assert_allclose(found, true, atol=0.5)


def test_doubt_stray_pieces_and_wrong_sides_are_places_to_look_at():
    labels, affine, table = brain(), ras_affine(), label_table()
    uncertainty = np.full(labels.shape, 0.1, np.float32)
    uncertainty[30:36, 30:36, 28:34] = 0.8
    labels[20:24, 42:46, 28:32] = 50
    places = places_to_review(labels, uncertainty, affine, table)
    assert places[0].structure == 'Right caudate'
    assert 'apart from the rest' in places[0].reason
    peak = next(p for p in places if p.reason.startswith('Unsure'))
    np.testing.assert_allclose(peak.mm, (affine @ [32.5, 32.5, 30.5, 1])[:3], atol=8)
    swapped = np.where(labels == 17, 53, np.where(labels == 53, 17, labels))
    reasons = [p.reason for p in places_to_review(swapped, None, affine, table)]
    assert sum('beyond the midline' in reason for reason in reasons) == 2
    assert places_to_review(np.zeros_like(labels), uncertainty, affine, table) == []
    assert replace(peak, mm=(-0.4, 0.4, -12.6)).text == '0, 0, −13'


@pytest.mark.parametrize(
    ('low', 'high', 'expected'),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (530, 1090, [400, 600, 800, 1000, 1200]), (3, 3, None)],
)
def test_axes_have_round_values_that_span_the_data(low, high, expected):
    marks = ticks(low, high)
    assert marks[0] <= low
    assert marks[-1] >= high
    if expected:
        assert marks == expected


def test_a_chart_joins_the_sessions_of_a_child_and_names_each_point():
    points = [Point(1, 500, 'a', 'a1'), Point(6, 800, 'a', 'a2'), Point(3, 600, 'b', 'b1')]
    chart = growth_chart('Brain', 'mL', points, 'Age (months)')
    assert len(chart.marks) == 3
    assert len(chart.lines) == 1
    assert {m.point.name for m in chart.marks if m.label} == {'a1', 'a2', 'b1'}
    by_name = {m.point.name: m for m in chart.marks}
    assert by_name['a1'].x < by_name['b1'].x < by_name['a2'].x
    assert by_name['a2'].y < by_name['a1'].y
    assert growth_chart('Brain', 'mL', [], 'Age') is None


def test_a_single_point_still_gives_a_chart():
    (mark,) = growth_chart('Brain', 'mL', [Point(0, 0, 'a', 'a1')], 'Age').marks
    assert np.isfinite([mark.x, mark.y]).all()


VOLUMES = {2: 100.0, 41: 100.0, 3: 300.0, 42: 300.0, 4: 5.0, 43: 5.0}


def scaled(factor):
    return {index: volume * factor for index, volume in VOLUMES.items()}


def test_growth_is_told_per_month_and_in_percent():
    visits = [Visit('ses-B', 6.0, scaled(1.5)), Visit('ses-A', 2.0, VOLUMES)]
    growth = growth_table(visits).set_index('structure')
    row = growth.loc['Cortex']
    assert (row['from-session'], row['to-session']) == ('ses-A', 'ses-B')
    assert row['change-mm3'] == pytest.approx(300)
    assert row['change-mm3-per-month'] == pytest.approx(75)
    assert row['change-percent'] == pytest.approx(50)
    assert row['change-percent-per-month'] == pytest.approx(12.5)
    assert growth_flags(growth_table(visits)) == ()


def test_sessions_of_one_age_or_without_age_show_no_growth():
    visits = [Visit('a', 6.0, VOLUMES), Visit('b', 6.0, VOLUMES), Visit('c', None, VOLUMES)]
    assert growth_table(visits).empty
    assert growth_flags(growth_table([])) == ()


def test_a_tissue_that_shrinks_is_flagged_and_ventricles_are_not():
    later = {**VOLUMES, 2: 90.0, 41: 90.0, 4: 1.0, 43: 1.0}
    growth = growth_table([Visit('ses-A', 2.0, VOLUMES), Visit('ses-B', 6.0, later)])
    (flag,) = growth_flags(growth)
    assert flag.code == 'shrinks-with-age'
    assert flag.message.startswith('White matter shrinks by 10 % from ses-A to ses-B')


def test_brains_of_one_child_at_one_age_cannot_differ_much():
    visits = [Visit('ses-A', 6.0, VOLUMES), Visit('ses-B', 6.0, scaled(1.3))]
    (flag,) = visit_flags(visits)
    assert flag.code == 'same-age-differs'
    assert 'differ by 30 %' in flag.message
    assert visit_flags([visits[0], Visit('ses-B', 6.0, scaled(1.05))]) == ()
    assert visit_flags([visits[0], Visit('ses-B', None, scaled(1.3))]) == ()


def test_a_tissue_that_is_absent_has_no_volume():
    assert group_volumes({}) == {}
    assert list(group_volumes(VOLUMES)) == [
        'Segmented brain',
        'White matter',
        'Cortex',
        'Ventricles',
    ]


def test_a_subject_with_one_session_gets_no_page(tmp_path):
    publish(tmp_path, label='A')
    assert write_subject_report(tmp_path, '01') is None
    assert not (tmp_path / 'sub-01.html').exists()


def test_a_subject_page_shows_the_trajectory_and_what_cannot_be(tmp_path):
    publish(tmp_path, label='B', months=9.0, scale=0.8, flags=(WARNING,))
    publish(tmp_path, label='A', months=4.0)
    publish(tmp_path, label='C', months=None)
    publish(tmp_path, subject='012', label='A')
    (tmp_path / 'sub-01_ses-A.html').write_text('')
    path = write_subject_report(tmp_path, 'sub-01')
    assert path == tmp_path / 'sub-01.html'
    page = check_page(path)
    assert '3 sessions, 4 to 9 months' in page.words
    assert 'Not drawn, because no age in months is known: ses-C.' in page.words
    assert 'Segmented brain shrinks by 20 % from ses-A to ses-B' in page.words
    assert '−20.0' in page.words
    assert '012' not in page.words
    links = {a['href'] for a in page.all('a')}
    assert 'sub-01_ses-A.html' in links
    assert 'sub-01_ses-B.html' not in links


def test_sessions_are_read_back_as_they_were_published(tmp_path):
    publish(tmp_path, label='10', months=3.0)
    publish(tmp_path, label='9', months=2.0, flags=(WARNING,))
    first, second = collect(tmp_path)
    assert (first.session, second.session) == ('9', '10')
    assert first.age == Age(2.0, None, 'participants.tsv')
    assert first.flags == (WARNING,)
    assert len(first.volumes) == 27
    assert first.problem == ''


def test_flags_are_sorted_by_severity():
    flags = [Flag('a', 'info', ''), Flag('b', 'severe', ''), Flag('c', 'warning', '')]
    assert [f.code for f in unique_flags([*flags, *flags])] == ['b', 'c', 'a']


def test_methods_keep_headings_items_and_paragraphs():
    blocks = wording.markdown_blocks('# A\n\nOne\ntwo.\n- x\n  y\n- z\n')
    assert blocks == [('heading', 'A'), ('paragraph', 'One two.'), ('item', 'x y'), ('item', 'z')]
