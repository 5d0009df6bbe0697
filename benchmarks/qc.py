"""Whether the quality flags work: good scans, spoilt in known ways and severities.

    python benchmarks/qc.py FOLDER [--quick] [--records FILE] [--minutes 12]

Spoilt are real scans, which are segmented; images simulated from infants' label maps at 2 mm,
whose labels are known, so that only the measures of the scan are tested; label maps; and pairs of
scans. FOLDER holds `ds-bmex`, `ds-templates`, `label-maps` and `adult-heads`. Two Markdown tables
are printed: what was found of each corruption, and each flag's false alarms on untouched scans
with its sensitivity. With `--records`, a run that was broken off goes on where it ended;
records of other weights are not used.

A flag counts as raised by a corruption when it is a warning or severe, and the untouched scan does
not raise it as strongly. Weak corruptions are measured with the labels of the untouched scan, to
save time; those that are segmented anew are marked in `CORRUPTIONS`.
"""

import argparse
import json
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import fft, ndimage

from babyseg_bids.labels import TISSUES, LabelTable, label_table
from babyseg_bids.morphometry import morphometry_table, voxel_volume
from babyseg_bids.network import Model, Segmentation, load_model, segment
from babyseg_bids.pipeline import align_scans, alignment_flags
from babyseg_bids.qc import bounding_box, crop, session_qc
from babyseg_bids.qc_flags import LIMITS
from babyseg_bids.qc_image import scan_agreement
from babyseg_bids.records import Age

# Session below the folder, suffix, and whether its head faces backwards in its header, which is
# put right before use.
SCANS = (
    ('ds-bmex/sub-0002/ses-V01', 'T1w', True),
    ('ds-templates/sub-month00', 'T2w', True),
    ('ds-bmex/sub-0007/ses-V01', 'T1w', True),
)
# Ages in months of the templates of two contrasts, and of the one whose T2w is the wrong head.
PAIRS = (('00', '06'), ('06', '12'), ('12', '00'))
# Voxels around what is not empty.
MARGIN = 10
HALF_TURN = np.diag([-1.0, -1.0, 1.0, 1.0])
# The age under which a head is wrong: a newborn's for older children, and the reverse.
WRONG_AGES = (0.0, 24.0)

NOISE = ('noisy', 'low-signal-to-noise')
MOTION = ('striped', 'ghosted', *NOISE)
SIDES = ('mirrored', 'left-right-swapped', 'left-right-confused')
CUT = ('brain-cut-off',)
FOREIGN = ('scans-disagree', 'alignment-refused', 'alignment-doubtful', 'scans-mirrored')
RANK = {'info': 0, 'warning': 1, 'severe': 2}
UNTOUCHED = 'as it is'

# Data, affine and labels of a scan, before and after; without labels it is to be segmented anew.
Sample = tuple[np.ndarray, np.ndarray, np.ndarray]
Corruption = Callable[[Sample, np.random.Generator], Sample]


def noise(share: float) -> Corruption:
    """Rician noise of `share` times the mean of the brain."""

    def apply(sample: Sample, rng: np.random.Generator) -> Sample:
        x, affine, labels = sample
        sd = share * x[x > 0].mean()
        a, b = rng.standard_normal((2, *x.shape), np.float32) * sd
        return np.where(x > 0, np.hypot(x + a, b), 0), affine, labels

    return apply


def motion(degrees: float, events: int) -> Corruption:
    """Lines of k-space from heads that were turned (sd in degrees) and moved (mm) meanwhile."""

    def apply(sample: Sample, rng: np.random.Generator) -> Sample:
        x, affine, labels = sample
        x = x.astype(np.float32)
        spectrum = fft.fftshift(fft.fftn(x))
        lines = x.shape[1]
        cuts = np.sort(rng.choice(np.arange(lines), events, replace=False))
        voxel = np.linalg.norm(affine[:3, :3], axis=0)
        for start, stop in zip(cuts, np.append(cuts[1:], lines), strict=True):
            angle, shift = rng.normal(0, degrees), rng.normal(0, degrees, 3) / voxel
            # The middle of k-space says where the head lies.
            if start <= lines // 2 < stop:
                continue
            moved = ndimage.rotate(x, angle, (0, 1), reshape=False, order=1)
            moved = ndimage.shift(moved, shift, order=1)
            spectrum[:, start:stop] = fft.fftshift(fft.fftn(moved))[:, start:stop]
        return np.abs(fft.ifftn(fft.ifftshift(spectrum))), affine, labels

    return apply


