"""Whether bias correction and denoising help a model on real scans.

Each scan is segmented as it is and with a strong bias field or noise added, both untreated and
treated. Printed is the mean Dice with the segmentation of the scan as it is, untreated; for the
scan itself this is how much the treatment changes a result that nothing was wrong with.
"""

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage

from babyseg_bids.network import load_model, segment
from babyseg_bids.normalisation import mean_overlap
from babyseg_bids.preflight import load_image
from babyseg_bids.preprocessing import preprocess

TREATMENTS = {
    'none': {},
    'n4': {'bias_correction': 'n4'},
    'denoise': {'denoise': True},
}
# The field multiplies by 1 / FIELD to FIELD from one side of the head to the other.
FIELD = 2.5
NOISE = 0.12


def corrupted(data: np.ndarray, how: str, rng: np.random.Generator) -> np.ndarray:
    """The scan (X, Y, Z) with a smooth field (`bias`), Rician noise (`noise`) or as it is."""
    if how == 'bias':
        coarse = ndimage.zoom(rng.normal(size=(3, 3, 3)), np.array(data.shape) / 3, order=3)
        field = np.zeros(data.shape)
        box = tuple(slice(0, min(a, b)) for a, b in zip(data.shape, coarse.shape, strict=True))
        field[box] = coarse[box]
        field = 2 * (field - field.min()) / np.ptp(field) - 1
        return data * FIELD**field
    if how == 'noise':
        sd = NOISE * np.quantile(data[data > 0], 0.95)
        real, imaginary = (rng.normal(0, sd, data.shape) for _ in range(2))
        return np.where(data > 0, np.hypot(data + real, imaginary), 0)
    return data


def coarser(image: nib.Nifti1Image, factor: int) -> nib.Nifti1Image:
    """Every block of voxels averaged, and empty space around the head cut off."""
    data = np.asanyarray(image.dataobj, np.float32)
    box = ndimage.find_objects((data > 0).astype(np.uint8))[0]
    part = image.slicer[box]
    shape = np.array(part.shape) // factor
    data = data[box][tuple(slice(0, n * factor) for n in shape)]
    data = data.reshape([n for pair in zip(shape, (factor,) * 3, strict=True) for n in pair])
    step = np.diag([factor] * 3 + [1.0])
    step[:3, 3] = (factor - 1) / 2
    return nib.Nifti1Image(data.mean((1, 3, 5)), part.affine @ step)


def main() -> None:
    """Print a table: a row for each scan and what was done to it, a column for each treatment."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('scans', type=Path, nargs='+')
    parser.add_argument('--model', default='default')
    parser.add_argument('--coarser', type=int, default=1, help='average blocks of so many voxels')
    parser.add_argument('--threads', type=int, default=1)
    args = parser.parse_args()
    model = load_model(args.model)
    rows = []
    for path in args.scans:
        image = coarser(load_image(path), args.coarser)
        truth = None
        for how in ('as it is', 'bias', 'noise'):
            rng = np.random.default_rng(0)
            data = corrupted(np.asanyarray(image.dataobj), how, rng).astype(np.float32)
            row = {'scan': path.name.split('.')[0], 'input': how}
            for name, options in TREATMENTS.items():
                treated = preprocess(nib.Nifti1Image(data, image.affine), **options)
                scan = (np.asanyarray(treated.dataobj), image.affine)
                labels = segment([scan], model, device='cpu', threads=args.threads).labels
                truth = labels if truth is None else truth
                row[name] = round(mean_overlap(labels, truth), 3)
            rows.append(row)
            print(row, flush=True)
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == '__main__':
    main()
