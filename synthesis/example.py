"""Write a small BIDS dataset of synthetic infants, so that babyseg can be tried without data.

The anatomies are drawn from the atlas that ships with babyseg, the images by the functions that
also draw the training images. Nobody was scanned for them. The true label maps lie under
`derivatives/truth`.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from babyseg_bids import __version__
from babyseg_bids.errors import BabySegError, OutputError, UsageError
from babyseg_bids.labels import TISSUES, label_table
from babyseg_bids.synthesis import acquisition, contrast, operators, surroundings
from babyseg_bids.synthesis.atlas import Atlas, load_atlas, sample_label_map
from babyseg_bids.synthesis.deformation import grid, rotation, sample_field
from babyseg_bids.synthesis.draws import Draws
from babyseg_bids.synthesis.maps import (
    CSF,
    MARROW,
    MUSCLE,
    SCALP,
    SKULL,
    ClassTable,
    class_table,
    hull_distance,
)
from babyseg_bids.synthesis.settings import ContrastSettings, SurroundingsSettings

PROGRAM = 'babyseg-example'
BIDS_VERSION = '1.10.0'
# White matter turns from darker to brighter than cortex in T1w during the first year, and the
# other way round in T2w: weighting by age in months, blended in between.
CONTRAST_BY_AGE = {
    'T1w': ((3.0, 'newborn T1'), (6.0, 'isointense T1'), (10.0, 'adult T1')),
    'T2w': ((4.0, 'newborn T2'), (10.0, 'adult T2')),
}
# Intensities of the tissues around the brain.
OUTER = {
    'T1w': {SKULL: 0.04, MARROW: 0.3, SCALP: 0.75, MUSCLE: 0.4},
    'T2w': {SKULL: 0.04, MARROW: 0.3, SCALP: 0.55, MUSCLE: 0.25},
}
# Voxel sizes in mm, and the brightest value of the stored images.
SPACINGS = {'T1w': (1.0, 1.0, 1.0), 'T2w': (0.9, 0.9, 2.0)}
PEAK = 700
# Deviation of a structure's mean, of the scanner's noise and of the log bias field.
STRUCTURE_SD, NOISE_SD, BIAS = 0.012, 0.015, 0.1
TISSUE = ContrastSettings(noise_in_class=0.025, texture=0.02, split_probability=0.0)
# The soft tissue of the neck may lie anywhere, which suits training but no example.
HEAD = SurroundingsSettings(body_probability=0.0, dura_probability=0.0)
# How far a child may have moved between two scans.
MOVED_DEG, MOVED_MM = 6.0, 5.0
# Room around the brain for the layers of the head, mm.
HEAD_MARGIN = 17.0


@dataclass(frozen=True)
class Visit:
    """One session of one synthetic child; `age` in months."""

    subject: str
    session: str
    age: float

    @property
    def name(self) -> str:
        """File name stem."""
        return f'sub-{self.subject}_ses-{self.session}'

    @property
    def folder(self) -> str:
        """Folder of the session's images, relative to a dataset."""
        return f'sub-{self.subject}/ses-{self.session}/anat'


VISITS = (Visit('01', '3mo', 3.0), Visit('01', '9mo', 9.0), Visit('02', '18mo', 18.0))


def class_means(
    table: ClassTable, age_months: float, suffix: str, /, *, draws: Draws
) -> np.ndarray:
    """Mean intensity of each class, (N,), in a scan of a child of a given age.

    Parameters
    ----------
    suffix : `T1w` or `T2w`
    """
    steps = CONTRAST_BY_AGE[suffix]
    levels = np.array([contrast.WEIGHTINGS[name] for _, name in steps])
    ages = [age for age, _ in steps]
    means = np.zeros(len(table))
    for tissue, column in zip(TISSUES, _columns(levels), strict=True):
        members = table.tissue(tissue)
        jitter = STRUCTURE_SD * draws.table(len(members), normal=True)
        means[members] = float(np.interp(age_months, ages, column)) + jitter
    # The two sides look alike, and CSF as it does in the ventricles.
    means = (means + means[table.mirror]) / 2
    means[table.of(CSF)] = float(means[table.of(4)[0]])
    for number, level in OUTER[suffix].items():
        means[table.of(number)] = level
    return means


def _columns(levels: np.ndarray) -> list[np.ndarray]:
    order = [contrast.TISSUE_ORDER.index(tissue) for tissue in TISSUES]
    return [levels[:, i] for i in order]


def add_head(labels: np.ndarray, /, *, table: ClassTable, draws: Draws) -> Tensor:
    """Classes (X, Y, Z) int32 of a head around a 1 mm label map (FreeSurfer numbers)."""
    numbers, inverse = np.unique(labels, return_inverse=True)
    classes = torch.tensor(table.of(*numbers.tolist()), dtype=torch.int32)
    return surroundings.add_layers(
        classes[torch.from_numpy(inverse.reshape(labels.shape))],
        torch.from_numpy(hull_distance(labels > 0)),
        HEAD,
        table=table,
        draws=draws,
    )


