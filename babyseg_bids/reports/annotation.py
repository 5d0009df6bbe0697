"""Which sessions to correct by hand first: those that would teach a network most."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from babyseg_bids.longitudinal import group_volumes
from babyseg_bids.reports.files import Derivative

RANKED = 100
COLUMNS: dict[str, dict[str, str]] = {
    'rank': {'Description': '1 is the session to correct first'},
    'participant_id': {'Description': 'Participant, with its prefix sub-'},
    'session_id': {'Description': 'Session, with its prefix ses-; n/a in datasets without'},
    'score': {'Description': '(uncertainty + novelty) / 2 * diversity when it was chosen, 0 to 1'},
    'uncertainty': {
        'Description': "Share of the cohort's sessions with a lower mean uncertainty, 0 to 1"
    },
    'novelty': {
        'Description': "Share of the cohort's sessions that are nearer to their own neighbours in "
        'age, volumes, signal and contrast, 0 to 1'
    },
    'diversity': {
        'Description': 'Distance to the nearest session ranked before, relative to the largest '
        'such distance at that step, 0 to 1'
    },
    'dseg': {'Description': 'Label map to correct, relative to this folder'},
}
# Quality measures that tell how a scan looks, whatever its units.
LOOKS = (
    'snr_white_matter',
    'snr_cortex',
    'snr_deep_grey',
    'cnr_white_matter_cortex',
    'cnr_cortex_ventricle',
)
NEIGHBOURS = 5
# A feature that varies less is the same for all: what is left are rounded digits.
LEAST_SPREAD = 1e-3


@dataclass(frozen=True)
class Candidate:
    """One ranked session."""

    record: Derivative
    score: float
    uncertainty: float
    novelty: float
    diversity: float


def _standardised(columns: np.ndarray) -> np.ndarray:
    """Columns as robust z-scores; what is unknown lies in the middle, what is extreme at 4."""
    if not len(columns):
        return columns
    with np.errstate(invalid='ignore'):
        known = np.isfinite(columns).any(axis=0)
        columns = columns[:, known]
        middle = np.nanmedian(columns, axis=0)
        spread = np.nanmedian(np.abs(columns - middle), axis=0) * 1.4826
        z = (columns - middle) / np.where(spread > LEAST_SPREAD, spread, np.inf)
    return np.clip(np.nan_to_num(z), -4, 4)


def _rank_share(values: np.ndarray) -> np.ndarray:
    """Share of the values that are smaller; unknown ones get one half."""
    known = np.isfinite(values)
    out = np.full(len(values), 0.5)
    order = np.sort(values[known])
    out[known] = np.searchsorted(order, values[known], 'left') / max(known.sum() - 1, 1)
    return np.clip(out, 0, 1)


def features(records: Sequence[Derivative], /) -> np.ndarray:
    """What makes sessions alike: (sessions, features), NaN where unknown.

    Log of age, log of the brain's volume, tissues as log shares of it, and `LOOKS`.
    """
    rows = []
    for record in records:
        months = record.age.months
        brain, *tissues = list(group_volumes(record.volumes).values()) or [np.nan]
        shares = [np.log(t / brain) if t > 0 else np.nan for t in tissues]
        shares += [np.nan] * (6 - len(shares))
        looks = [record.qc.get(k) for k in LOOKS]
        rows.append(
            [
                np.nan if months is None else np.log1p(max(months, 0)),
                np.log(brain) if brain > 0 else np.nan,
                *shares[:6],
                *(v if isinstance(v, (int, float)) else np.nan for v in looks),
            ]
        )
    return np.array(rows, float).reshape(len(rows), 8 + len(LOOKS))


def _neighbour_distance(points: np.ndarray) -> np.ndarray:
    """Mean distance of each point to its `NEIGHBOURS` nearest."""
    number = min(NEIGHBOURS, len(points) - 1)
    if number < 1:
        return np.zeros(len(points))
    from scipy.spatial import cKDTree

    return cKDTree(points).query(points, k=number + 1)[0][:, 1:].mean(axis=1)


def rank_for_annotation(records: Sequence[Derivative], /, number: int = RANKED) -> list[Candidate]:
    """The sessions that would teach most, if a person corrected them, in order.

    Greedy: the next session is the one with the highest (uncertainty + novelty) / 2 * diversity.
    Uncertainty is the rank of the mean uncertainty in the cohort; novelty that of the distance to
    the nearest neighbours among `features`; diversity the distance to the nearest session that was
    chosen before, relative to the largest. It combines uncertainty with representativeness as in
    suggestive annotation (Yang et al., MICCAI 2017) and with the farthest-first selection of
    core-sets (Sener and Savarese, ICLR 2018).

    Parameters
    ----------
    records : sessions with volumes
    """
    if not records:
        return []
    points = _standardised(features(records))
    doubt = [r.qc.get('mean_uncertainty') for r in records]
    unsure = _rank_share(
        np.array([d if isinstance(d, (int, float)) else np.nan for d in doubt], float)
    )
    novel = _rank_share(_neighbour_distance(points))
    worth = (unsure + novel) / 2
    nearest = np.full(len(records), np.inf)
    free = np.ones(len(records), bool)
    chosen: list[Candidate] = []
    while free.any() and len(chosen) < number:
        largest = nearest[free].max()
        diverse = np.ones(len(records)) if not chosen else nearest / max(largest, 1e-9)
        score = np.where(free, worth * diverse, -1)
        best = int(score.argmax())
        chosen.append(
            Candidate(
                records[best],
                float(score[best]),
                float(unsure[best]),
                float(novel[best]),
                float(diverse[best]),
            )
        )
        free[best] = False
        nearest = np.minimum(nearest, np.linalg.norm(points - points[best], axis=1))
    return chosen


def annotation_row(place: int, candidate: Candidate, /) -> dict[str, object]:
    """One row of the ranking's table."""
    record = candidate.record
    labels = [
        name
        for name in record.ledger.get('outputs') or ()
        if isinstance(name, str) and name.endswith('_desc-aseg_dseg.nii.gz')
    ]
    return {
        'rank': place,
        'participant_id': f'sub-{record.subject}',
        'session_id': f'ses-{record.session}' if record.session else None,
        **{
            k: f'{getattr(candidate, k):.4f}'
            for k in ('score', 'uncertainty', 'novelty', 'diversity')
        },
        'dseg': labels[0] if labels else None,
    }
