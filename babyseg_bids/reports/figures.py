"""Pictures of a segmentation: slices of the scan with the outlines of its structures.

Pillow draws them directly from arrays, which takes a tenth of the time of a plotting library.
All pictures are in neurological convention: the child's left is on the left.
"""

import io
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from babyseg_bids.labels import LabelTable, label_table
from babyseg_bids.qc import bounding_box, crop

PLANES = ('axial', 'coronal', 'sagittal')
# Axis that a plane cuts, axes that run to the right and upwards, and letters at the sides.
GEOMETRY = {
    'axial': (2, 0, 1, ('L', 'R')),
    'coronal': (1, 0, 2, ('L', 'R')),
    'sagittal': (0, 1, 2, ('P', 'A')),
}
MARGIN_MM = 6.0
# Slices stay within this part of the brain's extent: its ends show little.
EXTENT = (0.06, 0.94)
# A slice that shows this share of one structure more is not worth leaving an even spread.
LITTLE_GAIN = 0.05
# Pixels of a finished picture; outlines are drawn at twice that and reduced, which smooths them.
MONTAGE_WIDTH = 1480
OVERSAMPLE = 2
GAP = 6
# Width of what is shown around one place, and of its picture in each plane.
PLACE_MM = 44.0
PLACE_PIXELS = 200
# Cortex and white matter are everywhere: filling them would only veil the scan.
FILL_OPACITY = 0.2
UNFILLED_TISSUES = ('white-matter', 'cortex')
OUTLINE_PIXELS = 2
BACKGROUND = (0, 0, 0)
LETTER = (255, 214, 102)
CAPTION = (200, 205, 214)

# Anchors of a perceptually even dark-to-bright map (magma), from sure to unsure.
HEAT = np.array(
    [[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]], np.float32
)


