"""Where a person should look first: places of doubt, stray pieces and labels on the wrong side."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from babyseg_bids.labels import LabelTable
from babyseg_bids.qc import check_sides
from babyseg_bids.reports import wording as say

# Doubt is averaged over about this distance: along every border it is a thin and normal band.
DOUBT_MM = 3.0
# Two places that are closer show the same thing.
APART_MM = 14.0
# The smallest stray piece that is worth a look, mm3.
STRAY_MM3 = 40.0
PLACES = 8
STRAY_PLACES = 3


@dataclass(frozen=True)
class Place:
    """One place to look at: its voxel, its position in RAS mm, and why in words."""

    voxel: tuple[int, int, int]
    mm: tuple[float, float, float]
    structure: str
    color: str
    reason: str

    @property
    def text(self) -> str:
        """The position for people: `−12, 4, 33`."""
        # Rounded first: a format would write -0.4 as a zero with a sign.
        return ', '.join(say.number(float(round(v)) + 0.0, '.0f') for v in self.mm)


def _place(
    voxel: np.ndarray, number: int, reason: str, affine: np.ndarray, table: LabelTable
) -> Place:
    mm = (affine @ [*voxel, 1])[:3]
    row = table[number]
    return Place(
        tuple(int(v) for v in voxel),
        tuple(round(float(v), 1) for v in mm),
        say.sided_name(row),
        row.color,
        reason,
    )


def stray_pieces(
    labels: np.ndarray, affine: np.ndarray, table: LabelTable, /
) -> list[tuple[float, Place]]:
    """Pieces apart from the largest of their structure, the largest first, with their mm3.

    Pieces are 26-connected. The place is the voxel of the piece nearest to its centre.
    """
    unit = abs(float(np.linalg.det(affine[:3, :3])))
    boxes = ndimage.find_objects(np.clip(labels, 0, None).astype(np.int32))
    found = []
    for row in table.structures:
        box = boxes[row.index - 1] if row.index <= len(boxes) else None
        if box is None:
            continue
        pieces, _ = ndimage.label(labels[box] == row.index, np.ones((3, 3, 3), bool))
        sizes = np.bincount(pieces.ravel())
        sizes[0] = 0
        for piece in set(np.flatnonzero(sizes * unit >= STRAY_MM3)) - {int(sizes.argmax())}:
            voxels = np.argwhere(pieces == piece)
            middle = voxels[((voxels - voxels.mean(0)) ** 2).sum(1).argmin()]
            size = sizes[piece] * unit
            text = f'A piece of {size:.0f} mm³ apart from the rest of the structure'
            where = middle + [s.start for s in box]
            found.append((size, _place(where, row.index, text, affine, table)))
    return sorted(found, key=lambda pair: -pair[0])


def doubtful_places(
    labels: np.ndarray,
    uncertainty: np.ndarray,
    affine: np.ndarray,
    table: LabelTable,
    /,
    number: int = PLACES,
) -> list[Place]:
    """Peaks of the uncertainty inside the brain, averaged with a Gaussian of `DOUBT_MM`.

    Peaks are at least `APART_MM` from each other. The mean is over the brain alone: the Gaussian
    of the brain's uncertainty divided by the Gaussian of its mask.
    """
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    brain = (labels > 0) & np.isin(labels, table.indices)
    if not brain.any():
        return []
    # Averages vary slowly: every second or third millimetre has them all.
    step = tuple(slice(None, None, max(1, int(DOUBT_MM / 2 // z))) for z in zooms)
    steps = np.array([s.step for s in step])
    sigma = DOUBT_MM / (zooms * steps)
    inside = brain[step]
    share = ndimage.gaussian_filter(inside.astype(np.float32), sigma)
    doubt = np.where(inside, np.nan_to_num(uncertainty[step]), 0).astype(np.float32)
    mean = ndimage.gaussian_filter(doubt, sigma) / np.maximum(share, 1e-3)
    # Near the outer border the mean is over few voxels.
    mean[~inside | (share < 0.5)] = 0
    grid = np.argwhere(mean > 0)
    values = mean[tuple(grid.T)]
    order = np.argsort(-values, kind='stable')
    points = grid[order] * steps
    values = values[order]
    places: list[Place] = []
    free = np.ones(len(points), bool)
    while len(places) < number and free.any():
        first = int(free.argmax())
        voxel = points[first]
        text = f'Unsure: mean uncertainty {values[first]:.2f} around this place'
        places.append(_place(voxel, int(labels[tuple(voxel)]), text, affine, table))
        free &= (((points - voxel) * zooms) ** 2).sum(1) >= APART_MM**2
    return places


def misplaced_structures(
    labels: np.ndarray, affine: np.ndarray, table: LabelTable, /
) -> list[Place]:
    """The middle of each structure that lies mostly on the wrong side (see `qc.check_sides`)."""
    places = []
    for number in check_sides(labels, affine, table).structures:
        voxels = np.argwhere(labels == number)
        middle = voxels[((voxels - voxels.mean(0)) ** 2).sum(1).argmin()]
        text = 'Most of it lies beyond the midline, on the other side'
        places.append(_place(middle, number, text, affine, table))
    return places


def places_to_review(
    labels: np.ndarray, uncertainty: np.ndarray | None, affine: np.ndarray, table: LabelTable, /
) -> list[Place]:
    """What to look at first, at most `PLACES`: wrong sides, stray pieces, then peaks of doubt.

    Parameters
    ----------
    labels, uncertainty : (X, Y, Z) ndarray
        FreeSurfer numbers, and uncertainty from 0 to 1 or None.
    affine : (4, 4) ndarray
        Voxel to world, RAS mm.
    """
    places = misplaced_structures(labels, affine, table)[:PLACES]
    places += [place for _, place in stray_pieces(labels, affine, table)[:STRAY_PLACES]]
    if uncertainty is not None:
        places += doubtful_places(labels, uncertainty, affine, table)
    return places[:PLACES]
