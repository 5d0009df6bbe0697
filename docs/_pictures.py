"""Draws the pictures of the documentation from synthetic children: nobody's scan is shown.

babyseg-example demo
babyseg demo out participant
python docs/_pictures.py demo out
"""

import io
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from nibabel.processing import resample_from_to
from PIL import Image

from babyseg_bids.labels import label_table
from babyseg_bids.network import load_model
from babyseg_bids.synthesis.evaluate import segment_sample
from babyseg_bids.synthesis.finetune import drawn_brains
from babyseg_bids.synthesis.gallery import picture
from babyseg_bids.synthesis.generator import draw_sample
from babyseg_bids.synthesis.losses import hard_dice
from babyseg_bids.synthesis.settings import load_settings, update

HERE = Path(__file__).parent / 'images'
# Age in months, seed of the brain, and preset of the samples shown.
SAMPLES = ((1, 1, 'newborn'), (6, 2, 'default'), (18, 3, 'clinical'), (36, 4, 'low-field'))
# Ages in months of the drawn brains whose out-of-range scans are segmented, so many scans of each,
# and how many of the worst are shown.
AGES, TRIES, WORST = (1, 3, 6, 12, 24), 6, 4


def samples() -> Image.Image:
    """Training images in columns: a scan and its label map, three planes each."""
    columns = []
    for age, seed, preset in SAMPLES:
        settings = update(load_settings(preset), {'size': (88, 104, 88), 'spacing': 2.0})
        settings = update(settings, {'group_shares': (1.0,)})
        sample = draw_sample(drawn_brains([(age, seed)]), seed=seed, settings=settings)
        columns.append(np.asarray(Image.open(io.BytesIO(picture(sample))).convert('RGB')))
    return Image.fromarray(np.concatenate(columns, 1))


def failures() -> tuple[Image.Image, str]:
    """The worst of some out-of-range scans, in columns: scan, true labels, result; three planes.

    Returns the picture and a line on each column.
    """
    model = load_model()
    settings = update(
        load_settings('hard'), {'size': (160, 192, 160), 'spacing': 1.0, 'group_shares': (1.0,)}
    )
    found = []
    for age in AGES:
        for seed in range(len(found), len(found) + TRIES):
            sample = draw_sample(drawn_brains([(age, seed)]), seed=seed, settings=settings)
            labels = segment_sample(sample.images, model).channels(sample.target.shape)
            each = hard_dice(labels, sample.target, classes=len(model.labels))[1:]
            dice = float(each[~torch.isnan(each)].mean())
            centre = sample.target.nonzero().float().mean(0).long().tolist()
            shown = replace(
                sample,
                images=_around(sample.images, centre),
                target=_around(sample.target, centre),
            )
            panel = Image.open(io.BytesIO(picture(shown, _around(labels, centre)))).convert('RGB')
            found.append((dice, f'{age} months, seed {seed}: Dice {dice:.2f}', np.asarray(panel)))
    found.sort(key=lambda f: f[0])
    lines = [text for _, text, _ in found[:WORST]]
    lines.append(f'all {len(found)}: Dice {np.mean([dice for dice, _, _ in found]):.2f}')
    whole = np.concatenate([panel for _, _, panel in found[:WORST]], 1)
    return Image.fromarray(whole), '\n'.join(lines)


def _around(x: torch.Tensor, centre: list[int], size: int = 144) -> torch.Tensor:
    """A cube of (..., X, Y, Z) around a voxel; zero beyond the volume."""
    x = F.pad(x, [size // 2] * 6)
    for axis, middle in enumerate(centre):
        x = x.narrow(axis - 3, middle, size)
    return x


def session(bids: Path, out: Path, name: str = 'sub-01_ses-9mo') -> Image.Image:
    """A session of the example: T1w, T2w, labels on the T1w, uncertainty; two planes.

    The T2w lies where its header says, which is not where babyseg moves it to.
    """
    folder = Path(*name.split('_'), 'anat')
    scans = sorted((bids / folder).glob('*w.nii.gz'))
    dseg = next((out / folder).glob('*_desc-aseg_dseg.nii.gz'))
    doubt = next((out / folder).glob('*_desc-uncertainty_probseg.nii.gz'))
    reference = dseg.name.partition('_space-')[2].partition('_')[0]
    scans.sort(key=lambda p: reference not in p.name)
    grid = nib.as_closest_canonical(nib.load(scans[0]))
    images = [resample_from_to(nib.load(p), grid, order=1) for p in (*scans[:2], doubt)]
    base, other, unsure = (image.get_fdata() for image in images)
    labels = nib.as_closest_canonical(nib.load(dseg)).get_fdata()
    table = label_table()
    lut = np.zeros((int(labels.max()) + 1, 3), np.uint8)
    for row in table.rows:
        if row.index < len(lut):
            lut[row.index] = row.rgb
    rows = []
    for axis in (2, 1):
        grey = [_grey(_middle(v, axis)) for v in (base, other)]
        marked = lut[_middle(labels, axis).astype(int)]
        mixed = np.where(marked.any(-1, keepdims=True), (grey[0] // 2 + marked // 2), grey[0])
        cells = [*grey, mixed, _grey(_middle(unsure, axis))]
        rows.append([c.swapaxes(0, 1)[::-1] for c in cells])
    height = min(r[0].shape[0] for r in rows)
    width = min(c.shape[1] for r in rows for c in r)
    return Image.fromarray(
        np.concatenate([np.concatenate([_crop(c, height, width) for c in r], 1) for r in rows])
    )


def _middle(volume: np.ndarray, axis: int) -> np.ndarray:
    return np.take(volume, volume.shape[axis] // 2, axis)


def _grey(plane: np.ndarray) -> np.ndarray:
    top = np.quantile(plane, 0.995) or 1.0
    return np.repeat((255 * np.clip(plane / top, 0, 1)).astype(np.uint8)[..., None], 3, -1)


def _crop(cell: np.ndarray, height: int, width: int) -> np.ndarray:
    y, x = (cell.shape[0] - height) // 2, (cell.shape[1] - width) // 2
    return cell[y : y + height, x : x + width]


def main() -> None:
    """Write all pictures."""
    HERE.mkdir(exist_ok=True)
    samples().save(HERE / 'samples.webp', quality=80)
    worst, lines = failures()
    worst.save(HERE / 'failures.webp', quality=80)
    print(lines)
    if len(sys.argv) == 3:
        session(Path(sys.argv[1]), Path(sys.argv[2])).save(HERE / 'session.webp', quality=80)


if __name__ == '__main__':
    main()
