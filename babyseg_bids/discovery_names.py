"""Tell from a file's name whether it can be an anatomical image of a session, and why not."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import PurePosixPath

# In order of preference for the reference.
CONTRASTS = ('T1w', 'T2w', 'UNIT1', 'FLAIR', 'PDw', 'T2starw')
# Acquired in the plane of another scan, mostly thick and few slices: only when asked for.
ON_REQUEST = ('inplaneT1', 'inplaneT2')
KNOWN_CONTRASTS = CONTRASTS + ON_REQUEST

IMAGE_EXTENSIONS = ('.nii.gz', '.nii')
_FOREIGN_EXTENSIONS = ('.mgz', '.mgh', '.img', '.hdr', '.dcm', '.nrrd', '.mha', '.mhd', '.mnc')

_RAW_ENTITIES = frozenset({
    'task', 'acq', 'ce', 'trc', 'stain', 'rec', 'dir', 'run', 'mod', 'echo', 'flip', 'inv', 'mt',
    'part', 'proc', 'hemi', 'nuc', 'voi', 'sample', 'chunk', 'tracksys', 'recording', 'split',
})  # fmt: skip
_DERIVED_ENTITIES = frozenset({
    'space', 'desc', 'label', 'res', 'den', 'seg', 'atlas', 'from', 'to', 'mode', 'cohort',
})  # fmt: skip
_QUANTITATIVE = frozenset({
    'T1map', 'T2map', 'T2starmap', 'R1map', 'R2map', 'R2starmap', 'PDmap', 'MTRmap', 'MTsat',
    'MTVmap', 'MWFmap', 'T1rho', 'UNIMAP', 'Chimap', 'S0map', 'M0map', 'RB1map', 'TB1map',
})  # fmt: skip
_SERIES = frozenset({
    'MP2RAGE', 'MEGRE', 'MESE', 'VFA', 'IRT1', 'MPM', 'MTS', 'MTR', 'PDT2',
})  # fmt: skip
_NO_IMAGE = frozenset({
    'defacemask', 'mask', 'dseg', 'probseg',
})  # fmt: skip
_OLD = {'PD': 'PDw or PDmap', 'T2star': 'T2starw or T2starmap', 'FLASH': 'T1w, PDw or T2starw'}
_ALIASES = {
    't1': 'T1w', 't2': 'T2w', 'mprage': 'T1w', 'mp2rage': 'UNIT1', 'space': 'T2w', 'tse': 'T2w',
    'pd': 'PDw', 't2star': 'T2starw', 't2flair': 'FLAIR', 'uni': 'UNIT1',
}  # fmt: skip


@dataclass(frozen=True)
class Named:
    """A file in or near an `anat` folder, judged by its path alone.

    `rejection` is the reason why it is no candidate, '' for a candidate. `serious` marks a name
    that cannot be right, as opposed to an image that is simply of another kind.
    """

    relative_path: str
    subject: str
    session: str | None
    suffix: str = ''
    entities: dict[str, str] = field(default_factory=dict)
    rejection: str = ''
    serious: bool = False

    @property
    def identity(self) -> tuple[str, ...]:
        """What two files of one image have in common: entities (runs as numbers) and suffix."""
        entities = [
            f'{k}-{v.lstrip("0") or "0" if v.isdecimal() else v}' for k, v in self.entities.items()
        ]
        return (*sorted(entities), self.suffix)


def looks_like_image(name: str, /) -> bool:
    """Whether a file is an image by its extension, also one that BIDS does not allow."""
    lower = name.lower()
    return not name.startswith('.') and ('.nii' in lower or lower.endswith(_FOREIGN_EXTENSIONS))


def classify(relative_path: str, /, *, contrasts: Collection[str] = ()) -> Named | None:
    """Judge one file by its path.

    Parameters
    ----------
    relative_path : str
        Relative to the dataset, with `/`: `sub-01/ses-A/anat/sub-01_ses-A_T1w.nii.gz`.
    contrasts : collection of str
        Suffixes to use; empty for `CONTRASTS`.

    Returns
    -------
    Named or None
        None for a file that is no image (JSON, tables).
    """
    path = PurePosixPath(relative_path)
    if not looks_like_image(path.name):
        return None
    subject, session = _labels(path.parts)
    named = Named(relative_path, subject, session)
    extension = next((e for e in IMAGE_EXTENSIONS if path.name.endswith(e)), None)
    stem = path.name.removesuffix(extension) if extension else path.name.partition('.')[0]
    entities, suffix, problem = _parse(stem)
    if not all(re.fullmatch(r'[A-Za-z0-9+]+', x) for x in (subject, session) if x is not None):
        folder = path.parent.as_posix().removesuffix('/anat')
        problem = f"the labels of its folder '{folder}' are not letters and digits only"
    elif extension is None:
        ending = path.name[len(stem) :]
        problem = f"its name ends in '{ending}': only .nii and .nii.gz are read, in lower case"
    if not problem:
        problem = _folder_problem(path, subject, session, entities)
    entities = {k: v for k, v in entities.items() if k not in ('sub', 'ses')}
    named = Named(relative_path, subject, session, suffix, entities)
    if problem:
        return _reject(named, problem, serious=True)
    return _judge(named, contrasts or CONTRASTS, asked=bool(contrasts))


def _labels(parts: tuple[str, ...]) -> tuple[str, str | None]:
    """Subject and session of the folders."""
    subject = parts[0].removeprefix('sub-')
    session = parts[1] if len(parts) > 2 and parts[1].startswith('ses-') else None
    return subject, session.removeprefix('ses-') if session else None


def _parse(stem: str) -> tuple[dict[str, str], str, str]:
    """Entities, suffix and what is wrong with a file name without its extension."""
    *pairs, suffix = stem.split('_')
    entities: dict[str, str] = {}
    if '-' in suffix or not suffix.isalnum():
        return entities, suffix, f"its name has no suffix such as '_T1w' at its end ('{suffix}')"
    for pair in pairs:
        match = re.fullmatch(r'([A-Za-z0-9]+)-([A-Za-z0-9+]+)', pair)
        if not match:
            return entities, suffix, f"'{pair}' in its name is not of the form key-label"
        if match[1] in entities:
            return entities, suffix, f"its name has two entities '{match[1]}'"
        entities[match[1]] = match[2]
    return entities, suffix, ''


def _folder_problem(
    path: PurePosixPath, subject: str, session: str | None, entities: dict[str, str]
) -> str:
    """Whether a file lies where its name says."""
    folder = [f'sub-{subject}', *([f'ses-{session}'] if session is not None else [])]
    if entities.get('sub') != subject:
        return f"its name does not start with its folder's subject, sub-{subject}"
    if entities.get('ses') != session:
        if session is None:
            return f'its name says ses-{entities["ses"]}, but it lies in no session folder'
        return f'its name does not name the session of its folder, ses-{session}'
    if [*path.parts[:-1]] != [*folder, 'anat']:
        return 'it lies outside of the anat folder: move it there'
    return ''


def _judge(named: Named, contrasts: Collection[str], *, asked: bool) -> Named:
    """Reject what is no plain image of a wanted contrast."""
    entities, suffix = named.entities, named.suffix
    derived = sorted(set(entities) & _DERIVED_ENTITIES)
    unknown = sorted(set(entities) - _RAW_ENTITIES - _DERIVED_ENTITIES)
    if derived:
        return _reject(named, f'{derived[0]}-{entities[derived[0]]}: derived, not a raw scan')
    if unknown:
        return _reject(named, f"BIDS knows no entity '{unknown[0]}' for a scan", serious=True)
    if suffix not in KNOWN_CONTRASTS:
        return _other_suffix(named)
    if 'inv' in entities:
        return _reject(named, f'inv-{entities["inv"]}: an inversion image, part of another one')
    part = entities.get('part', 'mag')
    if part != 'mag':
        return _reject(named, f'part-{part}: the {part} part of an image, without anatomy')
    if suffix not in contrasts:
        if suffix in ON_REQUEST and not asked:
            return _reject(named, f'{suffix} is used only when asked for with --contrasts')
        return _reject(named, f'{suffix} is not among the --contrasts asked for')
    return named


def _other_suffix(named: Named) -> Named:
    """Reasons for suffixes that are not anatomical contrasts."""
    suffix = named.suffix
    if suffix in _QUANTITATIVE:
        return _reject(named, f'{suffix} is a quantitative map, not a weighted image')
    if suffix in _SERIES:
        return _reject(named, f'{suffix} is one of a series that a weighted image is made from')
    if suffix in _NO_IMAGE:
        return _reject(named, f'{suffix} is a mask or a label map, not a scan')
    if suffix in _OLD:
        return _reject(
            named, f'{suffix} is ambiguous and no longer BIDS: rename to {_OLD[suffix]}'
        )
    meant = {c.lower(): c for c in KNOWN_CONTRASTS}.get(suffix.lower())
    meant = meant or _ALIASES.get(suffix.lower())
    if meant:
        return _reject(named, f"'{suffix}' is not a suffix of BIDS: {meant}?", serious=True)
    return _reject(named, f"'{suffix}' is not an anatomical contrast that babyseg uses")


def _reject(named: Named, reason: str, *, serious: bool = False) -> Named:
    return Named(
        named.relative_path,
        named.subject,
        named.session,
        named.suffix,
        named.entities,
        reason,
        serious,
    )
