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

from babyseg_bids import __version__, messages
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

    The ledger rows of the former turn to `rejected`; flags name them and what is doubtful.
    """
    from babyseg_bids.pipeline import alignment_flags

    pairs = list(zip(session.scans[1:], alignments, strict=True))
    refused = {s.relative_path: a for s, a in pairs if a.status == 'refused'}
    ledger = tuple(
        LedgerRow(row.relative_path, row.suffix, 'rejected', refused[row.relative_path].reason)
        if row.relative_path in refused
        else row
        for row in session.ledger
    )
    flags = [flag for s, a in pairs for flag in alignment_flags(Path(s.path).name, a)]
    kept = tuple(s for s in session.scans if s.relative_path not in refused)
    final = replace(session, scans=kept, ledger=ledger, flags=(*session.flags, *flags))
    return final, [a for _, a in pairs if a.status != 'refused']


def read_spaces(path: Any, /) -> list[dict[str, Any]]:
    """The records that `NormaliseSession` wrote; none where no space was asked for."""
    return json.loads(Path(path).read_text()) if isdefined(path) else []


def with_space_flags(session: SessionInputs, records: list[dict[str, Any]], /) -> SessionInputs:
    """The session with what is to be known of its standard spaces."""
    flags = [Flag(**f) for record in records for f in record['flags']]
    return replace(session, flags=(*session.flags, *flags))


class _SessionSpec(BaseInterfaceInputSpec):
    session = traits.Dict(mandatory=True, desc='SessionInputs.to_dict()')
    stamps = traits.List(traits.Str, desc='size and time of each input file')


class _ModelSpec(_SessionSpec):
    model = traits.Str(mandatory=True)
    model_stamp = traits.Any(desc='changes with the content of a model file')
    device = traits.Str('auto', usedefault=True)
    threads = traits.Int(1, usedefault=True)


class _AlignSpec(_ModelSpec):
    seed = traits.Int(0, usedefault=True)


class _AlignOutput(TraitedSpec):
    alignments = File(exists=True, desc='JSON list, one record for each scan but the reference')


class AlignScans(SimpleInterface):
    """Align every scan of a session to the reference."""

    input_spec = _AlignSpec
    output_spec = _AlignOutput

    def _run_interface(self, runtime: Any) -> Any:
        session = SessionInputs.from_dict(self.inputs.session)
        alignments = self._alignments(session) if len(session.scans) > 1 else []
        records = [{**asdict(a), 'matrix': a.matrix.tolist()} for a in alignments]
        path = Path(runtime.cwd) / 'alignments.json'
        path.write_text(json.dumps(records))
        self._results['alignments'] = str(path)
        return runtime

    def _alignments(self, session: SessionInputs) -> list[Any]:
        from babyseg_bids.pipeline import align_scans
        from babyseg_bids.preflight import load_image

        def model() -> Any:
            # Weights are read only where a pair of scans leaves doubt, which is seldom.
            from babyseg_bids.network import load_model

            return load_model(self.inputs.model)

        return align_scans(
            [load_image(s.path) for s in session.scans],
            model,
            seed=self.inputs.seed,
            device=self.inputs.device,
            threads=self.inputs.threads,
        )


class _SegmentSpec(_ModelSpec):
    alignments = File(exists=True, mandatory=True)
    bias_correction = traits.Str('none', usedefault=True)
    denoise = traits.Bool(False, usedefault=True)
    keep_probabilities = traits.Bool(False, usedefault=True)


class _SegmentOutput(TraitedSpec):
    labels = File(exists=True)
    mask = File(exists=True)
    uncertainty = File(exists=True)
    probabilities = File(desc='only when asked for')
    measures = File(exists=True, desc='JSON: soft volumes, confidence, device, time')


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
        result = segment_aligned(
            images,
            alignments,
            model,
            device=self.inputs.device,
            threads=self.inputs.threads,
            keep_probabilities=self.inputs.keep_probabilities,
            bias_correction=self.inputs.bias_correction,
            denoise=self.inputs.denoise,
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
            'device': result.device,
            'seconds': round(time.monotonic() - began, 2),
            'model': f'{model.name} {model.version}',
            'turned': result.turned,
            'turn_degrees': round(result.turn_degrees, 1),
        }
        path = folder / 'measures.json'
        path.write_text(json.dumps(measures))
        self._results['measures'] = str(path)
        return runtime


class _NormaliseSpec(_ModelSpec):
    labels = File(exists=True, mandatory=True)
    spaces = traits.List(traits.Str, mandatory=True, desc='as given to --output-spaces')
    work_dir = traits.Str(mandatory=True, desc='where templates go that are nowhere yet')
    seed = traits.Int(0, usedefault=True)


class _NormaliseOutput(TraitedSpec):
    spaces = File(exists=True, desc='JSON list, one record for each space')
    files = traits.List(File(exists=True), desc='that the records name')


class NormaliseSession(SimpleInterface):
    """Bring the label map of a session into standard spaces, as far as there are templates."""

    input_spec = _NormaliseSpec
    output_spec = _NormaliseOutput
    # A template that was missing may be there now.
    always_run = True

    def _run_interface(self, runtime: Any) -> Any:
        records = [self._record(text, Path(runtime.cwd)) for text in self.inputs.spaces]
        path = Path(runtime.cwd) / 'spaces.json'
        path.write_text(json.dumps(records))
        self._results['spaces'] = str(path)
        # Nipype removes what no output names.
        names = ('labels', 'forward', 'inverse')
        self._results['files'] = [r[name] for r in records for name in names if name in r]
        return runtime

    def _record(self, text: str, folder: Path) -> dict[str, Any]:
        """What became of one space: `missing` names it when its template is not to be had."""
        from babyseg_bids.errors import AlignmentError, InputError
        from babyseg_bids.normalisation import poor_overlap
        from babyseg_bids.spaces import choose_space
        from babyseg_bids.templates import find_template, template_root

        session = SessionInputs.from_dict(self.inputs.session)
        space, note = choose_space(text, session.age)
        record: dict[str, Any] = {'asked': text, 'space': None, 'missing': False, 'flags': []}

        def flag(code: str, severity: Any, message: str) -> dict[str, Any]:
            record['flags'].append(asdict(Flag(code, severity, message)))
            return record

        if space is None:
            return flag('space-not-written', 'warning', note)
        if note:
            flag('space-age', 'info', note)
        record['space'] = space.name
        root = template_root(Path(self.inputs.work_dir))
        try:
            template = find_template(space, session.scans[0].suffix, root)
        except InputError as error:
            record['missing'] = True
            return flag('space-not-written', 'warning', str(error))
        record['template'] = template.relative_to(root).as_posix()
        target = folder / space.name
        target.mkdir(exist_ok=True)
        try:
            record |= self._normalise(session, template, target)
        except InputError as error:
            return flag('space-not-written', 'warning', f'{space.name} was not written: {error}')
        except AlignmentError:
            sentence = messages.normalisation_empty(space.name)
            return flag('space-not-written', 'warning', sentence)
        if poor := poor_overlap(space.name, record['overlap']):
            flag('space-overlap', 'warning', poor)
        return record

    def _normalise(self, session: SessionInputs, template: Path, target: Path) -> dict[str, Any]:
        """Paths of the results in `target`, and the overlap with the template's own labels."""
        from babyseg_bids.network import load_model, segment
        from babyseg_bids.normalisation import Head, normalise
        from babyseg_bids.preflight import load_image

        image, child = load_image(template), load_image(session.scans[0].path)
        arrays = [np.asanyarray(x.dataobj, dtype=np.float32) for x in (child, image)]
        model = load_model(self.inputs.model)
        options = {'device': self.inputs.device, 'threads': self.inputs.threads}
        own = segment([(arrays[1], image.affine)], model, **options).labels
        labels = np.asarray(nib.load(self.inputs.labels).dataobj)
        result = normalise(
            Head(arrays[0], labels, child.affine),
            Head(arrays[1], own, image.affine),
            model.labels,
            target,
            seed=self.inputs.seed,
        )
        path = target / 'labels.nii.gz'
        like_reference(result.labels, nib.load(template), dtype=np.int16).to_filename(path)
        return {
            'labels': str(path),
            'forward': str(result.forward),
            'inverse': str(result.inverse),
            'overlap': round(result.overlap, 4),
        }


