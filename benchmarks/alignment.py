"""How well known movements between two scans of one child are found, and other children refused.

The folder holds the datasets `ds-templates` (T1w and T2w of one anatomy at each age),
`ds-motion24` (a scan with motion, and the same one enhanced) and `ds-bmex` (different children). A
case takes one scan as the reference and puts the other onto a new grid: turned, coarser or with
thick slices, often cut off, noisy, stored in another order of axes. A movement of up to 30 degrees
and 40 mm goes into its header, and has to be found. `--brains` gives pairs of different brains
instead, which have to be left out. Every case adds a line to the log; a run continues where it was
ended.
"""

import argparse
import json
import time
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage

from babyseg_bids.alignment import Alignment
from babyseg_bids.network import load_model
from babyseg_bids.pipeline import align_scans
from babyseg_bids.preflight import load_image
from babyseg_bids.rigid import rotation_angle

MAX_DEGREES, MAX_MM = 30.0, 40.0
# Beyond this an alignment counts as wrong.
TOLERANCE_MM, TOLERANCE_DEGREES = 1.0, 1.0
# Month 24 of the templates is two brains.
ONE_ANATOMY = ('month00', 'month06', 'month09', 'month12')


@lru_cache(maxsize=16)
def loaded(path: Path) -> nib.Nifti1Image:
    """A scan without empty space around it; the same ones come back again and again."""
    image, _ = foreground(load_image(path))
    return nib.Nifti1Image(np.asanyarray(image.dataobj, np.float32), image.affine)


def rotation(axis: np.ndarray, degrees: float) -> np.ndarray:
    """3x3 rotation about an axis (Rodrigues' formula)."""
    x, y, z = axis / np.linalg.norm(axis)
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.radians(degrees)
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k


def foreground(image: nib.Nifti1Image) -> tuple[nib.Nifti1Image, np.ndarray]:
    """The image cropped to its non-zero voxels, and their centre in mm."""
    data = np.asanyarray(image.dataobj, np.float32)
    box = ndimage.find_objects((data > 0).astype(np.uint8))[0]
    cropped = image.slicer[box]
    centre = ndimage.center_of_mass(data[box] > 0)
    return cropped, nib.affines.apply_affine(cropped.affine, centre)


def new_grid(
    image: nib.Nifti1Image, centre: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Shape and affine of another scanner's grid around the head, and what it is like."""
    thick = rng.random() < 0.5
    spacing = np.full(3, rng.uniform(0.8, 2.0))
    if thick:
        spacing[:] = rng.uniform(0.8, 1.2)
        spacing[rng.integers(3)] = rng.uniform(2, 5)
    turn = rotation(rng.normal(size=3), rng.uniform(0, 20))
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in image.shape])).reshape(3, -1).T
    local = (nib.affines.apply_affine(image.affine, corners) - centre) @ turn
    low, high = local.min(0) - 5, local.max(0) + 5
    cut = 0.0
    if rng.random() < 0.5:
        cut, axis = rng.uniform(0.05, 0.25), rng.integers(3)
        amount = cut * (high - low)[axis]
        if rng.random() < 0.5:
            low[axis] += amount
        else:
            high[axis] -= amount
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing
    affine[:3, 3] = centre + turn @ low
    shape = np.ceil((high - low) / spacing).astype(int)
    return shape, affine, {'spacing': spacing.round(2).tolist(), 'cut': round(cut, 3)}


def displaced(
    image: nib.Nifti1Image, rng: np.random.Generator
) -> tuple[nib.Nifti1Image, np.ndarray, dict[str, Any]]:
    """The image as another scanner would store it, moved.

    Returns
    -------
    the image, the matrix (4, 4) that undoes the movement, and what was drawn
    """
    image, centre = foreground(image)
    shape, affine, drawn = new_grid(image, centre, rng)
    zooms = np.linalg.norm(image.affine[:3, :3], axis=0)
    # A voxel of the new grid averages over its own size.
    blur = np.linalg.norm((np.linalg.inv(image.affine) @ affine)[:3, :3], axis=1)
    blur = np.sqrt(np.maximum(blur**2 - 1, 0)) / np.sqrt(12)
    data = ndimage.gaussian_filter(np.asanyarray(image.dataobj, np.float32), blur)
    pull = np.linalg.inv(image.affine) @ affine
    data = ndimage.affine_transform(data, pull, output_shape=tuple(shape), order=1)
    noise = rng.uniform(0, 0.04) * np.quantile(data, 0.99)
    data = np.where(data > 0, np.abs(data + rng.normal(0, noise, data.shape)), 0)
    degrees, mm = rng.uniform(0, MAX_DEGREES), rng.uniform(0, MAX_MM)
    move = np.eye(4)
    move[:3, :3] = rotation(rng.normal(size=3), degrees)
    direction = rng.normal(size=3)
    move[:3, 3] = centre - move[:3, :3] @ centre + mm * direction / np.linalg.norm(direction)
    moved = nib.Nifti1Image(data.astype(np.float32), move @ affine)
    order = np.stack([rng.permutation(3), rng.choice([-1, 1], 3)], axis=1)
    drawn |= {'degrees': round(degrees, 2), 'mm': round(mm, 2), 'from': zooms.round(2).tolist()}
    return moved.as_reoriented(order), np.linalg.inv(move), drawn


