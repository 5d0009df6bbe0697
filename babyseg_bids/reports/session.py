"""The page of one session: what was done, what to look at, and the numbers."""

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from babyseg_bids.citation import BIBLIOGRAPHY
from babyseg_bids.labels import LabelTable, table_of
from babyseg_bids.longitudinal import spoken_tissue
from babyseg_bids.morphometry import (
    COLUMNS,
    asymmetry_index,
    brain_volume,
    structure_name,
    tissue_totals,
)
from babyseg_bids.qc_flags import LIMITS
from babyseg_bids.records import Flag, SessionInputs
from babyseg_bids.reports import figures as fig
from babyseg_bids.reports import wording as say
from babyseg_bids.reports.against_age import AgainstAge, against_age, group_table_of
from babyseg_bids.reports.files import render, unique_flags, write_atomic
from babyseg_bids.reports.review import places_to_review
from babyseg_bids.reports.viewer import viewer_code, viewer_data

# Slices of each plane, and how many stand side by side; sagittal ones are wider than the others.
SLICES = {'axial': (10, 5), 'coronal': (10, 5), 'sagittal': (8, 4)}
UNCERTAINTY_SLICES = 6
ALIGNED_SLICES = 5
MISSING_ALIGNMENT = 'not aligned'
DOUBTS_SHOWN = 6

REFERENCES = (
    (
        (
            'Hoffmann M, Zöllei L, Dalca AV (2025). Deep infant brain segmentation from '
            'multi-contrast MRI.'
        ),
        'https://arxiv.org/abs/2512.05114',
    ),
    (
        (
            'Gorgolewski KJ et al. (2016). The brain imaging data structure, a format for '
            'organizing and describing outputs of neuroimaging experiments. Scientific Data 3, '
            '160044.'
        ),
        'https://doi.org/10.1038/sdata.2016.44',
    ),
    (
        (
            'Studholme C et al. (1999). An overlap invariant entropy measure of 3D medical image '
            'alignment. Pattern Recognition 32(1), 71-86.'
        ),
        'https://doi.org/10.1016/S0031-3203(98)00091-0',
    ),
    (
        (
            'Esteban O et al. (2017). MRIQC: advancing the automatic prediction of image quality '
            'in MRI from unseen sites. PLoS ONE 12(9), e0184661.'
        ),
        'https://doi.org/10.1371/journal.pone.0184661',
    ),
)

# Measures in the order of the page, with their form.
MEASURE_NAMES: dict[str, tuple[str, str]] = {
    'mean_confidence': ('Mean confidence', '.3f'),
    'predicted_dice_mean': ('Predicted Dice, mean over the structures', '.3f'),
    'uncertain_share': ('Share of the brain over the uncertainty threshold', '.3f'),
    'structure_uncertain_max': ('The same in the least certain structure (share)', '.3f'),
    'mean_uncertainty': ('Mean uncertainty', '.3f'),
    'scan_agreement_min': ('Agreement of the scans, the worst one (Dice)', '.3f'),
    'snr_white_matter': ('Signal to noise, white matter', '.1f'),
    'snr_cortex': ('Signal to noise, cortex', '.1f'),
    'snr_deep_grey': ('Signal to noise, deep grey matter', '.1f'),
    'snr_ventricle': ('Signal to noise, ventricles', '.1f'),
    'snr_cerebellum': ('Signal to noise, cerebellum', '.1f'),
    'snr_brainstem': ('Signal to noise, brainstem', '.1f'),
    'cnr_white_matter_cortex': ('Contrast to noise, white matter and cortex', '.2f'),
    'cnr_cortex_ventricle': ('Contrast to noise, cortex and ventricles', '.2f'),
    'noise_percent': ('Noise (% of the white matter)', '.1f'),
    'bias_field_percent': ('Range of the smooth intensity field (%)', '.1f'),
    'stripe_ratio': ('Stripes: fine variation, roughest over smoothest axis', '.2f'),
    'ghost_share': ('Ghosts in the air (share of the brain)', '.3f'),
    'edge_width_mm': ('Width of the border of white matter and cortex (mm)', '.2f'),
    'smoothness_mm': ('Effective resolution (mm)', '.2f'),
    'voxel_min_mm': ('Shortest edge of a voxel (mm)', '.2f'),
    'voxel_max_mm': ('Longest edge of a voxel (mm)', '.2f'),
    'edge_area_mm2': ('Brain in the edge of the image (mm²)', '.0f'),
    'edge_share': ('The same, relative to the size of the brain', '.3f'),
    'flat_cut_share': ('Largest flat end of the brain (share of its cross-section)', '.3f'),
    'largest_component_min': ('Largest piece of the most fragmented structure (share)', '.3f'),
    'left_right_axis': ('Left-right axis of the labels against the scanner (cosine)', '.3f'),
    'left_right_misplaced_share': ('Left or right labels beyond the midline (share)', '.4f'),
    'anterior_axis': ('Back-to-front axis of the labels against the scanner (cosine)', '.3f'),
    'superior_axis': ('Bottom-to-top axis of the labels against the scanner (cosine)', '.3f'),
    'handedness': ('Handedness of the labels (1: as in a body, −1: as in a mirror)', '.3f'),
    'hemisphere_asymmetry_percent': ('Asymmetry of the hemispheres (%, left larger: +)', '+.1f'),
    'structure_asymmetry_percent': ('Asymmetry of the most asymmetric structure (%)', '+.1f'),
}
# Measured with a sign; either way beyond a limit is flagged.
EITHER_WAY = ('hemisphere_asymmetry_percent', 'structure_asymmetry_percent')