@dataclass(frozen=True)
class Volume:
    """Scan, label map and uncertainty of one session, in RAS order and cropped to the brain."""

    image: np.ndarray
    labels: np.ndarray
    uncertainty: np.ndarray | None
    affine: np.ndarray
    # The session's other scans on the same grid, by name.
    others: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def zooms(self) -> np.ndarray:
        """Voxel size in mm along each axis."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def load_volume(image: Path, labels: Path, uncertainty: Path | None = None) -> Volume:
    """Load what the pictures show: cropped to the brain first, then turned to RAS."""
    label_image: Any = nib.load(labels)
    array = np.asanyarray(label_image.dataobj)
    array = array.reshape(array.shape[:3]).astype(np.int16)
    margin = int(np.ceil(MARGIN_MM / min(label_image.header.get_zooms()[:3])))
    box = bounding_box(array > 0, margin=margin)
    if not all(s.stop > s.start for s in box):
        box = tuple(slice(0, int(n)) for n in array.shape)
    affine = crop(label_image.affine, box)

    def turned(part: np.ndarray) -> nib.Nifti1Image:
        return nib.as_closest_canonical(nib.Nifti1Image(part, affine))

    def load(path: Path) -> np.ndarray:
        source: Any = nib.load(path)
        data = np.asanyarray(source.dataobj)
        part = data.reshape(data.shape[:3])[box].astype(np.float32)
        return np.nan_to_num(np.asarray(turned(part).dataobj), posinf=0, neginf=0)

    canonical = turned(array[box])
    return Volume(
        image=load(image),
        labels=np.asarray(canonical.dataobj),
        uncertainty=None if uncertainty is None else load(uncertainty),
        affine=canonical.affine,
    )


def add_scan(volume: Volume, name: str, path: Path, matrix: np.ndarray, /) -> Volume:
    """Add another scan of the session, resampled linearly to the volume's grid.

    Parameters
    ----------
    matrix : (4, 4) ndarray
        World of that scan to world of the reference, RAS mm (see `alignment.Alignment`).
    """
    image: Any = nib.load(path)
    data = np.asanyarray(image.dataobj)
    data = np.nan_to_num(data.reshape(data.shape[:3]).astype(np.float32), posinf=0, neginf=0)
    to_voxel = np.linalg.inv(np.asarray(matrix, float) @ image.affine) @ volume.affine
    moved = ndimage.affine_transform(
        data, to_voxel[:3, :3], to_voxel[:3, 3], volume.labels.shape, order=1
    )
    return replace(volume, others={**volume.others, name: moved})


def grey_range(image: np.ndarray, labels: np.ndarray, /) -> tuple[float, float]:
    """Grey values to show as black and white: quantiles inside the brain, with some room."""
    values = image[labels > 0]
    values = values if values.size > 100 else image.ravel()
    low, high = np.quantile(values, [0.005, 0.995])
    room = 0.08 * (high - low)
    low = min(low - room, float(np.quantile(image, 0.02)))
    return float(low), float(max(high + room, low + 1e-6))


def slice_areas(labels: np.ndarray, axis: int, /) -> np.ndarray:
    """Voxels of each structure in each slice along an axis: (structures, slices)."""
    known, numbers = np.unique(labels, return_inverse=True)
    slices = labels.shape[axis]
    place = np.arange(slices).reshape([-1 if a == axis else 1 for a in range(3)])
    cells = numbers.reshape(labels.shape) * slices + place
    counts = np.bincount(cells.ravel(), minlength=len(known) * slices)
    return counts.reshape(len(known), slices)[known > 0]


def slice_positions(labels: np.ndarray, axis: int, number: int, /) -> list[int]:
    """Slices that show every structure as large as can be, spread over the brain's extent.

    The extent is divided evenly, and each part gives the slice that adds most to the sum, over
    the structures, of the largest share of its greatest area that any slice shows. Parts that add
    nothing give their middle.
    """
    areas = slice_areas(labels, axis)
    hits = np.flatnonzero(areas.any(axis=0))
    first, last = (hits[0], hits[-1]) if hits.size else (0, labels.shape[axis] - 1)
    ends = first + np.array(EXTENT) * (last - first)
    borders = np.linspace(*ends, number + 1)
    shares = areas / np.maximum(areas.max(axis=1, keepdims=True), 1) if areas.size else areas
    shown = np.zeros(len(shares))
    places: dict[int, int] = {}
    # Slices near a border of two parts would stand beside a neighbour that shows the same.
    room = (borders[1] - borders[0]) * 0.2
    parts = [
        np.unique(np.linspace(a + room, b - room, 9).round().astype(int))
        for a, b in itertools.pairwise(borders)
    ]
    # The part that has most to show chooses first, so that its neighbours show something else.
    for _ in range(number):
        best = (0.0, -1, 0)
        for part in set(range(number)) - set(places):
            gain = np.maximum(shares[:, parts[part]] - shown[:, None], 0).sum(axis=0)
            if gain.size and gain.max() > best[0]:
                best = (float(gain.max()), part, int(parts[part][gain.argmax()]))
        gain_of_best, part, index = best
        if gain_of_best < LITTLE_GAIN:
            break
        places[part] = index
        shown = np.maximum(shown, shares[:, index])
    middles = (borders[:-1] + borders[1:]) / 2
    return sorted(places.get(part, round(middles[part])) for part in range(number))


def cut(array: np.ndarray, plane: str, index: int, /) -> np.ndarray:
    """One slice as a picture: rows from top to bottom, columns from left to right."""
    axis, across, up, _ = GEOMETRY[plane]
    part = np.take(array, index, axis)
    return (part.T if across < up else part)[::-1]


def _resize(array: np.ndarray, size: tuple[int, int], method: int) -> np.ndarray:
    """Resample a slice to (width, height) pixels."""
    return np.asarray(Image.fromarray(array).resize(size, method))


def smooth_labels(labels: np.ndarray, size: tuple[int, int], /) -> np.ndarray:
    """Enlarge a slice of labels with smooth borders.

    Each label's mask is interpolated by itself and the strongest wins, so that outlines follow
    the anatomy and not the voxel grid.
    """
    height, width = labels.shape
    best = np.zeros(size[::-1], np.uint8)
    winner = np.zeros(size[::-1], np.int16)
    scale = np.array([size[1] / height, size[0] / width])
    for number in np.unique(labels):
        mask = labels == number
        rows, columns = bounding_box(mask, margin=2)
        top, left = (np.array([rows.start, columns.start]) * scale).round().astype(int)
        bottom, right = (np.array([rows.stop, columns.stop]) * scale).round().astype(int)
        part = (mask[rows, columns] * np.uint8(255)).astype(np.uint8)
        strength = _resize(part, (right - left, bottom - top), Image.Resampling.BICUBIC)
        here = np.s_[top:bottom, left:right]
        better = strength > best[here]
        best[here][better] = strength[better]
        winner[here][better] = number
    return winner


def outline(labels: np.ndarray, /, width: int = 1) -> np.ndarray:
    """Pixels of a label that touch another label, `width` pixels deep."""
    edge = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        ahead = np.diff(labels, axis=axis) != 0
        first = [slice(None)] * 2
        second = [slice(None)] * 2
        first[axis], second[axis] = slice(None, -1), slice(1, None)
        edge[tuple(first)] |= ahead
        edge[tuple(second)] |= ahead
    for _ in range(width - 1):
        grown = edge.copy()
        grown[1:] |= edge[:-1]
        grown[:-1] |= edge[1:]
        grown[:, 1:] |= edge[:, :-1]
        grown[:, :-1] |= edge[:, 1:]
        edge = grown
    return edge & (labels > 0)


def _colours(table: LabelTable) -> np.ndarray:
    """Look-up table from FreeSurfer number to colour, (N, 3) uint8."""
    lut = np.zeros((int(table.indices.max()) + 1, 3), np.uint8)
    for row in table.structures:
        lut[row.index] = row.rgb
    return lut


@dataclass(frozen=True)
class Layout:
    """Where the tiles of a picture go: `tiles` are (plane, slice, left, top, width, height)."""

    tiles: tuple[tuple[str, int, int, int, int, int], ...]
    size: tuple[int, int]
    scale: float


def lay_out(volume: Volume, rows: list[tuple[str, int]], columns: int, /) -> Layout:
    """Place slices in rows: each entry of `rows` is a plane with its number of slices.

    All tiles share one scale, in pixels a mm, so that planes compare.
    """
    extent = np.array(volume.labels.shape) * volume.zooms
    widest = max(extent[GEOMETRY[plane][1]] for plane, _ in rows)
    scale = (MONTAGE_WIDTH - GAP * (columns + 1)) / (columns * widest)
    cell = (MONTAGE_WIDTH - GAP * (columns + 1)) / columns
    tiles, top = [], GAP
    for plane, number in rows:
        axis, across, up, _ = GEOMETRY[plane]
        width, height = (int(round(extent[a] * scale)) for a in (across, up))
        positions = slice_positions(volume.labels, axis, number)
        for start in range(0, number, columns):
            for place, index in enumerate(positions[start : start + columns]):
                left = GAP + place * (cell + GAP) + (cell - width) / 2
                tiles.append((plane, index, int(left), top, width, height))
            top += height + GAP
    return Layout(tuple(tiles), (MONTAGE_WIDTH, top), scale)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The typeface inside Pillow, so that pictures look the same on every machine."""
    return ImageFont.load_default(size=size)


