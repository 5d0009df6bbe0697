"""Time the group level and its page on many sessions.

    python benchmarks/group.py [--sessions 10000] [--folder FOLDER] [--browser CHROMIUM]

Writes the records of made-up sessions (volumes that grow with age, spread, flags, some of them
broken), runs the group level twice, adds a tenth of new sessions and runs it again, and opens the
page in Chromium: time until it is shown, and the longest time of sorting, filtering and paging.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from babyseg_bids.labels import label_table
from babyseg_bids.morphometry import MEASURES
from babyseg_bids.reports.group import write_group
from babyseg_bids.reports.group_tables import QC_COLUMNS

CHROMIUM = '/usr/bin/chromium'
VISITS = 2


def write_sessions(folder: Path, first: int, number: int, rng: np.random.Generator) -> None:
    """The records of sessions `first` to `first + number`, two a child."""
    rows = label_table().structures
    sizes = rng.uniform(0.5, 50, len(rows))
    for place in range(first, first + number):
        subject, session = f'{place // VISITS:05d}', 'AB'[place % VISITS]
        months = float(rng.uniform(0, 12) + 14 * (place % VISITS))
        growth = 900 * (1 - np.exp(-(months + 6) / 12)) / sizes.sum() * 1000
        volumes = sizes * growth * np.exp(rng.normal(0, 0.06, len(rows)))
        if rng.random() < 0.005:
            volumes[rng.integers(len(rows))] *= 3
        stem = f'sub-{subject}_ses-{session}'
        anat = folder / f'sub-{subject}' / f'ses-{session}' / 'anat'
        anat.mkdir(parents=True)
        lines = ['\t'.join(('index', 'name', 'abbreviation', 'hemisphere', *MEASURES))]
        for row, volume in zip(rows, volumes, strict=True):
            share = volume / volumes.sum()
            numbers = (f'{volume:.3f}', f'{volume:.3f}', f'{share:.6f}', '0.9123')
            lines.append('\t'.join((str(row.index), row.name, row.abbreviation, 'L', *numbers)))
        (anat / f'{stem}_space-T1w_desc-babyseg_morph.tsv').write_text('\n'.join(lines) + '\n')
        flags = []
        if rng.random() < 0.1:
            flags = [
                {'code': 'uncertain', 'severity': 'warning', 'message': 'The network doubts.'}
            ]
        qc = {k: float(rng.uniform(0.5, 1)) for k in QC_COLUMNS}
        qc |= {'most_asymmetric_structure': 'Caudate', 'flags': flags}
        qc['uncertain_share_by_structure'] = {r.abbreviation: 0.1 for r in rows}
        (anat / f'{stem}_desc-babyseg_qc.json').write_text(json.dumps(qc))
        scan = f'sub-{subject}/ses-{session}/anat/{stem}_T1w.nii.gz'
        ledger = {
            'age': {'months': months, 'source': 'participants.tsv'},
            'scans': [{'relative_path': scan, 'suffix': 'T1w', 'entities': {}}],
            'ledger': [{'relative_path': scan, 'status': 'reference', 'reason': 'the only one'}],
            'inputs': [{'path': scan, 'sha256': f'{place:064x}'}],
            'outputs': [f'{stem}_desc-aseg_dseg.nii.gz'],
            'flags': flags,
            'model': 'default 1',
            'version': '1',
            'device': 'cpu',
            'seconds': 46.9,
        }
        if rng.random() < 0.998:
            (anat / f'{stem}_desc-inputs_ledger.json').write_text(json.dumps(ledger))
        (folder / f'{stem}.html').write_text('<title>report</title>')


def timed(folder: Path, what: str) -> None:
    """Run the group level once and say how long it took."""
    began, busy = time.monotonic(), time.process_time()
    write_group(folder)
    wall, cpu = time.monotonic() - began, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(f'{what}: {wall:.1f} s, {cpu:.1f} s of processor, peak {peak:.2f} GB', flush=True)


def open_page(page: Path, browser: str) -> None:
    """Open the page and use it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=['--disable-gpu'])
        tab = chromium.new_page(viewport={'width': 1600, 'height': 1000})
        tab.set_default_timeout(300_000)
        began = time.monotonic()
        tab.goto(page.resolve().as_uri())
        tab.wait_for_function('document.getElementById("page-note").textContent !== ""')
        print(f'page {page.stat().st_size / 1e6:.1f} MB, open in {time.monotonic() - began:.1f} s')
        use = """(act) => new Promise((done) => {
            const began = performance.now();
            act = new Function(act);
            act();
            requestAnimationFrame(() => setTimeout(() => done(performance.now() - began)));
        })"""
        filtering = (
            'const f = document.getElementById("filter"); f.value = "sub-00012";'
            'f.dispatchEvent(new Event("input"));'
        )
        for name, act in {
            'sort by volume': 'document.querySelectorAll("#sessions-table th button")[5].click()',
            'filter': filtering,
            'clear the filter': filtering.replace('sub-00012', ''),
            'next page': 'document.getElementById("next").click()',
        }.items():
            print(f'{name}: {tab.evaluate(use, act) / 1000:.2f} s')
        heap = tab.evaluate('performance.memory.usedJSHeapSize') / 1e6
        print(f'{tab.evaluate("document.querySelectorAll(`*`).length")} elements, {heap:.0f} MB')
        chromium.close()


def main() -> None:
    """Parse the command line and run all steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sessions', type=int, default=10_000)
    parser.add_argument('--folder', type=Path, help='kept; default: a temporary one')
    parser.add_argument('--browser', default=CHROMIUM)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        tenth = options.sessions // 10
        write_sessions(folder, 0, options.sessions - tenth, rng)
        timed(folder, f'{options.sessions - tenth} sessions, first time')
        write_sessions(folder, options.sessions - tenth, tenth, rng)
        timed(folder, f'{tenth} more sessions')
        (folder / 'logs' / 'group_index.json.gz').unlink()
        timed(folder, f'{options.sessions} sessions, first time')
        timed(folder, f'{options.sessions} sessions, again')
        open_page(folder / 'group.html', options.browser)


if __name__ == '__main__':
    main()
