"""Names and content of the derivatives, and whether a session has them already."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from babyseg_bids import __version__
from babyseg_bids.errors import OutputError
from babyseg_bids.labels import OFFICIAL, is_official, label_table, table_of
from babyseg_bids.records import Scan, SessionInputs
from babyseg_bids.reports.files import write_atomic
from babyseg_bids.settings import Settings
from babyseg_bids.tables import read_json

BIDS_VERSION = '1.10.0'
# Integer labels of the tissues in BIDS' common image-derived label table.
BIDS_LABELS = {
    'background': 0,
    'white-matter': 2,
    'ventricle': 3,
    'cortex': 8,
    'deep-grey': 9,
    'brainstem': 10,
    'cerebellum': 11,
}
# Without a trailing slash: the validator does not match `figures/` in nested folders.
IGNORED = (
    'figures',
    'log',
    'logs',
    '.babyseg-work',
    '*.html',
    '*_xfm.*',
    '*_morph.*',
    '*_qc.*',
    '*_ledger.*',
    'group_*',
    'README.md',
)
DESCRIPTIONS = {
    'aseg': 'Segmentation into 27 structures with FreeSurfer numbers (desc-aseg_dseg.tsv)',
    'brain': 'All voxels that have a structure',
    'uncertainty': 'One minus the probability of the label given',
    'babyseg': "Posterior probabilities, volumes and quality measures of babyseg's network",
    'inputs': 'Which images were used, and why others were not',
}
DSEG_COLUMNS = {
    'hemisphere': {
        'Description': "Side of the child's body on which the structure lies",
        'Levels': {'L': 'left', 'R': 'right', 'midline': 'unpaired', 'n/a': 'not a structure'},
    }
}
# Steps of the published uncertainty; finer ones say nothing and make files four times as large.
UNCERTAINTY_STEP = 0.01
README = """# babyseg derivatives

Brain segmentations of infants and young children, written by babyseg {version}.

- `sub-*.html`: one report a session; open it in a browser, no internet is needed.
- `*_desc-aseg_dseg.nii.gz`: label map on the grid of the reference scan, FreeSurfer numbers as in
  `desc-aseg_dseg.tsv`.
- `*_desc-brain_mask.nii.gz`, `*_desc-uncertainty_probseg.nii.gz`: brain mask; uncertainty, 0 to 1.
- `*_desc-babyseg_morph.tsv`: volumes. The sum is the segmented brain volume, not an intracranial
  volume.
- `*_desc-babyseg_qc.json`: quality measures and flags.
- `*_desc-inputs_ledger.json`: which images were used and why, and how to repeat the run.
- `logs/CITATION.md`: methods text and references.

For research use; not a medical device.
"""


@dataclass(frozen=True)
class Names:
    """File names of a session's derivatives, relative to the output folder.

    `space` is the reference's suffix.
    """

    session: SessionInputs

    @property
    def folder(self) -> str:
        """Folder of the images and tables: `sub-01/ses-A/anat`."""
        return '/'.join([*self.session.name.split('_'), 'anat'])

    @property
    def space(self) -> str:
        """Suffix of the reference scan."""
        return self.session.scans[0].suffix

    def image(self, what: str) -> str:
        """A derivative on the reference's grid; `what` is like `desc-aseg_dseg.nii.gz`."""
        return f'{self.folder}/{self.session.name}_space-{self.space}_{what}'

    def record(self, what: str) -> str:
        """A derivative without a space, such as `desc-babyseg_qc.json`."""
        return f'{self.folder}/{self.session.name}_{what}'

    def transform(self, scan: Scan, *, inverse: bool = False) -> str:
        """ITK transform between a scan and the reference.

        A scan whose suffix is not its own in the session keeps its entities in the name.
        """
        alike = sum(s.suffix == scan.suffix for s in self.session.scans) > 1
        entities = ''.join(f'{k}-{v}_' for k, v in scan.entities.items()) if alike else ''
        ends = (self.space, scan.suffix) if inverse else (scan.suffix, self.space)
        name = f'{entities}from-{ends[0]}_to-{ends[1]}_mode-image_xfm.txt'
        return f'{self.folder}/{self.session.name}_{name}'

    def standard(self, space: str) -> str:
        """Label map in a standard space, without its ending."""
        return f'{self.folder}/{self.session.name}_space-{space}_desc-aseg_dseg'

    def standard_transform(self, space: str, *, inverse: bool = False) -> str:
        """Composite ITK transform between the reference scan and a standard space."""
        ends = (space, self.space) if inverse else (self.space, space)
        return self.record(f'from-{ends[0]}_to-{ends[1]}_mode-image_xfm.h5')

    @property
    def ledger(self) -> str:
        """The completion record, which appears last."""
        return self.record('desc-inputs_ledger.json')

    @property
    def report(self) -> str:
        """The page of the session."""
        return f'{self.session.name}.html'

    @property
    def figures(self) -> str:
        """Folder of the report's pictures."""
        return f'sub-{self.session.subject}/figures'