# Shown elsewhere on the page.
NOT_SHOWN = ('segmented_brain_volume_mm3', 'voxel_volume_mm3', 'uncertainty_threshold')


@dataclass(frozen=True)
class SessionReportData:
    """All that the page of a session shows.

    `reference_image`, `labels` and `uncertainty` are paths of images on one grid. `figures_dir`
    receives the pictures as files.
    `transforms` has one mapping for each scan but the reference, with any of the keys `scan`,
    `status`, `rotation_deg`, `translation_mm`, `similarity`, `similarity_before`, `reason`,
    `matrix` (world of the scan to world of the reference; without it the scan is not drawn).
    `flags` are those of the session and of QC together; duplicates are shown once.
    """

    inputs: SessionInputs
    morph: pd.DataFrame
    qc: Mapping[str, Any]
    flags: tuple[Flag, ...]
    reference_image: Path
    labels: Path
    uncertainty: Path | None
    figures_dir: Path
    transforms: tuple[Mapping[str, Any], ...] = ()
    model: str = 'unknown'
    device: str = 'unknown'
    seconds: float | None = None
    version: str = 'unknown'
    boilerplate: str = ''
    uncertainty_threshold: float = 0.3


def _embed(data: bytes) -> str:
    """A picture as an address that holds it."""
    return 'data:image/webp;base64,' + base64.b64encode(data).decode('ascii')


def _picture(scan: Image.Image, title: str, alt: str, overlay: Image.Image | None = None) -> dict:
    """What the template needs of one picture."""
    return {
        'scan': _embed(fig.encode(scan)),
        'overlay': None if overlay is None else _embed(fig.encode(overlay)),
        'width': scan.width,
        'height': scan.height,
        'title': title,
        'alt': alt,
    }


def _table(data: SessionReportData) -> LabelTable:
    """The labels that the session's model knows."""
    return table_of([0, *data.morph['index']])


def load_session(data: SessionReportData, /) -> fig.Volume:
    """The images that the page shows: reference, labels, uncertainty and the aligned scans."""
    volume = fig.load_volume(data.reference_image, data.labels, data.uncertainty)
    matrices = {str(t['scan']): t['matrix'] for t in data.transforms if 'matrix' in t}
    for scan in data.inputs.scans[1:]:
        matrix = matrices.get(scan.label, matrices.get(scan.relative_path))
        if matrix is not None:
            volume = fig.add_scan(volume, scan.label, Path(scan.path), np.asarray(matrix))
    return volume


def draw_slices(volume: fig.Volume, data: SessionReportData, /) -> list[dict]:
    """Outlines in three planes; also written as `<session>_desc-<plane>_dseg.png`."""
    pictures = []
    for plane, (slices, columns) in SLICES.items():
        layout = fig.lay_out(volume, [(plane, slices)], columns)
        scan = fig.draw_scan(volume, layout)
        overlay = fig.draw_labels(volume, layout, _table(data))
        path = data.figures_dir / f'{data.inputs.name}_desc-{plane}_dseg.png'
        write_atomic(path, fig.encode(fig.blend(scan, overlay), 'PNG'))
        title = f'{plane.capitalize()} slices'
        alt = (
            f'{slices} {plane} slices over the brain in the reference scan of {data.inputs.name}.'
        )
        pictures.append(_picture(scan, title, alt, overlay))
    return pictures


