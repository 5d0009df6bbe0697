"""Deep segmentation of infant brain MRI: a BIDS App and a Python API."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version('babyseg')
except PackageNotFoundError:  # A source tree that was never installed still imports.
    __version__ = '0+unknown'

if TYPE_CHECKING:
    from babyseg_bids.development import calculate_developmental_metrics
    from babyseg_bids.pipeline import BabySegPipeline
    from babyseg_bids.reports.subject import generate_development_report

__all__ = [
    'BabySegPipeline',
    '__version__',
    'calculate_developmental_metrics',
    'generate_development_report',
]

_HOME = {
    'BabySegPipeline': 'babyseg_bids.pipeline',
    'calculate_developmental_metrics': 'babyseg_bids.development',
    'generate_development_report': 'babyseg_bids.reports.subject',
}


def __getattr__(name: str) -> Any:
    # Importing the pipeline imports torch, which `babyseg -h` must not pay for.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
