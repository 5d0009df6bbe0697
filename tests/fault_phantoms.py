"""What the tests of faults share: small heads, a tiny network, the program, and trees of files.

The network has random weights: what it draws is nonsense, and the same nonsense each time. A run
with it takes little more than starting Python.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from babyseg_bids.network.unet import GroupUNet, NetworkConfig
from babyseg_bids.network.weights import new_model, save_model

# Random per run: time stamps, durations and the names of runs.
VOLATILE = (
    (r'"seconds": [0-9.]+', '"seconds": 0'),
    (r'<dt>Time</dt><dd>[^<]*<', '<dt>Time</dt><dd><'),
    (r' on \d{4}-\d\d-\d\d \d\d:\d\d UTC', ''),
)


def head(seed: int = 0, *, size: int = 20) -> np.ndarray:
    """An ellipsoid of two tissues in a darker shell, with noise."""
    points = np.stack(np.meshgrid(*[np.linspace(-1, 1, size)] * 3, indexing='ij'))
    radius = np.sqrt((points**2 / np.array([0.7, 0.85, 0.65])[:, None, None, None] ** 2).sum(0))
    data = np.select([radius < 0.7, radius < 0.9, radius < 1], [600, 400, 200], 50)
    return (data + np.random.default_rng(seed).integers(0, 40, data.shape)).astype(np.int16)


def write_image(path: Path, data: np.ndarray, zooms: tuple[float, ...] = (6.0, 6.0, 6.0)) -> Path:
    """Write voxels with an affine that centres them."""
    affine = np.diag([*zooms, 1.0])
    affine[:3, 3] = -np.array(data.shape[:3]) * zooms / 2
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def write_dataset(root: Path, *subjects: str) -> Path:
    """A dataset with one T1w for each subject, without sessions."""
    root.mkdir(parents=True, exist_ok=True)
    description = {'Name': 'faults', 'BIDSVersion': '1.10.0', 'DatasetType': 'raw'}
    (root / 'dataset_description.json').write_text(json.dumps(description))
    for number, subject in enumerate(subjects):
        write_image(t1w(root, subject), head(number))
    return root


def t1w(root: Path, subject: str) -> Path:
    """Path of a subject's scan."""
    return root / f'sub-{subject}' / 'anat' / f'sub-{subject}_T1w.nii.gz'


def write_model(path: Path) -> Path:
    """A network of a few hundred weights for voxels of 6 mm."""
    torch.manual_seed(0)
    config = NetworkConfig(labels=28, encoder=(4, 4), decoder=(4, 4), head=(4,))
    about = {'name': 'tiny', 'version': '0', 'spacing': 6.0, 'training': {}}
    save_model(path, new_model(GroupUNet(config), **about))
    return path


def command(*words: str | Path) -> list[str]:
    """The program's command line."""
    return [sys.executable, '-m', 'babyseg_bids.cli.run', *map(str, words)]


def babyseg(
    *words: str | Path, environ: Mapping[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own, as a user does."""
    return subprocess.run(
        command(*words),
        capture_output=True,
        text=True,
        timeout=1200,
        env={**os.environ, **(environ or {})},
        **options,
    )


def said(done: subprocess.CompletedProcess[str]) -> str:
    """All that a run printed, in one line: tables break sentences; no traceback is among it."""
    text = done.stdout + done.stderr
    assert 'Traceback' not in text, text
    return ' '.join(re.sub('[│┃]', ' ', text).split())


def tree(output: Path) -> dict[str, bytes]:
    """Content of each file without what is new in each run; the logs of runs are left out."""
    files = {}
    for path in sorted(p for p in output.rglob('*') if not p.is_dir() or not any(p.iterdir())):
        name = path.relative_to(output).as_posix()
        if re.match(r'sub-[^/]+/log/', name):
            continue
        content = path.read_bytes() if path.is_file() else b'an empty folder'
        if name.endswith(('.json', '.html')):
            text = content.decode()
            for pattern, replacement in VOLATILE:
                text = re.sub(pattern, replacement, text)
            content = text.encode()
        files[name] = content
    return files


def differences(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> list[str]:
    """Names of files that are in one tree only or have another content."""
    return sorted(n for n in one.keys() | other.keys() if one.get(n) != other.get(n))
