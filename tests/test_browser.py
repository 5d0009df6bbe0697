"""The pages as people use them: opened from disk in Chromium, without a network."""

import csv
import os
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from report_phantoms import WARNING, brain, publish, ras_affine, scan, session
from test_reports import report_data

from babyseg_bids.records import Flag
from babyseg_bids.reports.group import write_group
from babyseg_bids.reports.people import RATINGS_FILE
from babyseg_bids.reports.session import write_session_report
from babyseg_bids.reports.subject import write_subject_report

playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')

NAMES = ('chromium', 'chromium-browser', 'google-chrome')
# Software rendering: machines for tests have no graphics card.
OPTIONS = ('--no-sandbox', '--use-angle=swiftshader', '--enable-unsafe-swiftshader')
EVIL = '<img src=x onerror=hacked=1>'


@pytest.fixture(scope='module')
def chromium():
    path = os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip('no Chromium: install the package chromium or set CHROMIUM to its path')
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """Open a file; the page must ask for nothing else and log no error."""
    contexts, troubles = [], []

    def opened(path, *, width=1600, scheme='light', scripts=True):
        context = chromium.new_context(
            viewport={'width': width, 'height': 900},
            color_scheme=scheme,
            java_script_enabled=scripts,
            offline=True,
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on('console', lambda m: troubles.append(m.text) if m.type == 'error' else None)
        page.on('pageerror', lambda e: troubles.append(str(e)))
        page.on('dialog', lambda d: troubles.append(d.message))
        address = path.resolve().as_uri()
        page.on(
            'request',
            lambda r: (
                troubles.append(r.url)
                if r.url != address and not r.url.startswith(('data:', 'blob:'))
                else None
            ),
        )
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert troubles == []


@pytest.fixture(scope='module')
def out(tmp_path_factory):
    """An output folder: a child with two sessions and a report with two scans, and another one."""
    folder = tmp_path_factory.mktemp('out')
    publish(folder, '01', 'A', months=2.0, flags=(WARNING,))
    publish(folder, '01', 'B', months=9.0, scale=0.8)
    publish(folder, '02', None, months=5.0)
    inputs = session()
    other = folder / 'other.nii.gz'
    nib.save(nib.Nifti1Image(200 - scan(brain()), ras_affine()), other)
    inputs = replace(inputs, scans=(inputs.scans[0], replace(inputs.scans[1], path=str(other))))
    shift = np.eye(4)
    shift[0, 3] = 2.0
    aligned = ({'scan': 'T2w', 'status': 'rigid', 'translation_mm': [2.0, 0, 0], 'matrix': shift},)
    data = report_data(folder / 'work', inputs=inputs, transforms=aligned, flags=(WARNING,))
    write_session_report(folder / 'sub-01_ses-A.html', data)
    write_subject_report(folder, '01')
    write_group(folder)
    return folder


def violations(page):
    """What axe finds, in one line each."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response['violations']
    return [f'{v["id"]}: {v["nodes"][0]["html"][:120]}' for v in found]


@pytest.mark.parametrize(('width', 'scheme'), [(375, 'dark'), (1600, 'light')])
@pytest.mark.parametrize('name', ['sub-01_ses-A.html', 'sub-01.html', 'group.html'])
def test_a_page_fits_the_screen_and_is_accessible(open_page, out, name, width, scheme):
    page = open_page(out / name, width=width, scheme=scheme)
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    assert violations(page) == []


def test_the_viewer_shows_the_scan_and_follows_structures_and_places(open_page, out):
    page = open_page(out / 'sub-01_ses-A.html')
    place = page.locator('a[data-mm]').first
    wanted = [round(float(v)) for v in place.get_attribute('data-mm').split()]
    place.click()
    page.wait_for_selector('#viewer[data-state=ready]')
    page.wait_for_function('document.activeElement.tagName === "CANVAS"')
    fields = [page.locator(f'#viewer-{axis}') for axis in 'xyz']
    found = [int(field.input_value()) for field in fields]
    # The cross goes to the middle of a voxel.
    assert np.abs(np.subtract(found, wanted)).max() <= 2
    page.select_option('#viewer-structure', label='Left thalamus')
    assert page.locator('#viewer-status').inner_text().startswith('Left thalamus')
    page.keyboard.press('Tab')
    page.locator('canvas').focus()
    before = fields[0].input_value()
    for _ in range(3):
        page.keyboard.press('ArrowLeft')
    assert int(fields[0].input_value()) < int(before)
    pixels = page.locator('canvas').screenshot()
    page.locator('#viewer-opacity').fill('0')
    assert page.locator('canvas').screenshot() != pixels
    page.select_option('#viewer-scan', label='T2w')
    assert len(pixels) > 5_000


def test_without_scripts_the_pictures_flicker_and_say_what_is_left_out(open_page, out):
    page = open_page(out / 'sub-01_ses-A.html', scripts=False)
    over = page.locator('#pictures .over').first
    assert over.is_visible()
    page.check('#show-scan')
    assert not over.is_visible()
    page.check('#show-flicker')
    page.check('#aligned-flicker')
    for image in (over, page.locator('#aligned img.other')):
        assert 'flicker' in image.evaluate('e => getComputedStyle(e).animationName')
    assert 'needs scripts' in page.locator('#viewer-note').inner_text()
    assert not page.locator('#viewer-frame').is_visible()
    assert page.locator('ol.places img').count() > 0


def test_a_printed_report_shows_pictures_and_no_controls(open_page, out):
    page = open_page(out / 'sub-01_ses-A.html')
    page.emulate_media(media='print')
    assert not page.locator('#viewer').is_visible()
    assert not page.locator('#show-flicker').is_visible()
    assert page.locator('#pictures .over').first.is_visible()
    assert page.locator('#methods-text').is_visible()


def test_the_table_sorts_and_filters(open_page, out):
    page = open_page(out / 'group.html')
    names = page.locator('#sessions-table tbody tr')
    page.get_by_role('button', name='Age').click()
    page.get_by_role('button', name='Age').click()
    order = [row.get_attribute('data-name') for row in names.all()]
    assert order == ['sub-01_ses-B', 'sub-02', 'sub-01_ses-A']
    page.fill('#filter', 'ses-a')
    assert page.locator('#shown').inner_text() == '1 of 3 sessions shown'
    page.fill('#filter', '')
    page.check('#only-flagged')
    assert [row.get_attribute('data-name') for row in names.all()] == ['sub-01_ses-A']
    page.uncheck('#only-flagged')
    page.fill('#filter', WARNING.code)
    assert [row.get_attribute('data-name') for row in names.all()] == ['sub-01_ses-A']
    # Three sessions need no pages.
    assert not page.locator('#pages').is_visible()


def test_ratings_are_in_view_without_scrolling(open_page, out):
    page = open_page(out / 'group.html', width=1600)
    box = page.get_by_label('Comment on sub-01_ses-A').bounding_box()
    frame = page.locator('#sessions .scroll').bounding_box()
    assert box['x'] + box['width'] <= frame['x'] + frame['width']


def test_ratings_come_back_with_the_next_call(open_page, out, tmp_path):
    folder = tmp_path / 'out'
    shutil.copytree(out, folder)
    page = open_page(folder / 'group.html')
    page.get_by_label('Rating of sub-01_ses-B').select_option('exclude')
    page.get_by_label('Comment on sub-01_ses-B').fill('wrong\tchild')
    page.get_by_label('Rating of sub-02').select_option('accept')
    page.reload()
    with page.expect_download() as download:
        page.get_by_role('button', name='Save ratings (2 changed)').click()
    assert download.value.suggested_filename == RATINGS_FILE
    download.value.save_as(folder / RATINGS_FILE)
    write_group(folder)
    with (folder / 'group_desc-babyseg_qc.tsv').open() as stream:
        rows = list(csv.DictReader(stream, delimiter='\t'))
    assert [(r['rating'], r['rating_comment']) for r in rows] == [
        ('n/a', 'n/a'),
        ('exclude', 'wrong child'),
        ('accept', 'n/a'),
    ]
    page.reload()
    assert page.get_by_label('Rating of sub-02').input_value() == 'accept'
    assert page.locator('#save-ratings').inner_text() == 'Save ratings'


def test_many_sessions_are_paged_and_their_points_are_named_and_linked(open_page, tmp_path):
    for number in range(160):
        for label, months in (('A', number / 20), ('B', 9 + number / 20)):
            publish(tmp_path, f'{number:03d}', label, months=months, scale=1 + months / 20)
    (tmp_path / 'sub-080_ses-A.html').write_text('<title>opened</title>')
    write_group(tmp_path)
    page = open_page(tmp_path / 'group.html')
    assert page.locator('#page-note').inner_text() == 'Page 1 of 4'
    page.click('#next')
    first = page.locator('#sessions-table tbody tr').first
    assert first.get_attribute('data-name') == 'sub-050_ses-A'
    chart = page.locator('svg.chart').first
    chart.scroll_into_view_if_needed()
    places = chart.evaluate("""svg => {
        const path = svg.querySelector('path.dots');
        const at = path.dataset.rows.split(' ').indexOf('160');
        const [x, y] = path.getAttribute('d').slice(1).split('M')[at].slice(0, -2).split(' ');
        const p = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
        return [p.x, p.y];
    }""")
    page.mouse.move(*places)
    assert page.locator('#hint').inner_text().startswith('sub-080_ses-A: ')
    assert violations(page) == []


def test_what_hostile_names_and_cells_hold_is_shown_as_text(open_page, tmp_path):
    publish(tmp_path, EVIL, 'A', months=3.0, flags=(Flag(EVIL, 'severe', EVIL),), model=EVIL)
    publish(tmp_path, EVIL, 'B', months=6.0)
    (tmp_path / 'logs').mkdir()
    participants = f'participant_id\tsite\nsub-{EVIL}\t{EVIL}\nsub-{EVIL}2\t{EVIL}\n'
    (tmp_path / 'logs' / 'participants.tsv').write_text(participants)
    ratings = f'participant_id\tsession_id\trating\tcomment\nsub-{EVIL}\tses-A\treview\t{EVIL}\n'
    (tmp_path / RATINGS_FILE).write_text(f'{ratings}{EVIL}\tx\t{EVIL}\t\n')
    pages = [write_subject_report(tmp_path, EVIL)]
    write_group(tmp_path)
    pages.append(tmp_path / 'group.html')
    data = report_data(
        tmp_path / 'work',
        inputs=replace(session(), subject='01', flags=(Flag('x', 'severe', EVIL),)),
        flags=(Flag(EVIL, 'severe', EVIL),),
        model=EVIL,
        boilerplate=EVIL,
    )
    pages.append(tmp_path / 'session.html')
    write_session_report(pages[-1], data)
    for path in pages:
        page = open_page(path)
        assert EVIL in page.locator('body').inner_text()
        assert page.evaluate('window.hacked') is None
