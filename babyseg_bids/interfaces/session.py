"""Nipype interfaces of one session's steps; each reads its files and calls one pure function.

Sessions, alignments and measures travel as JSON. The `stamps` of the input files are part of the
inputs only so that Nipype notices when a file was replaced by another of the same name.
"""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    SimpleInterface,
    TraitedSpec,
    isdefined,
    traits,
)

from babyseg_bids import __version__
from babyseg_bids.outputs import (
    Names,
    coarse_uncertainty,
    input_record,
    like_reference,
    sidecar,
)
from babyseg_bids.records import Flag, LedgerRow, SessionInputs


def read_alignments(path: str, /) -> list[Any]:
    """The alignments that `AlignScans` wrote."""
    from babyseg_bids.alignment import Alignment

    records = json.loads(Path(path).read_text())
    return [Alignment(**{**r, 'matrix': np.array(r['matrix'])}) for r in records]


def after_alignment(
    session: SessionInputs, alignments: list[Any], /
) -> tuple[SessionInputs, list[Any]]:
    """The session without the scans that could not be aligned, and the alignments that remain.

    Their ledger rows turn to `rejected`, and a flag names each.
    """
    from babyseg_bids.pipeline import refused_flag

    pairs = list(zip(session.scans[1:], alignments, strict=True))
    refused = {s.relative_path: (s, a) for s, a in pairs if a.status == 'refused'}
    ledger = tuple(
        LedgerRow(row.relative_path, row.suffix, 'rejected', refused[row.relative_path][1].reason)
        if row.relative_path in refused
        else row
        for row in session.ledger
    )
    flags = tuple(refused_flag(Path(s.path).name, a) for s, a in refused.values())
    kept = tuple(s for s in session.scans if s.relative_path not in refused)
    final = replace(session, scans=kept, ledger=ledger, flags=(*session.flags, *flags))
    return final, [a for _, a in pairs if a.status != 'refused']


class _SessionSpec(BaseInterfaceInputSpec):
    session = traits.Dict(mandatory=True, desc='SessionInputs.to_dict()')
    stamps = traits.List(traits.Str, desc='size and time of each input file')


class _AlignSpec(_SessionSpec):
    seed = traits.Int(0, usedefault=True)
    threads = traits.Int(1, usedefault=True)


class _AlignOutput(TraitedSpec):
    alignments = File(exists=True, desc='JSON list, one record for each scan but the reference')


class AlignScans(SimpleInterface):
    """Align every scan of a session to the reference."""

    input_spec = _AlignSpec
    output_spec = _AlignOutput

    def _run_interface(self, runtime: Any) -> Any:
        from babyseg_bids.pipeline import align_scans
        from babyseg_bids.preflight import load_image

        session = SessionInputs.from_dict(self.inputs.session)
        alignments = []
        if len(session.scans) > 1:
            images = [load_image(s.path) for s in session.scans]
            alignments = align_scans(images, seed=self.inputs.seed, threads=self.inputs.threads)
        records = [{**asdict(a), 'matrix': a.matrix.tolist()} for a in alignments]
        path = Path(runtime.cwd) / 'alignments.json'
        path.write_text(json.dumps(records))
        self._results['alignments'] = str(path)
        return runtime


class _SegmentSpec(_SessionSpec):
    alignments = File(exists=True, mandatory=True)
    model = traits.Str(mandatory=True)
    model_stamp = traits.Any(desc='changes with the content of a model file')
    device = traits.Str('auto', usedefault=True)
    threads = traits.Int(1, usedefault=True)
    keep_probabilities = traits.Bool(False, usedefault=True)


class _SegmentOutput(TraitedSpec):
    labels = File(exists=True)
    mask = File(exists=True)
    uncertainty = File(exists=True)
    probabilities = File(desc='only when asked for')
    measures = File(exists=True, desc='JSON: soft volumes, confidence, weights, device, time')


