"""The one label table: FreeSurfer numbers, names, sides, tissues, colours and mappings.

The table is `data/labels.tsv`; its row order is the order of the network's output channels.
"""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np

TISSUES = ('white-matter', 'cortex', 'deep-grey', 'ventricle', 'cerebellum', 'brainstem')

# Labels of the training sources that are folded into the table (FreeSurfer numbers). Those without
# a side, the vermis (172) and white-matter hypointensities (77), need the geometry to get one.
MERGED = {5: 4, 44: 43, 31: 4, 63: 43, 7: 8, 46: 47}


@dataclass(frozen=True)
class Label:
    """One structure. `mirror` is the number of its counterpart on the other side (or its own)."""

    index: int
    name: str
    abbreviation: str
    color: str
    hemisphere: str
    tissue: str
    mirror: int
    babyseg: int

    @property
    def rgb(self) -> tuple[int, int, int]:
        """Colour as three integers from 0 to 255."""
        return tuple(bytes.fromhex(self.color[1:]))  # type: ignore[return-value]


@dataclass(frozen=True)
class LabelTable:
    """Label rows in channel order; the background comes first."""

    rows: tuple[Label, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Label:
        """The label with FreeSurfer number `index`; KeyError if there is none."""
        for row in self.rows:
            if row.index == index:
                return row
        raise KeyError(index)

    @property
    def indices(self) -> np.ndarray:
        """FreeSurfer numbers by channel, (C,) int16."""
        return np.array([r.index for r in self.rows], np.int16)

    @property
    def structures(self) -> tuple[Label, ...]:
        """All labels but the background."""
        return tuple(r for r in self.rows if r.index)

    @property
    def mirror_channels(self) -> np.ndarray:
        """Channel of each channel's counterpart on the other side, (C,) int64."""
        channel = {r.index: c for c, r in enumerate(self.rows)}
        return np.array([channel[r.mirror] for r in self.rows], np.int64)

    def channels(self, numbers: np.ndarray, /) -> np.ndarray:
        """Turn FreeSurfer numbers into channels (uint8); unknown numbers become background.

        Numbers in `MERGED` count as what they are merged into.
        """
        numbers = np.asarray(numbers).astype(np.int64)
        lut = np.zeros(max(int(numbers.max(initial=0)), 255) + 1, np.uint8)
        for channel, row in enumerate(self.rows):
            lut[row.index] = channel
        for source, target in MERGED.items():
            lut[source] = lut[target]
        return lut[np.clip(numbers, 0, None)]


# Of the official network (22 channels). It has putamen, pallidum and accumbens in one label a
# side, and neither the third nor the fourth ventricle.
OFFICIAL = (
    0, 2, 3, 4, 8, 10, 11, 16, 17, 18, 28, 41, 42, 43, 47, 49, 50, 53, 54, 60, 169, 176,
)  # fmt: skip
_BASAL_GANGLIA = tuple(
    Label(
        index, f'{side}-Basal-Ganglia', f'{side[0]}-BG', color, side[0], 'deep-grey', other, index
    )
    for index, side, color, other in (
        (169, 'Left', '#ec0db0', 176),
        (176, 'Right', '#ec0db0', 169),
    )
)


# What the file of the official network ends in; babyseg's own models are .safetensors files.
OFFICIAL_ENDINGS = ('.pt', '.pth')


def is_official(model: str | Path, /) -> bool:
    """Whether the name of a model is that of an official checkpoint."""
    return Path(model).suffix in OFFICIAL_ENDINGS


def table_of(indices: Iterable[int], /) -> LabelTable:
    """The table of a model's labels, in the order given.

    Raises
    ------
    KeyError
        For a number that neither babyseg nor the official network knows.
    """
    known = {row.index: row for row in (*label_table().rows, *_BASAL_GANGLIA)}
    return LabelTable(tuple(known[int(i)] for i in indices))


@cache
def label_table() -> LabelTable:
    """The table that ships with babyseg: 27 structures and the background."""
    text = files('babyseg_bids').joinpath('data/labels.tsv').read_text('utf-8')
    rows = csv.DictReader(text.splitlines(), delimiter='\t')
    return LabelTable(
        tuple(
            Label(
                index=int(r['index']),
                name=r['name'],
                abbreviation=r['abbreviation'],
                color=r['color'],
                hemisphere=r['hemisphere'],
                tissue=r['tissue'],
                mirror=int(r['mirror']),
                babyseg=int(r['babyseg']),
            )
            for r in rows
        )
    )
