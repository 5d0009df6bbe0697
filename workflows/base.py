"""The workflow over all sessions."""

from collections.abc import Sequence

from niworkflows.engine.workflows import LiterateWorkflow

from babyseg_bids import __version__
from babyseg_bids.citation import INTRODUCTION, references
from babyseg_bids.outputs import write_dataset_files
from babyseg_bids.records import SessionInputs
from babyseg_bids.settings import Settings
from babyseg_bids.workflows.session import init_session_wf


def init_babyseg_wf(
    sessions: Sequence[SessionInputs], settings: Settings, *, name: str = 'babyseg_wf'
) -> LiterateWorkflow:
    """Build the workflow of a run: one independent part for each session.

    The files that describe the output dataset are written on the way, with the methods text of
    this workflow.

    Parameters
    ----------
    sessions : with at least one scan each
    """
    workflow = LiterateWorkflow(name=name)
    workflow.__desc__ = INTRODUCTION.format(version=__version__)
    workflow.base_dir = str(settings.scratch)
    parts = [init_session_wf(session, settings) for session in sessions]
    workflow.add_nodes(parts)
    methods = workflow.visit_desc()
    methods += references(methods)
    for part in parts:
        part.get_node('inputnode').inputs.boilerplate = methods
    write_dataset_files(settings, methods)
    return workflow