def draw_aligned(volume: fig.Volume, data: SessionReportData, /) -> dict[str, Any] | None:
    """The reference and the other scans in the same slices; None with one scan."""
    if not volume.others:
        return None
    rows = [(plane, ALIGNED_SLICES) for plane in fig.PLANES]
    layout = fig.lay_out(volume, rows, ALIGNED_SLICES)
    title = 'The same slices of each scan, on the grid of the reference'
    alt = f'Slices of the reference scan of {data.inputs.name}.'
    overlay = fig.draw_labels(volume, layout, _table(data))
    others = [
        {'name': name, 'scan': _embed(fig.encode(fig.draw_scan(volume, layout, image=image)))}
        for name, image in volume.others.items()
    ]
    return {**_picture(fig.draw_scan(volume, layout), title, alt, overlay), 'others': others}


def draw_doubt(volume: fig.Volume, data: SessionReportData, /) -> dict | None:
    """Uncertainty in three planes; also written as `<session>_desc-uncertainty_dseg.png`."""
    if volume.uncertainty is None:
        return None
    rows = [(plane, UNCERTAINTY_SLICES) for plane in fig.PLANES]
    layout = fig.lay_out(volume, rows, UNCERTAINTY_SLICES)
    scan = fig.draw_uncertainty(volume, layout, data.uncertainty_threshold)
    path = data.figures_dir / f'{data.inputs.name}_desc-uncertainty_dseg.png'
    write_atomic(path, fig.encode(scan, 'PNG'))
    title = 'Uncertainty in axial, coronal and sagittal slices'
    return _picture(scan, title, f'{title} of {data.inputs.name}.')


def _place_rows(volume: fig.Volume, table: LabelTable) -> list[dict[str, Any]]:
    """The places to review, each with a picture."""
    rows = []
    for place in places_to_review(volume.labels, volume.uncertainty, volume.affine, table):
        picture = fig.draw_place(volume, place.voxel, table)
        rows.append(
            {
                'name': place.structure,
                'color': place.color,
                'reason': place.reason,
                'mm': ' '.join(map(str, place.mm)),
                'where': place.text,
                'picture': _embed(fig.encode(picture, quality=75)),
                'width': picture.width,
                'height': picture.height,
            }
        )
    return rows


def legend(table: LabelTable, /) -> list[dict[str, str]]:
    """One entry for each colour; both sides of a structure share one."""
    rows = [row for row in table.structures if row.hemisphere != 'R']
    return [{'color': row.color, 'name': structure_name(row.name)} for row in rows]


def header_contradicted(qc: Mapping[str, Any], /) -> bool:
    """Whether the labels say that the head lies otherwise than the scan's header does."""
    keys = ('left_right_axis', 'anterior_axis', 'superior_axis')
    return any(LIMITS[key].severity(qc.get(key)) == 'severe' for key in keys)


def _facts(data: SessionReportData, flags: list[Flag]) -> list[tuple[str, str, str]]:
    """Term, value and detail of the summary."""
    inputs = data.inputs
    counts = {s: sum(f.severity == s for f in flags) for s in ('severe', 'warning', 'info')}
    found = ', '.join(f'{n} {s}' for s, n in counts.items() if n) or 'none'
    used = len(inputs.scans)
    rejected = sum(row.status == 'rejected' for row in inputs.ledger)
    scans = f'{used} used' + (f', {rejected} not used' if rejected else '')
    return [
        ('Subject', inputs.subject, ''),
        ('Session', inputs.session or 'none', ''),
        ('Age at scan', say.age_text(inputs.age), f'from: {inputs.age.source}'),
        ('Segmented brain volume', f'{say.millilitres(brain_volume(data.morph))} mL', ''),
        ('Scans', scans, ', '.join(dict.fromkeys(s.suffix for s in inputs.scans))),
        ('Flags', found, ''),
        ('Model', data.model, f'babyseg {data.version}'),
        ('Time', say.duration(data.seconds), f'on {data.device}'),
    ]


