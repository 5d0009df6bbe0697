"""The averaged, age-resolved probability atlas that ships with babyseg: file, and sampling.

It exists so that example scans can be drawn without any child's data: `sample_label_map` gives
the label map of a brain that never was, at any age the atlas covers. `docs/atlas.md` describes the
file and how it was made; `python -m babyseg_bids.synthesis.atlas build DIR OUT` makes it again.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from torch import Tensor

from babyseg_bids.errors import BabySegError, InputError, OutputError
from babyseg_bids.labels import label_table
from babyseg_bids.synthesis.deformation import random_displacement, resize, sample_field
from babyseg_bids.synthesis.draws import Draws
from babyseg_bids.synthesis.maps import remove_specks

FORMAT = 1
SHIPPED = 'data/atlas/infant.npz'
# Probabilities are stored in steps of 1/60, displacements in steps of 0.1 mm.
STEPS = 60
DISPLACEMENT_STEP = 0.1
# Smallest probability in a logarithm: a label that no map shows is unlikely, not impossible.
FLOOR = 1e-3
# Individual variation: the deformation's deviation at its coarsest scale in mm and its control
# points along the longest dimension, and the deviation of the log size, overall and by axis.
WARP_SD = 2.5
WARP_POINTS = (5, 9)
SIZE_SD = 0.025
AXIS_SD = 0.015
# Deviation of the smooth noise on log probabilities, and the distance of its control points, mm.
NOISE_SD = 0.5
NOISE_SPACING = 6.0
# Averaging rubs out what is thin: sulci (background) and the blades of white matter in the gyri.
# Added to their log probabilities, these bring tissue volumes back to those of the sources.
THIN = {'background': 1.2, 'white-matter': 0.35}
# The heads of the training maps stand with the face raised by so much against the atlas, degrees.
TRAINING_PITCH = 3.7
# Output voxels that are drawn at once, so that 28 scores a voxel stay within 50 MB.
_BLOCK = 400_000


@dataclass(frozen=True)
class Atlas:
    """Label probabilities, mean size and mean shape at a few ages, in one symmetric space.

    Only the half with x <= 0 (the left in RAS) is held; the other one is its mirror image.

    Parameters
    ----------
    ages : (N,), months, rising
    log_scale : (N, 3), log size along x, y, z relative to the common space
    displacement : (N, 3, *coarse) int8, in `DISPLACEMENT_STEP` mm, from the mean shape at an age
        to the common space; the whole grid, from the same corner
    displacement_spacing : mm
    labels : (K, V) uint8, channels that occur at each voxel of `mask`
    probabilities : (N, K, V) uint8, in 1/`STEPS`
    mask : (half x, Y, Z) bool, where there is more than background
    origin : (3,), position of voxel 0, mm
    spacing : mm
    """

    ages: np.ndarray
    log_scale: np.ndarray
    displacement: np.ndarray
    displacement_spacing: float
    labels: np.ndarray
    probabilities: np.ndarray
    mask: np.ndarray
    origin: np.ndarray
    spacing: float

    @classmethod
    def from_dense(
        cls,
        *,
        ages: np.ndarray,
        log_scale: np.ndarray,
        displacement: np.ndarray,
        displacement_spacing: float,
        probabilities: np.ndarray,
        origin: np.ndarray,
        spacing: float,
        keep: int,
    ) -> 'Atlas':
        """Make an atlas of dense probabilities (N, C, half x, Y, Z), `keep` labels a voxel."""
        mask = np.any(probabilities[:, 0] < 1 - 0.5 / STEPS, axis=0)
        inside = probabilities[:, :, mask]
        # The same labels at all ages, so that ages can be interpolated voxel by voxel.
        labels = np.argsort(-inside.max(0), axis=0, kind='stable')[:keep]
        kept = np.take_along_axis(inside, labels[None], 1)
        kept /= kept.sum(1, keepdims=True)
        steps = np.rint(displacement / DISPLACEMENT_STEP).clip(-127, 127).astype(np.int8)
        return cls(
            ages=np.asarray(ages, np.float32),
            log_scale=np.asarray(log_scale, np.float32),
            displacement=steps,
            displacement_spacing=float(displacement_spacing),
            labels=labels.astype(np.uint8),
            probabilities=np.rint(kept * STEPS).astype(np.uint8),
            mask=np.asarray(mask),
            origin=np.asarray(origin, np.float32),
            spacing=float(spacing),
        )

    @property
    def size(self) -> tuple[int, int, int]:
        """Voxels of the whole common space."""
        x, y, z = self.mask.shape
        return 2 * x - 1, y, z

    @cached_property
    def extent(self) -> np.ndarray:
        """First and last position of anything but background, (2, 3), mm."""
        corners = np.argwhere(self.mask)
        low = self.origin + self.spacing * corners.min(0)
        high = self.origin + self.spacing * corners.max(0)
        return np.array([low, [-low[0], *high[1:]]])

    def blend(self, age_months: float, /) -> np.ndarray:
        """Weight of each node, (N,), at an age; linear in log age, constant beyond the ends."""
        position = np.interp(
            np.log(max(age_months, 1e-3)), np.log(self.ages), np.arange(len(self.ages))
        )
        return np.clip(1 - np.abs(np.arange(len(self.ages)) - position), 0, 1)

    def dense(self, age_months: float, /) -> np.ndarray:
        """Label probabilities (C, X, Y, Z) float32 in the common space at an age."""
        blended = np.tensordot(self.blend(age_months), self.probabilities / np.float32(STEPS), 1)
        half = np.zeros((len(label_table()), *self.mask.shape), np.float32)
        x, y, z = np.nonzero(self.mask)
        for labels, values in zip(self.labels, blended, strict=True):
            half[labels, x, y, z] = values
        half[0][~self.mask] = 1
        other = half[label_table().mirror_channels][:, -2::-1]
        return np.concatenate([half, other], 1)

    def save(self, path: Path, /) -> None:
        """Write the atlas to one compressed file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            path,
            format=FORMAT,
            numbers=label_table().indices,
            ages=self.ages,
            log_scale=self.log_scale,
            displacement=self.displacement,
            displacement_spacing=self.displacement_spacing,
            labels=self.labels,
            probabilities=self.probabilities,
            mask=np.packbits(self.mask),
            half_size=np.array(self.mask.shape),
            origin=self.origin,
            spacing=self.spacing,
        )