def _annotate(picture: Image.Image, volume: Volume, layout: Layout) -> None:
    """Write the sides of the body and the position in mm onto each tile."""
    draw = ImageDraw.Draw(picture)
    centre = np.array(volume.labels.shape) / 2
    outlined: dict[str, Any] = {'stroke_width': 2, 'stroke_fill': BACKGROUND}
    for plane, index, left, top, width, height in layout.tiles:
        axis, _, _, letters = GEOMETRY[plane]
        # The corners are free, as brains are round.
        for letter, x, anchor in (
            (letters[0], left + 5, 'la'),
            (letters[1], left + width - 5, 'ra'),
        ):
            draw.text((x, top + 3), letter, LETTER, _font(22), anchor=anchor, **outlined)
        voxel = centre.copy()
        voxel[axis] = index
        mm = (volume.affine @ [*voxel, 1])[axis]
        text = f'{"xyz"[axis]} = {round(mm):+d} mm'
        if plane == 'sagittal':
            # The side of a sagittal slice is told relative to the middle of the brain.
            text = f'{"left" if index < centre[0] else "right"}, {text}'
        draw.text((left + 6, top + height - 4), text, CAPTION, _font(16), anchor='ls', **outlined)


def draw_scan(
    volume: Volume, layout: Layout, /, brightness: float = 1.0, image: np.ndarray | None = None
) -> Image.Image:
    """The slices of the reference, or of another `image` on its grid, with annotations."""
    image = volume.image if image is None else image
    low, high = grey_range(image, volume.labels)
    picture = Image.new('RGB', layout.size, BACKGROUND)
    for plane, index, left, top, width, height in layout.tiles:
        grey = np.clip((cut(image, plane, index) - low) / (high - low), 0, 1)
        tile = _resize(
            (grey * 255 * brightness).astype(np.uint8), (width, height), Image.Resampling.BICUBIC
        )
        picture.paste(Image.fromarray(tile), (left, top))
    _annotate(picture, volume, layout)
    return picture


def draw_labels(volume: Volume, layout: Layout, table: LabelTable | None = None) -> Image.Image:
    """Outlines of the structures on a transparent ground, faintly filled."""
    table = table or label_table()
    lut = _colours(table)
    fill = np.zeros(len(lut), np.uint8)
    for row in table.structures:
        fill[row.index] = 0 if row.tissue in UNFILLED_TISSUES else round(FILL_OPACITY * 255)
    known = np.where(np.isin(volume.labels, table.indices), volume.labels, 0)
    picture = Image.new('RGBA', layout.size, (0, 0, 0, 0))
    for plane, index, left, top, width, height in layout.tiles:
        size = (width * OVERSAMPLE, height * OVERSAMPLE)
        labels = smooth_labels(cut(known, plane, index), size)
        alpha = fill[labels]
        alpha[outline(labels, OUTLINE_PIXELS)] = 255
        tile = np.dstack([lut[labels], alpha])
        # Reducing with premultiplied alpha keeps dark seams away from the outlines.
        reduced = Image.fromarray(tile, 'RGBA').convert('RGBa').reduce(OVERSAMPLE)
        picture.paste(reduced.convert('RGBA'), (left, top))
    return picture


