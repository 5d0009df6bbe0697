"""Look at an image before it is used: can it be read, and can it be a head?

One bad image must never stop a session that has a good one, so nothing here raises for what a file
holds: `check_image` gives a verdict with its reason.
"""

import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.imageglobals import logger as nibabel_logger
from nibabel.orientations import aff2axcodes
from nibabel.spatialimages import HeaderDataError

from babyseg_bids.errors import InputError
from babyseg_bids.files import file_problem
from babyseg_bids.preflight_header import (
    WHOLE_HEAD_FIELD,
    form_flags,
    grid_flags,
    grid_problem,
    oblique_degrees,
    spatial_shape,
    type_problem,
)
from babyseg_bids.preflight_voxels import (
    UnreadableVoxelsError,
    VoxelSummary,
    summarise_voxels,
)
from babyseg_bids.records import Flag

# What nibabel and numpy raise for damaged headers and contents.
READ_ERRORS = (
    OSError,
    EOFError,
    zlib.error,
    ImageFileError,
    HeaderDataError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    ArithmeticError,
    MemoryError,
    np.linalg.LinAlgError,
)
_GZIP_START = b'\x1f\x8b'
_NEGATIVE_FRACTION = 0.01
_SPARSE_EXTENT = 30.0
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class ImageCheck:
    """The verdict on one image.

    Attributes
    ----------
    ok : bool
        Whether it can be used.
    reason : str
        Why not, in lower case and without the file's name; '' when it can.
    flags : tuple of Flag
        What a person should know although it can be used.
    shape : tuple of int
        Grid without trailing ones.
    zooms : tuple of float
        Voxel size in mm.
    orientation : str
        Where the axes point to, such as `RAS`.
    dtype : str
        Type of the voxels on disk.
    oblique : float
        Angle of the grid against the axes of the world, in degrees.
    minimum, maximum : float
        Of the finite values, scaled as the header says.
    complete : bool
        Whether a whole head fits into the field of view.
    digest, outline : str
        Checksums of the voxels, and of which of them are not zero ('' where nearly all are).
    """

    ok: bool
    reason: str = ''
    flags: tuple[Flag, ...] = ()
    shape: tuple[int, ...] = ()
    zooms: tuple[float, ...] = ()
    orientation: str = ''
    dtype: str = ''
    oblique: float = 0.0
    minimum: float = 0.0
    maximum: float = 0.0
    complete: bool = False
    digest: str = ''
    outline: str = ''


def check_image(path: Path | str, /) -> ImageCheck:
    """Judge one image by its file, its header and its voxels, which are read once.

    Parameters
    ----------
    path : Path
        .nii or .nii.gz.

    Returns
    -------
    ImageCheck
        Never raises for what the file holds. Memory stays at a few slices.
    """
    path = Path(path)
    problem = file_problem(path) or _packing_problem(path)
    if problem:
        return ImageCheck(False, problem)
    try:
        with _listening() as repairs, np.errstate(all='ignore'):
            return _check(path, repairs)
    except UnreadableVoxelsError as e:
        return ImageCheck(False, str(e))
    except READ_ERRORS as e:
        return ImageCheck(False, _unreadable(e))


