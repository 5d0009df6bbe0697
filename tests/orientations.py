"""All orders and directions of axes, and a scan stored in one of them."""

import itertools

import nibabel as nib
import numpy as np

CODES = [
    ''.join(c) for p in itertools.permutations(('LR', 'PA', 'IS')) for c in itertools.product(*p)
]


def reorient(image, affine, codes):
    """The same image (X, Y, Z) and its affine with other axes."""
    transform = nib.orientations.ornt_transform(
        nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
    )
    picture = nib.Nifti1Image(image, affine).as_reoriented(transform)
    return np.asarray(picture.dataobj), picture.affine
