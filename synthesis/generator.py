"""Draw training samples: a group of images of one random anatomy, and its label map."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from babyseg_bids.network.intensity import normalise
from babyseg_bids.synthesis import surroundings
from babyseg_bids.synthesis.acquisition import acquire
from babyseg_bids.synthesis.anatomy import Anatomy, draw_anatomy
from babyseg_bids.synthesis.contrast import draw_contrast, render
from babyseg_bids.synthesis.draws import Draws
from babyseg_bids.synthesis.kspace import rigid_labels
from babyseg_bids.synthesis.maps import ClassTable, TrainingMap, class_table
from babyseg_bids.synthesis.settings import SynthesisSettings


@dataclass(frozen=True)
class Sample:
    """A group of images and their label map.

    Parameters
    ----------
    images : (G, *size) float32 in 0..1
    target : (*size) int64, network channels
    record : the seed, and every choice that was made by name; with the same maps and settings
        `draw_sample(maps, seed=record['seed'])` draws the sample again
    """

    images: Tensor
    target: Tensor
    record: Mapping[str, object]


def draw_sample(
    maps: Sequence[TrainingMap],
    /,
    *,
    seed: int,
    settings: SynthesisSettings | None = None,
    table: ClassTable | None = None,
    device: torch.device | str = 'cpu',
) -> Sample:
    """Draw one sample; the same maps, settings and seed give the same bits on a device.

    Parameters
    ----------
    maps : prepared maps to choose from, with as many axes as the settings' size
    seed : seed of all random choices
    device : where the sample is drawn and stays
    """
    settings = settings or SynthesisSettings()
    table = table or class_table()
    draws = Draws(seed, device=device)
    anatomy = draw_anatomy(maps, settings=settings, table=table, draws=draws.scope('anatomy'))
    classes, visible = dress(anatomy, settings, table=table, draws=draws.scope('surroundings'))
    counts = range(1, len(settings.group_shares) + 1)
    scans = draws.choice('scans', counts, settings.group_shares)
    inner = draws.scope('group')
    ruined = None
    if scans > 1 and inner.chance('ruined', settings.group.ruined_probability):
        ruined = inner.integer('ruined scan', 1, scans) - 1
    images, views = [], []
    for i in range(scans):
        image, view = draw_scan(
            classes,
            visible,
            anatomy,
            _ruin(settings) if i == ruined else settings,
            table=table,
            first=i == 0,
            draws=draws.scope(f'scan {i + 1}'),
        )
        images.append(image)
        views.append(view)
    seen = views[0]
    for view in views[1:]:
        seen = seen | view
    channel = torch.from_numpy(table.channel).to(classes.device)
    target = channel.index_select(0, classes.view(-1)).view(classes.shape) * seen
    return Sample(torch.stack(images), target, {'seed': seed, **draws.log})


def _ruin(settings: SynthesisSettings, /) -> SynthesisSettings:
    """Settings of a scan that is of no use: the child moved all the time, and little signal."""
    acquisition = replace(
        settings.acquisition,
        motion_probability=1.0,
        motion_moves=16,
        motion_shift=20.0,
        motion_rotation=20.0,
        ghost_probability=1.0,
        ghost=(0.2, 0.6),
        noise=(0.1, 0.3),
    )
    return replace(settings, acquisition=acquisition)


def dress(
    anatomy: Anatomy, settings: SynthesisSettings, /, *, table: ClassTable, draws: Draws
) -> tuple[Tensor, Tensor]:
    """Decide what lies around a brain and what of it all scans of the child show.

    Returns
    -------
    classes : (*size) int32
    visible : (*size) bool
    """
    s = settings.surroundings
    classes = anatomy.classes
    if not anatomy.has_head:
        classes = surroundings.add_layers(
            classes, anatomy.distance, s, table=table, draws=draws.scope('layers')
        )
    head = draws.chance('head', s.head_probability)
    if head:
        visible = torch.ones(classes.shape, dtype=torch.bool, device=classes.device)
        if draws.chance('defaced', s.deface_probability):
            visible = surroundings.deface(anatomy.distance, spacing=settings.spacing, draws=draws)
    else:
        visible = surroundings.strip_skull(classes, anatomy.distance, s, table=table, draws=draws)
    # Whoever keeps the skull rarely cuts the hindbrain away.
    hindbrain = s.hindbrain_missing_probability * (0.1 if head else 1)
    if draws.chance('hindbrain missing', hindbrain):
        visible &= surroundings.without_hindbrain(classes, table=table, draws=draws)
    if draws.chance('crop', s.crop_probability):
        shape = tuple(classes.shape)
        visible &= surroundings.slab(shape, s.crop_share, draws=draws).to(visible.device)
    if draws.chance('occluded', s.occlusion_probability):
        shape = tuple(classes.shape)
        left = surroundings.occlusions(shape, most=s.occlusions, draws=draws)
        visible &= left.to(visible.device)
    return classes, visible


def draw_scan(
    classes: Tensor,
    visible: Tensor,
    anatomy: Anatomy,
    settings: SynthesisSettings,
    /,
    *,
    table: ClassTable,
    first: bool = True,
    draws: Draws,
) -> tuple[Tensor, Tensor]:
    """Draw one scan of an anatomy, with a contrast and artefacts of its own.

    Parameters
    ----------
    classes : (*size) int32
    visible : (*size) bool, what all scans of the child show
    first : whether labels and this scan agree exactly; others may lie a little differently

    Returns
    -------
    image : (*size) in 0..1
    view : (*size) bool, what this scan shows
    """
    group, spacing = settings.group, settings.spacing
    seen = visible
    shape = tuple(classes.shape)
    if not first and draws.chance('own view', group.own_view_probability):
        own = surroundings.slab(shape, settings.surroundings.crop_share, draws=draws)
        seen = visible & own.to(visible.device)
    shown, moved = classes, seen
    if not first and draws.chance('misaligned', group.misalign_probability):
        angles = group.misalign_rotation * draws.vector(
            'misalignment, degrees', -1, 1, 1 if len(shape) == 2 else 3
        )
        offset = draws.vector('misalignment, mm', -1, 1, len(shape)) * group.misalign / spacing
        shown, moved = rigid_labels([classes, seen], angles, offset)
    inner = draws.scope('contrast')
    contrast = draw_contrast(table, settings.contrast, age=anatomy.age, draws=inner)
    image = render(
        shown, contrast, settings=settings.contrast, distance=anatomy.distance, draws=inner
    )
    # Negative intensities of the mixture do not exist in magnitude images.
    image = image.clamp_min_(0).mul_(moved)
    inner = draws.scope('acquisition')
    scan, view = acquire(image, settings.acquisition, spacing=spacing, draws=inner)
    if view is not None:
        seen = seen & view.to(seen.device)
    masked = inner.chance('masked', settings.acquisition.masked_probability)
    if masked and not bool(moved.all()):
        scan = scan.mul_(moved)
    return normalise(scan), seen
