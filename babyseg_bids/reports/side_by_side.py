"""Label maps of one child's sessions side by side, in one aligned view and at one scale."""

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from babyseg_bids.labels import LabelTable, label_table
from babyseg_bids.qc import FRONT_BACK, TOP_BOTTOM, mean_direction
from babyseg_bids.reports.figures import smooth_labels

# What is shown around the brains, and the largest half width of a slice, mm.
MARGIN_MM = 4
MAX_HALF_MM = 120
# Slices are cut once a millimetre and enlarged with smooth borders.
PIXELS_PER_MM = 2
# Fewer structures do not fix a head's position.
FEWEST = 6

# World axes that run to the right and upwards in each plane.
PLANES = ((0, 1), (0, 2), (1, 2))


def structure_centres(
    labels: np.ndarray, affine: np.ndarray, table: LabelTable | None = None
) -> dict[int, np.ndarray]:
    """Centre of each structure in the world, mm, by FreeSurfer number."""
    table = table or label_table()
    boxes = ndimage.find_objects(np.clip(labels, 0, None).astype(np.int32))
    matrix = np.asarray(affine, float)
    centres = {}
    for row in table.structures:
        box = boxes[row.index - 1] if row.index <= len(boxes) else None
        if box is not None:
            voxel = np.argwhere(labels[box] == row.index).mean(0) + [s.start for s in box]
            centres[row.index] = matrix[:3, :3] @ voxel + matrix[:3, 3]
    return centres


def rigid_between(source: np.ndarray, target: np.ndarray, /) -> np.ndarray:
    """Rotation and translation, (4, 4), that take points (N, 3) closest to others (N, 3).

    The least-squares solution of Kabsch (Acta Cryst A 1976); it neither scales nor mirrors, so
    that growth and mistaken sides remain visible.
    """
    a, b = source.mean(0), target.mean(0)
    u, _, vt = np.linalg.svd((source - a).T @ (target - b))
    flip = np.diag([1.0, 1.0, np.sign(np.linalg.det(vt.T @ u.T))])
    out = np.eye(4)
    out[:3, :3] = vt.T @ flip @ u.T
    out[:3, 3] = b - out[:3, :3] @ a
    return out


def upright(centres: Mapping[int, np.ndarray], /) -> np.ndarray:
    """Rotation by quarter turns, (3, 3), after which right, front and top are x, y and z.

    The front and the top are told by the structures, as the header may be wrong about them.
    Quarter turns leave a head that lies a little oblique as it lies. The identity where too few
    structures are known.
    """
    front = mean_direction(centres, FRONT_BACK)
    top = mean_direction(centres, TOP_BOTTOM)
    body = np.array([np.cross(front, top), front, top])
    if not np.isfinite(body).all():
        return np.eye(3)
    turns = [
        np.eye(3)[list(order)] * np.array(signs)[:, None]
        for order in itertools.permutations(range(3))
        for signs in itertools.product((1, -1), repeat=3)
    ]
    proper = [t for t in turns if np.linalg.det(t) > 0]
    return max(proper, key=lambda turn: float((turn * body).sum()))


def _half_widths(maps: Sequence[tuple[np.ndarray, np.ndarray]], middle: np.ndarray) -> np.ndarray:
    """How far the labels reach from a point along each axis of the world, whole mm."""
    half = np.zeros(3)
    for labels, affine in maps:
        points = np.argwhere(labels > 0) @ affine[:3, :3].T + affine[:3, 3]
        # Half a voxel more: the points are the voxels' centres.
        reach = np.abs(points - middle).max(axis=0, initial=0)
        half = np.maximum(half, reach + np.abs(affine[:3, :3]).max() / 2)
    return np.minimum(np.ceil(half) + MARGIN_MM, MAX_HALF_MM).astype(int)


def _slice(
    labels: np.ndarray, affine: np.ndarray, middle: np.ndarray, plane: tuple[int, int], half: Any
) -> np.ndarray:
    """Labels in one plane through a point, rows from top to bottom, smoothly enlarged."""
    across, up = plane
    right = np.arange(-half[across], half[across] + 1)
    upwards = np.arange(half[up], -half[up] - 1, -1)
    points = np.broadcast_to(middle, (len(upwards), len(right), 3)).copy()
    points[..., across] += right[None, :]
    points[..., up] += upwards[:, None]
    to_voxel = np.linalg.inv(affine)
    voxels = points @ to_voxel[:3, :3].T + to_voxel[:3, 3]
    found = ndimage.map_coordinates(labels, np.moveaxis(voxels, -1, 0), order=0, cval=0)
    return smooth_labels(found, (len(right) * PIXELS_PER_MM, len(upwards) * PIXELS_PER_MM))


def _strip(tiles: Sequence[np.ndarray], lut: np.ndarray) -> str:
    """Slices beside each other, as a PNG picture in a `data:` address."""
    height = max(len(tile) for tile in tiles)
    centred = []
    for tile in tiles:
        above = (height - len(tile)) // 2
        centred.append(np.pad(tile, ((above, height - len(tile) - above), (0, 0))))
    stream = io.BytesIO()
    Image.fromarray(lut[np.hstack(centred)]).quantize(64).save(stream, 'PNG', optimize=True)
    return 'data:image/png;base64,' + base64.b64encode(stream.getvalue()).decode()


def aligned_pictures(
    maps: Sequence[tuple[np.ndarray, np.ndarray]], /, table: LabelTable | None = None
) -> list[str]:
    """One picture a session: axial, coronal and sagittal slices of its label map.

    The first head is turned upright by its own structures. Each other one is moved and turned,
    not scaled, onto it by the centres of its structures. All share one scale.

    Parameters
    ----------
    maps : label map (X, Y, Z) and affine (4, 4) of each session

    Returns
    -------
    PNG pictures as `data:` addresses; empty for a session with too few structures.
    """
    table = table or label_table()
    lut = np.zeros((int(table.indices.max()) + 1, 3), np.uint8)
    for row in table.structures:
        lut[row.index] = row.rgb
    centres = [structure_centres(labels, affine, table) for labels, affine in maps]
    first = next((c for c in centres if len(c) >= FEWEST), {})
    turn = upright(first)
    first = {number: turn @ centre for number, centre in first.items()}
    moved: list[tuple[np.ndarray, np.ndarray] | None] = []
    for (labels, affine), here in zip(maps, centres, strict=True):
        common = sorted(set(here) & set(first))
        if len(common) < FEWEST:
            moved.append(None)
            continue
        move = rigid_between(*(np.array([c[i] for i in common]) for c in (here, first)))
        known = np.where((labels > 0) & (labels < len(lut)), labels, 0).astype(np.int16)
        moved.append((known, move @ affine))
    shown = [m for m in moved if m is not None]
    middle = np.mean(list(first.values()), axis=0) if first else np.zeros(3)
    half = _half_widths(shown, middle)
    return [
        '' if m is None else _strip([_slice(*m, middle, plane, half) for plane in PLANES], lut)
        for m in moved
    ]
