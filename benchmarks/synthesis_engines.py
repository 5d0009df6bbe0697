"""The engines that `synthesis.py` compares: babyseg, and chains of MONAI and TorchIO.

Where a library leaves a choice, the faster reasonable way was taken; comments say which. Each
builder imports what it needs itself: memory is each engine's own, and any may be missing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Strengths of the transforms, about those of babyseg; hardly any changes the time.
FIELD_OF_VIEW = 192.0  # mm
ROTATION_DEG, SHIFT_MM, SHEAR = 20.0, 12.0, 0.08
SCALE = (0.85, 1.2)
WARP_MM, WARP_POINTS = 3.5, 9
BLUR_MM = (0.1, 1.2)
ZOOM = (0.5, 1.0)
BIAS, NOISE = 0.35, 0.08
GAMMA = (0.7, 1.4)

Draw = Callable[[int], tuple[Tensor, Tensor]]
"""From a seed to an image (*size) and its labels (*size)."""


def build_babyseg(source: Any, size: int) -> Draw:
    """`draw_sample` with its defaults, one scan a sample; `source` is a list of `TrainingMap`."""
    from babyseg_bids.synthesis.generator import draw_sample
    from babyseg_bids.synthesis.settings import load_settings

    settings = replace(
        load_settings(), size=(size,) * 3, spacing=FIELD_OF_VIEW / size, group_shares=(1.0,)
    )

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        sample = draw_sample(source, seed=seed, settings=settings)
        return sample.images[0], sample.target

    return draw


def build_monai(source: np.ndarray, size: int, *, elastic: bool = False) -> Draw:
    """Warp, mixture and artefacts of MONAI for the classes (X, Y, Z) uint8 of a map."""
    import monai.transforms as mt
    from monai.data import set_track_meta

    # Plain tensors all the way: nobody reads the metadata, and it costs time.
    set_track_meta(False)
    labels = torch.from_numpy(source).float()[None]
    classes = int(labels.max()) + 1
    warp = (monai_elastic if elastic else monai_coarse_warp)(size)
    artefacts = mt.Compose(
        [
            mt.RandGaussianSmooth(
                *(tuple(s * size / FIELD_OF_VIEW for s in BLUR_MM),) * 3, prob=1
            ),
            mt.RandSimulateLowResolution(zoom_range=ZOOM, prob=1),
            mt.RandBiasField(coeff_range=(-BIAS, BIAS), prob=1),
            # Rician noise, as babyseg has it, takes twice the time of this.
            mt.RandGaussianNoise(std=NOISE, prob=1),
            mt.RandAdjustContrast(gamma=GAMMA, prob=1),
        ]
    )

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        artefacts.set_random_state(seed)
        index = warp(labels, seed).long()
        return artefacts(mixture(index, classes))[0], index[0]

    return draw


def mixture(index: Tensor, classes: int) -> Tensor:
    """One Gaussian a class, with one draw a voxel: MONAI has no transform for it."""
    means, sds = torch.rand(classes), 0.1 * torch.rand(classes)
    return torch.addcmul(
        torch.take(means, index), torch.take(sds, index), torch.randn(index.shape)
    )


def monai_affine(size: int) -> dict[str, Any]:
    """Ranges of MONAI's random affine maps, which also turn output voxels into those of 1 mm."""
    spacing = FIELD_OF_VIEW / size
    # MONAI adds one to what it draws as the scale, and shifts after it has scaled.
    scale = tuple(spacing * s - 1 for s in SCALE)
    return {
        'rotate_range': (math.radians(ROTATION_DEG),) * 3,
        'shear_range': (SHEAR,) * 6,
        'translate_range': (SHIFT_MM,) * 3,
        'scale_range': (scale,) * 3,
    }


