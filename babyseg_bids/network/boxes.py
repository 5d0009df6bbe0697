"""Boxes of voxels: parts of a volume, and the blocks that cover it."""

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

Box = tuple[slice, slice, slice]

# Blocks where memory is short: smallest side and overlap, voxels.
_SMALLEST = 64
_OVERLAP = 32
# A block that covers a mask is not divided below this many voxels along an axis.
_SHORTEST = 12


def box_around(mask: Tensor, /) -> Box | None:
    """Smallest box around a mask (*size); None if it is empty."""
    box = []
    for axis in range(3):
        first, second = (a for a in (2, 1, 0) if a != axis)
        used = mask.any(first).any(second).nonzero()
        if not len(used):
            return None
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    return tuple(box)  # type: ignore[return-value]


def shifted(box: Box, part: Box, /) -> Box:
    """Where a box of a part of a volume lies in the volume."""
    return tuple(  # type: ignore[return-value]
        slice(b.start + p.start, b.stop + p.start) for b, p in zip(box, part, strict=True)
    )


def scaled(box: Box, factor: int, /) -> Box:
    """The same box of a grid of so many times smaller voxels."""
    return tuple(slice(factor * s.start, factor * s.stop) for s in box)  # type: ignore[return-value]


def within(inner: Box, outer: Box, /) -> Box:
    """Where a box lies in a box that holds it."""
    return tuple(  # type: ignore[return-value]
        slice(i.start - o.start, i.stop - o.start) for i, o in zip(inner, outer, strict=True)
    )


def overlapping(size: Sequence[int], /, *, limit: int, multiple: int) -> Iterator[Box]:
    """Blocks of at most `limit` voxels (but at least `_SMALLEST` a side) that cover a volume."""
    length = list(size)
    while length[0] * length[1] * length[2] > limit:
        axis = max(range(3), key=length.__getitem__)
        shorter = max(_SMALLEST, multiple * int(0.75 * length[axis] / multiple))
        if shorter >= length[axis]:
            break
        length[axis] = shorter
    starts = []
    for n, width in zip(size, length, strict=True):
        step = max(multiple, (width - _OVERLAP) // multiple * multiple)
        first = list(range(0, n - width, step))
        starts.append([*first, n - width])
    for corner in product(*starts):
        yield tuple(slice(c, c + n) for c, n in zip(corner, length, strict=True))  # type: ignore[misc]


def ramp(block: Box, size: Sequence[int], /) -> Tensor:
    """Weights that rise from the block's inner faces over the overlap, and never reach zero."""
    weights = torch.ones(())
    for s, n in zip(block, size, strict=True):
        length = s.stop - s.start
        index = torch.arange(length, dtype=torch.float32)
        low = (index + 1) / _OVERLAP if s.start else torch.ones(length)
        high = (length - index) / _OVERLAP if s.stop < n else torch.ones(length)
        weights = weights[..., None] * torch.minimum(low, high).clamp_max(1)
    return weights


def covering(mask: Tensor, most: int, /) -> Iterator[Box]:
    """Blocks of at most so many voxels, as small as a mask (*size) that they cover allows."""
    waiting = [tuple(slice(0, n) for n in mask.shape)]
    while waiting:
        whole = waiting.pop()
        inner = box_around(mask[whole])
        if inner is None:
            continue
        box = shifted(inner, whole)
        lengths = [s.stop - s.start for s in box]
        longest = max(range(3), key=lengths.__getitem__)
        if lengths[0] * lengths[1] * lengths[2] > most and lengths[longest] > _SHORTEST:
            middle = box[longest].start + lengths[longest] // 2
            for half in (slice(middle, box[longest].stop), slice(box[longest].start, middle)):
                waiting.append((*box[:longest], half, *box[longest + 1 :]))
            continue
        yield box
