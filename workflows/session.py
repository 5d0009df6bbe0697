"""The workflow of one session: align, segment, measure, report, publish."""

import re
from pathlib import Path

from nipype.interfaces.utility import IdentityInterface
from nipype.pipeline.engine import Node
from niworkflows.engine.workflows import LiterateWorkflow

from babyseg_bids.interfaces.session import (
    AlignScans,
    MeasureSession,
    NormaliseSession,
    PublishSession,
    ReportSession,
    SegmentScans,
    UpdateSubjectPage,
)
from babyseg_bids.preflight import voxel_count
from babyseg_bids.records import SessionInputs
from babyseg_bids.resources import SESSION_GB, session_gb
from babyseg_bids.settings import Settings
from babyseg_bids.spaces import standard_spaces

# Measured peaks with 300^3 scans, in GB; `segment` holds torch, scans and features.
SEGMENT_GB = 2.5
LIGHT_GB = 1.0


def init_session_wf(
    session: SessionInputs, settings: Settings, *, name: str | None = None
) -> LiterateWorkflow:
    """Build the workflow of one session.

    Inputs
    ------
    session : dict, `SessionInputs.to_dict()`
    boilerplate : methods text for the report

    Outputs
    -------
    ledger : path of the completion record in the output folder
    """
    name = name or re.sub(r'\W', '_', session.name) + '_wf'
    workflow = LiterateWorkflow(name=name)
    inputnode = Node(IdentityInterface(['session', 'boilerplate']), name='inputnode')
    inputnode.inputs.session = session.to_dict()
    outputnode = Node(IdentityInterface(['ledger']), name='outputnode')

    threads = max(1, settings.omp_nthreads)
    stamps = [_stamp(scan.path) for scan in session.scans]
    fingerprint = settings.fingerprint()
    network = {
        'model': settings.model,
        'model_stamp': [fingerprint['version'], fingerprint['model_sha256']],
        'device': settings.device,
        'threads': threads,
        'stamps': stamps,
    }
    # Every step holds what is on the reference's grid.
    large_gb = session_gb(voxel_count(session.scans[0].path)) - SESSION_GB
    segment_gb, light_gb = SEGMENT_GB + large_gb, LIGHT_GB + large_gb
    align = Node(
        AlignScans(seed=settings.random_seed, **network),
        name='align',
        n_procs=max(1, min(threads, len(session.scans) - 1)),
        mem_gb=LIGHT_GB if len(session.scans) == 1 else segment_gb,
    )
    segment = Node(
        SegmentScans(
            keep_probabilities=settings.save_probabilities,
            bias_correction=settings.bias_correction,
            denoise=settings.denoise,
            **network,
        ),
        name='segment',
        n_procs=threads,
        mem_gb=segment_gb,
    )
    measure = Node(
        MeasureSession(uncertainty_threshold=settings.uncertainty_threshold),
        name='measure',
        mem_gb=light_gb,
    )
    publish = Node(
        PublishSession(output_dir=str(settings.output_dir), settings=fingerprint),
        name='publish',
        mem_gb=LIGHT_GB,
    )
    workflow.connect(
        [
            (inputnode, align, [('session', 'session')]),
            (inputnode, segment, [('session', 'session')]),
            (inputnode, measure, [('session', 'session')]),
            (inputnode, publish, [('session', 'session')]),
            (align, segment, [('alignments', 'alignments')]),
            (align, publish, [('alignments', 'alignments')]),
            (segment, measure, [(n, n) for n in ('labels', 'uncertainty', 'measures')]),
            (segment, publish, [(n, n) for n in ('labels', 'mask', 'uncertainty', 'measures')]),
            (measure, publish, [('morph', 'morph'), ('qc', 'qc')]),
            (publish, outputnode, [('ledger', 'ledger')]),
        ]
    )
    if settings.save_probabilities:
        workflow.connect([(segment, publish, [('probabilities', 'probabilities')])])
    spaces = standard_spaces(settings.output_spaces)
    if spaces:
        normalise = Node(
            NormaliseSession(
                spaces=list(spaces),
                work_dir=str(settings.work_root),
                seed=settings.random_seed,
                **network,
            ),
            name='normalise',
            mem_gb=segment_gb,
        )
        workflow.connect(
            [
                (inputnode, normalise, [('session', 'session')]),
                (segment, normalise, [('labels', 'labels')]),
                (normalise, publish, [('spaces', 'spaces'), ('files', 'space_files')]),
            ]
        )
    if settings.report:
        report = Node(
            ReportSession(uncertainty_threshold=settings.uncertainty_threshold),
            name='report',
            mem_gb=light_gb,
        )
        workflow.connect(
            [
                (inputnode, report, [('session', 'session'), ('boilerplate', 'boilerplate')]),
                (align, report, [('alignments', 'alignments')]),
                (segment, report, [(n, n) for n in ('labels', 'uncertainty', 'measures')]),
                (measure, report, [('morph', 'morph'), ('qc', 'qc')]),
                (report, publish, [('report', 'report'), ('figures', 'figures')]),
            ]
        )
        if spaces:
            workflow.connect([(normalise, report, [('spaces', 'spaces')])])
        if session.session:
            subject_page = Node(
                UpdateSubjectPage(subject=session.subject, output_dir=str(settings.output_dir)),
                name='subject_page',
                mem_gb=LIGHT_GB,
            )
            workflow.connect([(publish, subject_page, [('ledger', 'ledger')])])
    return workflow


def _stamp(path: str) -> str:
    status = Path(path).stat()
    return f'{status.st_size}-{status.st_mtime_ns}'
