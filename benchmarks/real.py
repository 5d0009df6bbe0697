"""What a model does on real scans that have no reference segmentation.

The folder holds the datasets `ds-templates` (T1w and T2w of one anatomy), `ds-motion24` (a scan
with motion and the same one enhanced) and `ds-bmex` (stripped scans). Printed are the agreement of
T1w alone with T2w alone and of motion with enhanced (mean Dice over structures), that of the brain
with the non-zero region, volumes, and the largest difference between the two sides.
"""

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage

from babyseg_bids import BabySegPipeline
from babyseg_bids.labels import label_table


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
        labels = labels_of(pipeline, path)
        unit = abs(np.linalg.det(image.affine[:3, :3])) / 1000
        shown = ndimage.binary_fill_holes(np.asarray(image.dataobj) > 0)
        brain = labels > 0
        volume = {r.index: (labels == r.index).sum() * unit for r in table.structures}
        tissue = {
            t: sum(volume[r.index] for r in table.structures if r.tissue == t)
            for t in ('white-matter', 'cortex', 'ventricle', 'cerebellum', 'brainstem')
        }
        sides = {
            r.abbreviation[2:]: abs(volume[r.index] - volume[r.mirror])
            / max((volume[r.index] + volume[r.mirror]) / 2, 1e-9)
            for r in table.structures
            if r.hemisphere == 'L' and r.tissue != 'cerebellum'
        }
        worst = max(sides, key=sides.__getitem__)
        rows.append(
            {
                'scan': path.name.removesuffix('_T1w.nii.gz'),
                'brain': 2 * (brain & shown).sum() / (brain.sum() + shown.sum()),
                'mL': brain.sum() * unit,
                **tissue,
                'worst side': f'{worst} {100 * sides[worst]:.0f} %',
                'sides over 15 %': sum(v > 0.15 for v in sides.values()),
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('folder', type=Path, help='holds ds-templates, ds-motion24 and ds-bmex')
    parser.add_argument('--model', default='default')
    args = parser.parse_args()
    pipeline = BabySegPipeline(model=args.model)
    print(agreements(pipeline, args.folder).round(3).to_string(index=False))
    print()
    print(stripped(pipeline, args.folder).round(3).to_string(index=False))


if __name__ == '__main__':
    main()
