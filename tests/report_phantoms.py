"""A small brain of ellipsoids and the derivatives of sessions, for tests of QC and reports."""

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np

from babyseg_bids.labels import label_table
from babyseg_bids.morphometry import count_voxels, morphometry_table, voxel_volume, write_morph_tsv
from babyseg_bids.records import Age, Flag, LedgerRow, Scan, SessionInputs

SHAPE = (48, 56, 44)
GREY = {
    'white-matter': 120.0,
    'cortex': 85.0,
    'deep-grey': 95.0,
    'ventricle': 35.0,
    'cerebellum': 90.0,
    'brainstem': 105.0,
}
# Offset of each deep structure's centre from the midline, from the middle to the front and to the
# top, and its radius, all in voxels.
DEEP = {
    10: (5, -2, 0, 3),
    11: (6, 7, 2, 2.5),
    12: (11, 3, 0, 2.5),
    13: (8, 2, -2, 2),
    17: (10, -8, -5, 2.5),
    18: (10, 0, -7, 2),
    26: (4, 8, -4, 1.8),
    28: (4, -3, -6, 1.8),
    4: (4, 2, 5, 2),
    14: (0, -1, -2, 1.2),
    15: (0, -14, -9, 1.2),
    16: (0, -10, -10, 2.5),
}


def ras_affine(zoom=2.5):
    """Voxel to world in RAS with the origin in the middle."""
    affine = np.diag([zoom, zoom, zoom, 1.0])
    affine[:3, 3] = -zoom * (np.array(SHAPE) - 1) / 2
    return affine


def brain():
    """A label map (RAS, 2.5 mm) with all 27 structures: (48, 56, 44) int16."""
    axes = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in SHAPE), indexing='ij')
    x, y, z = axes
    left = x < 0
    labels = np.zeros(SHAPE, np.int16)
    outer = (x / 20) ** 2 + (y / 24) ** 2 + (z / 17) ** 2 < 1
    inner = (x / 17) ** 2 + (y / 21) ** 2 + (z / 14) ** 2 < 1
    labels[outer] = np.where(left, 3, 42)[outer]
    labels[inner] = np.where(left, 2, 41)[inner]
    low = (x / 12) ** 2 + ((y + 12) / 8) ** 2 + ((z + 12) / 5) ** 2 < 1
    labels[low] = np.where(left, 8, 47)[low]
    for number, (dx, dy, dz, radius) in DEEP.items():
        mirror = label_table()[number].mirror
        for index, sign in {number: -1, mirror: 1}.items():
            ball = (x - sign * dx) ** 2 + (y - dy) ** 2 + (z - dz) ** 2 < radius**2
            labels[ball] = index
    return labels


def scan(labels, noise=4.0, seed=0):
    """A scan of a label map: one grey value a tissue, and noise."""
    lut = np.zeros(256, np.float32)
    for row in label_table().structures:
        lut[row.index] = GREY[row.tissue]
    rng = np.random.default_rng(seed)
    return lut[labels] + rng.normal(0, noise, labels.shape).astype(np.float32)


def morphometry(labels, affine, confidence=0.9):
    """The volumes of a label map whose probabilities are certain."""
    counts = count_voxels(labels, label_table())
    unit = voxel_volume(affine)
    soft = {index: n * unit for index, n in counts.items()}
    return morphometry_table(labels, affine, soft, dict.fromkeys(counts, confidence))


def session(subject='01', label='A', months=6.0, flags=()):
    """What discovery knows of a session with a T1w, a T2w, and a third scan that is broken."""
    stem = f'sub-{subject}' + (f'_ses-{label}' if label else '')
    folder = f'sub-{subject}/' + (f'ses-{label}/' if label else '') + 'anat'
    names = [f'{folder}/{stem}_{kind}.nii.gz' for kind in ('T1w', 'T2w', 'run-2_T2w')]
    return SessionInputs(
        subject,
        label,
        (Scan('/data/a', names[0], 'T1w'), Scan('/data/b', names[1], 'T2w')),
        Age(months, None, 'participants.tsv') if months is not None else Age(),
        (
            LedgerRow(names[0], 'T1w', 'reference', 'the finest T1w'),
            LedgerRow(names[1], 'T2w', 'used', 'a readable image'),
            LedgerRow(names[2], 'T2w', 'rejected', 'the file is truncated'),
        ),
        tuple(flags),
    )


@cache
def _measured():
    """The phantom's volumes, measured once because many sessions are published."""
    return morphometry(brain(), ras_affine())


def publish(out_dir, subject='01', label='A', months=6.0, scale=1.0, flags=(), **ledger):
    """Write the derivatives of a session as the workflow does, with volumes times `scale`."""
    inputs = session(subject, label, months, flags)
    folder = Path(out_dir) / f'sub-{subject}' / (f'ses-{label}' if label else '') / 'anat'
    folder.mkdir(parents=True)
    morph = _measured().copy()
    morph[['volume-mm3', 'voxel-volume-mm3']] *= scale
    write_morph_tsv(morph, folder / f'{inputs.name}_space-T1w_desc-babyseg_morph.tsv')
    qc = {'mean_confidence': 0.9, 'uncertain_share': None, 'flags': []}
    (folder / f'{inputs.name}_desc-babyseg_qc.json').write_text(json.dumps(qc))
    content = {
        **inputs.to_dict(),
        'model': 'test 1',
        'version': '0.1.0',
        'device': 'cpu',
        'seconds': 12.5,
        'inputs': [{'path': 'a', 'sha256': f'{subject}{label}'}],
        'flags': [asdict(f) for f in flags],
        **ledger,
    }
    (folder / f'{inputs.name}_desc-inputs_ledger.json').write_text(json.dumps(content))
    return folder


WARNING = Flag('age-contradiction', 'warning', 'Two ages disagree.')