def load_atlas(path: Path | None = None, /) -> Atlas:
    """Read an atlas file; without a path, the one that ships with babyseg.

    Raises
    ------
    InputError
        If the file is missing, no atlas, or made for other labels.
    """
    path = path or Path(str(files('babyseg_bids').joinpath(SHIPPED)))
    try:
        with np.load(path) as archive:
            arrays = {k: archive[k] for k in archive.files}
        half = tuple(arrays['half_size'])
        known = int(arrays['format']) == FORMAT
        known &= np.array_equal(arrays['numbers'], label_table().indices)
        mask = np.unpackbits(arrays['mask'], count=int(np.prod(half))).reshape(half) > 0
    except (OSError, ValueError, KeyError, EOFError) as e:
        raise InputError(f'{path} cannot be read as an atlas of babyseg: {e}') from e
    if not known:
        raise InputError(f'{path} is an atlas of another version; use the one that ships.')
    return Atlas(
        ages=arrays['ages'],
        log_scale=arrays['log_scale'],
        displacement=arrays['displacement'],
        displacement_spacing=float(arrays['displacement_spacing']),
        labels=arrays['labels'],
        probabilities=arrays['probabilities'],
        mask=mask,
        origin=arrays['origin'],
        spacing=float(arrays['spacing']),
    )


