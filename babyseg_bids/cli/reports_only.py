"""`--reports-only`: pages made again from the results that are in the output folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.console import Console

from babyseg_bids import messages
from babyseg_bids.cli.verdicts import Verdict, conclude, empty_reason
from babyseg_bids.errors import BabySegError, InputError, OutputError
from babyseg_bids.records import Flag, SessionInputs
from babyseg_bids.settings import Settings

if TYPE_CHECKING:
    from babyseg_bids.reports.session import SessionReportData


def rewrite_reports(sessions: Sequence[SessionInputs], settings: Settings, out: Console, /) -> int:
    """Write the reports of all sessions that have results; the exit code."""
    from babyseg_bids.reports.subject import write_subject_report

    verdicts = []
    for session in sessions:
        if not session.scans:
            verdicts.append(Verdict(session.name, 'no usable image', empty_reason(session)))
            continue
        try:
            rewrite_report(session, settings)
        except BabySegError as error:
            verdicts.append(Verdict(session.name, 'failed', str(error)))
        else:
            verdicts.append(Verdict(session.name, 'done'))
            out.print(f'{session.name}: report written')
    done = {v.name for v in verdicts if v.fate == messages.DONE}
    for subject in sorted({s.subject for s in sessions if s.name in done}):
        write_subject_report(settings.output_dir, subject)
    return conclude(sessions, verdicts, settings, out, deed='with a new report')


def rewrite_report(session: SessionInputs, settings: Settings, /) -> None:
    """Write the report of one session; the old one stays until the new one is complete.

    Raises
    ------
    InputError
        When the session has no complete results.
    OutputError
        When the report cannot be written.
    """
    from babyseg_bids.outputs import Names
    from babyseg_bids.reports.session import write_session_report

    output = settings.output_dir
    names = Names(session)
    try:
        # Inside the output folder, so that files can be moved to their places at once.
        with TemporaryDirectory(dir=output, prefix='.babyseg-report-') as name:
            folder = Path(name)
            (folder / 'figures').mkdir()
            data = report_data(session, settings, folder / 'figures')
            write_session_report(folder / 'report.html', data)
            (output / names.figures).mkdir(parents=True, exist_ok=True)
            for figure in (folder / 'figures').iterdir():
                figure.replace(output / names.figures / figure.name)
            (folder / 'report.html').replace(output / names.report)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OutputError(messages.output_unwritable(output, reason)) from error


def report_data(
    session: SessionInputs, settings: Settings, figures: Path, /
) -> 'SessionReportData':
    """What the report shows, from the files of the session.

    Raises
    ------
    InputError
        When there is no completion record, or a file that it names cannot be read.
    """
    from babyseg_bids.morphometry import read_morph_tsv
    from babyseg_bids.outputs import Names, ledger_path
    from babyseg_bids.reports.session import SessionReportData

    output = settings.output_dir
    ledger_file = ledger_path(session, output)
    if not ledger_file.exists():
        raise InputError(messages.NO_RESULTS_YET)
    try:
        ledger = json.loads(ledger_file.read_text('utf-8'))
        used = _used(ledger, settings.bids_dir)
        names = Names(used)
        qc = json.loads((output / names.record('desc-babyseg_qc.json')).read_text('utf-8'))
        flags = tuple(Flag(**f) for f in qc.pop('flags', ()))
        return SessionReportData(
            inputs=used,
            morph=read_morph_tsv(output / names.image('desc-babyseg_morph.tsv')),
            qc=qc,
            flags=(*used.flags, *(f for f in flags if f not in used.flags)),
            reference_image=Path(used.scans[0].path),
            labels=output / names.image('desc-aseg_dseg.nii.gz'),
            uncertainty=output / names.image('desc-uncertainty_probseg.nii.gz'),
            figures_dir=figures,
            transforms=tuple({**a, 'scan': _label(a['scan'])} for a in ledger['alignments']),
            model=ledger['model'],
            device=ledger['device'],
            seconds=ledger['seconds'],
            version=ledger['version'],
            boilerplate=_boilerplate(output),
            uncertainty_threshold=ledger['settings']['uncertainty_threshold'],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(messages.results_unreadable(ledger_file, str(error))) from error


def _used(ledger: dict[str, Any], bids_dir: Path) -> SessionInputs:
    """The session as it was segmented, its scans found in the dataset of today."""
    scans = [{**s, 'path': str(bids_dir / s['relative_path'])} for s in ledger['scans']]
    return SessionInputs.from_dict({**ledger, 'scans': scans})


def _label(relative_path: str) -> str:
    """`acq-x_T2w` from the path of a scan."""
    stem = Path(relative_path).name.split('.')[0]
    return '_'.join(p for p in stem.split('_') if not p.startswith(('sub-', 'ses-')))


def _boilerplate(output: Path) -> str:
    file = output / 'logs' / 'CITATION.md'
    return file.read_text('utf-8') if file.exists() else ''
