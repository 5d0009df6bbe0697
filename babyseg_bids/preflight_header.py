"""Judge the header of an image: grid, units, orientation."""

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.nifti1 import Nifti1Header
from nibabel.orientations import aff2axcodes

from babyseg_bids.records import Flag

# A newborn's head is about 90 mm wide and 120 mm long; a grid may be a slab of one, or a whole
# adult with neck. Anything beyond these bounds (mm) is a mistake of units.
MIN_VOXEL, MAX_VOXEL = 0.05, 15.0
MIN_FIELD, MAX_FIELD = 20.0, 800.0
MIN_VOXELS_AN_AXIS = 4
MAX_VOXELS = 2**31
# Below this (mm), a head does not fit.
WHOLE_HEAD_FIELD = 80.0
THICK_SLICE = 3.0
OBLIQUE_DEGREES = 10.0

_FORM_ANGLE_DEGREES = 2.0
_FORM_SHIFT = 5.0
_SIZE_TOLERANCE = 0.01
_SHEAR_TOLERANCE = 0.01


def spatial_shape(shape: tuple[int, ...], /) -> tuple[tuple[int, ...], str]:
    """Shape without trailing ones, and why it is no volume ('' when it is one).

    >>> spatial_shape((10, 10, 10, 1))
    ((10, 10, 10), '')
    """
    size = ' x '.join(str(n) for n in shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        return shape, f'it is a series of volumes ({size}), not one 3-D image'
    if len(shape) < 3 or min(shape) < 1:
        return shape, f'it is not a 3-D image ({size} voxels)'
    if 1 in shape:
        return shape, f'it is a single slice ({size} voxels), not a 3-D image'
    if min(shape) < MIN_VOXELS_AN_AXIS:
        return shape, f'it has too few slices ({size} voxels) to show a brain'
    if np.prod(shape, dtype=float) > MAX_VOXELS:
        return shape, f'its header claims {size} voxels, which cannot be; the header is damaged'
    return shape, ''


def type_problem(dtype: np.dtype, /) -> str:
    """Why voxels of this type are no image, '' when they are."""
    if dtype.fields is not None:
        return 'its voxels are colours (RGB), not measured intensities'
    if dtype.kind == 'c':
        return 'its voxels are complex numbers: save the magnitude'
    if dtype.kind not in 'fiu':
        return f'its voxels are of the type {dtype}, which is no number'
    return ''


def grid_problem(affine: np.ndarray, shape: tuple[int, ...], /) -> str:
    """Why a grid cannot be a head's, '' when it can."""
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        return (
            'its orientation matrix is singular, so the place of its voxels is not known; '
            'convert it again from DICOM'
        )
    zooms = voxel_sizes(affine)
    field = zooms * shape
    in_words = f'voxels of {_mm(zooms)}, a field of view of {_mm(field)}'
    if zooms.max() < MIN_VOXEL or field.max() < MIN_FIELD:
        return f'{in_words}: its sizes seem to be in metres or another unit than mm'
    if zooms.min() > MAX_VOXEL or field.min() > MAX_FIELD:
        return f'{in_words}: its sizes seem to be in micrometres or another unit than mm'
    if zooms.min() < MIN_VOXEL or zooms.max() > MAX_VOXEL:
        return f'{in_words}: a voxel size that no scan of a head has; correct the header'
    if field.min() < MIN_FIELD:
        return f'{in_words}: too little to show a brain, or a wrong unit'
    if field.max() > MAX_FIELD:
        return f'{in_words}: far more than a head, or a wrong unit'
    return ''


def grid_flags(
    affine: np.ndarray, shape: tuple[int, ...], header: Nifti1Header, name: str, /
) -> list[Flag]:
    """What is odd about a grid that can be used."""
    flags = []
    zooms = voxel_sizes(affine)
    field = zooms * shape
    written = np.asarray(header.get_zooms()[:3], float)
    unit = _length_unit(header)
    if unit not in ('mm', 'unknown'):
        message = f'{name}: the header says that lengths are in {unit}; {_mm(zooms)} was taken.'
        flags.append(Flag('voxel-unit', 'warning', message))
    if np.any(np.abs(written - zooms) > _SIZE_TOLERANCE * zooms):
        message = (
            f'{name}: the voxel size is {_mm(written)} in pixdim but {_mm(zooms)} in the '
            'orientation matrix; the matrix was used.'
        )
        flags.append(Flag('voxel-size-contradiction', 'warning', message))
    if round(float(zooms.max()), 2) > THICK_SLICE:
        message = f'{name}: thick slices ({_mm(zooms)}); small structures will be less certain.'
        flags.append(Flag('thick-slices', 'info', message))
    if field.min() < WHOLE_HEAD_FIELD:
        message = f'{name}: the field of view is {_mm(field)}; the head may be cut off.'
        flags.append(Flag('small-field-of-view', 'warning', message))
    axes = affine[:3, :3] / zooms
    if np.abs(axes.T @ axes - np.eye(3)).max() > _SHEAR_TOLERANCE:
        message = f'{name}: its axes are not at right angles (a sheared matrix).'
        flags.append(Flag('sheared', 'warning', message))
    angle = oblique_degrees(affine)
    if angle > OBLIQUE_DEGREES:
        message = f'{name}: its axes are turned by {angle:.0f} degrees against the scanner.'
        flags.append(Flag('oblique', 'info', message))
    return flags


def form_flags(
    header: Nifti1Header, affine: np.ndarray, shape: tuple[int, ...], name: str, /
) -> list[Flag]:
    """Whether left and right are known: sform and qform, and how they agree."""
    sform, s_code = header.get_sform(coded=True)
    qform, q_code = header.get_qform(coded=True)
    if not s_code and not q_code:
        message = (
            f'{name}: the header has neither sform nor qform, so left and right are not known; '
            f'{"".join(str(c) for c in aff2axcodes(affine))} was assumed. Convert it again from '
            'DICOM, or compare the sides by eye.'
        )
        return [Flag('no-orientation', 'severe', message)]
    if sform is None or qform is None or abs(np.linalg.det(qform[:3, :3])) < 1e-12:
        return []
    s_axes, q_axes = (f[:3, :3] / voxel_sizes(f) for f in (sform, qform))
    s_codes, q_codes = (''.join(str(c) for c in aff2axcodes(f)) for f in (sform, qform))
    if np.linalg.det(s_axes) * np.linalg.det(q_axes) < 0:
        message = (
            f'{name}: sform ({s_codes}) and qform ({q_codes}) are mirror images: left and right '
            'contradict each other. The sform was used; compare the sides by eye.'
        )
        return [Flag('left-right-contradiction', 'severe', message)]
    if s_codes != q_codes:
        message = (
            f'{name}: sform ({s_codes}) and qform ({q_codes}) name different axes. '
            'The sform was used.'
        )
        return [Flag('orientation-contradiction', 'warning', message)]
    cosine = (np.trace(s_axes.T @ q_axes) - 1) / 2
    angle = float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
    centre = np.array([*(np.array(shape) - 1) / 2, 1])
    shift = float(np.linalg.norm((sform - qform) @ centre))
    if angle > _FORM_ANGLE_DEGREES or shift > _FORM_SHIFT:
        message = (
            f'{name}: sform and qform differ by {angle:.0f} degrees and {shift:.0f} mm. '
            'The sform was used.'
        )
        return [Flag('sform-qform-differ', 'info', message)]
    return []


def oblique_degrees(affine: np.ndarray, /) -> float:
    """Largest angle between an axis of the grid and the nearest axis of the world, in degrees."""
    axes = np.abs(affine[:3, :3] / voxel_sizes(affine))
    return float(np.degrees(np.arccos(np.clip(axes.max(0), 0, 1))).max())


def _length_unit(header: Nifti1Header) -> str:
    """Unit of length in the header; a code that NIfTI does not know counts as unknown."""
    try:
        return header.get_xyzt_units()[0]
    except KeyError:
        return 'unknown'


def _mm(sizes: np.ndarray) -> str:
    return ' x '.join(f'{float(s):.3g}' for s in sizes) + ' mm'
