"""What a model does on real scans, most of which have no reference segmentation.

The folder holds the datasets `ds-templates` (T1w and T2w of one anatomy), `ds-motion24` (a scan
with motion and the same one enhanced), `ds-bmex` (stripped scans), `adult-heads` and
`label-maps/fetal` (T2w atlases of fetal brains with their tissues). Printed are

* the mean Dice of T1w alone against T2w alone and of motion against enhanced;
* that of the brain with the non-zero region, volumes, the largest difference of two sides, and
  whether the lateral ventricles differ in the image, too;
* the agreement of 5 mm slices with the scan that they were made from;
* how far volumes depend on the order and direction of the axes and on oblique headers;
* where a head is put that lies turned by up to 150 degrees, against where it is put otherwise;
* what of adult brains lies outside the head;
* the Dice of tissues in fetal brains; the shipped weights know the label maps of 28, 30, 32 and 34
  weeks.
"""

import argparse
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation
from skimage.filters import threshold_otsu

from babyseg_bids import BabySegPipeline
from babyseg_bids.labels import label_table
from babyseg_bids.morphometry import asymmetry_index
from babyseg_bids.network.grid import foreground_box, onto_grid, working_grid
from babyseg_bids.network.head import put_upright
from babyseg_bids.network.intensity import normalise
from babyseg_bids.network.layout import angle_of
from babyseg_bids.synthesis.completion import AROUND

ORIENTATIONS = [
    ''.join(c)
    for order in itertools.permutations(('LR', 'PA', 'IS'))
    for c in itertools.product(*order)
]

# Tissues of the fetal atlases: their numbers there, and our labels. Fluid around the brain is none
# of ours, and the corpus callosum is white matter.
FETAL_TISSUES = {
    'white matter': ((1, 8), (2, 41)),
    'cortex': ((5,), (3, 42)),
    'ventricles': ((2,), (4, 14, 15, 43)),
    'cerebellum': ((3,), (8, 47)),
    'deep grey': ((6,), (10, 11, 12, 13, 26, 28, 49, 50, 51, 52, 58, 60)),
    'brainstem': ((7,), (16,)),
}
# Turns of a head about the axes x, y and z, one after the other, degrees.
DIRECTIONS = ((30, -35, 30), (0, 0, 60), (-60, 40, 120), (25, 0, 135))


def labels_of(pipeline: BabySegPipeline, *paths: Path) -> np.ndarray:
    """Label map (X, Y, Z) on the grid of the first scan."""
    return np.asarray(pipeline.predict(list(paths)).segmentation.dataobj)