class SegmentScans(SimpleInterface):
    """Segment the aligned scans of a session jointly, on the grid of the reference."""

    input_spec = _SegmentSpec
    output_spec = _SegmentOutput

    def _run_interface(self, runtime: Any) -> Any:
        from babyseg_bids.network import load_model
        from babyseg_bids.pipeline import segment_aligned
        from babyseg_bids.preflight import load_image

        began = time.monotonic()
        session = SessionInputs.from_dict(self.inputs.session)
        alignments = read_alignments(self.inputs.alignments)
        images = [load_image(s.path) for s in session.scans]
        model = load_model(self.inputs.model)
        result, weights = segment_aligned(
            images,
            alignments,
            model,
            device=self.inputs.device,
            threads=self.inputs.threads,
            keep_probabilities=self.inputs.keep_probabilities,
        )
        reference = nib.load(session.scans[0].path)
        folder = Path(runtime.cwd)
        volumes = {
            'labels': (result.labels, np.int16),
            'mask': (result.labels > 0, np.uint8),
            'uncertainty': (coarse_uncertainty(result.uncertainty), np.float32),
        }
        if result.probabilities is not None:
            volumes['probabilities'] = (result.probabilities, np.float32)
        for name, (data, dtype) in volumes.items():
            path = folder / f'{name}.nii.gz'
            like_reference(data, reference, dtype=dtype).to_filename(path)
            self._results[name] = str(path)
        measures = {
            'soft_volumes': result.soft_volumes,
            'confidence': result.confidence,
            'scan_weights': weights,
            'device': result.device,
            'seconds': round(time.monotonic() - began, 2),
            'model': f'{model.name} {model.version}',
            'turned': result.turned,
        }
        path = folder / 'measures.json'
        path.write_text(json.dumps(measures))
        self._results['measures'] = str(path)
        return runtime


class _MeasureSpec(BaseInterfaceInputSpec):
    session = traits.Dict(mandatory=True)
    labels = File(exists=True, mandatory=True)
    uncertainty = File(exists=True, mandatory=True)
    measures = File(exists=True, mandatory=True)
    uncertainty_threshold = traits.Float(0.3, usedefault=True)


class _MeasureOutput(TraitedSpec):
    morph = File(exists=True, desc='volumes, TSV')
    qc = File(exists=True, desc='quality measures and their flags, JSON')


class MeasureSession(SimpleInterface):
    """Volumes and quality of a session's segmentation."""

    input_spec = _MeasureSpec
    output_spec = _MeasureOutput

    def _run_interface(self, runtime: Any) -> Any:
        from babyseg_bids.labels import table_of
        from babyseg_bids.morphometry import morphometry_table, write_morph_tsv
        from babyseg_bids.preflight import load_image
        from babyseg_bids.qc import session_qc

        session = SessionInputs.from_dict(self.inputs.session)
        image = load_image(session.scans[0].path)
        labels = np.asarray(nib.load(self.inputs.labels).dataobj)
        uncertainty = np.asarray(nib.load(self.inputs.uncertainty).dataobj)
        measures = json.loads(Path(self.inputs.measures).read_text())
        # JSON has text as keys.
        volumes, confidence = (
            {int(k): v for k, v in measures[name].items()}
            for name in ('soft_volumes', 'confidence')
        )
        table = table_of(volumes)
        morph = morphometry_table(labels, image.affine, volumes, confidence, table)
        metrics, flags = session_qc(
            labels,
            uncertainty,
            np.asanyarray(image.dataobj),
            image.affine,
            morph,
            session.age,
            self.inputs.uncertainty_threshold,
            table,
        )
        folder = Path(runtime.cwd)
        write_morph_tsv(morph, folder / 'morph.tsv')
        content = {**metrics, 'flags': [asdict(f) for f in flags]}
        (folder / 'qc.json').write_text(json.dumps(content, indent=2) + '\n')
        self._results['morph'] = str(folder / 'morph.tsv')
        self._results['qc'] = str(folder / 'qc.json')
        return runtime