def heat_colours(values: np.ndarray, /) -> np.ndarray:
    """Colours of values from 0 to 1, (..., 3) uint8."""
    place = np.clip(values, 0, 1) * (len(HEAT) - 1)
    low = np.minimum(place.astype(int), len(HEAT) - 2)
    share = (place - low)[..., None]
    return ((1 - share) * HEAT[low] + share * HEAT[low + 1]).astype(np.uint8)


def _shown(values: np.ndarray) -> np.ndarray:
    """Place of an uncertainty in the heat map: its darkest end would not be seen on a scan."""
    return 0.15 + 0.85 * values


def heat_stops(number: int = 9) -> np.ndarray:
    """Colours of evenly spaced uncertainties from 0 to 1, (N, 3), for a colour bar."""
    return heat_colours(_shown(np.linspace(0, 1, number)))


def draw_uncertainty(volume: Volume, layout: Layout, threshold: float, /) -> Image.Image:
    """Uncertainty in colour over the darkened scan; what is over the threshold is outlined."""
    picture = draw_scan(volume, layout, brightness=0.7)
    if volume.uncertainty is None:
        return picture
    for plane, index, left, top, width, height in layout.tiles:
        part = np.clip(cut(volume.uncertainty, plane, index), 0, 1).astype(np.float32)
        values = _resize(part, (width, height), Image.Resampling.BILINEAR)
        alpha = np.clip(values / max(threshold, 1e-6), 0, 1) * 0.85
        alpha[outline((values > threshold).astype(np.int8))] = 1
        colours = heat_colours(_shown(values))
        tile = np.dstack([colours, (alpha * 255).astype(np.uint8)])
        layer = Image.fromarray(tile, 'RGBA')
        picture.paste(layer, (left, top), layer)
    _annotate(picture, volume, layout)
    return picture


def draw_place(
    volume: Volume, voxel: tuple[int, int, int], table: LabelTable | None = None
) -> Image.Image:
    """The three planes through one voxel, close by, with outlines and a cross at the voxel."""
    half = np.maximum(np.round(PLACE_MM / 2 / volume.zooms).astype(int), 1)
    padded = [(int(h), int(h)) for h in half]
    box = tuple(slice(int(v), int(v + 2 * h + 1)) for v, h in zip(voxel, half, strict=True))
    # Padded first, so that the voxel stays in the middle at the border of the volume too.
    low, high = grey_range(volume.image, volume.labels)
    near = replace(
        volume,
        image=np.pad(volume.image, padded, constant_values=low)[box],
        labels=np.pad(volume.labels, padded)[box],
    )
    size = (PLACE_PIXELS, PLACE_PIXELS)
    tiles = []
    for place, plane in enumerate(PLANES):
        index = int(half[GEOMETRY[plane][0]])
        tiles.append((plane, index, place * (PLACE_PIXELS + GAP), 0, *size))
    width = 3 * PLACE_PIXELS + 2 * GAP
    layout = Layout(tuple(tiles), (width, PLACE_PIXELS), PLACE_PIXELS / PLACE_MM)
    picture = Image.new('RGB', layout.size, BACKGROUND)
    for plane, index, left, top, *_ in tiles:
        grey = np.clip((cut(near.image, plane, index) - low) / (high - low), 0, 1)
        tile = _resize((grey * 255).astype(np.uint8), size, Image.Resampling.BICUBIC)
        picture.paste(Image.fromarray(tile), (left, top))
    picture = blend(picture, draw_labels(near, layout, table))
    draw = ImageDraw.Draw(picture)
    for plane, _, left, top, *_ in tiles:
        letters = GEOMETRY[plane][3]
        draw.text((left + 4, top + 2), letters[0], LETTER, _font(16))
        draw.text((left + PLACE_PIXELS - 4, top + 2), letters[1], LETTER, _font(16), anchor='ra')
        x, y = left + PLACE_PIXELS // 2, top + PLACE_PIXELS // 2
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            arm = (x + 7 * dx, y + 7 * dy, x + 18 * dx, y + 18 * dy)
            draw.line(arm, LETTER, 2)
    return picture


def encode(picture: Image.Image, /, kind: str = 'WEBP', quality: int = 82) -> bytes:
    """Compress a picture: WEBP for pages, PNG for files."""
    stream = io.BytesIO()
    options = {'quality': quality, 'method': 3} if kind == 'WEBP' else {'compress_level': 6}
    picture.save(stream, kind, **options)
    return stream.getvalue()


def blend(scan: Image.Image, overlay: Image.Image, /) -> Image.Image:
    """The overlay on the scan."""
    return Image.alpha_composite(scan.convert('RGBA'), overlay).convert('RGB')
