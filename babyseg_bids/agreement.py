"""Whether two scans show one brain, judged by a segmentation of each alone."""

from collections.abc import Callable
from functools import cache
from threading import Lock

import nibabel as nib
import numpy as np
from scipy import ndimage

from babyseg_bids.alignment_similarity import Volume, apply, coverage, head_volume
from babyseg_bids.network import Model, segment


def agreement(one: np.ndarray, other: np.ndarray, seen: np.ndarray, /) -> float:
    """Share of the voxels of either brain that have one label in both; 0 without any brain.

    Parameters
    ----------
    one, other : label maps of one shape
    seen : where both scans have data
    """
    brain = ((one > 0) | (other > 0)) & seen
    return float((one == other)[brain].mean()) if brain.any() else 0.0


class OwnSegmentations:
    """Agreement of the segmentations of a reference and of other scans, each made of one scan.

    Parameters
    ----------
    reference : 3-D image
    model : gives the model when it is needed for the first time
    device, threads : as for `segment`
    """

    def __init__(
        self,
        reference: nib.Nifti1Image,
        model: Callable[[], Model],
        /,
        *,
        device: str = 'auto',
        threads: int | None = None,
    ) -> None:
        # Scans may be aligned side by side; the network has memory for one at a time.
        self._lock = Lock()
        self._model = cache(model)
        self._options = {'device': device, 'threads': threads}
        self._fixed = cache(lambda: self._segmented(head_volume(reference, 'reference')))

    def _segmented(self, volume: Volume) -> tuple[Volume, np.ndarray]:
        scan = (volume.data, volume.affine)
        return volume, segment([scan], self._model(), **self._options).labels

    def agreement(self, moving: nib.Nifti1Image, matrix: np.ndarray, /) -> float:
        """Agreement of `moving` with the reference when `matrix` aligns it, 0..1."""
        head = head_volume(moving, 'other')
        with self._lock:
            fixed, labels = self._fixed()
        back = np.linalg.inv(matrix)
        pull = np.linalg.inv(head.affine) @ back @ fixed.affine
        shape = fixed.data.shape
        data = ndimage.affine_transform(head.data, pull, output_shape=shape, order=1)
        with self._lock:
            _, other = self._segmented(Volume(data, fixed.affine, fixed.mask, fixed.centre))
        points = apply(back @ fixed.affine, np.indices(shape).reshape(3, -1).T)
        return agreement(labels, other, coverage(moving)(points).reshape(shape))