class _ReportSpec(BaseInterfaceInputSpec):
    session = traits.Dict(mandatory=True)
    alignments = File(exists=True, mandatory=True)
    labels = File(exists=True, mandatory=True)
    uncertainty = File(exists=True, mandatory=True)
    measures = File(exists=True, mandatory=True)
    morph = File(exists=True, mandatory=True)
    qc = File(exists=True, mandatory=True)
    uncertainty_threshold = traits.Float(0.3, usedefault=True)
    boilerplate = traits.Str()


class _ReportOutput(TraitedSpec):
    report = File(exists=True, desc='HTML')
    figures = traits.List(File(exists=True))


class ReportSession(SimpleInterface):
    """The HTML page of a session and its pictures."""

    input_spec = _ReportSpec
    output_spec = _ReportOutput

    def _run_interface(self, runtime: Any) -> Any:
        from babyseg_bids.morphometry import read_morph_tsv
        from babyseg_bids.reports.session import SessionReportData, write_session_report

        alignments = read_alignments(self.inputs.alignments)
        given = SessionInputs.from_dict(self.inputs.session)
        session, _ = after_alignment(given, alignments)
        measures = json.loads(Path(self.inputs.measures).read_text())
        qc = json.loads(Path(self.inputs.qc).read_text())
        flags = tuple(Flag(**f) for f in qc.pop('flags'))
        transforms = [
            {'scan': scan.label, **asdict(a)}
            for scan, a in zip(given.scans[1:], alignments, strict=True)
        ]
        folder = Path(runtime.cwd)
        figures = folder / 'figures'
        figures.mkdir(exist_ok=True)
        data = SessionReportData(
            inputs=session,
            morph=read_morph_tsv(self.inputs.morph),
            qc=qc,
            flags=(*session.flags, *flags),
            reference_image=Path(session.scans[0].path),
            labels=Path(self.inputs.labels),
            uncertainty=Path(self.inputs.uncertainty),
            figures_dir=figures,
            transforms=tuple(transforms),
            scan_weights=tuple(w for w in measures['scan_weights'] if w > 0),
            model=measures['model'],
            device=measures['device'],
            seconds=measures['seconds'],
            version=__version__,
            boilerplate=self.inputs.boilerplate,
            uncertainty_threshold=self.inputs.uncertainty_threshold,
        )
        path = folder / 'report.html'
        write_session_report(path, data)
        self._results['report'] = str(path)
        self._results['figures'] = [str(p) for p in sorted(figures.iterdir())]
        return runtime


class _PublishSpec(BaseInterfaceInputSpec):
    session = traits.Dict(mandatory=True)
    output_dir = traits.Str(mandatory=True)
    settings = traits.Dict(mandatory=True, desc='Settings.fingerprint()')
    alignments = File(exists=True, mandatory=True)
    labels = File(exists=True, mandatory=True)
    mask = File(exists=True, mandatory=True)
    uncertainty = File(exists=True, mandatory=True)
    probabilities = File()
    measures = File(exists=True, mandatory=True)
    morph = File(exists=True, mandatory=True)
    qc = File(exists=True, mandatory=True)
    report = File()
    figures = traits.List(File())


class _PublishOutput(TraitedSpec):
    ledger = File(exists=True, desc='completion record of the session')


