"""What a run would take: time, memory and disk, from figures that were measured."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median

from babyseg_bids.outputs import ledger_path
from babyseg_bids.preflight import voxel_count
from babyseg_bids.records import SessionInputs
from babyseg_bids.resources import Plan, session_gb
from babyseg_bids.settings import Settings
from babyseg_bids.slurm import CPUS, SESSION_SECONDS

# Results of ten real sessions without probabilities: 4 to 9 MB where the reference had 27 million
# voxels, 4 MB where it had 4 million. The work folder holds about the same once more.
PAGE_BYTES = 3e6
VOXEL_BYTES = 0.25


@dataclass(frozen=True)
class Estimate:
    """Needs of a run: `seconds` in all and `each`, `disk_bytes` of results, memory in GiB.

    `known` is how many finished sessions of the output folder the time is taken from; 0 for the
    time that was measured on another machine.
    """

    sessions: int
    seconds: float
    each: float
    known: int
    memory_gb: float
    disk_bytes: float


def estimate(
    to_do: Sequence[SessionInputs], done: Sequence[SessionInputs], settings: Settings, shares: Plan
) -> Estimate:
    """Estimate a run over the sessions `to_do`, and learn its speed from those `done` before."""
    known = [s for s in (_seconds(ledger_path(d, settings.output_dir)) for d in done) if s]
    each = median(known) if known else SESSION_SECONDS * max(1.0, CPUS / shares.threads)
    rounds = ceil(len(to_do) / shares.at_once)
    voxels = sorted((voxel_count(s.scans[0].path) for s in to_do), reverse=True)
    disk = sum(PAGE_BYTES + VOXEL_BYTES * n for n in voxels)
    memory = sum(session_gb(n) for n in voxels[: shares.at_once])
    return Estimate(len(to_do), rounds * each, each, len(known), memory, disk)


def _seconds(ledger: Path) -> float | None:
    """How long a finished session took; None when its ledger does not say."""
    try:
        seconds = json.loads(ledger.read_text('utf-8'))['seconds']
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(seconds) if isinstance(seconds, int | float) else None
