"""Label maps of one child's sessions side by side, in one aligned view and at one scale."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy import ndimage

from babyseg_bids.labels import LabelTable, label_table

# Width and height of a slice, mm: a head of a child fits.
VIEW_MM = 170
PIXELS_PER_MM = 1.25
# Fewer structures do not fix a head's position.
FEWEST = 6

# World axes that run to the right and upwards in each plane, and the one that it cuts.
PLANES = ((0, 1, 2), (0, 2, 1), (1, 2, 0))


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


def _slice(
    labels: np.ndarray, to_voxel: np.ndarray, middle: np.ndarray, plane: tuple[int, int, int]
) -> np.ndarray:
    """Labels in one plane through a point, rows from top to bottom."""
    across, up, _ = plane
    n = int(VIEW_MM * PIXELS_PER_MM)
    steps = (np.arange(n) - (n - 1) / 2) / PIXELS_PER_MM
    points = np.broadcast_to(middle, (n, n, 3)).copy()
    points[..., across] += steps[None, :]
    points[..., up] += steps[::-1, None]
    voxels = points @ to_voxel[:3, :3].T + to_voxel[:3, 3]
    return ndimage.map_coordinates(labels, np.moveaxis(voxels, -1, 0), order=0, cval=0)


def aligned_pictures(
    maps: Sequence[tuple[np.ndarray, np.ndarray]], /, table: LabelTable | None = None
) -> list[str]:
    """One picture a session: axial, coronal and sagittal slices of its label map.

    Each head is moved and turned, not scaled, onto the first by the centres of its structures.

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
    middle = np.mean(list(first.values()), axis=0) if first else np.zeros(3)
    pictures = []
    for (labels, affine), here in zip(maps, centres, strict=True):
        common = sorted(set(here) & set(first))
        if len(common) < FEWEST:
            pictures.append('')
            continue
        move = rigid_between(*(np.array([c[i] for i in common]) for c in (here, first)))
        to_voxel = np.linalg.inv(move @ affine)
        known = np.where((labels > 0) & (labels < len(lut)), labels, 0).astype(np.int16)
        tiles = [lut[_slice(known, to_voxel, middle, plane)] for plane in PLANES]
        stream = io.BytesIO()
        Image.fromarray(np.hstack(tiles)).quantize(64).save(stream, 'PNG', optimize=True)
        pictures.append('data:image/png;base64,' + base64.b64encode(stream.getvalue()).decode())
    return pictures