def sample_label_map(
    atlas: Atlas, age_months: float, /, *, seed: int, spacing: float = 1.0, margin: float = 5.0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the label map of a brain that never was.

    The same seed at two ages gives the same individual, grown.

    Parameters
    ----------
    age_months : beyond the atlas' ages the nearest one is taken
    seed : of the individual
    spacing : voxel size, mm
    margin : background around the brain, mm

    Returns
    -------
    labels (X, Y, Z) int16, FreeSurfer numbers, and the affine (4, 4): RAS axes, mm
    """
    # Everything random is drawn in the common space, so that it does not depend on age or grid.
    draws = Draws(seed)
    size = draws.normal('size', SIZE_SD) + AXIS_SD * draws.table(3, normal=True)
    warp = random_displacement(
        atlas.size,
        amplitude=WARP_SD / atlas.spacing,
        points=WARP_POINTS,
        draws=draws,
    )
    scores = _scores(atlas, age_months, draws)

    blend = atlas.blend(age_months)
    scale = np.exp(blend @ atlas.log_scale + size)
    reach = 3 * WARP_SD
    start = (atlas.extent[0] - reach) * scale
    shape = np.ceil(((atlas.extent[1] + reach) * scale - start) / spacing).astype(int) + 1
    shift = np.tensordot(blend, atlas.displacement * np.float32(DISPLACEMENT_STEP), 1)
    channels = _draw(
        atlas, scores, warp, torch.from_numpy(shift).float(), start, scale, shape, spacing
    )
    box = ndimage.find_objects((channels > 0).astype(np.uint8))[0]
    channels = remove_specks(channels[box], np.arange(len(label_table())))

    pad = int(np.ceil(margin / spacing))
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = start + (np.array([s.start for s in box]) - pad) * spacing
    return label_table().indices[np.pad(channels, pad)], affine


def _scores(atlas: Atlas, age_months: float, draws: Draws) -> Tensor:
    """Log probabilities with smooth noise, (C, X, Y, Z), in the common space."""
    scores = torch.from_numpy(atlas.dense(age_months)).add_(FLOOR).log_()
    control = [max(2, round(s * atlas.spacing / NOISE_SPACING)) for s in atlas.size]
    for channel, row in zip(scores, label_table().rows, strict=True):
        channel.add_(THIN.get(row.tissue, 0.0))
        noise = draws.noise(1, *control)
        channel.add_(resize(noise, atlas.size)[0], alpha=NOISE_SD)
    return scores


def _draw(
    atlas: Atlas,
    scores: Tensor,
    warp: Tensor,
    shift: Tensor,
    start: np.ndarray,
    scale: np.ndarray,
    shape: np.ndarray,
    spacing: float,
) -> np.ndarray:
    """Most likely channel (*shape) uint8 of each voxel of the output grid.

    An output position is taken to the common size, moved by the individual's deformation, then by
    the age's mean shape.
    """
    axes = [
        torch.from_numpy(((a + spacing * np.arange(n)) / k - o) / atlas.spacing).float()
        for a, n, k, o in zip(start, shape, scale, atlas.origin, strict=True)
    ]
    where = torch.stack(torch.meshgrid(*axes, indexing='ij')).view(3, -1)
    out = torch.zeros(where.shape[1], dtype=torch.uint8)
    limit = torch.tensor(atlas.size).view(3, 1) - 1.0
    near = torch.from_numpy(ndimage.binary_dilation(atlas.mask, iterations=2))
    near = torch.cat([near, near.flip(0)[1:]])
    ratio = atlas.spacing / atlas.displacement_spacing
    for first in range(0, where.shape[1], _BLOCK):
        points = where[:, first : first + _BLOCK]
        points = points + _at(warp, points)
        points = points + _at(shift, points * ratio) / atlas.spacing
        nearest = torch.minimum(points.round().clamp_min(0), limit).long()
        chosen = near[tuple(nearest)].nonzero()[:, 0]
        if len(chosen):
            best = _at(scores, points[:, chosen]).argmax(0)
            out[first + chosen] = best.to(torch.uint8)
    return out.view(*shape.tolist()).numpy()


def _at(field: Tensor, points: Tensor) -> Tensor:
    """Values (C, P) of a field (C, X, Y, Z) at voxel coordinates (3, P)."""
    return sample_field(field, points[..., None, None])[..., 0, 0]


def build_atlas(label_map_dir: Path, out: Path) -> Atlas:
    """Compute the atlas from a folder of label maps named by age, and write it to `out`.

    See `babyseg_bids.synthesis.atlas_build`; takes about ten minutes on one core.
    """
    # Building needs ANTs, which takes seconds to import and which sampling does without.
    from babyseg_bids.synthesis.atlas_build import build

    atlas = build(Path(label_map_dir))
    try:
        atlas.save(Path(out))
    except OSError as e:
        raise OutputError(f'The atlas could not be written to {out}: {e}') from e
    return atlas


def layout(atlas: Atlas, /) -> pd.DataFrame:
    """Centre (x, y, z; mm, RAS) and volume (mm3) of each structure of the brain, by its number.

    The mean over the atlas's ages, symmetric as the atlas is, turned as the heads of the training
    maps stand. Structures that fields of view cut off and masks leave out are left out:
    cerebellum, brainstem and fourth ventricle.
    """
    c, s = np.cos(np.deg2rad(TRAINING_PITCH)), np.sin(np.deg2rad(TRAINING_PITCH))
    pitch = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    whole = [atlas.dense(float(age)) for age in atlas.ages]
    rows = []
    for channel, label in enumerate(label_table().rows):
        if not label.index or label.tissue in ('cerebellum', 'brainstem') or label.index == 15:
            continue
        volume = np.mean([p[channel].sum() for p in whole]) * atlas.spacing**3
        index = np.mean([ndimage.center_of_mass(p[channel]) for p in whole], 0)
        centre = atlas.origin + atlas.spacing * index
        rows.append((label.index, *np.round(pitch @ centre, 1), round(volume)))
    return pd.DataFrame(rows, columns=['index', 'x', 'y', 'z', 'volume'])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: `build DIR OUT` or `layout OUT`. Returns the exit code."""
    parser = argparse.ArgumentParser(prog='python -m babyseg_bids.synthesis.atlas')
    commands = parser.add_subparsers(dest='command', required=True)
    build = commands.add_parser('build', help='compute the atlas from label maps')
    build.add_argument('label_map_dir', type=Path, help='folder with maps named like 03mo.nii.gz')
    build.add_argument('out', type=Path, help='file to write, .npz')
    centres = commands.add_parser('layout', help="the shipped atlas's centres of the structures")
    centres.add_argument('out', type=Path, help='file to write, .tsv')
    arguments = parser.parse_args(argv)
    if arguments.command == 'layout':
        layout(load_atlas()).to_csv(arguments.out, sep='\t', index=False)
        return 0
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    try:
        build_atlas(arguments.label_map_dir, arguments.out)
    except BabySegError as e:
        print(e, file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == '__main__':
    sys.exit(main())
