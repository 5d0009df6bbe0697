"""Build the age-resolved probability atlas from label maps of several children.

Every map is brought into one symmetric space (affinely by the centroids of its structures, then by
symmetric diffeomorphic registration with ANTs to the average, group-wise). At each age node the
registered maps and their mirror images are averaged with a kernel over age that is wide enough to
count at least `MIN_CHILDREN` children. Size and shape by age are averaged in the same way.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from scipy import ndimage

from babyseg_bids.errors import InputError
from babyseg_bids.labels import label_table
from babyseg_bids.synthesis.affine import fit_affine, log_scale, mean_centroids, transform
from babyseg_bids.synthesis.atlas import Atlas
from babyseg_bids.synthesis.maps import class_table, prepare_map

log = logging.getLogger(__name__)

NODES = (1.0, 3.0, 6.0, 12.0, 24.0)
# Effective number of children (inverse of the sum of squared weights) behind every node.
MIN_CHILDREN = 3.0
SPACING = 1.5
SHAPE_SPACING = 4.5
# Labels kept at a voxel, the likeliest over all ages; the rest is dropped to keep the file small.
LABELS_PER_VOXEL = 4
# The same child at two ages, by file stem; its maps count as one child.
SAME_CHILD = {'04mo': '01mo'}
# Grey values of the images that are registered: cortex between the white matter and the outside.
GREY = {
    'background': 0.0,
    'white-matter': 1.0,
    'cortex': 0.55,
    'deep-grey': 0.75,
    'ventricle': 0.15,
    'cerebellum': 0.5,
    'brainstem': 0.8,
}
# SyN iterations at 1/4, 1/2 and full resolution, one entry for each round of template building.
ROUNDS = ((60, 40, 0), (60, 40, 6))


@dataclass(frozen=True)
class Child:
    """One source map.

    Parameters
    ----------
    name, child : file stem, and whose map it is
    age : months
    channels : (X, Y, Z) uint8, 1 mm, RAS axes; voxel indices serve as its coordinates in mm
    centroids : (C - 1, 3), mm, one a structure
    """

    name: str
    child: str
    age: float
    channels: np.ndarray
    centroids: np.ndarray


@dataclass(frozen=True)
class Space:
    """The common grid. `origin` is the position of voxel 0 in mm; x is symmetric about 0."""

    size: tuple[int, int, int]
    origin: np.ndarray
    spacing: float

    def points(self) -> np.ndarray:
        """Positions of all voxels, (3, *size), mm."""
        axes = [
            o + self.spacing * np.arange(n) for o, n in zip(self.origin, self.size, strict=True)
        ]
        return np.stack(np.meshgrid(*axes, indexing='ij'))

    def voxels(self, points: np.ndarray, /) -> np.ndarray:
        """Voxel coordinates (3, ...) of positions (3, ...)."""
        return (points - self.origin.reshape(3, *[1] * (points.ndim - 1))) / self.spacing


def read_children(folder: Path, /, *, same_child: Mapping[str, str]) -> list[Child]:
    """Read every `<months>mo.nii.gz` of a folder.

    Raises
    ------
    InputError
        If there are none, or one of them lacks a structure.
    """
    paths = [p for p in sorted(folder.glob('*.nii*')) if re.match(r'\d+mo\.nii', p.name)]
    if not paths:
        raise InputError(f'{folder} holds no label maps named like 03mo.nii.gz.')
    table, structures = class_table(), len(label_table()) - 1
    children = []
    for path in paths:
        channels = table.channel[prepare_map(path).classes].astype(np.uint8)
        present = np.arange(1, structures + 1)
        missing = np.setdiff1d(present, channels)
        if len(missing):
            name = label_table().rows[missing[0]].name
            raise InputError(f'{path} has no voxel of {name}; leave this map out.')
        name = path.name.split('.')[0]
        centroids = np.array(ndimage.center_of_mass(channels > 0, channels, present))
        age = float(name.removesuffix('mo'))
        children.append(Child(name, same_child.get(name, name), age, channels, centroids))
    return children


def common_space(children: Iterable[Child], affines: Iterable[np.ndarray]) -> Space:
    """A grid symmetric in x that holds all brains after their affine maps."""
    low, high = [], []
    for child, matrix in zip(children, affines, strict=True):
        brain = transform(np.linalg.inv(matrix), np.argwhere(child.channels)[::7].T.astype(float))
        low.append(brain.min(1))
        high.append(brain.max(1))
    margin = 4 * SPACING
    start, stop = np.min(low, 0) - margin, np.max(high, 0) + margin
    half = np.ceil(max(-start[0], stop[0]) / SPACING)
    size = [2 * half + 1, *np.ceil((stop - start)[1:] / SPACING)]
    x, y, z = (int(s) for s in size)
    return Space((x, y, z), np.array([-half * SPACING, *start[1:]]), SPACING)


def mirrored(x: np.ndarray, /) -> np.ndarray:
    """Mirror image of displacements (3, *size) on the common grid."""
    return x[:, ::-1] * np.array([-1, 1, 1]).reshape(3, 1, 1, 1)


def register(
    images: Sequence[np.ndarray], space: Space, /, *, rounds: Sequence[Sequence[int]] = ROUNDS
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Group-wise SyN of grey images (*size) to their symmetric average.

    Returns
    -------
    For each image the displacements (3, *size) in mm from the template to the image and back.
    """
    # ANTs takes a second to import, which sampling from the atlas must not pay for.
    import ants

    def wrap(x: np.ndarray) -> 'ants.ANTsImage':
        return ants.from_numpy(
            x.astype(np.float32), origin=tuple(space.origin), spacing=(space.spacing,) * 3
        )

    def read(path: str) -> np.ndarray:
        return np.moveaxis(ants.image_read(path).numpy(), -1, 0).astype(np.float32)

    template = np.mean(images, 0)
    with TemporaryDirectory() as folder:
        for number, iterations in enumerate(rounds, start=1):
            template = (template + template[::-1]) / 2
            forward, backward, warped = [], [], []
            for i, image in enumerate(images):
                result = ants.registration(
                    wrap(template),
                    wrap(image),
                    type_of_transform='SyNOnly',
                    initial_transform='Identity',
                    syn_metric='meansquares',
                    reg_iterations=tuple(iterations),
                    flow_sigma=2,
                    outprefix=f'{folder}/{i}_',
                )
                forward.append(read(f'{folder}/{i}_1Warp.nii.gz'))
                backward.append(read(f'{folder}/{i}_1InverseWarp.nii.gz'))
                warped.append(result['warpedmovout'].numpy())
                log.info(
                    'Round %d of %d: registered %d of %d.', number, len(rounds), i + 1, len(images)
                )
            template = np.mean(warped, 0)
    return forward, backward