def load_image(path: Path | str, /) -> nib.Nifti1Image:
    """Load an image for processing: 3-D, float32, finite (NaN and infinity become 0).

    The affine is that of the file; so are the codes of sform and qform where the file has any.

    Raises
    ------
    InputError
        The image cannot be read or is no 3-D image; the sentence names the file.
    """
    path = Path(path)
    problem = file_problem(path) or _packing_problem(path)
    if problem:
        raise InputError(f'{path}: {problem}.')
    try:
        with _listening(), np.errstate(all='ignore'):
            image = nib.load(path)
            if not isinstance(image, nib.Nifti1Pair):
                raise InputError(f'{path}: it is not in NIfTI format.')
            shape, problem = spatial_shape(image.shape)
            problem = problem or type_problem(image.get_data_dtype())
            if problem:
                raise InputError(f'{path}: {problem}.')
            data = image.get_fdata(dtype=np.float32, caching='unchanged').reshape(shape)
            if isinstance(data, np.memmap):
                data = np.array(data)
            np.nan_to_num(data, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
            return _with_forms(data, image)
    except READ_ERRORS as e:
        raise InputError(f'{path}: {_unreadable(e)}.') from e


def voxel_count(path: Path | str, /) -> int:
    """Voxels of an image that was checked before, from its header; 0 when it has gone since."""
    try:
        with _listening():
            image: Any = nib.load(path)
            return int(np.prod(image.shape))
    except READ_ERRORS:
        return 0


def _with_forms(data: np.ndarray, image: nib.Nifti1Pair) -> nib.Nifti1Image:
    """A new image on the same grid: a clean header with the affine, units and form codes."""
    result = nib.Nifti1Image(data, image.affine)
    header = image.header
    s_code, q_code = int(header['sform_code']), int(header['qform_code'])
    result.set_sform(image.affine, s_code or q_code or 1)
    result.set_qform(image.affine, q_code or s_code or 1)
    # A qform cannot hold a shear; the affine must stay that of the file.
    result.set_sform(image.affine, s_code or q_code or 1, update_affine=True)
    result.header.set_xyzt_units('mm')
    return result


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def _listening() -> Iterator[list[str]]:
    """Collect what nibabel says of headers that it repairs, instead of letting it print."""
    collector = _Collector()
    handlers, propagate = nibabel_logger.handlers[:], nibabel_logger.propagate
    nibabel_logger.handlers[:], nibabel_logger.propagate = [collector], False
    try:
        yield collector.messages
    finally:
        nibabel_logger.handlers[:], nibabel_logger.propagate = handlers, propagate


def _check(path: Path, repairs: list[str]) -> ImageCheck:
    image = nib.load(path)
    if not isinstance(image, nib.Nifti1Pair):
        return ImageCheck(False, 'it is not in NIfTI format')
    header, affine = image.header, image.affine
    shape, problem = spatial_shape(image.shape)
    dtype = image.get_data_dtype()
    problem = problem or type_problem(dtype) or grid_problem(affine, shape)
    proxy: Any = image.dataobj
    slope, intercept = float(proxy.slope), float(proxy.inter)
    if not problem and not (np.isfinite(slope) and slope and np.isfinite(intercept)):
        problem = f'its scaling (slope {slope}, intercept {intercept}) is no number'
    if problem:
        return ImageCheck(False, problem, shape=shape, dtype=str(dtype))
    voxels = summarise_voxels(
        path,
        (shape[0], shape[1], shape[2]),
        dtype,
        int(proxy.offset),
        slope=slope,
        intercept=intercept,
    )
    zooms = voxel_sizes(affine)
    name = path.name
    # SPM's alignment of the offset concerns no reader.
    odd = [m for m in dict.fromkeys(repairs) if 'SPM' not in m]
    flags = [
        *(Flag('header-repaired', 'warning', f'{name}: odd header: {m}.') for m in odd),
        *form_flags(header, affine, shape, name),
        *grid_flags(affine, shape, header, name),
        *_voxel_flags(voxels, zooms, name),
    ]
    reason = _voxel_problem(voxels)
    return ImageCheck(
        ok=not reason,
        reason=reason,
        flags=() if reason else tuple(flags),
        shape=shape,
        zooms=tuple(round(float(z), 6) for z in zooms),
        orientation=''.join(str(c) for c in aff2axcodes(affine)),
        dtype=str(dtype),
        oblique=oblique_degrees(affine),
        minimum=voxels.minimum,
        maximum=voxels.maximum,
        complete=bool((zooms * shape).min() >= WHOLE_HEAD_FIELD),
        digest=voxels.digest,
        outline=voxels.outline,
    )


def _voxel_problem(voxels: VoxelSummary) -> str:
    """Why the voxels are no image, '' when they are."""
    if voxels.nan + voxels.infinite == 1:
        return 'none of its voxels holds a number (all NaN or infinite)'
    if voxels.minimum == voxels.maximum:
        if voxels.minimum == 0:
            return 'all of its voxels are zero'
        return f'all of its voxels have the same value ({voxels.minimum:.4g})'
    largest = max(abs(voxels.minimum), abs(voxels.maximum))
    if not largest <= _FLOAT32_MAX:
        return 'its values are too large to be intensities; its scaling is wrong'
    return ''


def _voxel_flags(voxels: VoxelSummary, zooms: np.ndarray, name: str) -> list[Flag]:
    """What is odd about voxels that can be used."""
    flags = []
    for fraction, what in ((voxels.nan, 'NaN'), (voxels.infinite, 'infinite')):
        if fraction:
            message = f'{name}: {_percent(fraction)} of the voxels are {what}; 0 was put there.'
            flags.append(Flag('not-finite', 'warning', message))
    if voxels.negative > _NEGATIVE_FRACTION:
        message = f'{name}: {_percent(voxels.negative)} of the voxels are negative.'
        flags.append(Flag('negative-values', 'info', message))
    if voxels.few_values:
        message = f'{name}: nearly all voxels share a few values, as in a mask; is it a scan?'
        flags.append(Flag('few-values', 'warning', message))
    if voxels.box:
        extent = np.array([last - first + 1 for first, last in voxels.box]) * zooms
        if extent.min() < _SPARSE_EXTENT:
            size = ' x '.join(f'{e:.0f}' for e in extent)
            message = f'{name}: only {size} mm of it are not empty.'
            flags.append(Flag('nearly-empty', 'warning', message))
    if voxels.surplus:
        message = f'{name}: the file goes on behind its last voxel; the header may be wrong.'
        flags.append(Flag('surplus-data', 'warning', message))
    return flags


def _packing_problem(path: Path) -> str:
    """Whether compression and file name disagree."""
    try:
        with path.open('rb') as f:
            start = f.read(2)
    except OSError as e:
        return f'it could not be read ({e.strerror or e})'
    packed = start == _GZIP_START
    if path.name.endswith('.gz') and not packed:
        return 'it is not compressed although its name ends in .gz, or it is damaged'
    if path.name.endswith('.nii') and packed:
        return 'it is compressed although its name does not end in .gz: rename it to .nii.gz'
    return ''


def _unreadable(error: BaseException) -> str:
    """A reason from an exception of nibabel or numpy."""
    if isinstance(error, ImageFileError):
        return 'it is not in NIfTI format'
    if isinstance(error, EOFError):
        return 'it is truncated; copy it again from its source'
    if isinstance(error, MemoryError):
        return 'it does not fit into memory'
    if isinstance(error, OSError | zlib.error):
        return f'its content is damaged ({error}); copy it again from its source'
    return f'its header is damaged ({error})'


def _percent(fraction: float) -> str:
    return f'{100 * fraction:.2g} %' if fraction >= 0.0001 else 'less than 0.01 %'
