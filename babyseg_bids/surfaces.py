"""Surfaces of the cortex from a label map: area, thickness and gyrification of each hemisphere.

The white surface is the border of a hemisphere's inside (all its structures of the cerebrum but
the cortex), the pial surface that of its inside and cortex together. Both are found by marching
cubes (Lewiner et al., J Graph Tools 2003) at one half of the mask smoothed by a Gaussian. Where
the banks of a sulcus touch in the label map, the pial surface bridges it: area and gyrification
are then too small and thickness too large. Compare maps of one resolution only.
"""

from dataclasses import dataclass, fields

import numpy as np
from scipy import ndimage

from babyseg_bids.labels import LabelTable, label_table
from babyseg_bids.thinning import thinned_affine, thinning

# Width of the Gaussian in voxels: marching cubes on a plain mask makes steps, which add area.
SMOOTHING_VOXELS = 0.8

# Gaps narrower than twice this are closed for the hull, which then bridges all sulci
# (Schaer et al., IEEE TMI 2008, use 15 mm for adults; heads of infants are smaller).
HULL_RADIUS_MM = 10.0

OUTSIDE_CEREBRUM = ('cerebellum', 'brainstem')


@dataclass(frozen=True)
class CortexMeasures:
    """Cortex of one hemisphere, without the medial wall, where the border has no cortex.

    Parameters
    ----------
    white_area_mm2, pial_area_mm2 : area of the triangles that border on cortex, mm2
    thickness_mm : mean thickness, 2 V / (white + pial area) with the cortex' volume V, mm
    gyrification_index : area of the whole pial surface over that of its hull, without unit
    volume_mm3 : volume of the cortex' voxels, mm3
    """

    white_area_mm2: float
    pial_area_mm2: float
    thickness_mm: float
    gyrification_index: float
    volume_mm3: float


UNITS = {
    'white_area_mm2': 'mm^2',
    'pial_area_mm2': 'mm^2',
    'thickness_mm': 'mm',
    'gyrification_index': '1',
    'volume_mm3': 'mm^3',
}
MEASURES = tuple(f.name for f in fields(CortexMeasures))


def surface(
    mask: np.ndarray, affine: np.ndarray, /, smoothing: float = SMOOTHING_VOXELS
) -> tuple[np.ndarray, np.ndarray]:
    """Triangles around a mask.

    Parameters
    ----------
    mask : (X, Y, Z) bool ndarray
    affine : (4, 4) ndarray, voxel to world in mm
    smoothing : standard deviation of the Gaussian, voxels

    Returns
    -------
    triangles : (N, 3, 3) ndarray
        Corners of each triangle in the world, mm. Empty where the mask is.
    places : (N, 3) ndarray
        Centre of each triangle, voxels.
    """
    from skimage.measure import marching_cubes

    room = int(np.ceil(4 * smoothing)) + 1
    soft = ndimage.gaussian_filter(np.pad(mask, room).astype(np.float32), smoothing)
    if soft.max(initial=0) <= 0.5:
        return np.zeros((0, 3, 3)), np.zeros((0, 3))
    corners, faces, _, _ = marching_cubes(soft, 0.5)
    voxels = corners.astype(np.float64) - room
    world = voxels @ np.asarray(affine, float)[:3, :3].T + np.asarray(affine, float)[:3, 3]
    return world[faces], voxels[faces].mean(axis=1)


def triangle_areas(triangles: np.ndarray, /) -> np.ndarray:
    """Area of each triangle, |(b - a) x (c - a)| / 2: (N, 3, 3) to (N,).

    >>> float(triangle_areas(np.array([[[0, 0, 0], [2, 0, 0], [0, 3, 0]]]))[0])
    3.0
    """
    a, b, c = np.moveaxis(np.asarray(triangles, float), 1, 0)
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2


def surface_area(mask: np.ndarray, affine: np.ndarray, /) -> float:
    """Area of the surface around a mask, mm2."""
    return float(triangle_areas(surface(mask, affine)[0]).sum())


def closed_hull(
    mask: np.ndarray, affine: np.ndarray, /, radius: float = HULL_RADIUS_MM
) -> tuple[np.ndarray, int]:
    """The mask after a morphological closing by a ball of `radius` mm, and its padding in voxels.

    Returns
    -------
    (X + 2 p, Y + 2 p, Z + 2 p) bool ndarray, and p
    """
    zooms = np.linalg.norm(np.asarray(affine, float)[:3, :3], axis=0)
    room = int(np.ceil(radius / zooms.min())) + 2
    padded = np.pad(mask, room)
    grown = ndimage.distance_transform_edt(~padded, sampling=zooms) <= radius
    return ndimage.distance_transform_edt(grown, sampling=zooms) > radius, room