def age_weights(
    ages: np.ndarray, children: Sequence[str], node: float, /, *, width: float = 0.35
) -> np.ndarray:
    """Kernel weights (N,) of maps at an age node; they sum to 1.

    The kernel is Gaussian in the logarithm of age. From `width` (octaves) it is widened until the
    effective number of children is at least `MIN_CHILDREN`.

    Raises
    ------
    InputError
        If there are too few children for any width.
    """
    if len(set(children)) < MIN_CHILDREN:
        raise InputError(f'An atlas takes maps of at least {MIN_CHILDREN:.0f} children.')
    distance = np.log2(ages / node)
    while True:
        weights = np.exp(-0.5 * (distance / width) ** 2)
        weights /= weights.sum()
        each = [weights[[c == child for c in children]].sum() for child in set(children)]
        # Weights that are equal to rounding count as equal, so that the loop ends.
        if 1 / np.sum(np.square(each)) >= MIN_CHILDREN - 1e-6:
            return weights
        width *= 1.1


def local_line(
    ages: np.ndarray, values: np.ndarray, node: float, weights: np.ndarray, /
) -> np.ndarray:
    """Weighted linear regression of values (N, D) over log age, read at a node, (D,)."""
    root = np.sqrt(weights)[:, None]
    design = np.c_[np.ones(len(ages)), np.log2(ages / node)] * root
    return np.linalg.lstsq(design, values * root, rcond=None)[0][0]