def ledger_path(session: SessionInputs, output: Path, /) -> Path:
    """The completion record of a session, whatever its reference."""
    return output / Names(session).ledger


def like_reference(
    data: np.ndarray, reference: nib.Nifti1Image, /, *, dtype: type
) -> nib.Nifti1Image:
    """An image with the exact grid header of another: shape, affine, forms, codes, zooms, units.

    Parameters
    ----------
    data : (X, Y, Z) or (X, Y, Z, C)
    """
    header = reference.header.copy()
    header.set_data_dtype(dtype)
    header.set_slope_inter(1, 0)
    header['cal_min'] = header['cal_max'] = 0
    header['descrip'] = f'babyseg {__version__}'.encode()
    zooms = header.get_zooms()[:3]
    image = nib.Nifti1Image(data.astype(dtype, copy=False), None, header)
    image.header.set_zooms((*zooms, 1.0)[: data.ndim])
    # Built without an affine, the image keeps the forms and codes of the header to the last bit.
    for form in ('sform', 'qform'):
        image.header[f'{form}_code'] = reference.header[f'{form}_code']
    image._affine = reference.affine
    return image


def coarse_uncertainty(uncertainty: np.ndarray, /) -> np.ndarray:
    """Uncertainty rounded to `UNCERTAINTY_STEP`, which files compress well."""
    steps = uncertainty / UNCERTAINTY_STEP
    np.round(steps, out=steps)
    steps *= np.float32(UNCERTAINTY_STEP)
    return steps


def sidecar(session: SessionInputs, what: str, **more: Any) -> dict[str, Any]:
    """JSON sidecar of an image derivative on the reference's grid."""
    uris = [f'bids:raw:{s.relative_path}' for s in session.scans]
    return {
        'Description': DESCRIPTIONS[what],
        'Sources': uris,
        'SpatialReference': uris[0],
        'SkullStripped': False,
        **more,
    }


