"""Contrast: an intensity for every class, at random, by tissue, or from physics."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from babyseg_bids.synthesis.deformation import smooth_field
from babyseg_bids.synthesis.draws import Draws
from babyseg_bids.synthesis.maps import ClassTable
from babyseg_bids.synthesis.relaxation import draw_scanner
from babyseg_bids.synthesis.settings import ContrastSettings

# Typical intensities (0..1) of white matter, cortex, deep grey, ventricle, cerebellum, brainstem
# for weightings that a child's scan may have; each is jittered, so they only set the order.
WEIGHTINGS = {
    'adult T1': (0.85, 0.55, 0.65, 0.12, 0.60, 0.80),
    'newborn T1': (0.45, 0.60, 0.62, 0.15, 0.60, 0.65),
    'isointense T1': (0.60, 0.58, 0.64, 0.15, 0.60, 0.72),
    'adult T2': (0.35, 0.55, 0.45, 0.95, 0.52, 0.40),
    'newborn T2': (0.75, 0.48, 0.42, 0.95, 0.48, 0.42),
    'FLAIR': (0.50, 0.65, 0.60, 0.10, 0.62, 0.52),
}
TISSUE_ORDER = ('white-matter', 'cortex', 'deep-grey', 'ventricle', 'cerebellum', 'brainstem')
# A child's age is drawn up to here where the map does not say it, months.
OLDEST = 60.0
# Depth below the brain's hull at which white matter is most mature, mm.
DEEP = 25.0


@dataclass(frozen=True)
class Contrast:
    """Mean intensity of each class, (N,) in 0..1.

    Parameters
    ----------
    means : of the least mature white matter, where `mature` says something else
    mature : the same for the most mature, None where maturity is the same everywhere
    """

    means: np.ndarray
    mature: np.ndarray | None = None


def draw_contrast(
    table: ClassTable, settings: ContrastSettings, /, *, age: float | None, draws: Draws
) -> Contrast:
    """Draw a contrast in one of four ways.

    Parameters
    ----------
    age : of the anatomy, months; None for unknown
    """
    kinds = ('random', 'tissue', 'typical', 'physics')
    kind = draws.choice('contrast', kinds, settings.shares)
    if kind == 'physics':
        return _physics(table, settings, age, draws)
    if kind == 'random':
        means = random_means(table, draws=draws)
    else:
        weighting = draws.choice('weighting', list(WEIGHTINGS)) if kind == 'typical' else None
        means = tissue_means(table, weighting=weighting, draws=draws)
    if draws.chance('dark air', 0.7):
        means[0] = 0
    return Contrast(means)


def _physics(
    table: ClassTable, settings: ContrastSettings, age: float | None, draws: Draws
) -> Contrast:
    if age is None or draws.chance('any age', settings.any_age_probability):
        # Contrast changes fastest early, so early ages are drawn more often.
        age = OLDEST * draws.uniform('root of age', 0, 1) ** 2
    draws.log['age'] = round(age, 1)
    scanner = draw_scanner(
        table, field=settings.field_tesla, jitter=settings.relaxation_jitter, draws=draws
    )
    spread = 1 + draws.uniform('maturity', 0, settings.maturity_spread)
    young, old = scanner.means(age / spread), scanner.means(age * spread)
    brain = table.channel > 0
    top = max(young[brain].max(), old[brain].max(), 1e-9)
    # Fat may be brighter than any brain; it saturates.
    young, old = np.minimum(young / top, 1.3), np.minimum(old / top, 1.3)
    young[0] = old[0] = 0
    varies = np.isin(np.arange(len(table)), table.tissue('white-matter'))
    even = (young + old) / 2
    return Contrast(np.where(varies, young, even), np.where(varies, old, even))


def random_means(table: ClassTable, /, *, draws: Draws) -> np.ndarray:
    """Mean intensity of each class, (N,) in 0..1, the two sides mostly alike.

    All classes are independent (BabySeg's scheme); now and then sides differ too.
    """
    means = draws.table(len(table))
    if draws.chance('same on both sides', 0.9):
        means = means[np.minimum(np.arange(len(means)), table.mirror)]
    return means


def tissue_means(
    table: ClassTable, /, *, weighting: str | None = None, draws: Draws
) -> np.ndarray:
    """Mean intensity of each class, (N,), structures of one tissue close to each other.

    Parameters
    ----------
    weighting : a key of `WEIGHTINGS`; None for random tissue intensities
    """
    means = random_means(table, draws=draws)
    jitter = draws.table(len(TISSUE_ORDER), normal=True)
    if weighting is None:
        levels = draws.table(len(TISSUE_ORDER))
        # Cerebellum and brainstem resemble cortex and white matter in any contrast.
        levels[4] = levels[1] + 0.06 * jitter[4]
        levels[5] = levels[0] + 0.12 * jitter[5]
    else:
        levels = np.array(WEIGHTINGS[weighting]) + 0.06 * jitter
    # Real contrast between tissues is often a small part of the range, above all around birth.
    solid = [0, 1, 2, 4, 5]
    middle = levels[solid].mean()
    levels[solid] = middle + draws.uniform('strength', 0.25, 1) * (levels[solid] - middle)
    offset = draws.uniform('spread', 0.02, 0.12)
    for level, tissue in zip(levels, TISSUE_ORDER, strict=True):
        members = table.tissue(tissue)
        means[members] = level + offset * (2 * means[members] - 1)
    means[table.of(24)] = levels[3]  # CSF looks as it does in the ventricles.
    # White matter within the cerebellum looks like white matter (labels 7 and 46).
    means[table.of(7, 46)] = levels[0]
    return means.clip(0, 1.2)


def render(
    classes: Tensor,
    contrast: Contrast,
    /,
    *,
    settings: ContrastSettings,
    draws: Draws,
    distance: Tensor | None = None,
) -> Tensor:
    """Image (*size) of a Gaussian mixture with smooth variation inside the tissues.

    Each class draws its own deviation and its own amplitude of the variation. Some classes are
    split in two parts of different intensity along a smooth border.

    Parameters
    ----------
    classes : (*size) int32
    distance : (*size), signed distance to the brain's hull, mm; needed where maturity varies
    """
    n, device = len(contrast.means), classes.device
    flat = classes.reshape(-1)
    means = contrast.means
    # Dark air has no texture; its noise comes with the acquisition.
    varied = np.ones(n)
    varied[0] = contrast.means[0] > 0
    if draws.chance('split', settings.split_probability):
        border = smooth_field(
            classes.shape, points=draws.integer('split points', 4, 16), draws=draws
        )
        flat = torch.add(flat, (border.view(-1) > 0).int(), alpha=n)
        change = draws.table(n, normal=True) * settings.split_sd * (draws.table(n) < 0.5)
        means = np.concatenate([means, means + change * varied])
    parts = len(means) // n

    def lookup(values: np.ndarray) -> Tensor:
        table = torch.from_numpy(np.tile(values, len(means) // len(values))).float().to(device)
        return table.index_select(0, flat)

    image = lookup(means)
    deviations = settings.noise_in_class * draws.table(n) * varied
    image.addcmul_(draws.noise(flat.numel()), lookup(np.tile(deviations, parts)))
    if settings.texture:
        points = draws.integer('texture points', 3, 12)
        field = smooth_field(classes.shape, points=points, draws=draws)
        image.addcmul_(field.view(-1), lookup(settings.texture * draws.table(n) * varied))
    if contrast.mature is not None and distance is not None:
        progress = maturity(distance, draws=draws)
        image.addcmul_(progress.view(-1), lookup(contrast.mature - contrast.means))
    return image.view(classes.shape)


def maturity(distance: Tensor, /, *, draws: Draws) -> Tensor:
    """How far white matter has matured, (*size) in 0..1: first in the centre and at the back.

    Parameters
    ----------
    distance : (*size), signed distance to the brain's hull, mm; the second axis from posterior to
        anterior
    """
    depth = distance * (-1 / DEEP)
    n = distance.shape[1]
    backwards = torch.linspace(0.5, -0.5, n, device=distance.device)
    view = [-1 if i == 1 else 1 for i in range(distance.ndim)]
    tilt = draws.uniform('back to front', 0, 1)
    wobble = smooth_field(distance.shape, points=6, draws=draws)[0]
    return depth.add_(tilt * backwards.view(view)).add_(wobble, alpha=0.15).clamp_(0, 1)