def gyrification_index(mask: np.ndarray, affine: np.ndarray, /) -> float:
    """Area of the surface around a mask over that of its hull (see `closed_hull`); 1 if smooth.

    The three-dimensional form of the index of Zilles et al. (Anat Embryol 1988).
    """
    hull, _ = closed_hull(mask, affine)
    outer = surface_area(hull, affine)
    return surface_area(mask, affine) / outer if outer > 0 else float('nan')


def _fill(mask: np.ndarray) -> np.ndarray:
    """The largest piece of a mask without holes."""
    pieces, number = ndimage.label(mask)
    if number > 1:
        mask = pieces == np.bincount(pieces.ravel())[1:].argmax() + 1
    return ndimage.binary_fill_holes(mask)


def _bordering_area(
    region: np.ndarray, cortex: np.ndarray, affine: np.ndarray, inside: bool
) -> float:
    """Area of a region's surface where the nearest voxel inside or outside it is cortex, mm2."""
    triangles, places = surface(region, affine)
    if not len(triangles):
        return float('nan')
    zooms = np.linalg.norm(np.asarray(affine, float)[:3, :3], axis=0)
    # The nearest voxel of the side that is asked about, from any voxel.
    nearest = ndimage.distance_transform_edt(
        ~region if inside else region,
        sampling=zooms,
        return_distances=False,
        return_indices=True,
    )
    index = np.clip(places.round().astype(int), 0, np.array(region.shape) - 1)
    there = nearest[(slice(None), *index.T)]
    return float(triangle_areas(triangles)[cortex[tuple(there)]].sum())


def hemisphere_measures(
    inside: np.ndarray, cortex: np.ndarray, affine: np.ndarray, /
) -> CortexMeasures:
    """Measure the cortex of one hemisphere.

    Parameters
    ----------
    inside, cortex : (X, Y, Z) bool ndarray
        What the cortex surrounds, and the cortex.
    affine : (4, 4) ndarray
        Voxel to world, mm.
    """
    unit = abs(float(np.linalg.det(np.asarray(affine, float)[:3, :3])))
    volume = float(cortex.sum()) * unit
    if not cortex.any() or not inside.any():
        nan = float('nan')
        return CortexMeasures(nan, nan, nan, nan, volume or nan)
    both = _fill(inside | cortex)
    core = both & ~cortex
    white = _bordering_area(core, cortex, affine, False)
    pial = _bordering_area(both, cortex, affine, True)
    thickness = 2 * volume / (white + pial) if white + pial > 0 else float('nan')
    return CortexMeasures(white, pial, thickness, gyrification_index(both, affine), volume)


def cortex_measures(
    labels: np.ndarray, affine: np.ndarray, table: LabelTable | None = None
) -> dict[str, CortexMeasures]:
    """Measure the cortex of both hemispheres from a label map.

    Parameters
    ----------
    labels : (X, Y, Z) integer ndarray
        FreeSurfer numbers.
    affine : (4, 4) ndarray
        Voxel to world, mm. Grids of 0.3 mm and finer are thinned (see
        `thinning`).

    Returns
    -------
    Measures by side, `L` and `R`; NaN where the hemisphere has no cortex or no inside.
    """
    table = table or label_table()
    steps = thinning(affine)
    labels, affine = labels[steps], thinned_affine(affine, steps)
    out = {}
    for side in ('L', 'R'):
        rows = [
            r
            for r in table.structures
            if r.hemisphere == side and r.tissue not in OUTSIDE_CEREBRUM
        ]
        whole = np.isin(labels, [r.index for r in rows])
        hits = [np.flatnonzero(whole.any(tuple(b for b in range(3) if b != a))) for a in range(3)]
        box = tuple(slice(h[0], h[-1] + 1) if h.size else slice(0, 0) for h in hits)
        part = np.pad(labels[box], 1)
        cortex = np.isin(part, [r.index for r in rows if r.tissue == 'cortex'])
        out[side] = hemisphere_measures(
            np.isin(part, [r.index for r in rows]) & ~cortex, cortex, affine
        )
    return out