def mean_dice(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over the structures that either label map has."""
    present = [n for n in np.union1d(a, b) if n]
    each = [2 * ((a == n) & (b == n)).sum() / ((a == n).sum() + (b == n).sum()) for n in present]
    return float(np.mean(each)) if each else float('nan')


def agreements(pipeline: BabySegPipeline, folder: Path) -> pd.DataFrame:
    """Dice between two scans of the same anatomy."""
    rows = []
    for anat in sorted(folder.glob('ds-templates/sub-*/**/anat')):
        pair = sorted(anat.glob('*_T[12]w.nii.gz'))
        if len(pair) == 2:
            rows.append((pair[0].name.removesuffix('_T1w.nii.gz'), *pair))
    pair = sorted(folder.glob('ds-motion24/sub-*/**/anat/*_T1w.nii.gz'))
    rows.append(('motion24: enhanced, motion', *pair))
    out = [
        (name, mean_dice(labels_of(pipeline, a), labels_of(pipeline, b))) for name, a, b in rows
    ]
    return pd.DataFrame(out, columns=['pair', 'dice'])


def stripped(pipeline: BabySegPipeline, folder: Path) -> pd.DataFrame:
    """Brains, sides and volumes (mL) in scans without skull, cerebellum and brainstem."""
    table = label_table()
    rows = []
    for path in sorted(folder.glob('ds-bmex/sub-*/**/anat/*_T1w.nii.gz')):
        image = nib.load(path)
        data = np.asarray(image.dataobj)
        labels = labels_of(pipeline, path)
        unit = abs(np.linalg.det(image.affine[:3, :3])) / 1000
        shown = ndimage.binary_fill_holes(data > 0)
        brain = labels > 0
        volume = {r.index: (labels == r.index).sum() * unit for r in table.structures}
        tissue = {
            t: sum(volume[r.index] for r in table.structures if r.tissue == t)
            for t in ('white-matter', 'cortex', 'ventricle', 'cerebellum', 'brainstem')
        }
        sides = {
            r.abbreviation[2:]: asymmetry_index(volume[r.index], volume[r.mirror])
            for r in table.structures
            if r.hemisphere == 'L' and r.tissue != 'cerebellum'
        }
        # A structure that is absent on both sides counts, too.
        uneven = {name: np.nan_to_num(abs(value), nan=200) for name, value in sides.items()}
        worst = max(uneven, key=uneven.__getitem__)
        rows.append(
            {
                'scan': path.name.removesuffix('_T1w.nii.gz'),
                'brain': 2 * (brain & shown).sum() / (brain.sum() + shown.sum()),
                'mL': brain.sum() * unit,
                **tissue,
                'worst side': f'{worst} {uneven[worst]:.0f} %',
                'sides over 15 %': sum(v > 15 for v in uneven.values()),
                'LV left - right': f'{sides["LV"]:+.0f} %',
                'of dark voxels': f'{dark_sides(data, labels):+.0f} %',
            }
        )
    return pd.DataFrame(rows)


def dark_sides(data: np.ndarray, labels: np.ndarray) -> float:
    """Asymmetry (percent) of what is as dark as a lateral ventricle near the labels of one.

    Where it is that of the labels, their asymmetry is not the network's alone. Counted are the
    brain's voxels within three of the labels in a T1w scan, but for the third ventricle.
    """
    brain = ndimage.find_objects((labels > 0).astype(int))[0]
    data, labels = data[brain], labels[brain]
    left, right = (ndimage.distance_transform_edt(labels != n) for n in (4, 43))
    around = (np.minimum(left, right) <= 3) & ~np.isin(labels, (0, 14))
    dark = around & (data < threshold_otsu(data[around]))
    return asymmetry_index(*(np.count_nonzero(dark & d) for d in (left < right, right < left)))


def thick_slices(pipeline: BabySegPipeline, path: Path, *, slice_mm: float = 5) -> pd.DataFrame:
    """Dice of a scan averaged to thick slices along each axis with its own label map."""
    image = nib.as_closest_canonical(nib.load(path))
    data = np.asarray(image.dataobj, np.float32)
    own = labels_of(pipeline, path)
    own = np.asarray(nib.as_closest_canonical(nib.Nifti1Image(own, nib.load(path).affine)).dataobj)
    rows = []
    for axis, plane in enumerate(('sagittal', 'coronal', 'axial')):
        step = round(slice_mm / image.header.get_zooms()[axis])
        count = data.shape[axis] // step
        whole = tuple(slice(0, count * step) if a == axis else slice(None) for a in range(3))
        shape = list(data.shape)
        shape[axis : axis + 1] = [count, step]
        thick = data[whole].reshape(shape).mean(axis + 1)
        scale = np.eye(4)
        scale[axis, axis] = step
        scale[axis, 3] = (step - 1) / 2
        found = pipeline.predict([nib.Nifti1Image(thick, image.affine @ scale)]).segmentation
        expected = most_frequent(own[whole].reshape(shape), axis + 1)
        rows.append((plane, mean_dice(np.asarray(found.dataobj), expected)))
    return pd.DataFrame(rows, columns=['5 mm slices', 'dice'])


def most_frequent(labels: np.ndarray, axis: int) -> np.ndarray:
    """The label that most voxels along an axis have."""
    numbers = np.unique(labels)
    counts = np.stack([(labels == n).sum(axis) for n in numbers])
    return np.asarray(numbers[counts.argmax(0)])


def orientations(pipeline: BabySegPipeline, path: Path) -> pd.DataFrame:
    """Largest change of a structure's volume over 48 axis orders and flips and three turns."""
    image = nib.load(path)
    expected = volumes(pipeline, image)
    changes = {}
    for codes in ORIENTATIONS:
        transform = nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes)
        )
        changes[codes] = volumes(pipeline, image.as_reoriented(transform)) / expected - 1
    for axis in range(3):
        turn = np.eye(4)
        turn[:3, :3] = Rotation.from_rotvec(np.eye(3)[axis] * 15, degrees=True).as_matrix()
        oblique = nib.Nifti1Image(image.dataobj, turn @ image.affine)
        changes[f'turned {"xyz"[axis]}'] = volumes(pipeline, oblique) / expected - 1
    worst = {name: float(np.nanmax(np.abs(c))) for name, c in changes.items()}
    name = max(worst, key=worst.__getitem__)
    return pd.DataFrame(
        [(len(worst), name, 100 * worst[name])],
        columns=['orientations', 'worst', 'largest change of a volume, %'],
    )


def volumes(pipeline: BabySegPipeline, image: nib.Nifti1Image) -> np.ndarray:
    """Soft volumes of the structures, mm3."""
    result = pipeline.predict([image]).volumes
    return result.set_index('index')['volume-mm3'].to_numpy(float)


