"""Start of a run on a large dataset: until the first session is handed to Nipype.

    python benchmarks/discovery.py FOLDER [--subjects 10000] [--plain 500]

FOLDER gets a dataset of empty images with two sessions a subject (T1w, T2w, their JSON files, a
functional scan and a sessions.tsv); only the first subject has images that can be read. It is used
again when it exists. `BIDSLayout(dataset)` as PyBIDS comes is measured on --plain subjects of the
same form and scaled, since it needs minutes. Times are those of the processor: other programs do
not change them as they do wall time, which is given beside them.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel as nib
import numpy as np

# Runs in a process of its own, whose peak memory is then that of this start alone.
MEASURE = """
import json, os, resource, sys, time
from pathlib import Path
began = time.monotonic()
os.environ['NO_ET'] = '1'

def report(*_):
    use = resource.getrusage(resource.RUSAGE_SELF)
    peak = use.ru_maxrss / 1024
    cpu = use.ru_utime + use.ru_stime
    print(json.dumps({'cpu': cpu, 'wall': time.monotonic() - began, 'peak': peak}))
    sys.stdout.flush()
    os._exit(0)

if sys.argv[1] == 'plain':
    from bids import BIDSLayout
    BIDSLayout(sys.argv[2])
    report()
from babyseg_bids.cli import execution
from babyseg_bids.cli.run import main
execution.run_workflow = report
main(sys.argv[1:])
"""


def write_dataset(root: Path, subjects: int) -> None:
    """Generate the dataset, unless it is there."""
    if root.exists():
        return
    root.mkdir(parents=True)
    description = {'Name': 'generated', 'BIDSVersion': '1.10.0'}
    (root / 'dataset_description.json').write_text(json.dumps(description))
    for number in range(subjects):
        subject = f'sub-{number:05d}'
        for label in 'AB':
            folder, stem = root / subject / f'ses-{label}', f'{subject}_ses-{label}'
            (folder / 'anat').mkdir(parents=True)
            (folder / 'func').mkdir()
            (folder / 'func' / f'{stem}_task-rest_bold.nii.gz').touch()
            for contrast in ('T1w', 'T2w'):
                (folder / 'anat' / f'{stem}_{contrast}.nii.gz').touch()
                (folder / 'anat' / f'{stem}_{contrast}.json').write_text('{}')
        table = 'session_id\tage_months\nses-A\t6\nses-B\t12\n'
        (root / subject / f'{subject}_sessions.tsv').write_text(table)
    noise = np.random.default_rng(0).integers(0, 900, (40, 40, 40)).astype(np.int16)
    for path in (root / 'sub-00000').glob('ses-*/anat/*.nii.gz'):
        nib.save(nib.Nifti1Image(noise, np.diag([4, 4, 4, 1])), path)


def measure(*words: str | Path) -> dict[str, float]:
    """Processor seconds, wall seconds and peak memory in MB of one start."""
    command = [sys.executable, '-c', MEASURE, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout.strip():
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print one row for each start, with ratios to plain PyBIDS."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path)
    parser.add_argument('--subjects', type=int, default=10_000)
    parser.add_argument('--plain', type=int, default=500)
    given = parser.parse_args()
    full, small = given.folder / f'n{given.subjects}', given.folder / f'n{given.plain}'
    for root, count in ((full, given.subjects), (small, given.plain)):
        write_dataset(root, count)
    factor = given.subjects / given.plain
    plain = measure('plain', small)
    rows = [(f'BIDSLayout, scaled by {factor:g}', {k: v * factor for k, v in plain.items()})]
    with TemporaryDirectory() as name:
        out, index = Path(name) / 'out', Path(name) / 'index'
        level = (full, out, 'participant')
        one = ('--participant-label', '00000')
        database = ('--bids-database-dir', index)
        rows += [
            ('one participant', measure(*level, *one)),
            ('all', measure(*level)),
            ('all, index written', measure(*level, *database)),
            ('all, index read', measure(*level, *database)),
        ]
    print('start | processor s | ratio | wall s | peak MB')
    for title, row in rows:
        ratio = rows[0][1]['cpu'] / row['cpu']
        peak = plain['peak'] if row is rows[0][1] else row['peak']
        print(f'{title} | {row["cpu"]:.1f} | {ratio:.1f} | {row["wall"]:.1f} | {peak:.0f}')


if __name__ == '__main__':
    main()