def bias(strength: float) -> Corruption:
    """A gradient whose ends differ by `strength` in the logarithm."""

    def apply(sample: Sample, rng: np.random.Generator) -> Sample:
        x, affine, labels = sample
        axes = np.meshgrid(*(np.linspace(-0.5, 0.5, n) for n in x.shape), indexing='ij')
        way = rng.normal(size=3)
        field = np.exp(strength * np.tensordot(way / np.linalg.norm(way), axes, 1))
        return x * field, affine, labels

    return apply


def _lowest(x: np.ndarray, share: float) -> int:
    """The first plane above the lowest part of the brain's extent."""
    planes = np.flatnonzero((x > 0).any((0, 1)))
    return int(planes[0] + share * len(planes))


def emptied(share: float) -> Corruption:
    """The lowest part of the brain set to zero in a field of view that stays."""

    def apply(sample: Sample, rng: np.random.Generator) -> Sample:  # noqa: ARG001
        x, affine, labels = (part.copy() for part in sample)
        first = _lowest(x, share)
        x[:, :, :first], labels[:, :, :first] = 0, 0
        return x, affine, labels

    return apply


def cut_off(share: float) -> Corruption:
    """A field of view that ends above the lowest part of the brain."""

    def apply(sample: Sample, rng: np.random.Generator) -> Sample:  # noqa: ARG001
        x, affine, labels = sample
        box = (slice(0, None), slice(0, None), slice(_lowest(x, share), None))
        return x[box], crop(affine, box), labels[box]

    return apply


def mirrored(sample: Sample, rng: np.random.Generator) -> Sample:  # noqa: ARG001
    """The data of the other side under the same header."""
    return sample[0][::-1], sample[1], sample[2]


def turned(sample: Sample, rng: np.random.Generator) -> Sample:  # noqa: ARG001
    """A header that says the opposite of left and right, front and back."""
    return sample[0], HALF_TURN @ sample[1], sample[2]


def swapped(sample: Sample, rng: np.random.Generator) -> Sample:  # noqa: ARG001
    """All left labels on the right."""
    return sample[0], sample[1], _mirror_numbers()[sample[2]]


def swapped_front(sample: Sample, rng: np.random.Generator) -> Sample:  # noqa: ARG001
    """Left and right exchanged in the front quarter of the brain."""
    labels = sample[2]
    planes = np.flatnonzero((labels > 0).any((0, 2)))
    front = np.arange(labels.shape[1]) > planes[-1] - len(planes) // 4
    return sample[0], sample[1], np.where(front[None, :, None], _mirror_numbers()[labels], labels)


def _mirror_numbers() -> np.ndarray:
    """The number of each structure's other side."""
    mirror = np.arange(256)
    for row in label_table().structures:
        mirror[row.index] = row.mirror
    return mirror


@dataclass(frozen=True)
class Spoiling:
    """A corruption, the flags that are meant for it, and how real scans are measured after it."""

    what: str
    severity: str
    corruption: Corruption
    meant: tuple[str, ...]
    anew: bool = False
    quick: bool = False


CORRUPTIONS = (
    Spoiling('noise', '2 %', noise(0.02), NOISE),
    Spoiling('noise', '5 %', noise(0.05), NOISE, quick=True),
    Spoiling('noise', '10 %', noise(0.1), NOISE),
    Spoiling('noise', '20 %', noise(0.2), NOISE, anew=True, quick=True),
    Spoiling('motion', '1°, 2 events', motion(1, 2), MOTION),
    Spoiling('motion', '2°, 4 events', motion(2, 4), MOTION, quick=True),
    Spoiling('motion', '4°, 8 events', motion(4, 8), MOTION),
    Spoiling('motion', '6°, 12 events', motion(6, 12), MOTION, anew=True),
    Spoiling('bias field', 'log range 0.3', bias(0.3), ('uneven',)),
    Spoiling('bias field', 'log range 1.0', bias(1.0), ('uneven',), quick=True),
    Spoiling('cropped: emptied below', '10 %', emptied(0.1), CUT),
    Spoiling('cropped: emptied below', '25 %', emptied(0.25), CUT, anew=True),
    Spoiling('cropped: field of view', '10 %', cut_off(0.1), CUT, quick=True),
    Spoiling('cropped: field of view', '25 %', cut_off(0.25), CUT, anew=True),
    Spoiling('wrong side: labels', 'all', swapped, SIDES, quick=True),
    Spoiling('wrong side: labels', 'front quarter', swapped_front, SIDES, quick=True),
    Spoiling('wrong side: header turned', '180°', turned, ('unexpected-orientation',)),
    Spoiling('wrong side: data mirrored', '', mirrored, SIDES, anew=True),
)


