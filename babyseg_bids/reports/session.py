"""The page of one session: what was done, what to look at, and the numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from babyseg_bids.records import Flag, SessionInputs


@dataclass(frozen=True)
class SessionReportData:
    """All that the page of a session shows.

    `reference_image`, `labels` and `uncertainty` are paths of images on one grid. `figures_dir`
    receives the pictures as files. `scan_weights` has one weight for each of `inputs.scans`.
    `transforms` has one mapping for each scan but the reference, with any of the keys `scan`,
    `status`, `rotation_deg`, `translation_mm`, `similarity`, `similarity_before`, `reason`.
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
    scan_weights: tuple[float, ...] = ()
    model: str = 'unknown'
    device: str = 'unknown'
    seconds: float | None = None
    version: str = 'unknown'
    boilerplate: str = ''
    uncertainty_threshold: float = 0.3
