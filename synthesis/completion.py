"""Make whole label maps of maps that only know tissues, such as those of fetal atlases.

Which structure a voxel of deep grey matter belongs to, and on which side white matter lies, is the
model's own judgement of clean images drawn from the tissues; where a tissue ends is never changed.
"""

from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from babyseg_bids.errors import InputError
from babyseg_bids.labels import label_table
from babyseg_bids.network.inference import segment
from babyseg_bids.network.weights import Model
from babyseg_bids.synthesis.maps import CSF

_MEDIAL = (17, 18, 53, 54)
_DEEP = tuple(
    r.index for r in label_table().structures if r.tissue == 'deep-grey' and r.index not in _MEDIAL
)
# Labels that a voxel of each tissue may get (FreeSurfer numbers). Atlases draw hippocampus and
# amygdala half as white matter, half as cortex, the internal capsule as deep grey matter, and
# much of the ventral diencephalon as brainstem. Tissues are numbered as in the fetal atlas of
# Fidon et al. (Open Research Europe 2021).
PERMITTED = {
    1: (2, 41, *_MEDIAL),
    2: (4, 43, 14, 15),
    3: (8, 47),
    4: (CSF,),
    5: (3, 42, *_MEDIAL),
    6: (*_DEEP, 2, 41),
    7: (16, 28, 60),
    8: (2, 41),
}
AROUND = 4
# What the tissues 1 to 8 look like in T2w and T1w of newborns and in T1w of older children.
_CONTRASTS = (
    (0.70, 1.00, 0.45, 0, 0.45, 0.50, 0.50, 0.70),
    (0.40, 0.10, 0.55, 0, 0.55, 0.55, 0.50, 0.40),
    (0.90, 0.10, 0.65, 0, 0.60, 0.70, 0.85, 0.90),
)
# Deviation of the Gaussian that makes borders as soft as those of scans, mm.
_BLUR = 0.5
# Probability below which the nearest voxel of the same tissue decides.
_NONE = 0.01


def complete(path: Path, /, model: Model) -> nib.Nifti1Image:
    """Label map in FreeSurfer's numbers of a map of the tissues 1 to 8 (see `PERMITTED`).

    Raises
    ------
    InputError
        If the file cannot be read, is not 3-D or holds other numbers, or the model sees nothing of
        a tissue.
    """
    try:
        image = nib.squeeze_image(nib.load(path))
        tissues = np.asarray(image.dataobj).round().astype(np.int16)
    except (OSError, nib.filebasedimages.ImageFileError, EOFError) as e:
        raise InputError(f'{path} cannot be read as a map of tissues: {e}') from e
    unknown = np.setdiff1d(tissues, [0, *PERMITTED])
    if tissues.ndim != 3 or unknown.size or not tissues.any():
        raise InputError(
            f'{path} is no map of tissues: it must be 3-D and hold the numbers 1 to '
            f'{max(PERMITTED)}, and has the shape {tissues.shape} and {np.unique(tissues)[:20]}.'
        )
    sigma = _BLUR / np.array(image.header.get_zooms()[:3])
    scans = []
    for levels in _CONTRASTS:
        drawn = np.array([0, *levels], np.float32)[tissues]
        scans.append((ndimage.gaussian_filter(drawn, sigma), image.affine))
    found = segment(scans, model, keep_probabilities=True)
    try:
        labels = restrict(tissues, found.probabilities, model.labels.indices)
    except InputError as e:
        raise InputError(f'{path}: {e}') from e
    return nib.Nifti1Image(labels, image.affine)


def restrict(tissues: np.ndarray, probabilities: np.ndarray, numbers: np.ndarray, /) -> np.ndarray:
    """The likeliest label (X, Y, Z) int16 of each voxel that its tissue permits.

    Parameters
    ----------
    tissues : (X, Y, Z), keys of `PERMITTED`, 0 for none
    probabilities : (X, Y, Z, C)
    numbers : (C,), FreeSurfer number of each channel

    Raises
    ------
    InputError
        If no voxel of a tissue has a permitted label of any probability.
    """
    out = np.zeros(tissues.shape, np.int16)
    for tissue, permitted in PERMITTED.items():
        where = tissues == tissue
        if tissue == AROUND:
            out[where] = CSF
        if tissue == AROUND or not where.any():
            continue
        channels = np.flatnonzero(np.isin(numbers, permitted))
        theirs = probabilities[where][:, channels]
        sure = np.zeros(tissues.shape, bool)
        sure[where] = theirs.max(1) >= _NONE
        out[where] = numbers[channels][theirs.argmax(1)]
        if not sure.any():
            raise InputError(
                f'the model finds nothing where tissue {tissue} is; check the numbers.'
            )
        nearest = ndimage.distance_transform_edt(
            ~sure, return_distances=False, return_indices=True
        )
        out[where] = out[tuple(nearest)][where]
    return out
