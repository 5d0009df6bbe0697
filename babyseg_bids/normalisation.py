"""From a child's scan to a template, guided by a segmentation of both.

Templates seldom come with the labels that a child has, so the network segments the template, too.
Corresponding structures give the first pose, the image of the brain refines it to an affine
transform, and a diffeomorphic registration (SyN, Avants et al. 2008) of the image and of a map for
each tissue does the rest.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from babyseg_bids import messages
from babyseg_bids.alignment_similarity import apply
from babyseg_bids.errors import AlignmentError
from babyseg_bids.labels import LabelTable
from babyseg_bids.registration import FLIP, affine_of, ants_image, deterministic_ants

# Edge length in mm of the voxels that are registered, and of those of the written deformation.
REGISTRATION_MM = 2.0
MARGIN_MM = 12.0
# Smaller structures say little about where the brain is.
LEAST_VOXELS = 50
LEAST_STRUCTURES = 4
# Tissues that guide the deformation, each as one channel.
TISSUES = (
    ('cortex',),
    ('white-matter',),
    ('ventricle',),
    ('deep-grey',),
    ('cerebellum', 'brainstem'),
)
# Weight of all tissue channels together; the image has 1.
TISSUE_WEIGHT = 2.0
# Below it the labels in the template's space are flagged.
EXPECTED_OVERLAP = 0.6
AFFINE_ITERATIONS = (100, 50)
SYN_ITERATIONS = (60, 40, 20)


@dataclass(frozen=True)
class Head:
    """A scan (X, Y, Z), its label map of the same shape, and the affine of both in RAS mm."""

    image: np.ndarray
    labels: np.ndarray
    affine: np.ndarray


@dataclass(frozen=True)
class Normalised:
    """A child in the space of a template.

    Attributes
    ----------
    labels : (X, Y, Z) int16 on the template's grid
    forward, inverse : composite ITK transforms (HDF5): `forward` resamples the child's images onto
        the template, `inverse` the template's onto the child
    overlap : mean Dice of the child's structures with those of the template
    """

    labels: np.ndarray
    forward: Path
    inverse: Path
    overlap: float


def similarity_transform(moving: np.ndarray, fixed: np.ndarray, /) -> np.ndarray:
    """Rotation, shift and one scale that best bring points onto points (Umeyama 1991).

    Parameters
    ----------
    moving, fixed : (N, 3), corresponding points in mm

    Returns
    -------
    (4, 4) matrix from moving to fixed
    """
    a, b = moving - moving.mean(0), fixed - fixed.mean(0)
    left, sizes, right = np.linalg.svd(b.T @ a)
    # A reflection would fit mirrored points, which no head is.
    sign = np.diag([1.0, 1.0, np.sign(np.linalg.det(left @ right))])
    matrix = np.eye(4)
    matrix[:3, :3] = (left @ sign @ right) * (sizes * np.diag(sign)).sum() / (a**2).sum()
    matrix[:3, 3] = fixed.mean(0) - matrix[:3, :3] @ moving.mean(0)
    return matrix


def first_pose(scan: Head, template: Head, /) -> np.ndarray:
    """The similarity transform that the centres of the structures in both give.

    Raises
    ------
    AlignmentError
        When fewer than `LEAST_STRUCTURES` are in both.
    """
    sizes = [np.bincount(h.labels.ravel(), minlength=256) for h in (scan, template)]
    # A large voxel counts for more.
    volumes = [
        s * abs(np.linalg.det(h.affine[:3, :3]))
        for s, h in zip(sizes, (scan, template), strict=True)
    ]
    shared = [n for n in range(1, 256) if min(v[n] for v in volumes) >= LEAST_VOXELS]
    if len(shared) < LEAST_STRUCTURES:
        raise AlignmentError(f'only {len(shared)} structures are in both')
    centres = [
        apply(h.affine, np.array(ndimage.center_of_mass(h.labels > 0, h.labels, shared)))
        for h in (scan, template)
    ]
    return similarity_transform(*centres)


def _channels(head: Head, table: LabelTable) -> tuple[list[np.ndarray], np.ndarray]:
    """Image of the brain and a map of each tissue on a coarse grid, and its affine."""
    box = ndimage.find_objects((head.labels > 0).astype(np.uint8))[0]
    labels = head.labels[box]
    affine = head.affine.copy()
    affine[:3, 3] = apply(head.affine, np.array([[s.start for s in box]]))[0]
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in labels.shape])).reshape(3, -1).T
    world = apply(affine, corners)
    low, high = world.min(0) - MARGIN_MM, world.max(0) + MARGIN_MM
    grid = np.diag([REGISTRATION_MM] * 3 + [1.0])
    grid[:3, 3] = low
    shape = tuple(np.ceil((high - low) / REGISTRATION_MM).astype(int) + 1)
    pull = np.linalg.inv(affine) @ grid
    # Voxels of the scan that one of the grid covers are averaged.
    blur = np.maximum(np.linalg.norm(pull[:3, :3], axis=1) - 1, 0) / 2

    def onto_grid(values: np.ndarray) -> np.ndarray:
        smooth = ndimage.gaussian_filter(values.astype(np.float32), blur)
        return ndimage.affine_transform(smooth, pull, output_shape=shape, order=1)

    image = np.where(labels > 0, head.image[box], 0).astype(np.float32)
    image = np.clip(image / max(np.quantile(image[labels > 0], 0.99), 1e-6), 0, 1)
    maps = []
    for tissues in TISSUES:
        members = [row.index for row in table.rows if row.tissue in tissues]
        maps.append(ndimage.gaussian_filter(onto_grid(np.isin(labels, members)), 0.5))
    return [onto_grid(image), *maps], grid


def _register(
    ants: Any, fixed: list[Any], moving: list[Any], folder: Path
) -> tuple[np.ndarray, Path, Path]:
    """Affine matrix (RAS, fixed to moving), deformation and inverse deformation (files)."""
    affine = ants.registration(
        fixed[0],
        moving[0],
        'Affine',
        initial_transform='Identity',
        outprefix=f'{folder}/affine-',
        aff_metric='mattes',
        aff_sampling=32,
        aff_random_sampling_rate=0.2,
        aff_iterations=AFFINE_ITERATIONS,
        aff_shrink_factors=(2, 1),
        aff_smoothing_sigmas=(1, 0),
    )
    start = affine['fwdtransforms'][0]
    weight = TISSUE_WEIGHT / len(TISSUES)
    pairs = zip(fixed[1:], moving[1:], strict=True)
    ants.registration(
        fixed[0],
        moving[0],
        'SyNOnly',
        initial_transform=[start],
        outprefix=f'{folder}/syn-',
        syn_metric='mattes',
        syn_sampling=32,
        reg_iterations=SYN_ITERATIONS,
        multivariate_extras=[('MeanSquares', f, m, weight, 0) for f, m in pairs],
    )
    pull = affine_of(ants.read_transform(start))
    return pull, folder / 'syn-1Warp.nii.gz', folder / 'syn-1InverseWarp.nii.gz'


def _composite(ants: Any, steps: list[np.ndarray | Path]) -> Any:
    """One transform that takes points through `steps`, matrices (RAS) and deformations (files)."""
    parts = []
    for step in steps:
        if isinstance(step, Path):
            parts.append(ants.transform_from_displacement_field(ants.image_read(str(step))))
        else:
            matrix = FLIP @ step @ FLIP
            parameters = [*matrix[:3, :3].ravel(), *matrix[:3, 3]]
            parts.append(
                ants.create_ants_transform('AffineTransform', dimension=3, parameters=parameters)
            )
    return ants.compose_ants_transforms(parts)


def mean_overlap(one: np.ndarray, other: np.ndarray, /) -> float:
    """Mean Dice over the structures that either label map has; 0 when there is none."""
    counts = [np.bincount(x.ravel(), minlength=256)[1:256] for x in (one, other)]
    both = np.bincount(np.where(one == other, one, 0).ravel(), minlength=256)[1:256]
    total = counts[0] + counts[1]
    return float((2 * both[total > 0] / total[total > 0]).mean()) if total.any() else 0.0


def poor_overlap(space: str, overlap: float, /) -> str:
    """A sentence where the labels lie badly on the template's; else empty."""
    if overlap >= EXPECTED_OVERLAP:
        return ''
    return messages.normalisation_poor(space, overlap, EXPECTED_OVERLAP)


