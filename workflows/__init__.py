"""Nipype workflow builders; they wire and know nothing else."""

from babyseg_bids.workflows.base import init_babyseg_wf
from babyseg_bids.workflows.session import init_session_wf

__all__ = ['init_babyseg_wf', 'init_session_wf']
