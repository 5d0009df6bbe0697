"""What the interactive viewer in a page shows: small volumes, and NiiVue to draw them.

The page opens from a lone file, so that all is inside it: NiiVue as `data/viewer/build.sh` bundles
it, and each volume as a gzipped NIfTI, both in base64.
"""

import base64
import gzip
import math
from functools import cache
from importlib.resources import files
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from babyseg_bids.labels import LabelTable
from babyseg_bids.reports.figures import Volume, grey_range
from babyseg_bids.reports.wording import sided_name

# More voxels make the page large; fewer hide the thalamus of a newborn.
MAX_VOXELS = 900_000
# Scans in the viewer besides the reference. Each adds about half a megabyte.
MAX_OTHERS = 2


@cache
def viewer_code() -> str:
    """NiiVue, gzipped and in base64."""
    packed = files('babyseg_bids').joinpath('data/viewer/niivue.js.gz').read_bytes()
    return base64.b64encode(packed).decode('ascii')


def coarse_grid(volume: Volume, /) -> tuple[np.ndarray, tuple[int, ...]]:
    """Voxel to world, and shape, of a grid over the volume with at most `MAX_VOXELS` voxels.

    Voxels are cubes of a multiple of 0.1 mm, and no smaller than the volume's.
    """
    zooms = volume.zooms
    extent = np.array(volume.labels.shape) * zooms
    size = max(float(zooms.max()), float((extent.prod() / MAX_VOXELS) ** (1 / 3)))
    tenths = math.ceil(size * 10 - 1e-6)
    while True:
        size = tenths / 10
        shape = tuple(int(n) for n in np.maximum(np.ceil(extent / size - 1e-6), 1))
        # Rounding up at the border may still give too many.
        if math.prod(shape) <= MAX_VOXELS:
            break
        tenths += 1
    affine = volume.affine.copy()
    affine[:3, :3] *= size / zooms
    # The first voxels of both grids share their outer corner.
    affine[:3, 3] += volume.affine[:3, :3] @ ((size / zooms - 1) / 2)
    return affine, shape


def _resample(
    array: np.ndarray, volume: Volume, grid: np.ndarray, shape: tuple, order: int
) -> Any:
    to_voxel = np.linalg.inv(volume.affine) @ grid
    if order:
        # Without smoothing, a coarser grid would show noise as structure.
        ratio = np.linalg.norm(to_voxel[:3, :3], axis=0)
        array = ndimage.gaussian_filter(array.astype(np.float32), 0.42 * np.maximum(ratio - 1, 0))
    return ndimage.affine_transform(
        array, to_voxel[:3, :3], to_voxel[:3, 3], shape, order=order, mode='nearest'
    )


def pack(array: np.ndarray, affine: np.ndarray, /) -> str:
    """A volume of uint8 as gzipped NIfTI in base64."""
    image = nib.Nifti1Image(array.astype(np.uint8), affine)
    image.header.set_xyzt_units('mm')
    # A fixed time makes the same page out of the same data.
    packed = gzip.compress(image.to_bytes(), 9, mtime=0)
    return base64.b64encode(packed).decode('ascii')


def viewer_data(volume: Volume, reference: str, table: LabelTable, /) -> dict[str, Any]:
    """The viewer's volumes and its list of structures, ready for JSON.

    Returns
    -------
    dict
        scans: names and volumes of uint8, reference first; labels: a volume of the places of the
        labels in `structures` (uint8, because FreeSurfer numbers of other models exceed it);
        uncertainty: a volume in percent, or None; structures: name, colour (r, g, b) each.
    """
    grid, shape = coarse_grid(volume)
    scans = []
    images = {reference: volume.image, **dict(list(volume.others.items())[:MAX_OTHERS])}
    for name, image in images.items():
        low, high = grey_range(image, volume.labels)
        grey = np.clip((_resample(image, volume, grid, shape, 1) - low) / (high - low), 0, 1)
        scans.append({'name': name, 'data': pack(np.rint(grey * 255), grid)})
    lut = np.zeros(int(max(table.indices.max(), volume.labels.max(initial=0))) + 1, np.uint8)
    for place, row in enumerate(table.structures, start=1):
        lut[row.index] = place
    labels = lut[_resample(volume.labels, volume, grid, shape, 0)]
    doubt = None
    if volume.uncertainty is not None:
        values = _resample(volume.uncertainty, volume, grid, shape, 1)
        # Steps of 2 %: finer ones double the size and are not seen.
        doubt = pack(np.where(labels > 0, np.rint(np.clip(values, 0, 1) * 50) * 2, 0), grid)
    return {
        'scans': scans,
        'labels': pack(labels, grid),
        'uncertainty': doubt,
        'structures': [{'name': sided_name(r), 'rgb': list(r.rgb)} for r in table.structures],
    }