@dataclass(frozen=True)
class Case:
    """One thing to examine: what it is, and how to get its measures and flags."""

    kind: str
    scan: str
    what: str
    severity: str
    meant: tuple[str, ...]
    run: Callable[[], dict[str, Any]]

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells a case from all others."""
        return self.kind, self.scan, self.what, self.severity


def load(path: Path) -> nib.Nifti1Image:
    """A scan in RAS order, cropped to what is not empty, without what is not finite."""
    image = nib.as_closest_canonical(nib.load(path))
    data = np.nan_to_num(image.get_fdata(dtype=np.float32))
    box = bounding_box(data > 0, margin=MARGIN)
    return nib.Nifti1Image(data[box], crop(image.affine, box))


def judged(
    sample: Sample,
    months: float | None,
    table: LabelTable,
    found: Segmentation | None = None,
) -> dict[str, Any]:
    """Measures and flags of a scan with its labels, or with all that the network found.

    Without `found` there are no probabilities: volumes are those of the voxels, and nothing is
    said about doubt.
    """
    data, affine, labels = sample
    volumes = {r.index: (labels == r.index).sum() * voxel_volume(affine) for r in table.structures}
    if found is None:
        morph = morphometry_table(labels, affine, volumes, dict.fromkeys(volumes, 0.9), table)
        doubt = None
    else:
        soft, sure = found.soft_volumes, found.confidence
        morph = morphometry_table(labels, affine, soft, sure, table)
        doubt = found.uncertainty
    metrics, flags = session_qc(labels, doubt, data, affine, morph, Age(months), table=table)
    worst: dict[str, str] = {}
    for flag in flags:
        if RANK[flag.severity] >= RANK[worst.get(flag.code, 'info')]:
            worst[flag.code] = flag.severity
    return {**metrics, 'flags': worst}


class Scan:
    """A real scan, segmented when that is needed for the first time."""

    def __init__(
        self, name: str, image: nib.Nifti1Image, model: Model, months: float | None
    ) -> None:
        self.name, self.model, self.months = name, model, months
        self.image = image
        self.data, self.affine = np.asarray(image.dataobj, np.float32), image.affine

    @cached_property
    def found(self) -> Segmentation:
        """What the network finds in it."""
        return segment([(self.data, self.affine)], self.model, device='cpu')

    @property
    def sample(self) -> Sample:
        """The scan with its labels."""
        return self.data, self.affine, self.found.labels

    def untouched(self) -> dict[str, Any]:
        """Measures and flags of the scan as it is."""
        return judged(self.sample, self.months, self.model.labels, self.found)

    def spoilt(self, spoiling: Spoiling, seed: int) -> dict[str, Any]:
        """Measures and flags of the spoilt scan."""
        empty = np.zeros(self.data.shape, np.int16)
        sample = (self.data, self.affine, empty) if spoiling.anew else self.sample
        x, affine, labels = spoiling.corruption(sample, np.random.default_rng(seed))
        x = np.ascontiguousarray(x, np.float32)
        if not spoiling.anew:
            return judged((x, affine, labels), self.months, self.model.labels)
        found = segment([(x, affine)], self.model, device='cpu')
        return judged((x, affine, found.labels), self.months, self.model.labels, found)

    def at_wrong_age(self, months: float) -> dict[str, Any]:
        """Measures and flags of the scan as it is, under another child's age."""
        return judged(self.sample, months, self.model.labels, self.found)


def ages_of(folder: Path) -> dict[str, float]:
    """Age in months by the place of a session, from the datasets' own discovery."""
    from babyseg_bids.discovery import find_sessions

    ages = {}
    for name in ('ds-bmex', 'ds-templates'):
        for s in find_sessions(folder / name):
            if s.age.months is not None:
                ages[f'{name}/{s.name.replace("_", "/")}'] = s.age.months
    return ages


