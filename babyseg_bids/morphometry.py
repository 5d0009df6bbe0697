"""Volumes of the structures: one table a session, with tissue totals and asymmetry.

Volumes come in two kinds. The soft one sums the network's probabilities, which is steadier under
noise and partial volume; the hard one counts the voxels of the label map, so that it can be
recomputed from the map that is published beside the table.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from babyseg_bids.labels import LabelTable, label_table

MISSING = 'n/a'
MEASURES = (
    'volume-mm3',
    'voxel-volume-mm3',
    'fraction-of-brain',
    'mean-confidence',
    'predicted-dice',
)
COLUMNS = ('index', 'name', 'abbreviation', 'hemisphere', *MEASURES)

# Decimals in files: a thousandth of a cubic millimetre is far below what any scan resolves.
DECIMALS = {
    'volume-mm3': 3,
    'voxel-volume-mm3': 3,
    'fraction-of-brain': 6,
    'mean-confidence': 4,
    'predicted-dice': 4,
}

DESCRIPTIONS: dict[str, dict[str, Any]] = {
    'index': {'Description': 'FreeSurfer number of the structure in the label map'},
    'name': {'Description': 'FreeSurfer name of the structure'},
    'abbreviation': {'Description': 'Short name, as in desc-aseg_dseg.tsv'},
    'hemisphere': {
        'Description': "Side of the child's body on which the structure lies",
        'Levels': {'L': 'left', 'R': 'right', 'midline': 'unpaired'},
    },
    'volume-mm3': {
        'Description': 'Soft volume: sum over voxels of the probability of the structure, times '
        'the volume of a voxel',
        'Units': 'mm^3',
    },
    'voxel-volume-mm3': {
        'Description': 'Hard volume: number of voxels of the structure in the label map, times '
        'the volume of a voxel',
        'Units': 'mm^3',
    },
    'fraction-of-brain': {
        'Description': 'Soft volume divided by the segmented brain volume, which is the sum of '
        'the soft volumes of all structures present. It is not an intracranial volume: fluid '
        'outside the brain is not segmented',
        'Units': 'arbitrary',
    },
    'mean-confidence': {
        'Description': 'Mean, over the voxels of the structure in the label map, of the '
        'probability of the most likely label; from 0 to 1',
        'Units': 'arbitrary',
    },
    'predicted-dice': {
        'Description': 'Dice coefficient that the structure is expected to have with the truth '
        'if the probabilities are right: twice the sum of the probabilities inside the label, '
        'divided by the hard plus the soft volume',
        'Units': 'arbitrary',
    },
}


def voxel_volume(affine: np.ndarray, /) -> float:
    """Volume of one voxel in mm3: the absolute determinant of the voxel-to-world matrix."""
    return float(abs(np.linalg.det(np.asarray(affine, float)[:3, :3])))


def structure_name(name: str, /) -> str:
    """A structure's name for people, without its side.

    >>> structure_name('Left-Accumbens-area'), structure_name('Right-VentralDC')
    ('Accumbens', 'Ventral DC')
    """
    name = re.sub(r'^(Left|Right)-|-area$', '', name)
    words = name.replace('VentralDC', 'Ventral-DC').split('-')
    if words == ['Brain', 'Stem']:
        return 'Brainstem'
    return ' '.join([words[0], *(w if w.isupper() else w.lower() for w in words[1:])])


def count_voxels(labels: np.ndarray, table: LabelTable, /) -> dict[int, int]:
    """Number of voxels of each structure of the table in a label map.

    Parameters
    ----------
    labels : (X, Y, Z) integer ndarray
        FreeSurfer numbers; numbers that the table lacks are ignored.
    """
    size = int(table.indices.max()) + 1
    # Counting takes eight bytes a voxel; one slice after the other, a large scan needs no more.
    counts = np.zeros(size + 1, np.int64)
    for part in np.moveaxis(labels, -1, 0):
        counts += np.bincount(np.clip(part, 0, size).ravel(), minlength=size + 1)
    return {row.index: int(counts[row.index]) for row in table.structures}


def predicted_dice(confidence: float, hard: float, soft: float, /) -> float:
    """Dice that a structure is expected to have with the truth, if probabilities are calibrated.

    The expected overlap is the sum of the probabilities inside the label, the expected size of
    the truth the sum of all: 2 * confidence * hard / (hard + soft).

    Parameters
    ----------
    confidence : mean probability inside the label
    hard, soft : size of the label, and sum of its probabilities, both in voxels or both in mm3
    """
    return 2 * confidence * hard / (hard + soft)


def morphometry_table(
    labels: np.ndarray,
    affine: np.ndarray,
    soft_volumes: Mapping[int, float],
    confidence: Mapping[int, float],
    table: LabelTable | None = None,
) -> pd.DataFrame:
    """Measure every structure of the label table.

    Parameters
    ----------
    labels : (X, Y, Z) integer ndarray
        Label map, FreeSurfer numbers.
    affine : (4, 4) ndarray
        Voxel to world, mm.
    soft_volumes : mapping
        Sum of probabilities by FreeSurfer number, mm3.
    confidence : mapping
        Mean highest probability inside each hard label.
    table : LabelTable, optional
        The label table that ships with babyseg if not given.

    Returns
    -------
    DataFrame
        One row a structure, always all and always in the table's order. A structure without a
        voxel in the label map is absent: its measures are NaN, also where stray probability
        would give it a small soft volume, so that the table agrees with the map.
    """
    table = table or label_table()
    counts = count_voxels(labels, table)
    unit = voxel_volume(affine)
    rows = []
    for row in table.structures:
        present = counts[row.index] > 0
        soft = float(soft_volumes.get(row.index, np.nan)) if present else np.nan
        hard = counts[row.index] * unit if present else np.nan
        sure = float(confidence.get(row.index, np.nan)) if present else np.nan
        dice = predicted_dice(sure, hard, soft)
        names = (row.index, row.name, row.abbreviation, row.hemisphere)
        rows.append((*names, soft, hard, np.nan, sure, dice))
    morph = pd.DataFrame(rows, columns=list(COLUMNS))
    total = brain_volume(morph)
    if total > 0:
        morph['fraction-of-brain'] = morph['volume-mm3'] / total
    return morph


def brain_volume(morph: pd.DataFrame, /) -> float:
    """Segmented brain volume in mm3: sum of the soft volumes; NaN when nothing was found."""
    return float(morph['volume-mm3'].sum(min_count=1))


def tissue_totals(morph: pd.DataFrame, table: LabelTable | None = None) -> pd.DataFrame:
    """Sum the structures of each tissue: columns tissue, volume-mm3, fraction-of-brain.

    Tissues come in the order of the label table; one without any structure is NaN.
    """
    table = table or label_table()
    tissue = {row.index: row.tissue for row in table.structures}
    groups = morph['volume-mm3'].groupby(morph['index'].map(tissue)).sum(min_count=1)
    totals = groups.reindex(list(dict.fromkeys(tissue.values())))
    return pd.DataFrame(
        {
            'tissue': totals.index,
            'volume-mm3': totals.to_numpy(float),
            'fraction-of-brain': totals.to_numpy(float) / brain_volume(morph),
        }
    )


def asymmetry_index(left: float, right: float, /) -> float:
    """Asymmetry in percent, 100 (L - R) / ((L + R) / 2): positive where the left is larger.

    NaN where a side is absent, because an absent side says nothing about asymmetry.

    >>> asymmetry_index(110.0, 90.0)
    20.0
    """
    total = left + right
    return 200 * (left - right) / total if total > 0 else float('nan')


def asymmetry_table(morph: pd.DataFrame, table: LabelTable | None = None) -> pd.DataFrame:
    """Left and right of each paired structure side by side.

    Returns
    -------
    DataFrame
        structure (name without its side), left-index, right-index, left-mm3, right-mm3,
        asymmetry-percent (see `asymmetry_index`).
    """
    table = table or label_table()
    volume = dict(zip(morph['index'], morph['volume-mm3'], strict=True))
    rows = []
    for row in table.structures:
        if row.hemisphere != 'L':
            continue
        left, right = float(volume[row.index]), float(volume[row.mirror])
        name = row.name.removeprefix('Left-')
        rows.append((name, row.index, row.mirror, left, right, asymmetry_index(left, right)))
    columns = [
        'structure',
        'left-index',
        'right-index',
        'left-mm3',
        'right-mm3',
        'asymmetry-percent',
    ]
    return pd.DataFrame(rows, columns=columns)


def write_morph_tsv(morph: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a table from `morphometry_table` as TSV; NaN becomes `n/a`."""
    text = morph.astype(object)
    for name, decimals in DECIMALS.items():
        text[name] = [MISSING if pd.isna(v) else f'{v:.{decimals}f}' for v in morph[name]]
    text.to_csv(path, sep='\t', index=False, na_rep=MISSING, lineterminator='\n')


def read_morph_tsv(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read what `write_morph_tsv` wrote."""
    return pd.read_csv(Path(path), sep='\t', na_values=[MISSING], keep_default_na=False)


def morph_sidecar() -> dict[str, Any]:
    """The JSON dictionary that goes beside the TSV: each column with its meaning and unit."""
    return {name: dict(DESCRIPTIONS[name]) for name in COLUMNS}