def directions(pipeline: BabySegPipeline, folder: Path) -> pd.DataFrame:
    """Where every scan is put when it is resampled as if the head lay turned.

    Returns
    -------
    One row a scan: by how many degrees it is turned as it was given, and for each of `DIRECTIONS`
    those between where the head is put and where it is put as it was given.
    """
    rows = []
    for path in sorted(folder.glob('[da]*/**/*_T[12]w.nii.gz')):
        image = nib.as_closest_canonical(nib.load(path))
        data = np.asarray(image.dataobj, np.float32)
        zooms = np.array(image.header.get_zooms())
        own = put(pipeline, data, zooms)
        row = {'scan': path.name.removesuffix('.nii.gz'), 'given': angle_of(own)}
        voxel = min(zooms)
        size = round(float(np.linalg.norm(data.shape * zooms)) / voxel)
        for degrees in DIRECTIONS:
            turn = Rotation.from_euler('xyz', degrees, degrees=True).as_matrix()
            matrix = np.diag(voxel / zooms) @ turn
            start = (np.array(data.shape) - 1) / 2 - matrix @ np.full(3, (size - 1) / 2)
            turned = ndimage.affine_transform(data, matrix, start, (size,) * 3, order=1)
            found = put(pipeline, turned, np.full(3, voxel))
            row[str(degrees)] = angle_of(turn @ found @ own.T)
        rows.append(row)
        print(' '.join(str(x) for x in row.values()), flush=True)
    return pd.DataFrame(rows)


def put(pipeline: BabySegPipeline, scan: np.ndarray, zooms: np.ndarray) -> np.ndarray:
    """The rotation (3, 3) from the axes in which a head is put upright to the scan's own."""
    model = pipeline.model
    affine = np.diag([*zooms, 1.0])
    grid = working_grid(
        affine, foreground_box(scan), spacing=model.spacing, multiple=model.multiple
    )
    standing = put_upright(
        lambda g: normalise(onto_grid(torch.from_numpy(scan), affine, g))[None],
        grid,
        model,
        device='cpu',
    )
    return np.linalg.inv(grid.affine[:3, :3]) @ standing.grid.affine[:3, :3]


def adult_heads(pipeline: BabySegPipeline, folder: Path) -> pd.DataFrame:
    """Brain volume and what of it lies outside the head, in heads with skull and neck."""
    rows = []
    for path in sorted(folder.glob('adult-heads/*.nii*')):
        image = nib.load(path)
        data = np.asarray(image.dataobj, np.float32)
        head = head_mask(data)
        brain = labels_of(pipeline, path) > 0
        unit = abs(np.linalg.det(image.affine[:3, :3])) / 1000
        outside = 100 * (brain & ~head).sum() / max(1, brain.sum())
        rows.append((path.name, brain.sum() * unit, outside, ndimage.label(brain)[1]))
    return pd.DataFrame(rows, columns=['head', 'brain mL', 'outside head, %', 'pieces'])


def head_mask(data: np.ndarray) -> np.ndarray:
    """Where a scan (X, Y, Z) shows the head, without holes."""
    width = 3
    bright = ndimage.gaussian_filter(data, 1) > 0.1 * np.quantile(data, 0.99)
    # Beyond the field of view the head goes on; closing would take it away from the border.
    closed = ndimage.binary_closing(np.pad(bright, width, mode='edge'), iterations=width)
    return ndimage.binary_fill_holes(closed[(slice(width, -width),) * 3])


def fetal(pipeline: BabySegPipeline, folder: Path) -> pd.DataFrame:
    """Dice of the tissues of fetal brains without the fluid around them, by week and operation."""
    rows = []
    for case in sorted(folder.glob('label-maps/fetal/GA*')):
        image = nib.load(case / 'srr.nii.gz')
        truth = np.asarray(nib.load(case / 'parcellation.nii.gz').dataobj)
        brain = (truth > 0) & (truth != AROUND)
        stripped = nib.Nifti1Image(image.get_fdata(dtype=np.float32) * brain, image.affine)
        labels = np.asarray(pipeline.predict([stripped]).segmentation.dataobj)
        dice = {}
        for tissue, (theirs, ours) in FETAL_TISSUES.items():
            a, b = np.isin(truth, theirs), np.isin(labels, ours)
            dice[tissue] = 2 * (a & b).sum() / (a.sum() + b.sum())
        rows.append({'brain': case.name, **dice})
    return pd.DataFrame(rows)


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('folder', type=Path, help='holds the datasets')
    parser.add_argument('--model', default='default')
    parser.add_argument(
        '--only',
        nargs='+',
        choices=('agreements', 'stripped', 'thick', 'turned', 'directions', 'heads', 'fetal'),
    )
    args = parser.parse_args()
    pipeline = BabySegPipeline(model=args.model)
    thick = args.folder / 'ds-motion24'
    enhanced = min(thick.glob('sub-*/**/anat/*_T1w.nii.gz'))
    tables = {
        'agreements': lambda: agreements(pipeline, args.folder),
        'stripped': lambda: stripped(pipeline, args.folder),
        'thick': lambda: thick_slices(pipeline, enhanced),
        'turned': lambda: orientations(pipeline, enhanced),
        'directions': lambda: directions(pipeline, args.folder),
        'heads': lambda: adult_heads(pipeline, args.folder),
        'fetal': lambda: fetal(pipeline, args.folder),
    }
    for name in args.only or tables:
        print(tables[name]().round(3).to_string(index=False), end='\n\n', flush=True)


if __name__ == '__main__':
    main()
