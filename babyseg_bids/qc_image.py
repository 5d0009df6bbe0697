"""Quality measures of the scan itself: pure functions, each with its source and formula.

Nearly all need the brain alone, because scans of infants are often skull-stripped.
"""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
from scipy import ndimage

from babyseg_bids.labels import LabelTable

# Fewer voxels say nothing about a distribution.
FEWEST_VOXELS = 30

# The median absolute deviation of a normal distribution, in standard deviations.
NORMAL_MAD = 0.6745

# More voxels do not move the fitted field by a noticeable amount.
FIELD_VOXELS = 40_000

BRAIN_TISSUES = ('white-matter', 'cortex', 'deep-grey')


def signal_to_noise(values: np.ndarray, /) -> float:
    """Signal to noise inside one tissue: median / (sd * sqrt(n / (n - 1))).

    The formula of MRIQC (Esteban et al., PLoS ONE 2017) with the spread of the tissue itself,
    because skull-stripped scans have no air to measure noise in. NaN below 30 voxels.
    """
    n = values.size
    if n < FEWEST_VOXELS:
        return float('nan')
    spread = float(values.std()) * np.sqrt(n / (n - 1))
    return float(np.median(values)) / spread if spread > 0 else float('nan')


def contrast_to_noise(a: np.ndarray, b: np.ndarray, /) -> float:
    """Contrast of two tissues: |mean(a) - mean(b)| / sqrt(var(a) + var(b)).

    After Magnotta and Friedman (J Digit Imaging 2006), without the air term.
    """
    if min(a.size, b.size) < FEWEST_VOXELS:
        return float('nan')
    spread = np.sqrt(a.var(dtype=np.float64) + b.var(dtype=np.float64))
    gap = abs(a.mean(dtype=np.float64) - b.mean(dtype=np.float64))
    return float(gap / spread) if spread > 0 else float('nan')


def noise_sigma(image: np.ndarray, mask: np.ndarray, /) -> float:
    """Standard deviation of the noise, in grey values: median(|d|) / 0.6745.

    d is the diagonal detail of a Haar wavelet: the alternating sum of a cube of 2 voxels a side,
    divided by sqrt(8); cubes inside the mask count (Donoho, IEEE Trans Inf Theory 1995; for MRI
    Coupe et al., Med Image Anal 2010). Resampling smooths noise away, so that it is a lower bound.
    """
    detail = np.asarray(image, np.float64)
    inside = np.asarray(mask, bool)
    for axis in range(3):
        detail = np.diff(detail, axis=axis)
        first = inside.take(range(inside.shape[axis] - 1), axis)
        inside = first & inside.take(range(1, inside.shape[axis]), axis)
    if inside.sum() < FEWEST_VOXELS:
        return float('nan')
    return float(np.median(np.abs(detail[inside])) / np.sqrt(8) / NORMAL_MAD)


def _polynomial(points: np.ndarray) -> np.ndarray:
    """The nine terms of a quadratic in three coordinates, (N, 9)."""
    x, y, z = points.T
    return np.stack([x, y, z, x * x, y * y, z * z, x * y, x * z, y * z], axis=1)