def monai_coarse_warp(size: int) -> Callable[[Tensor, int], Tensor]:
    """Affine map and deformation in one resampling, from displacements of a few control points.

    MONAI's own Rand2DElastic works this way; its 3-D transform does not (see `monai_elastic`), so
    this is put together from the same parts, and many times faster. The affine map is applied to
    the control points, which gives the same and costs nothing.
    """
    import monai.transforms as mt

    affine = mt.RandAffineGrid(**monai_affine(size))
    # The default is double precision, which labels do not need.
    resample = mt.Resample(mode='nearest', padding_mode='zeros', dtype=torch.float32)
    distance = (size - 1) / (WARP_POINTS - 1)
    amplitude = WARP_MM * size / FIELD_OF_VIEW

    def warp(labels: Tensor, seed: int) -> Tensor:
        affine.set_random_state(seed)
        points = mt.create_grid(
            (WARP_POINTS,) * 3, (distance,) * 3, dtype=torch.float32, backend='torch'
        )
        points[:3] += amplitude * torch.randn(points[:3].shape)
        points = affine(grid=points)[None, :3]
        grid = F.interpolate(points, size=(size,) * 3, mode='trilinear', align_corners=True)[0]
        return resample(labels, grid)

    return warp


def monai_elastic(size: int) -> Callable[[Tensor, int], Tensor]:
    """Affine map and deformation with the ready transform: noise a voxel, smoothed densely.

    These sigmas, in voxels, are the usual choice; with them, displacements are some 4 mm at most
    in standard deviation. The smoothing takes gigabytes at large sizes.
    """
    import monai.transforms as mt

    transform = mt.Rand3DElastic(
        sigma_range=(5, 8),
        magnitude_range=(2 * size, 4 * size),
        prob=1,
        spatial_size=(size,) * 3,
        mode='nearest',
        padding_mode='zeros',
        **monai_affine(size),
    )

    def warp(labels: Tensor, seed: int) -> Tensor:
        transform.set_random_state(seed)
        return transform(labels)

    return warp


def build_monai_elastic(source: np.ndarray, size: int) -> Draw:
    """The same with MONAI's ready 3-D deformation, as most would write it."""
    return build_monai(source, size, elastic=True)


def build_torchio(source: np.ndarray, size: int) -> Draw:
    """TorchIO's label-to-image chain for the classes (X, Y, Z) uint8 of a map."""
    import torchio as tio

    # Its warp keeps the grid, so the map is brought to the output's once, before the clock starts.
    prepare = tio.Compose([tio.Resample(FIELD_OF_VIEW / size), tio.CropOrPad(size)])
    prepared = prepare(tio.LabelMap(tensor=torch.from_numpy(source)[None]))
    tensor, affine = prepared.data, prepared.affine
    # Copies between the steps are not needed: each sample starts with a subject of its own.
    kept = {'copy': False}
    linear = {'scales': SCALE, 'degrees': ROTATION_DEG, 'translation': SHIFT_MM}
    chain = tio.Compose(
        [
            # RandomAffine and RandomElasticDeformation with one resampling instead of two.
            tio.RandomAffineElasticDeformation(affine_kwargs=linear, **kept),
            tio.RandomLabelsToImage(label_key='labels', image_key='image', **kept),
            tio.RandomBlur(std=BLUR_MM, **kept),
            tio.RandomAnisotropy(downsampling=(1 / ZOOM[1], 1 / ZOOM[0]), **kept),
            tio.RandomBiasField(coefficients=BIAS, **kept),
            tio.RandomNoise(std=(0, NOISE), **kept),
            tio.RandomGamma(log_gamma=tuple(math.log(g) for g in GAMMA), **kept),
        ],
        **kept,
    )

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        subject = chain(tio.Subject(labels=tio.LabelMap(tensor=tensor, affine=affine)))
        return subject['image'].data[0], subject['labels'].data[0]

    return draw


@dataclass(frozen=True)
class Engine:
    """What is compared: its name in the table, the module it needs, and how to build it.

    One that is not `usual` runs only where it is asked for.
    """

    title: str
    module: str
    build: Callable[[Any, int], Draw]
    usual: bool = True


REFERENCE = 'monai'
"""The engine that all others are compared with."""
# In the order of the table: the reference comes first.
ENGINES = {
    REFERENCE: Engine('MONAI, coarse warp (reference)', 'monai', build_monai),
    'monai-elastic': Engine('MONAI, Rand3DElastic', 'monai', build_monai_elastic, usual=False),
    'torchio': Engine('TorchIO', 'torchio', build_torchio),
    'babyseg': Engine('babyseg, all defaults', 'babyseg_bids', build_babyseg),
}
