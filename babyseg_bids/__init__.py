"""Deep segmentation of infant brain MRI: a BIDS App and a Python API."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version('babyseg')
except PackageNotFoundError:  # A source tree that was never installed still imports.
    __version__ = '0+unknown'

if TYPE_CHECKING:
    from babyseg_bids.pipeline import BabySegPipeline

__all__ = ['BabySegPipeline', '__version__']


def __getattr__(name: str) -> Any:
    # Importing the pipeline imports torch, which `babyseg -h` must not pay for.
    if name == 'BabySegPipeline':
        from babyseg_bids.pipeline import BabySegPipeline

        return BabySegPipeline
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