def normalise(
    scan: Head, template: Head, table: LabelTable, folder: Path, /, *, seed: int = 0
) -> Normalised:
    """Bring a child's label map into the space of a template.

    Parameters
    ----------
    table : the labels of both
    folder : the transforms are written there
    seed : the same seed gives the same result, bit for bit

    Raises
    ------
    AlignmentError
        When the two have too few structures in common.
    """
    pose = first_pose(scan, template)
    moving, moving_grid = _channels(scan, table)
    fixed, fixed_grid = _channels(template, table)
    forward, inverse = folder / 'forward.h5', folder / 'inverse.h5'
    with deterministic_ants(seed) as ants, tempfile.TemporaryDirectory(dir=folder) as name:
        pull, warp, unwarp = _register(
            ants,
            [ants_image(ants, c, fixed_grid) for c in fixed],
            [ants_image(ants, c, pose @ moving_grid) for c in moving],
            Path(name),
        )
        # From the affinely transformed template back into the child's own world.
        linear = np.linalg.inv(pose) @ pull
        ants.write_transform(_composite(ants, [warp, linear]), str(forward))
        back = _composite(ants, [np.linalg.inv(linear), unwarp])
        ants.write_transform(back, str(inverse))
        labels = _warp_labels(ants, scan, template, forward)
    return Normalised(labels, forward, inverse, mean_overlap(labels, template.labels))


def _warp_labels(ants: Any, scan: Head, template: Head, transform: Path) -> np.ndarray:
    """The child's label map (X, Y, Z) int16 on the template's grid."""
    fixed, moving = _unsheared(template), _unsheared(scan)
    warped = ants.apply_transforms(
        ants_image(ants, np.zeros(fixed[0].shape, np.float32), fixed[1]),
        ants_image(ants, moving[0], moving[1]),
        [str(transform)],
        interpolator='genericLabel',
    )
    return np.round(warped.numpy()).astype(np.int16)


def _unsheared(head: Head) -> tuple[np.ndarray, np.ndarray]:
    """Label map and affine; on a grid along the world's axes if its own is sheared."""
    zooms = np.linalg.norm(head.affine[:3, :3], axis=0)
    axes = head.affine[:3, :3] / zooms
    if np.allclose(axes.T @ axes, np.eye(3), atol=1e-4):
        return head.labels, head.affine
    return _straight(head.labels, head.affine)


def _straight(labels: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`labels` on a grid along the world's axes, with voxels of the smallest edge."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in labels.shape])).reshape(3, -1).T
    world = apply(affine, corners)
    edge = np.linalg.norm(affine[:3, :3], axis=0).min()
    grid = np.diag([edge] * 3 + [1.0])
    grid[:3, 3] = world.min(0)
    shape = tuple(np.ceil(np.ptp(world, axis=0) / edge).astype(int) + 1)
    pull = np.linalg.inv(affine) @ grid
    return ndimage.affine_transform(labels, pull, output_shape=shape, order=0), grid