def open_scan(
    folder: Path,
    place: str,
    suffix: str,
    model: Model,
    ages: dict[str, float],
    backwards: bool = False,
) -> Scan:
    """The scan of a session, its header put right."""
    (path,) = folder.glob(f'{place}/anat/*_{suffix}.nii.gz')
    image = load(path)
    if backwards:
        affine = HALF_TURN @ image.affine
        image = nib.as_closest_canonical(nib.Nifti1Image(np.asarray(image.dataobj), affine))
    return Scan(path.name.removesuffix('.nii.gz'), image, model, ages.get(place))


def real_cases(
    folder: Path, model: Model, seed: int, quick: bool, templates: dict[str, Scan]
) -> Iterator[Case]:
    """Real scans, spoilt; an adult's head as an infant's; children under another's age."""
    ages = ages_of(folder)
    for place, suffix, backwards in SCANS[: 1 if quick else None]:
        scan = templates.get(f'{place}_{suffix}')
        scan = scan or open_scan(folder, place, suffix, model, ages, backwards)
        yield Case('real scan', scan.name, UNTOUCHED, '', (), scan.untouched)
        for s in CORRUPTIONS:
            if s.quick or not quick:
                run = lambda scan=scan, s=s: scan.spoilt(s, seed)  # noqa: E731
                yield Case('real scan', scan.name, s.what, s.severity, s.meant, run)
        if scan.months is not None:
            wrong = max(WRONG_AGES, key=lambda m: abs(m - scan.months))
            run = lambda scan=scan, m=wrong: scan.at_wrong_age(m)  # noqa: E731
            text = f'as {wrong:g} months old'
            meant = ('implausible-volume',)
            yield Case('real scan', scan.name, 'wrong head: age', text, meant, run)
    if not quick:
        adult = Scan('adult', load(folder / 'adult-heads/head_T1w.nii.gz'), model, 6.0)
        meant = ('implausible-volume',)
        text = 'as 6 months old'
        yield Case('real scan', 'adult', 'wrong head: adult', text, meant, adult.untouched)


def pair_flags(first: Scan, second: Scan, model: Model) -> dict[str, Any]:
    """Alignment of two scans, and how well their own segmentations agree."""
    (alignment,) = align_scans([first.image, second.image])
    found = alignment_flags(second.name, alignment)
    flags: dict[str, str] = {flag.code: flag.severity for flag in found}
    if alignment.status == 'refused':
        return {'flags': flags}
    to_voxel = np.linalg.inv(alignment.matrix @ second.affine) @ first.affine
    moved = ndimage.affine_transform(
        second.found.labels, to_voxel, output_shape=first.data.shape, order=0, cval=-1
    )
    dice = scan_agreement({'1': first.found.labels, '2': moved}, model.labels)
    worst = min(dice.values(), default=None)
    limit = LIMITS['scan_agreement_min']
    severity = limit.severity(worst)
    flags |= {limit.code: severity} if severity else {}
    return {'flags': flags, 'scan_agreement_min': worst}


def pair_cases(model: Model, templates: dict[str, Scan]) -> Iterator[Case]:
    """Sessions of a T1w and a T2w: of one anatomy, of two, and with one of them mirrored."""
    for month, other in PAIRS:
        first, second, foreign = (
            templates[f'ds-templates/sub-month{m}_{suffix}']
            for m, suffix in ((month, 'T1w'), (month, 'T2w'), (other, 'T2w'))
        )
        data = second.data[::-1].copy()
        flipped = nib.Nifti1Image(data, second.affine)
        mirror = Scan(f'{second.name} mirrored', flipped, model, second.months)
        for what, scan, meant in (
            (UNTOUCHED, second, ()),
            ('wrong head: other child', foreign, FOREIGN),
            ('wrong side: data mirrored', mirror, FOREIGN),
        ):
            run = lambda first=first, scan=scan: pair_flags(first, scan, model)  # noqa: E731
            yield Case('pair of scans', f'month{month}', what, '', meant, run)


def label_cases(folder: Path) -> Iterator[Case]:
    """Label maps with known sides: sound ones, and a network's with confused sides."""
    table = label_table()

    def examine(path: Path) -> dict[str, Any]:
        image = nib.as_closest_canonical(nib.load(path)).slicer[::2, ::2, ::2]
        labels = table.indices[table.channels(np.asarray(image.dataobj))]
        flags = judged((labels.astype(np.float32), image.affine, labels), None, table)['flags']
        return {'flags': {code: s for code, s in flags.items() if code in SIDES}}

    for kind, what, meant in (
        ('infant', UNTOUCHED, ()),
        ('faulty', 'wrong side: confused by a network', SIDES),
    ):
        for path in sorted((folder / 'label-maps' / kind).glob('*.nii.gz')):
            run = lambda path=path: examine(path)  # noqa: E731
            yield Case('label map', path.name, what, '', meant, run)