class PublishSession(SimpleInterface):
    """Name all results as BIDS derivatives and put them into the output folder at once."""

    input_spec = _PublishSpec
    output_spec = _PublishOutput
    # Whether the results are in the output folder is for the run to find out, not for a cache.
    always_run = True

    def _run_interface(self, runtime: Any) -> Any:
        from babyseg_bids.publish import publish_session

        given = SessionInputs.from_dict(self.inputs.session)
        alignments = read_alignments(self.inputs.alignments)
        session, kept = after_alignment(given, alignments)
        measures = json.loads(Path(self.inputs.measures).read_text())
        qc = json.loads(Path(self.inputs.qc).read_text())
        files = {
            **self._images(session),
            **self._transforms(session, kept, Path(runtime.cwd)),
            **self._tables(session),
            **self._pages(session),
        }
        ledger = {
            **session.to_dict(),
            'version': __version__,
            **{k: measures[k] for k in ('model', 'device', 'seconds', 'scan_weights', 'turned')},
            'settings': self.inputs.settings,
            'inputs': [input_record(s) for s in given.scans],
            'alignments': [
                {'scan': s.relative_path, **asdict(a), 'matrix': a.matrix.tolist()}
                for s, a in zip(given.scans[1:], alignments, strict=True)
            ],
            'flags': [asdict(f) for f in session.flags] + qc['flags'],
        }
        # Absolute paths of the input belong to one machine.
        for scan in ledger['scans']:
            del scan['path']
        output = Path(self.inputs.output_dir)
        self._results['ledger'] = str(publish_session(session, files, ledger, output))
        return runtime

    def _images(self, session: SessionInputs) -> dict[str, Any]:
        from babyseg_bids.labels import table_of

        names = Names(session)
        files: dict[str, Any] = {}
        kinds = [
            ('desc-aseg_dseg', self.inputs.labels, sidecar(session, 'aseg', Manual=False)),
            ('desc-brain_mask', self.inputs.mask, sidecar(session, 'brain', Type='Brain')),
            ('desc-uncertainty_probseg', self.inputs.uncertainty, sidecar(session, 'uncertainty')),
        ]
        if isdefined(self.inputs.probabilities):
            measures = json.loads(Path(self.inputs.measures).read_text())
            names_in_order = [r.abbreviation for r in table_of(measures['soft_volumes']).rows]
            description = sidecar(session, 'babyseg', LabelMap=names_in_order)
            kinds.append(('desc-babyseg_probseg', self.inputs.probabilities, description))
        for what, image, description in kinds:
            files[names.image(f'{what}.nii.gz')] = Path(image)
            files[names.image(f'{what}.json')] = description
        return files

    def _transforms(
        self, session: SessionInputs, alignments: list[Any], folder: Path
    ) -> dict[str, Any]:
        from babyseg_bids.alignment import write_transform

        names = Names(session)
        files: dict[str, Any] = {}
        for scan, alignment in zip(session.scans[1:], alignments, strict=True):
            for inverse in (False, True):
                name = names.transform(scan, inverse=inverse)
                matrix = np.linalg.inv(alignment.matrix) if inverse else alignment.matrix
                path = folder / Path(name).name
                write_transform(matrix, path)
                files[name] = path
        return files

    def _tables(self, session: SessionInputs) -> dict[str, Any]:
        from babyseg_bids.morphometry import morph_sidecar

        names = Names(session)
        return {
            names.image('desc-babyseg_morph.tsv'): Path(self.inputs.morph),
            names.image('desc-babyseg_morph.json'): morph_sidecar(),
            names.record('desc-babyseg_qc.json'): Path(self.inputs.qc),
        }

    def _pages(self, session: SessionInputs) -> dict[str, Any]:
        if not isdefined(self.inputs.report):
            return {}
        names = Names(session)
        files: dict[str, Any] = {names.report: Path(self.inputs.report)}
        for figure in self.inputs.figures:
            files[f'{names.figures}/{Path(figure).name}'] = Path(figure)
        return files


class _SubjectPageSpec(BaseInterfaceInputSpec):
    ledger = File(exists=True, mandatory=True, desc='of the session that was just completed')
    subject = traits.Str(mandatory=True)
    output_dir = traits.Str(mandatory=True)


class UpdateSubjectPage(SimpleInterface):
    """Draw the trajectory of a subject anew, now that one more session is complete."""

    input_spec = _SubjectPageSpec
    output_spec = TraitedSpec
    always_run = True

    def _run_interface(self, runtime: Any) -> Any:
        from babyseg_bids.reports.subject import write_subject_report

        write_subject_report(Path(self.inputs.output_dir), self.inputs.subject)
        return runtime


__all__ = [
    'AlignScans',
    'MeasureSession',
    'PublishSession',
    'ReportSession',
    'SegmentScans',
    'UpdateSubjectPage',
    'after_alignment',
    'read_alignments',
]
