"""Read an image's voxels once, from start to end, a few slices at a time, and sum them up."""

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

# About this much is held at a time (a 0.2 mm scan has a gigabyte of voxels).
CHUNK_BYTES = 8 * 1024 * 1024
_SAMPLES_PER_CHUNK = 4096
_FEW_VALUES = 3


class UnreadableVoxelsError(Exception):
    """The voxels cannot be read; the message is a reason in lower case."""


@dataclass(frozen=True)
class VoxelSummary:
    """What the voxels of an image are like.

    Attributes
    ----------
    minimum, maximum : float
        Of the finite values, scaled as the header says.
    nan, infinite, negative : float
        Fractions of the voxels.
    nonzero : float
        Fraction of the voxels that are neither zero nor NaN or infinite.
    box : tuple of (int, int)
        First and last index along each axis of the voxels that are not zero; empty without any.
    few_values : bool
        A sample of the voxels holds three different values or fewer, as a mask does.
    digest, outline : str
        Checksums of all voxels, and of which voxels are not zero ('' where nearly all are).
    surplus : bool
        The file goes on behind the last voxel.
    """

    minimum: float
    maximum: float
    nan: float
    infinite: float
    negative: float
    nonzero: float
    box: tuple[tuple[int, int], ...]
    few_values: bool
    digest: str
    outline: str
    surplus: bool


class _Summing:
    """Running sums over slabs of slices."""

    def __init__(self, shape: tuple[int, int, int], zero: float | None) -> None:
        self.shape = shape
        self.zero = zero
        self.minimum, self.maximum = math.inf, -math.inf
        self.nan = self.infinite = self.nonzero = self.below = 0
        self.used = [np.zeros(n, bool) for n in shape]
        self.digest = self.outline = zlib.crc32(repr(shape).encode())
        self.values: set[float] = set()

    def add(self, slab: np.ndarray, start: int) -> None:
        """Add slices `slab` (slices, Y, X), the first of which is number `start`."""
        self.digest = zlib.crc32(slab.data, self.digest)
        if slab.dtype.kind == 'f':
            good = np.isfinite(slab)
            bad = slab.size - int(good.sum())
            if bad:
                nans = int(np.isnan(slab).sum())
                self.nan += nans
                self.infinite += bad - nans
                if bad == slab.size:
                    return
                finite = slab[good]
            else:
                finite = slab
        else:
            good, bad, finite = None, 0, slab
        self.minimum = min(self.minimum, float(finite.min()))
        self.maximum = max(self.maximum, float(finite.max()))
        filled = slab != self.zero if self.zero is not None else np.ones(slab.shape, bool)
        if self.zero is not None and slab.dtype.kind != 'u':
            self.below += int((finite < self.zero).sum())
        if bad:
            filled &= good
        self.nonzero += int(np.count_nonzero(filled))
        self.used[0] |= filled.any((0, 1))
        self.used[1] |= filled.any((0, 2))
        self.used[2][start : start + len(slab)] |= filled.any((1, 2))
        self.outline = zlib.crc32(np.packbits(filled).data, self.outline)
        if len(self.values) <= _FEW_VALUES:
            step = max(finite.size // _SAMPLES_PER_CHUNK, 1)
            self.values.update(np.unique(finite.reshape(-1)[::step])[: _FEW_VALUES + 1].tolist())


def summarise_voxels(
    path: Path,
    shape: tuple[int, int, int],
    dtype: np.dtype,
    offset: int,
    *,
    slope: float = 1.0,
    intercept: float = 0.0,
) -> VoxelSummary:
    """Read all voxels of a NIfTI file.

    Parameters
    ----------
    path : Path
        .nii or .nii.gz.
    shape, dtype, offset
        Grid, type on disk and first byte of the voxels.
    slope, intercept : float
        Scaling of the header.

    Raises
    ------
    UnreadableVoxelsError
        The file ends too early, or its compressed data are damaged.
    """
    # Where the scaled value is zero; an unsigned integer may have no such number.
    zero: float | None = -intercept / slope
    if dtype.kind in 'iu':
        limits = np.iinfo(dtype)
        zero = round(-intercept / slope)
        if not limits.min <= zero <= limits.max:
            zero = None
    sums = _Summing(shape, zero)
    try:
        with _open(path) as f, np.errstate(all='ignore'):
            _skip(f, offset)
            plane = shape[0] * shape[1] * dtype.itemsize
            step = max(1, CHUNK_BYTES // plane)
            for start in range(0, shape[2], step):
                count = min(step, shape[2] - start)
                slab = np.frombuffer(_read(f, count * plane), dtype)
                sums.add(slab.reshape(count, shape[1], shape[0]), start)
            # Reading past the end also verifies the checksum of a compressed file.
            surplus = bool(f.read(1))
    except EOFError as e:
        reason = 'it is truncated: its voxels end too early; copy it again from its source'
        raise UnreadableVoxelsError(reason) from e
    except (OSError, zlib.error) as e:
        reason = f'its compressed content is damaged ({e}); copy it again from its source'
        raise UnreadableVoxelsError(reason) from e
    return _summary(sums, slope, intercept, surplus)


def _open(path: Path) -> BinaryIO:
    if path.name.endswith('.gz'):
        return gzip.open(path, 'rb')  # type: ignore[return-value]
    return path.open('rb')


def _skip(f: BinaryIO, count: int) -> None:
    while count > 0:
        count -= len(_read(f, min(count, CHUNK_BYTES)))


def _read(f: BinaryIO, count: int) -> bytes:
    """Exactly `count` bytes, or EOFError."""
    parts = []
    while count:
        part = f.read(min(count, CHUNK_BYTES))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b''.join(parts)


def _summary(sums: _Summing, slope: float, intercept: float, surplus: bool) -> VoxelSummary:
    size = math.prod(sums.shape)
    ends = sorted(v * slope + intercept for v in (sums.minimum, sums.maximum))
    box = []
    for used in sums.used:
        filled = np.flatnonzero(used)
        if len(filled):
            box.append((int(filled[0]), int(filled[-1])))
    nonzero = sums.nonzero / size
    finite = size - sums.nan - sums.infinite
    negative = sums.below if slope > 0 else sums.nonzero - sums.below
    return VoxelSummary(
        minimum=ends[0],
        maximum=ends[1],
        nan=sums.nan / size,
        infinite=sums.infinite / size,
        negative=negative / size if finite and ends[0] < 0 else 0.0,
        nonzero=nonzero,
        box=tuple(box) if len(box) == len(sums.shape) else (),
        few_values=len(sums.values) <= _FEW_VALUES,
        digest=f'{sums.digest:08x}',
        # An image with noise everywhere has no outline.
        outline=f'{sums.outline:08x}-{sums.nonzero}' if 0.001 < nonzero < 0.9 else '',
        surplus=surplus,
    )