def bias_field_percent(tissues: np.ndarray, image: np.ndarray, affine: np.ndarray, /) -> float:
    """Strength of the smooth intensity field in percent: 100 (exp(q95 - q5) - 1).

    log(grey value) = constant of its tissue + quadratic polynomial in space, fitted by least
    squares and twice again without residuals beyond 2.5 robust standard deviations (a log-linear
    model as of Van Leemput et al., IEEE TMI 1999, with fixed labels). q95 and q5 are quantiles of
    the polynomial over the voxels.

    Parameters
    ----------
    tissues : (X, Y, Z) integer ndarray
        One number a tissue, 0 outside. Tissues of one number share a constant.
    """
    positive = (tissues > 0) & (image > 0)
    voxels = np.argwhere(positive)
    voxels = voxels[:: max(1, len(voxels) // FIELD_VOXELS)]
    if len(voxels) < 10 * FEWEST_VOXELS:
        return float('nan')
    values = np.log(image[tuple(voxels.T)].astype(np.float64))
    kinds = tissues[tuple(voxels.T)]
    points = voxels @ np.asarray(affine, float)[:3, :3].T
    points = (points - points.mean(0)) / np.maximum(points.std(0), 1e-6)
    intercepts = (kinds[:, None] == np.unique(kinds)).astype(float)
    field = _polynomial(points)
    design = np.hstack([intercepts, field])
    keep = np.ones(len(values), bool)
    for _ in range(3):
        weights, *_ = np.linalg.lstsq(design[keep], values[keep], rcond=None)
        rest = values - design @ weights
        spread = np.median(np.abs(rest - np.median(rest))) / NORMAL_MAD
        keep = np.abs(rest) <= max(2.5 * spread, 1e-9)
    low, high = np.quantile(field @ weights[intercepts.shape[1] :], [0.05, 0.95])
    return float(100 * np.expm1(min(high - low, 10.0)))


def edge_width_mm(
    white: np.ndarray, cortex: np.ndarray, image: np.ndarray, affine: np.ndarray, /
) -> float:
    """Width in mm of the border of white matter and cortex: |contrast| / median gradient.

    The contrast is that of the medians, the gradient (grey values per mm) that of the voxels of
    either tissue that touch the other. The inverse of the average edge strength (Pannetier et al.,
    PLoS ONE 2016), and comparable between contrasts; blur and motion widen it. NaN where the
    tissues differ by less than their spread, as the border is then invisible.
    """
    if not contrast_to_noise(image[white], image[cortex]) >= 0.5:
        return float('nan')
    cross = ndimage.generate_binary_structure(3, 1)
    border = (white & ndimage.binary_dilation(cortex, cross)) | (
        cortex & ndimage.binary_dilation(white, cross)
    )
    if border.sum() < FEWEST_VOXELS:
        return float('nan')
    steps = np.linalg.inv(np.asarray(affine, float)[:3, :3])
    parts = np.stack([g[border] for g in np.gradient(image.astype(np.float64))], axis=1)
    slope = float(np.median(np.linalg.norm(parts @ steps, axis=1)))
    gap = abs(float(np.median(image[white])) - float(np.median(image[cortex])))
    return gap / slope if slope > 0 else float('nan')


def smoothness_mm(image: np.ndarray, mask: np.ndarray, affine: np.ndarray, /) -> float:
    """Effective resolution in mm: geometric mean over the axes of the smoothness (FWHM).

    FWHM = spacing * sqrt(-2 ln 2 / ln(1 - var(difference) / (2 var(image)))) of neighbours inside
    the mask (Forman et al., Magnetic Resonance in Medicine 1995). NaN where there is no
    correlation to measure.
    """
    zooms = np.linalg.norm(np.asarray(affine, float)[:3, :3], axis=0)
    image = np.asarray(image, np.float64)
    if mask.sum() < FEWEST_VOXELS or (total := float(image[mask].var())) <= 0:
        return float('nan')
    widths = []
    for axis in range(3):
        n = mask.shape[axis]
        inside = mask.take(range(n - 1), axis) & mask.take(range(1, n), axis)
        if inside.sum() < FEWEST_VOXELS:
            return float('nan')
        share = float(np.diff(image, axis=axis)[inside].var()) / (2 * total)
        if not 0 < share < 1:
            return float('nan')
        widths.append(zooms[axis] * np.sqrt(-2 * np.log(2) / np.log(1 - share)))
    return float(np.prod(widths) ** (1 / 3))


def stripe_ratio(image: np.ndarray, mask: np.ndarray, /) -> float:
    """Motion indicator: fine variation along the roughest axis over that along the smoothest.

    The fine variation of a voxel axis is the squared median absolute second difference inside the
    mask (white matter, where anatomy has little of it). Noise is alike along all axes (ratio 1);
    motion disturbs the phase-encoding direction and leaves stripes across it. Thick slices and
    resampling raise the ratio, too.
    """
    powers = []
    for axis in range(3):
        n = mask.shape[axis]
        if n < 3:
            return float('nan')
        inside = (
            mask.take(range(n - 2), axis)
            & mask.take(range(1, n - 1), axis)
            & mask.take(range(2, n), axis)
        )
        if inside.sum() < FEWEST_VOXELS:
            return float('nan')
        second = np.diff(np.asarray(image, np.float64), n=2, axis=axis)
        powers.append(float(np.median(np.abs(second[inside]))) ** 2)
    return max(powers) / min(powers) if min(powers) > 0 else float('nan')


def ghost_share(image: np.ndarray, brain: np.ndarray, /) -> float:
    """Ghost to signal ratio: (mean of ghosts - mean of other air) / median of the brain.

    Ghosts are sought where the head, moved by half the field of view along an axis, falls on air;
    the axis with the largest ratio counts (Giannelli et al., J Appl Clin Med Phys 2010). The head
    is what is brighter than a tenth of the brain's median, filled, with a margin of 3 voxels. NaN
    for skull-stripped scans, whose air is empty.
    """
    if brain.sum() < FEWEST_VOXELS:
        return float('nan')
    if np.mean(image[~brain] != 0) < 0.5:
        return float('nan')
    signal = float(np.median(image[brain]))
    head = ndimage.binary_fill_holes(ndimage.binary_opening(image > 0.1 * signal))
    head = ndimage.binary_dilation(head | brain, iterations=3)
    air = ~head
    if signal <= 0 or air.sum() < 1000:
        return float('nan')
    shares = []
    for axis in range(3):
        ghost = np.roll(head, head.shape[axis] // 2, axis) & air
        rest = air & ~ghost
        if min(ghost.sum(), rest.sum()) >= 1000:
            shares.append(float(image[ghost].mean() - image[rest].mean()) / signal)
    return max(shares, default=float('nan'))


def flat_cut_share(mask: np.ndarray, affine: np.ndarray, /) -> float:
    """Largest flat end of the brain, as a share of its largest cross-section on the same axis.

    The ends are the first and the last brain voxel of each line along the axis; counted is how
    many lie in one plane. Rounded brains end gradually: a sphere of radius r ends by 2 h / r of
    its cross-section in one slice of thickness h. That much is subtracted, with r of a circle of
    the largest cross-section. A missing part that was filled with zeros, or that lies outside the
    field of view, remains.
    """
    zooms = np.linalg.norm(np.asarray(affine, float)[:3, :3], axis=0)
    worst = 0.0
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        largest = int(mask.sum(axis=others).max(initial=0))
        if not largest:
            return float('nan')
        filled = mask.any(axis)
        ends = max(
            int(np.bincount(np.flip(mask, axis).argmax(axis)[filled]).max()),
            int(np.bincount(mask.argmax(axis)[filled]).max()),
        )
        radius = np.sqrt(largest * zooms.prod() / zooms[axis] / np.pi)
        worst = max(worst, ends / largest - 2 * zooms[axis] / radius)
    return float(worst)


def scan_metrics(
    labels: np.ndarray, image: np.ndarray, affine: np.ndarray, table: LabelTable, /
) -> dict[str, float]:
    """All measures of the scan that need the brain alone, by name.

    Parameters
    ----------
    labels, image : (X, Y, Z) ndarray
        Label map and scan, cropped to the brain.
    """
    image = np.asarray(image, np.float64)
    number = {t: i for i, t in enumerate(dict.fromkeys(r.tissue for r in table.structures), 1)}
    lut = np.zeros(int(table.indices.max()) + 1, np.uint8)
    for row in table.structures:
        lut[row.index] = number[row.tissue]
    tissues = lut[np.where((labels > 0) & (labels < lut.size), labels, 0)]
    masks: Mapping[str, np.ndarray] = {t: tissues == n for t, n in number.items()}
    values = {t: image[mask] for t, mask in masks.items()}
    metrics = {f'snr_{t.replace("-", "_")}': signal_to_noise(v) for t, v in values.items()}
    for a, b in (('white-matter', 'cortex'), ('cortex', 'ventricle')):
        metrics[f'cnr_{a}_{b}'.replace('-', '_')] = contrast_to_noise(values[a], values[b])
    white = masks['white-matter']
    level = float(np.median(values['white-matter'])) if white.any() else float('nan')
    sigma = noise_sigma(image, tissues > 0)
    metrics['noise_percent'] = 100 * sigma / level if level > 0 else float('nan')
    judged = np.where(np.isin(tissues, [number[t] for t in BRAIN_TISSUES]), tissues, 0)
    metrics['bias_field_percent'] = bias_field_percent(judged, image, affine)
    metrics['edge_width_mm'] = edge_width_mm(white, masks['cortex'], image, affine)
    metrics['smoothness_mm'] = smoothness_mm(image, white, affine)
    metrics['stripe_ratio'] = stripe_ratio(image, white)
    metrics['flat_cut_share'] = flat_cut_share(tissues > 0, affine)
    return metrics


def scan_agreement(maps: Mapping[str, np.ndarray], table: LabelTable, /) -> dict[str, float]:
    """Mean Dice over the structures of each scan's own segmentation with every other one's.

    Dice = 2 |A and B| / (|A| + |B|), over the structures that either map has. A scan that
    disagrees with all others is suspect: of another child, mirrored or badly aligned.

    Parameters
    ----------
    maps : mapping
        Label maps on one grid by the scans' names, each made from that scan alone; -1 where the
        scan shows nothing, which takes no part.

    Returns
    -------
    The mean over the other scans, by name; empty with fewer than two scans.
    """
    size = int(table.indices.max()) + 1
    numbers = np.array([row.index for row in table.structures])
    flat = [np.where(m < size, m, 0).ravel().astype(np.int64) for m in maps.values()]
    each: dict[str, list[float]] = {name: [] for name in maps}
    for (name, a), (other, b) in combinations(zip(maps, flat, strict=True), 2):
        seen = (a >= 0) & (b >= 0)
        both = np.bincount(a[seen & (a == b)], minlength=size)[numbers]
        total = sum(np.bincount(m[seen], minlength=size)[numbers] for m in (a, b))
        present = total > 0
        if present.any():
            dice = float(np.mean(2 * both[present] / total[present]))
            each[name].append(dice)
            each[other].append(dice)
    return {name: float(np.mean(values)) for name, values in each.items() if values}
