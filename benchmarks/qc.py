"""Whether the quality flags work: good scans, spoilt in known ways.

Two kinds of scans are spoilt: real ones, which are segmented, and images simulated from the
infant label maps at 2 mm, whose labels are known, so that only the measures of the scan are
tested (`--simulated` runs these alone). Printed are all flags of the untouched scans (false
alarms) and how many spoilt scans raise a flag that is meant for them (sensitivity). The folder
holds `ds-bmex`, `ds-templates`, `label-maps` and `adult-heads`.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage

from babyseg_bids.labels import TISSUES, label_table
from babyseg_bids.morphometry import morphometry_table, voxel_volume
from babyseg_bids.network import Model, Segmentation, load_model, segment
from babyseg_bids.pipeline import align_scans, scans_agreement
from babyseg_bids.qc import session_qc
from babyseg_bids.records import Age

# Session below the folder, suffix, and whether its head faces backwards in its header, which is
# put right before use.
SCANS = (
    ('ds-bmex/sub-0002/ses-V01', 'T1w', True),
    ('ds-templates/sub-month00', 'T2w', False),
    ('ds-bmex/sub-0007/ses-V01', 'T1w', True),
    ('ds-templates/sub-month24', 'T1w', False),
)
# Spoilt scans are segmented anew where it is true; the weaker corruptions are measured with the
# labels of the untouched scan, to save time.
AGAIN, ONCE = True, False
Corruption = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def noise(share: float) -> Corruption:
    """Rician noise of `share` times the mean of the brain."""

    def apply(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        sd = share * x[x > 0].mean()
        a, b = rng.normal(0, sd, (2, *x.shape))
        return np.where(x > 0, np.hypot(x + a, b), 0)

    return apply


def motion(degrees: float, events: int) -> Corruption:
    """Lines of k-space from heads that were turned (sd in degrees) and moved (mm) meanwhile."""

    def apply(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        spectrum = np.fft.fftshift(np.fft.fftn(x))
        lines = x.shape[1]
        cuts = np.sort(rng.choice(np.arange(lines), events, replace=False))
        for start, stop in zip(cuts, np.append(cuts[1:], lines), strict=True):
            # The middle of k-space says where the head lies.
            if start <= lines // 2 < stop:
                continue
            moved = ndimage.rotate(x, rng.normal(0, degrees), (0, 1), reshape=False, order=1)
            moved = ndimage.shift(moved, rng.normal(0, degrees, 3), order=1)
            part = np.fft.fftshift(np.fft.fftn(moved))
            spectrum[:, start:stop] = part[:, start:stop]
        return np.abs(np.fft.ifftn(np.fft.ifftshift(spectrum)))

    return apply


def bias(strength: float) -> Corruption:
    """A gradient whose ends differ by `strength` in the logarithm."""

    def apply(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        axes = np.meshgrid(*(np.linspace(-0.5, 0.5, n) for n in x.shape), indexing='ij')
        way = rng.normal(size=3)
        return x * np.exp(strength * np.tensordot(way / np.linalg.norm(way), axes, 1))

    return apply


def emptied(share: float) -> Corruption:
    """The lowest part of the brain's extent set to zero."""

    def apply(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:  # noqa: ARG001
        planes = np.flatnonzero((x > 0).any((0, 1)))
        out = x.copy()
        out[:, :, : planes[0] + int(share * len(planes))] = 0
        return out

    return apply


def mirrored(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:  # noqa: ARG001
    """The data of the other side under the same header."""
    return x[::-1]


NOISE = ('noisy', 'low-signal-to-noise')
MOTION = ('striped', 'ghosted', *NOISE)
SIDES = ('mirrored', 'left-right-swapped', 'left-right-confused')
# Name, severity, corruption, the flags that are meant for it, and whether to segment anew.
CORRUPTIONS: tuple[tuple[str, str, Corruption, tuple[str, ...], bool], ...] = (
    ('noise', '2 %', noise(0.02), NOISE, ONCE),
    ('noise', '5 %', noise(0.05), NOISE, ONCE),
    ('noise', '10 %', noise(0.1), NOISE, ONCE),
    ('noise', '20 %', noise(0.2), NOISE, AGAIN),
    ('motion', '1 degree, 2 events', motion(1, 2), MOTION, ONCE),
    ('motion', '2 degrees, 4 events', motion(2, 4), MOTION, ONCE),
    ('motion', '4 degrees, 8 events', motion(4, 8), MOTION, ONCE),
    ('motion', '6 degrees, 12 events', motion(6, 12), MOTION, AGAIN),
    ('bias field', 'log range 0.3', bias(0.3), ('uneven',), ONCE),
    ('bias field', 'log range 1.0', bias(1.0), ('uneven',), ONCE),
    ('emptied below', '25 %', emptied(0.25), ('brain-cut-off',), AGAIN),
    ('mirrored data', '', mirrored, SIDES, AGAIN),
)


def load(path: Path) -> nib.Nifti1Image:
    """A scan in RAS order without what is not finite."""
    image = nib.as_closest_canonical(nib.load(path))
    return nib.Nifti1Image(np.nan_to_num(image.get_fdata(dtype=np.float32)), image.affine)


def examine(
    data: np.ndarray,
    affine: np.ndarray,
    months: float | None,
    model: Model,
    found: Segmentation | None = None,
) -> tuple[dict, Segmentation]:
    """Flags and measures of a scan, and its segmentation where it is not given."""
    x = np.ascontiguousarray(data, np.float32)
    found = found or segment([(x, affine)], model, device='cpu')
    morph = morphometry_table(
        found.labels, affine, found.soft_volumes, found.confidence, model.labels
    )
    metrics, flags = session_qc(
        found.labels, found.uncertainty, x, affine, morph, Age(months), table=model.labels
    )
    return {**metrics, 'flags': {f.code: f.severity for f in flags}}, found


def cut_off(data: np.ndarray, share: float) -> np.ndarray:
    """A field of view that ends above the lowest part of the brain's extent."""
    planes = np.flatnonzero((data > 0).any((0, 1)))
    return data[:, :, planes[0] + int(share * len(planes)) :]


def swapped_front(labels: np.ndarray) -> np.ndarray:
    """Left and right exchanged in the front quarter of the brain."""
    mirror = np.arange(256)
    for row in label_table().structures:
        mirror[row.index] = row.mirror
    planes = np.flatnonzero((labels > 0).any((0, 2)))
    front = np.arange(labels.shape[1]) > planes[-1] - len(planes) // 4
    return np.where(front[None, :, None], mirror[labels], labels)


def label_flags(labels: np.ndarray, affine: np.ndarray, months: float | None) -> dict[str, str]:
    """Flags of a label map alone."""
    table = label_table()
    labels = table.indices[table.channels(labels)]
    volumes = {r.index: (labels == r.index).sum() * voxel_volume(affine) for r in table.structures}
    morph = morphometry_table(labels, affine, volumes, dict.fromkeys(volumes, 1.0))
    _, flags = session_qc(labels, None, labels.astype(float), affine, morph, Age(months))
    return {f.code: f.severity for f in flags if f.code in SIDES}


def spoilt(folder: Path, model: Model, seed: int, ages: dict[str, float]) -> Iterator[dict]:
    """One record a scan and corruption."""
    for place, suffix, backwards in SCANS:
        (path,) = folder.glob(f'{place}/anat/*_{suffix}.nii.gz')
        image = load(path)
        data, affine, months = np.asarray(image.dataobj), image.affine, ages.get(place)
        if backwards:
            affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
        who = {'scan': path.name.removesuffix('.nii.gz')}
        good, found = examine(data, affine, months, model)
        yield {**who, 'what': 'as it is', 'severity': '', 'meant': (), **good}
        # The sides of a label map, exchanged in the whole and in a part of it.
        maps = {'all sides exchanged': found.labels[::-1]}
        maps['sides exchanged in front'] = swapped_front(found.labels)
        for what, labels in maps.items():
            flags = label_flags(labels, affine, months)
            yield {**who, 'what': what, 'severity': '', 'meant': SIDES, 'flags': flags}
        turned = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
        result, _ = examine(data, turned, months, model, found)
        meant: tuple[str, ...] = ('unexpected-orientation',)
        yield {**who, 'what': 'header turned', 'severity': '', 'meant': meant, **result}
        for what, severity, corruption, meant, again in CORRUPTIONS:
            rng = np.random.default_rng(seed)
            spoilt_data = corruption(data, rng)
            result, _ = examine(spoilt_data, affine, months, model, None if again else found)
            yield {**who, 'what': what, 'severity': severity, 'meant': meant, **result}
        result, _ = examine(cut_off(data, 0.15), affine, months, model)
        meant = ('brain-cut-off',)
        yield {**who, 'what': 'cut-off view', 'severity': '15 %', 'meant': meant, **result}


def pairs(folder: Path, model: Model) -> Iterator[dict]:
    """Sessions of a T1w and a T2w: of one anatomy, of two, and with one of them mirrored."""

    def image(month: str, suffix: str) -> nib.Nifti1Image:
        name = f'sub-month{month}'
        return load(folder / f'ds-templates/{name}/anat/{name}_{suffix}.nii.gz')

    for month, other in (('06', '24'), ('24', '00')):
        first, second = image(month, 'T1w'), image(month, 'T2w')
        mirror = nib.Nifti1Image(np.asarray(second.dataobj)[::-1].copy(), second.affine)
        for what, scan in (
            ('pair as it is', second),
            ('pair, wrong head', image(other, 'T2w')),
            ('pair, one mirrored', mirror),
        ):
            alignments = align_scans([first, scan])
            refused = alignments[0].status == 'refused'
            dice = scans_agreement([first, scan], alignments, model, device='cpu')
            low = min(dice.values(), default=0.0)
            # A scan that is refused is flagged by the alignment.
            flags = {'alignment-refused': 'warning'} if refused else {}
            flags |= {'scans-disagree': 'measured'} if not refused and low < 0.7 else {}
            meant = () if what == 'pair as it is' else ('scans-disagree', 'alignment-refused')
            record = {'scan': f'month{month}', 'what': what, 'severity': '', 'meant': meant}
            yield {**record, 'flags': flags, 'scan_agreement_min': low}


def wrong_heads(folder: Path, model: Model) -> Iterator[dict]:
    """An adult's head under the age of an infant, and label maps with known sides."""
    image = load(folder / 'adult-heads/head_T1w.nii.gz')
    result, _ = examine(np.asarray(image.dataobj), image.affine, 6.0, model)
    meant = ('implausible-volume',)
    yield {'scan': 'adult', 'what': 'adult head', 'severity': '6 months', 'meant': meant, **result}
    for kind, meant in (('infant', ()), ('faulty', SIDES)):
        for path in sorted((folder / 'label-maps' / kind).glob('*.nii.gz')):
            labels = nib.as_closest_canonical(nib.load(path)).slicer[::2, ::2, ::2]
            flags = label_flags(np.asarray(labels.dataobj), labels.affine, None)
            record = {'scan': path.name, 'what': f'{kind} map', 'severity': '', 'meant': meant}
            yield {**record, 'flags': flags}


def simulated(folder: Path, seed: int, maps: int) -> Iterator[dict]:
    """Images of infant label maps with one grey value a tissue, 1 % noise and slight blur."""
    table = label_table()
    grey = dict(zip(TISSUES, (120.0, 85.0, 100.0, 35.0, 90.0, 110.0), strict=True))
    paths = sorted((folder / 'label-maps/infant').glob('*.nii.gz'))
    for path in paths[:: max(1, len(paths) // maps)][:maps]:
        image = nib.as_closest_canonical(nib.load(path)).slicer[::2, ::2, ::2]
        labels = table.indices[table.channels(np.asarray(image.dataobj))]
        planes = [
            np.flatnonzero((labels > 0).any((1, 2))),
            np.flatnonzero((labels > 0).any((0, 2))),
        ]
        rows, columns = (slice(max(p[0] - 6, 0), p[-1] + 7) for p in planes)
        labels, affine = labels[rows, columns], image.affine
        lut = np.zeros(256)
        for row in table.structures:
            lut[row.index] = grey[row.tissue]
        rng = np.random.default_rng(seed)
        data = ndimage.gaussian_filter(lut[labels], 0.4)
        data = np.abs(data + rng.normal(0, 1, data.shape)) * (labels > 0)
        unit = voxel_volume(affine)
        volumes = {r.index: (labels == r.index).sum() * unit for r in table.structures}
        morph = morphometry_table(labels, affine, volumes, dict.fromkeys(volumes, 0.9))
        months = float(path.name[:2])
        spoil = [('as it is', '', lambda x, _: x, (), ONCE), *CORRUPTIONS]
        for what, severity, corruption, meant, _ in spoil:
            if what == 'mirrored data':
                continue
            bad = corruption(data, np.random.default_rng(seed))
            seen = np.where(bad > 0, labels, 0) if what == 'emptied below' else labels
            metrics, flags = session_qc(seen, None, bad, affine, morph, Age(months))
            yield {
                **metrics,
                'scan': path.name,
                'what': f'simulated: {what}',
                'severity': severity,
                'meant': meant,
                'flags': {f.code: f.severity for f in flags},
            }


def ages_of(folder: Path) -> dict[str, float]:
    """Age in months by the place of a session, from the datasets' own discovery."""
    from babyseg_bids.discovery import find_sessions

    ages = {}
    for name in ('ds-bmex', 'ds-templates'):
        for s in find_sessions(folder / name):
            if s.age.months is not None:
                ages[f'{name}/{s.name.replace("_", "/")}'] = s.age.months
    return ages


def summary(rows: list[dict]) -> pd.DataFrame:
    """Sensitivity of the flags that are meant for a corruption, and all that were raised."""
    out = []
    for (what, severity), group in pd.DataFrame(rows).groupby(['what', 'severity'], sort=False):
        flagged = [set(f) & set(m) for f, m in zip(group['flags'], group['meant'], strict=True)]
        codes = pd.Series([c for f in group['flags'] for c, s in f.items() if s != 'info'])
        counts = ', '.join(f'{c} {n}' for c, n in codes.value_counts().items())
        wanted = group['meant'].iloc[0]
        hit = f'{sum(map(bool, flagged))} of {len(group)}' if wanted else ''
        out.append((what, severity, len(group), hit, counts))
    columns = ['corruption', 'severity', 'scans', 'found by a flag meant for it', 'all warnings']
    return pd.DataFrame(out, columns=columns)


def main() -> None:
    """Print the table, and write every record where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('folder', type=Path)
    parser.add_argument('--model', default='default')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--records', type=Path, help='JSON lines, one a scan and corruption')
    parser.add_argument('--simulated', action='store_true', help='leave out all that is segmented')
    parser.add_argument('--maps', type=int, default=11, help='label maps to simulate scans of')
    args = parser.parse_args()
    rows = []
    sources = [simulated(args.folder, args.seed, args.maps)]
    if not args.simulated:
        model = load_model(args.model)
        sources += [
            wrong_heads(args.folder, model),
            spoilt(args.folder, model, args.seed, ages_of(args.folder)),
            pairs(args.folder, model),
        ]
    for source in sources:
        for row in source:
            rows.append(row)
            if args.records:
                with args.records.open('a') as stream:
                    stream.write(json.dumps(row) + '\n')
    print(summary(rows).to_string(index=False))


if __name__ == '__main__':
    main()
