"""Intensities from physics: relaxation times by tissue and age, and signal equations.

Times are rounded values in the range of published measurements at 3 T in newborns and adults
(among others Wansapura et al., JMRI 1999, for adults and Williams et al., Radiology 2005, for
newborns). Between birth and maturity they fall exponentially, as water leaves and myelin comes;
the time constants are set so that white and grey matter cross where infants' scans are known to
be isointense: around 6 months in T1-weighted and a few months later in T2-weighted images. Every
draw jitters all values, so that the ranges matter, not the numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from babyseg_bids.synthesis.draws import Draws
from babyseg_bids.synthesis.maps import (
    CSF,
    DURA,
    MARROW,
    MUSCLE,
    SCALP,
    SKULL,
    ClassTable,
)


@dataclass(frozen=True)
class Tissue:
    """Relaxation at 3 T, at birth and mature.

    Parameters
    ----------
    t1, t2 : (newborn, mature), ms
    density : (newborn, mature) proton density relative to water
    months : time constant of the change
    """

    t1: tuple[float, float]
    t2: tuple[float, float]
    density: tuple[float, float]
    months: float = 8.0

    def at(self, age: float, /) -> tuple[float, float, float]:
        """T1 (ms), T2 (ms) and density at an age in months."""
        left = float(np.exp(-max(age, 0.0) / self.months))
        t1, t2, density = (
            late + (early - late) * left for early, late in (self.t1, self.t2, self.density)
        )
        return t1, t2, density


TISSUES = {
    'white-matter': Tissue((2700, 850), (200, 75), (0.92, 0.70)),
    'cortex': Tissue((2000, 1400), (135, 95), (0.88, 0.82)),
    'deep-grey': Tissue((1900, 1150), (125, 78), (0.86, 0.79)),
    'ventricle': Tissue((4200, 4200), (1800, 1800), (1.0, 1.0)),
    'cerebellum': Tissue((2050, 1350), (140, 93), (0.88, 0.82)),
    # Myelinated early.
    'brainstem': Tissue((2000, 950), (130, 76), (0.87, 0.74), 6.0),
    'cerebellar-white-matter': Tissue((2300, 880), (160, 75), (0.90, 0.72), 6.0),
}
FAT = Tissue((370, 370), (70, 70), (0.9, 0.9))
BONE = Tissue((900, 900), (2, 2), (0.2, 0.2))
SOFT = Tissue((1300, 1400), (45, 40), (0.8, 0.8))
OUTER = {
    CSF: TISSUES['ventricle'],
    SCALP: FAT,
    SKULL: BONE,
    MARROW: Tissue((1100, 500), (55, 60), (0.6, 0.7)),
    MUSCLE: SOFT,
    DURA: Tissue((1500, 1500), (30, 30), (0.5, 0.5)),
}
# What a class outside the brain without an entry above may be made of.
ANYTHING = (FAT, BONE, SOFT, TISSUES['ventricle'])
# Exponent of the field strength in T1 (after Bottomley et al., Medical Physics 1984).
FIELD_EXPONENT = 0.35


@dataclass(frozen=True)
class PulseSequence:
    """Ranges of a pulse sequence's settings, ms and degrees; None where it has none."""

    equation: str
    tr: tuple[float, float]
    te: tuple[float, float]
    ti: tuple[float, float] | None = None
    angle: tuple[float, float] | None = None


SEQUENCES = {
    'MPRAGE': PulseSequence('inversion', (1500, 3000), (2, 5), ti=(700, 1200)),
    'T1w spin echo': PulseSequence('spin echo', (350, 900), (8, 20)),
    'T1w gradient echo': PulseSequence('gradient echo', (7, 30), (2, 6), angle=(10, 35)),
    'T2w': PulseSequence('spin echo', (3000, 12000), (80, 250)),
    'PDw': PulseSequence('spin echo', (2000, 6000), (10, 35)),
    'FLAIR': PulseSequence('inversion', (6000, 11000), (80, 150), ti=(1700, 2900)),
    'inversion recovery': PulseSequence('inversion', (3000, 8000), (10, 40), ti=(300, 1800)),
}