def _alignment(transform: Mapping[str, Any] | None) -> str:
    """One scan's alignment in words."""
    if transform is None:
        return MISSING_ALIGNMENT
    status = transform.get('status')
    if status == 'identity':
        return 'already aligned'
    parts = []
    for key, form, unit in (('rotation_deg', '.1f', '°'), ('translation_mm', '.1f', ' mm')):
        value = transform.get(key)
        if value is not None:
            size = float(np.linalg.norm(value))
            parts.append(f'{"turned" if unit == "°" else "moved"} by {size:{form}}{unit}')
    text = ', '.join(parts)
    if status == 'refused':
        return 'refused' + (f' ({text})' if text else '')
    return text or str(status or MISSING_ALIGNMENT)


STATUS_LEVELS = {'reference': 'good', 'used': 'good', 'rejected': 'warning'}


def _scan_rows(data: SessionReportData) -> list[dict[str, str]]:
    """The ledger with alignment."""
    transforms = {str(t.get('scan')): t for t in data.transforms}
    rows = []
    for row in data.inputs.ledger:
        stem = row.relative_path.rsplit('/', 1)[-1].split('.')[0]
        parts = [p for p in stem.split('_') if not p.startswith(('sub-', 'ses-'))]
        transform = transforms.get(row.relative_path) or transforms.get('_'.join(parts))
        alignment = _alignment(transform) if row.status != 'reference' else 'is the reference'
        rows.append(
            {
                'path': row.relative_path,
                'suffix': row.suffix,
                'status': row.status if row.status != 'rejected' else 'not used',
                'level': STATUS_LEVELS.get(row.status, 'info'),
                'reason': row.reason,
                'alignment': alignment,
            }
        )
    return rows


def _structure_rows(morph: pd.DataFrame, table: LabelTable) -> list[dict[str, Any]]:
    """The volumes table: one row a structure, left and right side by side."""
    by_index = {int(r['index']): r for r in morph.to_dict('records')}
    total = brain_volume(morph)
    rows = []
    for row in table.structures:
        if row.hemisphere == 'R':
            continue
        paired = row.mirror != row.index
        left, right = by_index[row.index], by_index[row.mirror]
        sides = [left['volume-mm3'], right['volume-mm3']]
        # The sum of both sides is unknown when one was not found.
        both = sum(sides) if paired else sides[0]
        rows.append(
            {
                'name': structure_name(row.name),
                'color': row.color,
                'paired': paired,
                'left': say.millilitres(sides[0]) if paired else '',
                'right': say.millilitres(sides[1]) if paired else '',
                'both': say.millilitres(both),
                'asymmetry': say.number(asymmetry_index(*sides), '+.1f') if paired else '',
                'share': say.percent(both / total if total > 0 else None, 2),
                'sure_left': say.number(left['mean-confidence']),
                'sure_right': say.number(right['mean-confidence']) if paired else '',
                'dice_left': say.number(left.get('predicted-dice')),
                'dice_right': say.number(right.get('predicted-dice')) if paired else '',
            }
        )
    return rows


def _tissue_rows(morph: pd.DataFrame) -> tuple[list[dict[str, Any]], int]:
    """Tissue totals with the lengths of their bars, and the end of the bars' scale in percent."""
    totals = tissue_totals(morph)
    largest = totals['fraction-of-brain'].max()
    scale = int(np.ceil(10 * largest) * 10) if np.isfinite(largest) else 100
    rows = []
    for row in totals.to_dict('records'):
        share = row['fraction-of-brain']
        rows.append(
            {
                'name': spoken_tissue(row['tissue']),
                'volume': say.millilitres(row['volume-mm3']),
                'share': say.percent(share),
                'width': f'{100 * 100 * share / scale:.1f}' if np.isfinite(share) else '0',
            }
        )
    return rows, scale


def _doubt_rows(data: SessionReportData, table: LabelTable) -> list[dict[str, str]]:
    """The structures with the largest share of uncertain voxels."""
    shares = data.qc.get('uncertain_share_by_structure') or {}
    sure = dict(zip(data.morph['abbreviation'], data.morph['mean-confidence'], strict=True))
    named = {r.abbreviation: r for r in table.structures}
    worst = sorted((k for k in shares if k in named and shares[k] > 0), key=lambda k: -shares[k])
    return [
        {
            'name': say.sided_name(named[k]),
            'color': named[k].color,
            'share': say.percent(shares[k], 0),
            'confidence': say.number(sure[k]),
        }
        for k in worst[:DOUBTS_SHOWN]
    ]