def random_pose(degrees: float, millimetres: float, /, *, draws: Draws) -> np.ndarray:
    """Random rigid transform (4, 4), at most so many degrees about and mm along each axis."""
    matrix = np.eye(4)
    angles = np.deg2rad(draws.vector('degrees', -degrees, degrees, 3))
    matrix[:3, :3] = rotation(torch.from_numpy(angles)).numpy()
    matrix[:3, 3] = draws.vector('mm', -millimetres, millimetres, 3)
    return matrix


def scan_grid(
    shape: Sequence[int], affine: np.ndarray, spacing: Sequence[float], tilt: np.ndarray, /
) -> tuple[tuple[int, int, int], np.ndarray]:
    """Grid of a scan that covers an image, tilted about its middle.

    Returns
    -------
    shape and affine (4, 4) of the new grid, in the image's world
    """
    extent = np.array(shape) * np.diag(affine)[:3]
    size = np.ceil(extent / spacing).astype(int)
    middle = affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]
    matrix = np.eye(4)
    matrix[:3, :3] = tilt[:3, :3] @ np.diag(spacing)
    matrix[:3, 3] = middle + tilt[:3, 3] - matrix[:3, :3] @ ((size - 1) / 2)
    x, y, z = size.tolist()
    return (x, y, z), matrix


