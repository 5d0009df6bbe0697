"""Adapt a model to a lab's own corrected label maps, without making it worse for others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from babyseg_bids.errors import InputError
from babyseg_bids.labels import label_table
from babyseg_bids.network.unet import NetworkConfig
from babyseg_bids.network.weights import Model
from babyseg_bids.synthesis.atlas import load_atlas, sample_label_map
from babyseg_bids.synthesis.evaluate import evaluate, held_out_cases
from babyseg_bids.synthesis.maps import TrainingMap, prepare_labels, prepare_map
from babyseg_bids.synthesis.proportions import published_share, with_white_matter
from babyseg_bids.synthesis.settings import SynthesisSettings, load_settings
from babyseg_bids.synthesis.train import Stage, Trainer, TrainingPlan

# Brains that never were, drawn from the atlas: what every adapted model still has to segment.
_GUARDS = ((1.0, 101), (6.0, 102), (12.0, 103), (24.0, 104))
# And others to learn beside the corrections, so that nothing is forgotten.
_COMPANIONS = ((1.0, 201), (3.0, 202), (6.0, 203), (9.0, 204), (12.0, 205), (24.0, 206))
# The Dice on the guards may fall by no more: two standard errors of their mean.
TOLERANCE = 0.01
_EXTENT = (128, 160, 128)


@dataclass(frozen=True)
class Comparison:
    """Mean Dice before and after, on synthetic scans.

    Parameters
    ----------
    guards : of the built-in validation brains
    corrections : of the lab's own label maps, which were trained on
    """

    guards: tuple[float, float]
    corrections: tuple[float, float]

    @property
    def worse(self) -> bool:
        """Whether the adapted model lost more on the built-in brains than chance explains."""
        before, after = self.guards
        return after < before - TOLERANCE


def read_corrections(folder: Path, /) -> list[TrainingMap]:
    """Corrected label maps of a folder and the folders in it, in babyseg's numbers.

    Takes every `*_dseg.nii.gz`, or every NIfTI file where there is none.

    Raises
    ------
    InputError
        If there is none, or one cannot be read.
    """
    files = sorted(folder.rglob('*_dseg.nii.gz')) or sorted(folder.rglob('*.nii.gz'))
    if not files:
        raise InputError(f'{folder} holds no label map; put corrected *_dseg.nii.gz files there.')
    return [prepare_map(path) for path in files]


def read_ranking(path: Path, /) -> dict[str, float]:
    """How much each correction should count, by its name, from the group level's ranking.

    Raises
    ------
    InputError
        If the file is not such a table.
    """
    try:
        table = pd.read_csv(path, sep='\t', na_values='n/a')
        names = [Path(str(name)).name.split('.')[0] for name in table['dseg']]
        return dict(zip(names, table['score'].astype(float), strict=True))
    except (OSError, ValueError, KeyError) as e:
        raise InputError(
            f'{path} is no ranking ({e}); give group_desc-babyseg_annotation.tsv.'
        ) from e


def drawn_brains(kinds: Sequence[tuple[float, int]], /) -> list[TrainingMap]:
    """Training maps drawn from the shipped atlas, by age in months and seed.

    With the published share of white matter, of which the atlas has too little.
    """
    atlas = load_atlas()
    brains = []
    for age, seed in kinds:
        labels, _ = sample_label_map(atlas, age, seed=seed)
        drawn = prepare_labels(labels, name=f'atlas-{age:g}-{seed}', age=age)
        brains.append(with_white_matter(drawn, published_share(age)))
    return brains


def finetune(
    model: Model,
    corrections: Sequence[TrainingMap],
    folder: Path,
    /,
    *,
    steps: int = 500,
    rate: float = 2e-4,
    seed: int = 0,
    shares: Mapping[str, float] | None = None,
    samples: int = 2,
    settings: SynthesisSettings | None = None,
    workers: int = 1,
    device: str = 'cpu',
    extent: tuple[int, int, int] = _EXTENT,
    guards: Sequence[tuple[float, int]] = _GUARDS,
    companions: Sequence[tuple[float, int]] = _COMPANIONS,
) -> tuple[Model, Comparison]:
    """Train on corrections and on brains of the atlas in turn, and compare before with after.

    Parameters
    ----------
    folder : for the checkpoint; an interrupted call goes on there
    shares : how often each correction is drawn, by its name; equally if not given
    samples : synthetic scans of each brain in the comparison
    extent : of the volumes, mm
    guards, companions : age in months and seed of the brains drawn from the atlas

    Returns
    -------
    the adapted model, and the comparison on which to decide whether to keep it
    """
    config: NetworkConfig = model.network.config  # type: ignore[assignment]
    size = tuple(int(n / model.spacing) // config.multiple * config.multiple for n in extent)
    stage = Stage(model.spacing, size, steps, 1)  # type: ignore[arg-type]
    plan = TrainingPlan(
        (stage,),
        network=config,
        synthesis=settings or load_settings(),
        seed=seed,
        rate=rate,
        warmup=min(50, max(1, steps // 4)),
    )
    trainer = Trainer(plan, folder, device=device)
    if trainer.step == 0:
        trainer.start_from(model.network.state_dict())
    trainer.run([*_repeated(corrections, shares), *drawn_brains(companions)], workers=workers)
    adapted = replace(model, network=trainer.averaged.to('cpu').eval())
    judges = drawn_brains(guards)

    def measure(maps: Sequence[TrainingMap]) -> tuple[float, float]:
        before, after = (
            _mean_dice(m, maps, samples=samples, settings=settings, extent=extent)
            for m in (model, adapted)
        )
        return before, after

    return adapted, Comparison(measure(judges), measure(corrections))


def _repeated(
    maps: Sequence[TrainingMap], shares: Mapping[str, float] | None
) -> list[TrainingMap]:
    """Maps, some several times: about in proportion to their shares."""
    if not shares:
        return list(maps)
    given = [max(0.0, shares.get(m.name, 0.0)) for m in maps]
    least = min((s for s in given if s > 0), default=1.0)
    return [
        m
        for m, share in zip(maps, given, strict=True)
        for _ in range(min(5, max(1, round(share / least))))
    ]


def _mean_dice(
    model: Model,
    maps: Sequence[TrainingMap],
    *,
    samples: int,
    settings: SynthesisSettings | None,
    extent: tuple[int, int, int],
) -> float:
    cases = held_out_cases(model, maps, samples=samples, settings=settings, extent=extent)
    dice = evaluate(cases)
    return float(np.nanmean(dice[[r.abbreviation for r in label_table().rows[1:]]].to_numpy()))