def simulate(path: Path, seed: int) -> Sample:
    """A scan of a label map with one grey value a tissue, 1 % noise and slight blur."""
    table = label_table()
    grey = dict(zip(TISSUES, (120.0, 85.0, 100.0, 35.0, 90.0, 110.0), strict=True))
    image = nib.as_closest_canonical(nib.load(path)).slicer[::2, ::2, ::2]
    labels = table.indices[table.channels(np.asarray(image.dataobj))]
    rows, columns, _ = bounding_box(labels > 0, margin=6)
    box = (rows, columns, slice(0, None))
    labels, affine = labels[box], crop(image.affine, box)
    lut = np.zeros(256)
    for row in table.structures:
        lut[row.index] = grey[row.tissue]
    rng = np.random.default_rng(seed)
    data = ndimage.gaussian_filter(lut[labels], 0.4)
    data = np.abs(data + rng.normal(0, 1, data.shape)) * (labels > 0)
    return data.astype(np.float32), affine, labels


def simulated_cases(folder: Path, seed: int, maps: int, quick: bool) -> Iterator[Case]:
    """Simulated scans, spoilt; their labels are known."""
    paths = sorted((folder / 'label-maps/infant').glob('*.nii.gz'))
    for path in paths[:: max(1, len(paths) // maps)][:maps]:
        cache: list[Sample] = []

        def examine(
            corruption: Corruption | None, path: Path = path, cache: list[Sample] = cache
        ) -> dict[str, Any]:
            if not cache:
                cache.append(simulate(path, seed))
            sample = cache[0]
            if corruption:
                sample = corruption(sample, np.random.default_rng(seed))
            return judged(sample, float(path.name[:2]), label_table())

        kind = 'simulated scan'
        yield Case(kind, path.name, UNTOUCHED, '', (), lambda e=examine: e(None))
        for s in CORRUPTIONS:
            # Nothing but a network could notice these: the true labels would be mirrored along.
            if s.corruption is mirrored or (quick and not s.quick):
                continue
            run = lambda e=examine, s=s: e(s.corruption)  # noqa: E731
            yield Case(kind, path.name, s.what, s.severity, s.meant, run)


def raised(row: dict[str, Any], untouched: dict[tuple[str, str], dict[str, str]]) -> set[str]:
    """Flags that are at least a warning, and worse than those of the untouched scan."""
    base = untouched.get((row['kind'], row['scan']), {}) if row['what'] != UNTOUCHED else {}
    return {
        code
        for code, severity in row['flags'].items()
        if RANK[severity] > RANK[base.get(code, 'info')]
    }


def _grouped(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Records of one kind, corruption and severity, in the order of the tables."""
    order = {s.what: i for i, s in enumerate(CORRUPTIONS)}
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row['kind'], row['what'], row['severity']), []).append(row)
    return dict(sorted(groups.items(), key=lambda g: (g[0][0], order.get(g[0][1], -1))))


def _markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table."""
    lines = [head, tuple('---' for _ in head), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _can_be_raised(code: str, kind: str) -> bool:
    """Whether a kind of case is examined for a flag at all."""
    if kind == 'label map':
        return code in SIDES
    return (kind == 'pair of scans') == (code in FOREIGN)


def tables(rows: list[dict[str, Any]]) -> str:
    """What was found of each corruption; each flag's false alarms and sensitivity."""
    untouched = {(r['kind'], r['scan']): r['flags'] for r in rows if r['what'] == UNTOUCHED}
    first = []
    good: dict[str, list[set[str]]] = {}
    # By flag, and by kind and corruption: severities with their counts.
    hits: dict[str, dict[str, list[str]]] = {}
    for (kind, what, severity), some in _grouped(rows).items():
        found = [raised(r, untouched) for r in some]
        counts = Counter(code for codes in found for code in sorted(codes))
        meant = set(some[0]['meant'])
        hit = f'{sum(bool(f & meant) for f in found)} of {len(some)}' if meant else ''
        listed = ', '.join(f'`{code}` {n}' for code, n in counts.most_common())
        first.append((kind, f'{what} {severity}'.strip(), hit, listed or 'none'))
        if what == UNTOUCHED:
            good[kind] = found
            continue
        for code in sorted(meant | set(counts)):
            place = f'{what} ({kind})' if code in meant else f'not meant for {what} ({kind})'
            text = f'{severity} {counts[code]}/{len(some)}'.strip()
            hits.setdefault(code, {}).setdefault(place, []).append(text)
    second = []
    codes = {*hits, *(code for some in good.values() for found in some for code in found)}
    for code in sorted(codes):
        alarms = ', '.join(
            f'{sum(code in f for f in found)} of {len(found)} ({kind})'
            for kind, found in good.items()
            if _can_be_raised(code, kind)
        )
        places = sorted(hits.get(code, {}).items(), key=lambda p: p[0].startswith('not meant'))
        by = '; '.join(f'{place}: {", ".join(texts)}' for place, texts in places)
        second.append((f'`{code}`', alarms or 'not examined', by))
    return '\n\n'.join(
        (
            _markdown(('kind', 'spoilt', 'found by a flag meant for it', 'flags raised'), first),
            _markdown(('flag', 'false alarms on untouched', 'raised by'), second),
        )
    )


def fingerprint(model: Model) -> str:
    """What tells weights apart."""
    total = 0
    for value in model.network.state_dict().values():
        total = zlib.crc32(value.cpu().numpy().tobytes(), total)
    return f'{model.name} {model.version} {total:08x} {model.temperature:g}'


def all_cases(args: argparse.Namespace, model: Model | None) -> Iterator[Case]:
    """Every case, those without a network first."""
    yield from label_cases(args.folder)
    yield from simulated_cases(args.folder, args.seed, 2 if args.quick else args.maps, args.quick)
    if model is None:
        return
    templates: dict[str, Scan] = {}
    if not args.quick:
        ages = ages_of(args.folder)
        for month, _ in PAIRS:
            for suffix in ('T1w', 'T2w'):
                place = f'ds-templates/sub-month{month}'
                # All templates face backwards in their headers.
                scan = open_scan(args.folder, place, suffix, model, ages, backwards=True)
                templates[f'{place}_{suffix}'] = scan
    yield from real_cases(args.folder, model, args.seed, args.quick, templates)
    if not args.quick:
        yield from pair_cases(model, templates)


def main() -> None:
    """Examine all cases and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('folder', type=Path)
    parser.add_argument('--model', default='default')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--quick', action='store_true', help='one real and two simulated scans')
    parser.add_argument('--simulated', action='store_true', help='leave out all that is segmented')
    parser.add_argument('--maps', type=int, default=11, help='label maps to simulate scans of')
    parser.add_argument('--records', type=Path, help='JSON lines; what they hold is not redone')
    parser.add_argument('--minutes', type=float, help='begin no case after that time')
    args = parser.parse_args()
    model = None if args.simulated else load_model(args.model)
    weights = fingerprint(model) if model else ''
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    if args.records and args.records.is_file():
        for line in args.records.read_text('utf-8').splitlines():
            row = json.loads(line)
            if row['weights'] in ('', weights) and row['seed'] == args.seed:
                rows[row['kind'], row['scan'], row['what'], row['severity']] = row
    began, left = time.monotonic(), 0
    for case in all_cases(args, model):
        if case.key in rows:
            continue
        elapsed = time.monotonic() - began
        if args.minutes and elapsed > 60 * args.minutes:
            left += 1
            continue
        print(f'{elapsed:6.0f} s  {" · ".join(filter(None, case.key))}', file=sys.stderr)
        used = weights if case.kind in ('real scan', 'pair of scans') else ''
        kind, scan, what, severity = case.key
        row = {'kind': kind, 'scan': scan, 'what': what, 'severity': severity}
        row |= {'meant': list(case.meant), 'weights': used, 'seed': args.seed, **case.run()}
        rows[case.key] = row
        if args.records:
            with args.records.open('a', encoding='utf-8') as stream:
                stream.write(json.dumps(row) + '\n')
    print(tables(list(rows.values())))
    print(f'\n{len(rows)} cases' + (f', {left} not done: run it again' if left else ''))
    print(f'Weights: {weights or "none"}; {(time.monotonic() - began) / 60:.1f} minutes')


if __name__ == '__main__':
    main()
