"""The one label table: FreeSurfer numbers, names, sides, tissues, colours and mappings.

The table is `data/labels.tsv`; its row order is the order of the network's output channels.
"""

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

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
