"""What lies around the brain: layers of a head, stripped borders, and parts that are missing.

Classes are int32 (*size) in the map's own axes (right, anterior, superior), distances are signed
distances to the brain's hull in mm, negative inside.
"""

import torch
from torch import Tensor

from babyseg_bids.synthesis.deformation import smooth_field
from babyseg_bids.synthesis.draws import Draws
from babyseg_bids.synthesis.maps import CSF, DURA, MARROW, MUSCLE, SCALP, SKULL, ClassTable
from babyseg_bids.synthesis.settings import SurroundingsSettings

# Resolution of the borders of layers, mm.
STEP = 0.25


def add_layers(
    classes: Tensor,
    distance: Tensor,
    settings: SurroundingsSettings,
    /,
    *,
    table: ClassTable,
    draws: Draws,
) -> Tensor:
    """Put CSF rim, dura, skull with marrow, scalp and soft tissue around a brain without a head.

    Returns
    -------
    (*size) int32; where `classes` was not zero it is as before
    """
    wobble = smooth_field(classes.shape, points=6, draws=draws)[0]
    csf, skull, marrow, scalp, muscle, dura = table.of(CSF, SKULL, MARROW, SCALP, MUSCLE, DURA)
    csf_end = draws.uniform('csf', *settings.csf)
    bone = draws.uniform('skull', *settings.skull)
    skin = draws.uniform('scalp', *settings.scalp)
    # One uneven distance serves all layers, so that they run in parallel.
    d = distance - wobble.mul(0.3 * csf_end)
    ends = [
        (csf_end, csf),
        (csf_end + bone / 3, skull),
        (csf_end + 2 * bone / 3, marrow),
        (csf_end + bone, skull),
        (csf_end + bone + skin, scalp),
    ]
    if draws.chance('dura', settings.dura_probability):
        ends.insert(1, (csf_end + 0.8, dura))
    outermost = ends[-1][0]
    # Distances become steps, and a table says what lies there: one look-up instead of comparisons.
    labels = torch.zeros(int(outermost / STEP) + 2, dtype=torch.int32)
    inner = 0
    for end, label in ends:
        labels[inner : int(end / STEP) + 1] = label
        inner = int(end / STEP) + 1
    steps = d.div(STEP).clamp_(0, len(labels) - 1).int()
    out = labels.to(d.device).index_select(0, steps.view(-1)).view(d.shape)
    if draws.chance('body', settings.body_probability):
        out.masked_fill_(_body(d, wobble, draws=draws) & (out == 0), muscle)
    return torch.where(classes == 0, out, classes)


def _body(distance: Tensor, wobble: Tensor, /, *, draws: Draws) -> Tensor:
    """Soft tissue of face, neck and shoulders below and in front of the brain, (*size) bool."""
    dim = distance.ndim
    height = _ramp(distance, dim - 1)
    front = _ramp(distance, 1)
    face = draws.uniform('face', 0.2, 1.0)
    start = draws.uniform('neck', -0.9, -0.1)
    lower = height + 0.2 * wobble < start - 0.5 * (front - face).clamp_max(0.3)
    # The neck is narrower than the shoulders, which fill the grid's lower end.
    reach = draws.uniform('neck width', 15, 45)
    shoulders = draws.uniform('shoulders', -1.6, -0.8)
    return lower & ((distance < reach) | (height < shoulders))


def _ramp(x: Tensor, axis: int) -> Tensor:
    """From -1 to 1 along one axis, in a shape that broadcasts."""
    n = x.shape[axis]
    return torch.linspace(-1, 1, n, device=x.device).view(
        [-1 if i == axis else 1 for i in range(x.ndim)]
    )