def _measures(qc: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Name and form of each single number in the quality record, the well-known ones first."""
    known = {k: v for k, v in MEASURE_NAMES.items() if k in qc}
    others = {
        k: (k.replace('_', ' ').capitalize(), '.4g')
        for k, v in qc.items()
        if k not in MEASURE_NAMES and k not in NOT_SHOWN and isinstance(v, (int, float))
    }
    return known | others


def _quality_rows(data: SessionReportData) -> list[dict[str, str]]:
    """The measures with their limits, and how each compares with its own.

    The verdict is that of the measure and not of its flag, which several measures may share.
    """
    rows = []
    for key, (name, form) in _measures(data.qc).items():
        value, limit = data.qc[key], LIMITS.get(key)
        level = ''
        if limit is not None and value is not None:
            size = abs(value) if key in EITHER_WAY else value
            level = limit.severity(size, data.inputs.age.months) or 'good'
        rows.append(
            {
                'name': name,
                'value': say.number(value, form),
                'limit': say.limit_text(limit) if limit else '',
                'level': level,
                'verdict': 'fine' if level == 'good' else level,
            }
        )
    return rows


def _further_rows(morph: pd.DataFrame, table: LabelTable) -> tuple[list[str], list[Any]]:
    """Columns of the volumes table beyond the usual ones, with their values by structure."""
    names = [str(c) for c in morph.columns if c not in COLUMNS]
    rows = []
    for row in morph.to_dict('records') if names else ():
        values = [row[n] if isinstance(row[n], str) else say.number(row[n], '.4g') for n in names]
        rows.append((say.sided_name(table[int(row['index'])]), values))
    return names, rows


def _against_age(data: SessionReportData) -> AgainstAge | None:
    """The session's volumes against age."""
    known = data.morph.dropna(subset=['volume-mm3'])
    volumes = dict(zip(known['index'].astype(int), known['volume-mm3'], strict=True))
    table = group_table_of(data.labels)
    return against_age(volumes, data.inputs.age.months, table, data.inputs.name)


def write_session_report(path: str | os.PathLike[str], data: SessionReportData, /) -> None:
    """Write the page of a session, with everything that it shows inside it.

    Parameters
    ----------
    path : path of the HTML file; it appears when it is complete
    data : what to show; its pictures also go to `data.figures_dir` as PNG files

    Raises
    ------
    OutputError
        The page or a picture cannot be written.
    """
    table = _table(data)
    flags = unique_flags(data.flags)
    volume = load_session(data)
    tissues, tissue_scale = _tissue_rows(data.morph)
    methods = say.markdown_blocks(data.boilerplate)
    further = _further_rows(data.morph, table)
    reference = data.inputs.scans[0].label if data.inputs.scans else data.reference_image.name
    cited = any(kind == 'heading' and text == 'References' for kind, text in methods)
    page = render(
        'session.html',
        name=data.inputs.name,
        version=data.version,
        made=say.now(),
        heat=', '.join(f'rgb({r:.0f},{g:.0f},{b:.0f})' for r, g, b in fig.heat_stops()),
        verdict=say.verdict(flags),
        facts=_facts(data, flags),
        scans=_scan_rows(data),
        flags=flags,
        reference=reference,
        contradicted=header_contradicted(data.qc),
        legend=legend(table),
        figures=draw_slices(volume, data),
        aligned=draw_aligned(volume, data),
        uncertainty=draw_doubt(volume, data),
        places=_place_rows(volume, table),
        viewer=viewer_data(volume, reference, table),
        viewer_code=viewer_code(),
        threshold=f'{data.uncertainty_threshold:g}',
        doubts=_doubt_rows(data, table),
        total=say.millilitres(brain_volume(data.morph)),
        tissues=tissues,
        tissue_scale=tissue_scale,
        structures=_structure_rows(data.morph, table),
        aged=_against_age(data),
        age=say.age_text(data.inputs.age),
        further_names=further[0],
        further=further[1],
        quality=_quality_rows(data),
        methods=methods,
        references=() if cited else REFERENCES,
        bibliography=BIBLIOGRAPHY,
    )
    write_atomic(path, page)
