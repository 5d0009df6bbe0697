"""Optional treatment of scans before the network sees them: bias correction and denoising.

Both are off unless asked for: the network was trained on uneven and noisy images.
"""

from typing import Literal

import nibabel as nib
import numpy as np
from scipy import ndimage

from babyseg_bids.registration import ants_image, deterministic_ants

BiasCorrection = Literal['none', 'n4']
BIAS_CORRECTIONS: tuple[BiasCorrection, ...] = ('none', 'n4')
# The field is smooth: N4 looks at voxels of about this edge length.
FIELD_MM = 4.0
N4_ITERATIONS = 50
N4_LEVELS = 4


def preprocess(
    image: nib.Nifti1Image, /, *, bias_correction: BiasCorrection = 'none', denoise: bool = False
) -> nib.Nifti1Image:
    """A scan without its bias field (N4, Tustison et al. 2010) or noise, on the same grid.

    Denoising comes first, since N4 multiplies noise, too. It is the adaptive non-local means of
    Manjón et al. (2010) for Rician noise. What is 0 stays 0.

    Parameters
    ----------
    image : 3-D
    """
    if bias_correction == 'none' and not denoise:
        return image
    data = np.asanyarray(image.dataobj, dtype=np.float32)
    found = ndimage.find_objects((data > 0).astype(np.uint8))
    if not found:
        return image
    box = found[0]
    zooms = np.linalg.norm(image.affine[:3, :3], axis=0)
    # Both look at neighbours only; where the scan lies in the world does not matter.
    grid = np.diag([*zooms, 1.0])
    with deterministic_ants(0) as ants:
        part = ants_image(ants, data[box], grid)
        mask = ants_image(ants, data[box] > 0, grid)
        if denoise:
            part = ants.denoise_image(part, mask=mask, noise_model='Rician')
        if bias_correction == 'n4':
            part = ants.n4_bias_field_correction(
                part,
                mask=mask,
                shrink_factor=max(1, round(FIELD_MM / float(zooms.max()))),
                convergence={'iters': [N4_ITERATIONS] * N4_LEVELS, 'tol': 1e-6},
            )
        treated = part.numpy()
    out = data.copy()
    out[box] = np.where(data[box] > 0, np.maximum(treated, 0), data[box])
    return nib.Nifti1Image(out, image.affine)