def strip_skull(
    classes: Tensor,
    distance: Tensor,
    settings: SurroundingsSettings,
    /,
    *,
    table: ClassTable,
    draws: Draws,
) -> Tensor:
    """Mask (*size) bool of what a brain extraction leaves.

    Either just the labelled structures, or what lies within a smooth, wobbling border that may be
    too tight or too loose.
    """
    if draws.chance('exact strip', settings.exact_strip_share):
        return brain_mask(classes, table)
    limit = draws.uniform('strip margin', *settings.strip_margin)
    wobble = smooth_field(classes.shape, points=draws.integer('strip points', 5, 14), draws=draws)
    return distance <= wobble[0].mul_(settings.strip_wobble).add_(limit)


def brain_mask(classes: Tensor, table: ClassTable, /) -> Tensor:
    """Where a class belongs to one of the network's structures, (*size) bool."""
    inside = torch.from_numpy(table.channel > 0).to(classes.device)
    return inside.index_select(0, classes.reshape(-1)).view(classes.shape)


def without_hindbrain(classes: Tensor, /, *, table: ClassTable, draws: Draws) -> Tensor:
    """Mask (*size) bool of what is left when cerebellum and brainstem are cut away.

    Now and then the upper part of the brainstem stays.
    """
    lost = torch.zeros(len(table), dtype=torch.bool)
    lost[table.tissue('cerebellum') + table.of(15)] = True
    gone = lost.to(classes.device).index_select(0, classes.reshape(-1)).view(classes.shape)
    stem = classes == table.of(16)[0]
    if draws.chance('stem stays', 0.3) and bool(stem.any()):
        levels = stem.flatten(0, -2).any(0).nonzero()[:, 0]
        cut = draws.uniform('stem cut', float(levels[0]), float(levels[-1]))
        stem &= torch.arange(classes.shape[-1], device=classes.device) < cut
    return ~(gone | stem)


def slab(size: tuple[int, ...], share: tuple[float, float], /, *, draws: Draws) -> Tensor:
    """Field of view (*size) bool that ends before the grid does, at one side of one axis."""
    axis = draws.integer('crop axis', 0, len(size) - 1)
    position = torch.arange(size[axis]).view([-1 if i == axis else 1 for i in range(len(size))])
    width = round(size[axis] * draws.uniform('crop', *share))
    if draws.chance('crop low', 0.5):
        position = size[axis] - 1 - position
    return (position < width).expand(*size)


def deface(distance: Tensor, /, *, spacing: float, draws: Draws) -> Tensor:
    """Mask (*size) bool of a head without its face: a plane in front of and below the brain."""
    where = torch.stack(
        [a.expand(distance.shape) for a in (_mm(distance, 1, spacing), _mm(distance, -1, spacing))]
    )
    tilt = draws.uniform('deface tilt', 0.3, 1.2)
    height = where[0] - tilt * where[1]
    inside = height[distance <= 0]
    if not len(inside):
        return torch.ones_like(distance, dtype=torch.bool)
    return (height < inside.max() + draws.uniform('deface margin', 2, 15)) | (distance <= 2)


def _mm(x: Tensor, axis: int, spacing: float) -> Tensor:
    axis %= x.ndim
    at = torch.arange(x.shape[axis], device=x.device) * spacing
    return at.view([-1 if i == axis else 1 for i in range(x.ndim)])


def occlusions(size: tuple[int, ...], /, *, most: int, draws: Draws) -> Tensor:
    """Mask (*size) bool without some boxes or planes."""
    left = torch.ones(size, dtype=torch.bool)
    for i in range(draws.integer('occlusions', 1, most)):
        inner = draws.scope(f'occlusion {i + 1}')
        plane = inner.chance('plane', 0.5)
        axis = inner.integer('axis', 0, len(size) - 1)
        box = []
        for a, n in enumerate(size):
            if plane and a != axis:
                box.append(slice(None))
                continue
            width = 1 + int((0.03 if plane else 0.3) * n * float(draws.table(1)[0]))
            start = int(draws.table(1)[0] * (n - width))
            box.append(slice(start, start + width))
        left[tuple(box)] = False
    return left