def child_probabilities(
    child: Child, matrix: np.ndarray, displacement: np.ndarray, space: Space, /
) -> np.ndarray:
    """Symmetric share of each label in each voxel, (C, half x, Y, Z), of one registered map.

    A voxel's share is counted over eight points in it, so that nothing is interpolated.
    """
    count = len(label_table())
    size = space.size
    out = np.zeros((count, np.prod(size)), np.float32)
    points = space.points()
    everywhere = np.arange(out.shape[1])
    for corner in np.ndindex(2, 2, 2):
        shift = (np.array(corner).reshape(3, 1, 1, 1) - 0.5) * space.spacing / 2
        where = np.rint(transform(matrix, points + shift + displacement)).astype(int)
        limit = np.array(child.channels.shape).reshape(3, 1, 1, 1)
        inside = ((where >= 0) & (where < limit)).all(0)
        where = np.clip(where, 0, limit - 1)
        labels = child.channels[tuple(where)] * inside
        out[labels.ravel(), everywhere] += 1 / 8
    full = out.reshape(count, *size)
    half = size[0] // 2 + 1
    return (full + full[label_table().mirror_channels, ::-1])[:, :half] / 2


def build(
    folder: Path,
    /,
    *,
    nodes: Sequence[float] = NODES,
    same_child: Mapping[str, str] = SAME_CHILD,
    rounds: Sequence[Sequence[int]] = ROUNDS,
) -> Atlas:
    """Compute the atlas from a folder of label maps named by age (`03mo.nii.gz`).

    Parameters
    ----------
    nodes : ages of the atlas, months
    same_child : file stem -> file stem of an earlier map of the same child
    rounds : SyN iterations, see `ROUNDS`
    """
    children = read_children(folder, same_child=same_child)
    ages = np.array([c.age for c in children])
    owners = [c.child for c in children]
    weights = np.array([age_weights(ages, owners, node) for node in nodes])

    reference = mean_centroids(np.array([c.centroids for c in children]))
    affines = [fit_affine(reference, c.centroids) for c in children]
    space = common_space(children, affines)
    forward, backward = register(
        [_grey(c, m, space) for c, m in zip(children, affines, strict=True)], space, rounds=rounds
    )

    half = (space.size[0] // 2 + 1, *space.size[1:])
    probabilities = np.zeros((len(nodes), len(label_table()), *half), np.float32)
    for i, child in enumerate(children):
        each = child_probabilities(child, affines[i], forward[i], space)
        for node, weight in zip(probabilities, weights[:, i], strict=True):
            node += weight * each
    scales = np.array([log_scale(m) for m in affines])
    shapes = np.array([(b + mirrored(b)) / 2 for b in backward])
    every = round(SHAPE_SPACING / SPACING)
    smooth = ndimage.gaussian_filter(shapes, (0, 0, 1, 1, 1))[:, :, ::every, ::every, ::every]
    return Atlas.from_dense(
        ages=np.array(nodes),
        log_scale=np.array(
            [local_line(ages, scales, a, w) for a, w in zip(nodes, weights, strict=True)]
        ),
        displacement=np.einsum('ni,i...->n...', weights, smooth),
        displacement_spacing=every * SPACING,
        probabilities=probabilities,
        origin=space.origin,
        spacing=SPACING,
        keep=LABELS_PER_VOXEL,
    )


def _grey(child: Child, matrix: np.ndarray, space: Space) -> np.ndarray:
    """The child's grey image (*size) on the common grid after its affine map."""
    values = np.array([GREY[r.tissue] for r in label_table().rows], np.float32)
    image = ndimage.gaussian_filter(values[child.channels], 0.5)
    return ndimage.map_coordinates(image, transform(matrix, space.points()), order=1)