def draw_scan(
    classes: Tensor,
    affine: np.ndarray,
    age_months: float,
    suffix: str,
    /,
    *,
    table: ClassTable,
    draws: Draws,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scan of a head.

    Parameters
    ----------
    classes : (X, Y, Z) int32
    affine : (4, 4), 1 mm, RAS axes

    Returns
    -------
    image (*size) int16, and the affine (4, 4) of its grid in the head's own world
    """
    means = class_means(table, age_months, suffix, draws=draws)
    image = contrast.render(classes, contrast.Contrast(means), settings=TISSUE, draws=draws)
    spacing = SPACINGS[suffix]
    # The scanner averages over a voxel: a Gaussian whose width at half maximum is the voxel's.
    widths = zip(classes.shape, spacing, strict=True)
    image = operators.apply(
        image, [operators.gaussian(n, acquisition.SD * mm) for n, mm in widths]
    )
    if spacing != SPACINGS['T1w']:
        tilt = random_pose(8, 6, draws=draws)
        shape, where = scan_grid(classes.shape, affine, spacing, tilt)
        matrix = torch.from_numpy(np.linalg.inv(affine) @ where).float()
        points = torch.einsum('ij,j...->i...', matrix[:3, :3], grid(shape))
        image = _sample(image, points + matrix[:3, 3].view(3, 1, 1, 1))
        affine = where
    image = acquisition.bias_field(image, sd=BIAS, draws=draws)
    image = acquisition.rician(image, sd=NOISE_SD, draws=draws)
    return (PEAK * image.clamp(0, 1.5)).round().to(torch.int16).numpy(), affine


def _sample(image: Tensor, points: Tensor) -> Tensor:
    """Linear interpolation (*size) at voxel coordinates (3, *size), air outside."""
    limit = torch.tensor(image.shape).view(3, 1, 1, 1) - 0.5
    inside = ((points > -0.5) & (points < limit)).all(0)
    return sample_field(image[None], points)[0] * inside


def write_example(out: Path, /, *, seed: int = 0, atlas: Atlas | None = None) -> None:
    """Write the dataset: two children, one of them seen twice, each time with T1w and T2w.

    Parameters
    ----------
    out : folder; created if needed, files of an earlier example are replaced
    seed : another seed gives other children
    """
    atlas = atlas or load_atlas()
    out.mkdir(parents=True, exist_ok=True)
    _write_dataset_files(out, seed)
    for number, visit in enumerate(VISITS):
        _write_visit(out, visit, seed, 1000 * seed + number, atlas)


def _write_visit(out: Path, visit: Visit, seed: int, scan_seed: int, atlas: Atlas) -> None:
    individual = 1000 * seed + int(visit.subject)
    labels, affine = sample_label_map(atlas, visit.age, seed=individual, margin=HEAD_MARGIN)
    table = class_table()
    head = add_head(labels, table=table, draws=Draws(individual))

    draws = Draws(scan_seed)
    for suffix in SPACINGS:
        image, own = draw_scan(head, affine, visit.age, suffix, table=table, draws=draws)
        # The child lies differently at every scan.
        pose = random_pose(MOVED_DEG, MOVED_MM, draws=draws)
        stem = out / visit.folder / f'{visit.name}_{suffix}'
        _write_image(stem, image, pose @ own, {'Manufacturer': 'none: synthetic image'})
        if suffix == 'T1w':
            truth = out / 'derivatives/truth' / visit.folder
            name = f'{visit.name}_space-T1w_desc-truth_dseg'
            source = f'bids:raw:{visit.folder}/{visit.name}_T1w.nii.gz'
            _write_image(truth / name, labels, pose @ own, {'SpatialReference': source})


def _write_image(
    stem: Path, data: np.ndarray, affine: np.ndarray, sidecar: Mapping[str, object]
) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(data, affine)
    image.header.set_xyzt_units('mm', 'sec')
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    image.to_filename(f'{stem}.nii.gz')
    _write_json(Path(f'{stem}.json'), sidecar)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + '\n', 'utf-8')


def _write_tsv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join('\t'.join(map(str, row)) + '\n' for row in rows), 'utf-8')


README = """# Synthetic infants

Example scans for babyseg, written by `babyseg-example` (seed {seed}). Nobody was scanned for them:
anatomies are drawn from an averaged probability atlas, intensities by a generator. They are good
for trying the program, not for measuring how accurate it is on real scans.

T1w and T2w of a session lie on different grids, and the child moved between them. The true label
maps, on the grid of the T1w, are in `derivatives/truth`.
"""


def _write_dataset_files(out: Path, seed: int) -> None:
    made_by = [{'Name': PROGRAM, 'Version': __version__}]
    common = {'BIDSVersion': BIDS_VERSION, 'License': 'CC0', 'GeneratedBy': made_by}
    raw = {
        'Name': 'Synthetic infants',
        'DatasetType': 'raw',
        'Authors': ['The babyseg developers'],
        **common,
    }
    _write_json(out / 'dataset_description.json', raw)
    (out / 'README.md').write_text(README.format(seed=seed), 'utf-8')

    subjects = sorted({v.subject for v in VISITS})
    _write_tsv(out / 'participants.tsv', [['participant_id'], *([f'sub-{s}'] for s in subjects)])
    described = {'age': {'Description': 'Age at the scan', 'Units': 'month'}}
    for subject in subjects:
        rows = [[f'ses-{v.session}', v.age] for v in VISITS if v.subject == subject]
        stem = out / f'sub-{subject}/sub-{subject}_sessions'
        _write_tsv(stem.with_suffix('.tsv'), [['session_id', 'age'], *rows])
        _write_json(stem.with_suffix('.json'), described)

    truth = out / 'derivatives/truth'
    names = [[r.index, r.name, r.abbreviation, r.color] for r in label_table().rows]
    header = ['index', 'name', 'abbreviation', 'color']
    _write_tsv(truth / 'desc-truth_dseg.tsv', [header, *names])
    links = {'DatasetType': 'derivative', 'DatasetLinks': {'raw': '../..'}}
    derived = {'Name': 'True label maps', **links, **common}
    _write_json(truth / 'dataset_description.json', derived)


def _prepare(out: Path, overwrite: bool) -> None:
    """Make room for the dataset, or raise with the reason why that cannot be done."""
    if out.exists() and not out.is_dir():
        raise UsageError(f'{out} is a file; give the name of a folder to write the example to.')
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise UsageError(
            f'{out} is not empty; give another folder, or --overwrite to replace its example.'
        )
    if not _is_example(out):
        raise UsageError(
            f'{out} holds something that {PROGRAM} did not write, and is left alone; give another '
            'folder.'
        )
    for folder in [*out.glob('sub-*'), out / 'derivatives/truth']:
        if folder.is_dir():
            shutil.rmtree(folder)


def _is_example(folder: Path) -> bool:
    description = folder / 'dataset_description.json'
    return description.is_file() and f'"{PROGRAM}"' in description.read_text('utf-8', 'replace')


def build_parser() -> argparse.ArgumentParser:
    """The command line of `babyseg-example`."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description='Write a small BIDS dataset of synthetic infants to try babyseg with: two '
        'children, three sessions, T1w and T2w, with the true label maps.',
    )
    parser.add_argument('out', type=Path, metavar='OUT', help='folder to write; must be empty')
    parser.add_argument(
        '--seed', type=int, default=0, help='another number gives other children (default: 0)'
    )
    parser.add_argument(
        '--overwrite', action='store_true', help='replace an example that is in OUT already'
    )
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Console script `babyseg-example OUT`. Returns the exit code."""
    arguments = build_parser().parse_args(argv)
    out = arguments.out
    try:
        try:
            _prepare(out, arguments.overwrite)
            write_example(out, seed=arguments.seed)
        except OSError as e:
            reason = e.strerror or e
            raise OutputError(f'The example cannot be written to {out}: {reason}.') from e
    except BabySegError as e:
        print(f'{PROGRAM}: {e}', file=sys.stderr)
        return e.exit_code
    print(
        f'Wrote {len(VISITS)} sessions to {out}. Segment them with: '
        f'babyseg {out} {out}/derivatives/babyseg participant'
    )
    return 0


if __name__ == '__main__':
    sys.exit(main())