def _by_number(record: dict[str, float]) -> dict[int, float]:
    """A record of structures out of JSON, which has text as keys."""
    return {int(k): v for k, v in record.items()}


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
        from babyseg_bids.development import cortex_record
        from babyseg_bids.labels import table_of
        from babyseg_bids.morphometry import morphometry_table, write_morph_tsv
        from babyseg_bids.preflight import load_image
        from babyseg_bids.qc import session_qc
        from babyseg_bids.surfaces import cortex_measures

        session = SessionInputs.from_dict(self.inputs.session)
        image = load_image(session.scans[0].path)
        labels = np.asarray(nib.load(self.inputs.labels).dataobj)
        uncertainty = np.asarray(nib.load(self.inputs.uncertainty).dataobj)
        measures = json.loads(Path(self.inputs.measures).read_text())
        volumes, confidence = (
            _by_number(measures[name]) for name in ('soft_volumes', 'confidence')
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
        cortex = cortex_record(cortex_measures(labels, image.affine, table))
        content = {**metrics, 'cortex': cortex, 'flags': [asdict(f) for f in flags]}
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
    spaces = File()
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
        session = with_space_flags(session, read_spaces(self.inputs.spaces))
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
    spaces = File()
    space_files = traits.List(File(), desc='that the records of `spaces` name')
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
        spaces = read_spaces(self.inputs.spaces)
        session = with_space_flags(session, spaces)
        measures = json.loads(Path(self.inputs.measures).read_text())
        qc = json.loads(Path(self.inputs.qc).read_text())
        files = {
            **self._images(session),
            **self._transforms(session, kept, Path(runtime.cwd)),
            **self._spaces(session, spaces),
            **self._tables(session),
            **self._pages(session),
        }
        ledger = {
            **session.to_dict(),
            'version': __version__,
            **{k: measures[k] for k in ('model', 'device', 'seconds', 'turned', 'turn_degrees')},
            'settings': self.inputs.settings,
            'inputs': [input_record(s) for s in given.scans],
            'alignments': [
                {'scan': s.relative_path, **asdict(a), 'matrix': a.matrix.tolist()}
                for s, a in zip(given.scans[1:], alignments, strict=True)
            ],
            'spaces': [
                {k: r[k] for k in ('asked', 'space', 'missing', 'template', 'overlap') if k in r}
                for r in spaces
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

    def _spaces(self, session: SessionInputs, records: list[dict[str, Any]]) -> dict[str, Any]:
        names = Names(session)
        files: dict[str, Any] = {}
        for record in records:
            if 'labels' not in record:
                continue
            space, stem = record['space'], names.standard(record['space'])
            files[f'{stem}.nii.gz'] = Path(record['labels'])
            reference = f'bids:templateflow:{record["template"]}'
            more = {'Manual': False, 'SpatialReference': reference}
            files[f'{stem}.json'] = sidecar(session, 'aseg', **more)
            for inverse, key in ((False, 'forward'), (True, 'inverse')):
                files[names.standard_transform(space, inverse=inverse)] = Path(record[key])
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
    'NormaliseSession',
    'PublishSession',
    'ReportSession',
    'SegmentScans',
    'UpdateSubjectPage',
    'after_alignment',
    'read_alignments',
]