def signal(
    equation: str,
    t1: np.ndarray,
    t2: np.ndarray,
    density: np.ndarray,
    /,
    *,
    tr: float,
    te: float,
    ti: float = 0.0,
    angle: float = 90.0,
) -> np.ndarray:
    """Magnitude of the steady-state signal, same shape as the tissues' values.

    Parameters
    ----------
    equation : `spin echo`, `inversion` or `gradient echo` (spoiled)
    t1, t2, tr, te, ti : ms
    angle : degrees
    """
    recovered = np.exp(-tr / t1)
    if equation == 'spin echo':
        along = 1 - recovered
    elif equation == 'inversion':
        along = 1 - 2 * np.exp(-ti / t1) + recovered
    elif equation == 'gradient echo':
        flip = np.deg2rad(angle)
        along = np.sin(flip) * (1 - recovered) / (1 - np.cos(flip) * recovered)
    else:
        raise ValueError(f'{equation!r} is not a signal equation.')
    return np.abs(density * along * np.exp(-te / t2))


def class_tissues(table: ClassTable, /, draws: Draws) -> list[Tissue]:
    """What each class is made of, (N,)."""
    by_class: list[Tissue] = [SOFT] * len(table)
    for name, tissue in TISSUES.items():
        if name != 'cerebellar-white-matter':
            for c in table.tissue(name):
                by_class[c] = tissue
    for c in table.of(7, 46):
        by_class[c] = TISSUES['cerebellar-white-matter']
    picks = draws.table(len(table))
    for c in np.flatnonzero(table.channel == 0).tolist():
        # Both sides of a structure are made of the same.
        pick = picks[min(c, int(table.mirror[c]))]
        number = int(table.numbers[c])
        by_class[c] = OUTER.get(number, ANYTHING[int(pick * len(ANYTHING))])
    return by_class


@dataclass(frozen=True)
class Scanner:
    """One concrete pulse sequence at one field strength, with jittered tissue values.

    Parameters
    ----------
    factors : (3, N), of T1, T2 and density of each class
    """

    equation: str
    tr: float
    te: float
    ti: float
    angle: float
    field: float
    tissues: Sequence[Tissue]
    factors: np.ndarray

    def means(self, age: float, /) -> np.ndarray:
        """Signal of each class, (N,), at an age in months; not scaled."""
        t1, t2, density = np.array([t.at(age) for t in self.tissues]).T * self.factors
        fluid = t2 > 1000
        t1 = np.where(fluid, t1, t1 * (self.field / 3.0) ** FIELD_EXPONENT)
        return signal(
            self.equation, t1, t2, density, tr=self.tr, te=self.te, ti=self.ti, angle=self.angle
        )


def draw_scanner(
    table: ClassTable, /, *, field: tuple[float, float], jitter: float, draws: Draws
) -> Scanner:
    """Draw a pulse sequence and its settings.

    Parameters
    ----------
    field : range of field strengths, tesla
    jitter : deviation of the logarithm of each tissue's values; structures of one tissue differ by
        a quarter of it
    """
    name = draws.choice('sequence', list(SEQUENCES))
    s = SEQUENCES[name]
    tissues = class_tissues(table, draws)
    kinds = {id(t): i for i, t in enumerate({id(t): t for t in tissues}.values())}
    kind = np.array([kinds[id(t)] for t in tissues])
    by_kind = draws.table(3, len(kinds), normal=True)[:, kind]
    by_class = draws.table(3, len(table), normal=True)
    by_class = by_class[:, np.minimum(np.arange(len(table)), table.mirror)]
    return Scanner(
        s.equation,
        tr=draws.uniform('TR', *s.tr),
        te=draws.uniform('TE', *s.te),
        ti=draws.uniform('TI', *s.ti) if s.ti else 0.0,
        angle=draws.uniform('flip angle', *s.angle) if s.angle else 90.0,
        field=draws.uniform('field', *field),
        tissues=tissues,
        factors=np.exp(jitter * (by_kind + by_class / 4)),
    )