def errors(found: Alignment, truth: np.ndarray, image: nib.Nifti1Image) -> tuple[float, float]:
    """Distance in mm at the centre of the moved head and angle in degrees to the truth."""
    _, centre = foreground(image)
    one, other = (nib.affines.apply_affine(m, centre) for m in (found.matrix, truth))
    turn = np.linalg.inv(truth) @ found.matrix
    return float(np.linalg.norm(one - other)), rotation_angle(turn)


def same_brain(folder: Path) -> list[tuple[Path, Path]]:
    """Pairs of reference and other scan of one anatomy, both ways round."""
    pairs = []
    for name in ONE_ANATOMY:
        pairs.append(tuple(sorted(folder.glob(f'ds-templates/sub-{name}/anat/*_T[12]w.nii.gz'))))
    pairs.append(tuple(sorted(folder.glob('ds-motion24/sub-*/anat/*_T1w.nii.gz'))))
    return [pair for a, b in pairs for pair in ((a, b), (b, a))]


def different_brains(folder: Path) -> list[tuple[Path, Path]]:
    """Pairs of different children, of one and of two contrasts, and of templates of two ages."""
    children = sorted(folder.glob('ds-bmex/sub-*/**/anat/*_T1w.nii.gz'))
    # Two names, one brain.
    children = [p for p in children if 'sub-0001_ses-V02' not in p.name]
    t1, t2 = (sorted(folder.glob(f'ds-templates/sub-*/anat/*_T{n}w.nii.gz')) for n in (1, 2))
    pairs = [(t1[-1], t2[-1]), (t2[-1], t1[-1])]
    pairs += list(pairwise([*children, children[0]]))
    pairs += list(zip(children[::2], children[1::2][::-1], strict=False))
    pairs += [(a, b) for i, a in enumerate(t1) for b in (t2[i - 1], t2[i - 2])]
    pairs += list(zip(children, t2 * 2, strict=False))
    return list(dict.fromkeys(pairs))


def cases(folder: Path, count: int, *, brains: bool) -> Iterator[tuple[int, Path, Path]]:
    """Number, reference and other scan of each case."""
    pairs = different_brains(folder) if brains else same_brain(folder)
    for number in range(count or len(pairs)):
        yield number, *pairs[number % len(pairs)]


def run_case(number: int, reference: Path, other: Path) -> dict[str, Any]:
    """Align one displaced scan, and say what came out."""
    rng = np.random.default_rng([7, number])
    fixed = loaded(reference)
    moved, truth, drawn = displaced(loaded(other), rng)
    began = time.process_time()
    (found,) = align_scans([fixed, moved], lambda: load_model('default'), seed=number)
    seconds = time.process_time() - began
    mm, degrees = errors(found, truth, moved)
    return {
        'case': number,
        'reference': reference.name,
        'other': other.name,
        **drawn,
        'status': found.status,
        'similarity': found.similarity,
        'sharpness': found.sharpness,
        'overlap': found.overlap,
        'doubt': found.doubt,
        'rotation': found.rotation_deg,
        'translation': found.translation_mm,
        'error_mm': mm,
        'error_degrees': degrees,
        'cpu_s': seconds,
        'reason': found.reason,
    }


def summary(rows: pd.DataFrame) -> str:
    """Counts of each outcome, and the distribution of the errors of what was used."""
    kept = rows[rows.status != 'refused']
    right = (kept.error_mm <= TOLERANCE_MM) & (kept.error_degrees <= TOLERANCE_DEGREES)
    flagged = (kept.doubt != '').sum()
    counts = (
        f'{len(rows)} cases, {rows.cpu_s.mean():.1f} CPU s each: {right.sum()} right, '
        f'{(~right).sum()} wrong and used, {len(rows) - len(kept)} left out, {flagged} flagged'
    )
    lines = [counts, rows.status.value_counts().to_string()]
    parts = kept[['error_mm', 'error_degrees']].quantile([0.5, 0.9, 0.99, 1.0]).round(2)
    return '\n'.join([*lines, parts.to_string()])


def main() -> None:
    """Run the cases that the log does not have, and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('folder', type=Path, help='holds ds-templates, ds-motion24 and ds-bmex')
    parser.add_argument('log', type=Path, help='a line of JSON for each case')
    parser.add_argument('--cases', type=int, default=0, help='default: each pair once')
    parser.add_argument('--brains', action='store_true', help='pairs of different brains')
    args = parser.parse_args()
    lines = args.log.read_text().splitlines() if args.log.exists() else []
    rows = [json.loads(line) for line in lines]
    done = {row['case'] for row in rows}
    for number, *pair in cases(args.folder, args.cases, brains=args.brains):
        if number in done:
            continue
        rows.append(run_case(number, *pair))
        with args.log.open('a') as log:
            log.write(json.dumps(rows[-1]) + '\n')
    print(summary(pd.DataFrame(rows)))


if __name__ == '__main__':
    main()