def checksum(path: Path, /) -> str:
    """SHA-256 of a file."""
    with path.open('rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def input_record(scan: Scan, /) -> dict[str, Any]:
    """What identifies an input file later: size and time for a quick look, SHA-256 for proof."""
    path = Path(scan.path)
    status = path.stat()
    return {
        'path': scan.relative_path,
        'bytes': status.st_size,
        'mtime_ns': status.st_mtime_ns,
        'sha256': checksum(path),
    }


def _unchanged(scan: Scan, record: Mapping[str, Any]) -> bool:
    path = Path(scan.path)
    status = path.stat()
    if (status.st_size, status.st_mtime_ns) == (record.get('bytes'), record.get('mtime_ns')):
        return True
    return checksum(path) == record.get('sha256')


def is_done(session: SessionInputs, output: Path, settings: Settings, /) -> bool:
    """Whether a session has all its outputs, made with these settings from these inputs."""
    try:
        ledger = json.loads(ledger_path(session, output).read_text('utf-8'))
        inputs = {r['path']: r for r in ledger['inputs']}
        outputs: Sequence[str] = ledger['outputs']
        same = (
            ledger['settings'] == settings.fingerprint()
            and ledger['age'] == asdict(session.age)
            and list(inputs) == [s.relative_path for s in session.scans]
            and all(_unchanged(s, inputs[s.relative_path]) for s in session.scans)
        )
    except (OSError, ValueError, KeyError, TypeError):
        # No ledger, or one of another program or version: the session is done again.
        return False
    if settings.report and not any(name.endswith('.html') for name in outputs):
        return False
    complete = same and all((output / name).is_file() for name in outputs)
    return complete and not _can_be_completed(session, ledger, settings)


def _can_be_completed(
    session: SessionInputs, ledger: Mapping[str, Any], settings: Settings
) -> bool:
    """Whether a template that was missing when the session was done is there by now."""
    missing = [r['asked'] for r in ledger.get('spaces', ()) if r['missing']]
    if not missing:
        return False
    from babyseg_bids.spaces import choose_space
    from babyseg_bids.templates import is_on_disk, template_root

    root = template_root(settings.work_root)
    spaces = [choose_space(text, session.age)[0] for text in missing]
    return any(s is not None and is_on_disk(s, root) for s in spaces)


def dseg_table(*, official: bool = False) -> str:
    """The content of desc-aseg_dseg.tsv; with the official network's labels when it was used."""
    lines = ['index\tname\tabbreviation\tcolor\tmapping\themisphere']
    indices = [r.index for r in label_table().rows]
    if official:
        indices += [i for i in OFFICIAL if i not in indices]
    for row in table_of(indices).rows:
        mapping = BIDS_LABELS[row.tissue]
        lines.append(
            f'{row.index}\t{row.name}\t{row.abbreviation}\t{row.color}\t{mapping}\t'
            f'{row.hemisphere}'
        )
    return '\n'.join(lines) + '\n'


def generated_by(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The entry `GeneratedBy` of this program, with the container that it runs in, if any.

    Apptainer says in the environment which file it runs; the docker image has its name in
    `BABYSEG_IMAGE`.
    """
    record: dict[str, Any] = {'Name': 'babyseg', 'Version': __version__}
    sif = environ.get('APPTAINER_CONTAINER') or environ.get('SINGULARITY_CONTAINER')
    image = environ.get('BABYSEG_IMAGE')
    if sif:
        record['Container'] = {'Type': 'apptainer', 'Tag': image or Path(sif).name}
    elif image:
        record['Container'] = {'Type': 'docker', 'Tag': image}
    return record


def source_dataset(bids_dir: Path, /) -> dict[str, str]:
    """The entry `SourceDatasets` of the raw dataset: its place, and its DOI if it has one."""
    source = {'URL': bids_dir.resolve().as_uri()}
    doi = read_json(bids_dir / 'dataset_description.json').content.get('DatasetDOI')
    return {**source, 'DOI': doi} if isinstance(doi, str) and doi else source


def _text_of(path: Path) -> bytes | None:
    """A file as it is; None where it is absent or unreadable, which discovery has told."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def write_dataset_files(settings: Settings, methods: str, /) -> None:
    """Write the files that describe the output folder as a BIDS derivative dataset.

    Each is replaced at once, since many jobs may share one output folder.

    Raises
    ------
    OutputError
        When the folder cannot be written.
    """
    from babyseg_bids.citation import bibliography

    description = {
        'Name': 'babyseg: segmentation of infant brain MRI',
        'BIDSVersion': BIDS_VERSION,
        'DatasetType': 'derivative',
        'GeneratedBy': [generated_by()],
        'SourceDatasets': [source_dataset(settings.bids_dir)],
        'DatasetLinks': {
            'raw': settings.bids_dir.resolve().as_uri(),
            'templateflow': 'https://github.com/templateflow/templateflow',
        },
    }
    descriptions = ''.join(f'desc-{k}\t{v}\n' for k, v in DESCRIPTIONS.items())
    # The group level joins them to the volumes, when the dataset itself may be gone.
    kept = {
        f'logs/{name}': text
        for name in ('participants.tsv', 'participants.json')
        if (text := _text_of(settings.bids_dir / name)) is not None
    }
    files = {
        **kept,
        'dataset_description.json': json.dumps(description, indent=2) + '\n',
        '.bidsignore': '\n'.join(IGNORED) + '\n',
        'README.md': README.format(version=__version__),
        'descriptions.tsv': f'desc_id\tdescription\n{descriptions}',
        'desc-aseg_dseg.tsv': dseg_table(official=is_official(settings.model)),
        'desc-aseg_dseg.json': json.dumps(DSEG_COLUMNS, indent=2) + '\n',
        'logs/CITATION.md': methods,
        'logs/CITATION.bib': bibliography(methods),
    }
    for name, content in files.items():
        path = settings.output_dir / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)
        except OSError as e:
            raise OutputError(
                f'{path} cannot be written ({e.strerror}); free space there or choose another '
                'output folder.'
            ) from e
