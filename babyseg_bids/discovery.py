"""Find the sessions of a dataset, their scans and their ages.

The files are listed with PyBIDS (`discovery_index`), judged by their names (`discovery_names`), by
filters (`discovery_filters`) and by their content (`preflight`); `discovery_choice` holds the
rules by which scans and the reference are chosen.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from babyseg_bids.age import AgeOverrides, DatasetTables, resolve_age
from babyseg_bids.discovery_choice import Check, Choice, check_reference, choose_scans
from babyseg_bids.discovery_filters import check_filters, filter_reason, unknown_groups
from babyseg_bids.discovery_index import list_anat_files
from babyseg_bids.discovery_names import KNOWN_CONTRASTS, Named, classify
from babyseg_bids.errors import NoInputError, UsageError
from babyseg_bids.files import file_problem, natural_key
from babyseg_bids.preflight import ImageCheck, check_image
from babyseg_bids.records import Age, Flag, LedgerRow, Scan, SessionInputs
from babyseg_bids.shares import ArrayTask, count_sessions, share
from babyseg_bids.tables import read_json

_log = logging.getLogger(__name__)

Key = tuple[str, str | None]

# Attribute of `ImageCheck` that two images share, code of the flag, what it means.
_COPIES = (
    ('digest', 'image-copy', 'hold exactly the same voxels: one is a copy of the other'),
    (
        'outline',
        'image-same-outline',
        'fill exactly the same voxels: they are probably one brain, or were cut out with one mask',
    ),
)


class LedgerLine(NamedTuple):
    """One line of the table that `--dry-run` prints."""

    session: str
    image: str
    contrast: str
    status: str
    reason: str


def find_sessions(
    bids_dir: Path,
    *,
    participants: Sequence[str] = (),
    sessions: Sequence[str] = (),
    contrasts: Sequence[str] = (),
    filters: Mapping[str, Any] | None = None,
    reference: str | None = None,
    ages: AgeOverrides | None = None,
    database_dir: Path | None = None,
    task: ArrayTask | None = None,
    check_images: bool = True,
) -> list[SessionInputs]:
    """Find what there is to segment.

    Parameters
    ----------
    bids_dir : Path
        The dataset.
    participants, sessions : sequence of str
        Labels with or without `sub-` and `ses-`; empty for all.
    contrasts : sequence of str
        Suffixes to use (`T1w`); empty for all but `inplaneT1` and `inplaneT2`.
    filters : mapping, optional
        Content of a filter file, see `discovery_filters`.
    reference : str, optional
        Preferred reference: a suffix, with entities before it if needed, or several with commas.
    ages : AgeOverrides, optional
        What `parse_age_option` made of `--age-months`.
    database_dir : Path, optional
        PyBIDS index to use or to create.
    task : ArrayTask, optional
        Only the share of this task of a job array; no other subject is looked at.
    check_images : bool
        Read every candidate. Without it names alone decide, which is quick and may accept images
        that cannot be read.

    Returns
    -------
    list of SessionInputs
        In natural order. A session without any usable image is there too, with `scans=()`, and so
        is a requested participant who has none, with a flag `no-images`. The share of a task may
        be empty.

    Raises
    ------
    UsageError
        The folder is no dataset, or an argument cannot be understood.
    NoInputError
        Nothing matches; says what was looked for and what exists.
    """
    bids_dir = Path(bids_dir).absolute()
    dataset_flags = _check_dataset(bids_dir)
    participants = _labels(participants, 'sub-')
    sessions = _labels(sessions, 'ses-')
    wanted_contrasts = _contrasts(contrasts)
    preferences = check_reference(reference)
    check_filters(filters)
    if groups := unknown_groups(filters):
        _log.info('Filters that concern no anatomical image: %s', ', '.join(groups))

    subjects = participants
    if task is not None:
        subjects = _share(bids_dir, task, participants, sessions)
        if not subjects:
            return []
        participants = tuple(p for p in participants if p in subjects)
    files = list_anat_files(bids_dir, subjects, database_dir=database_dir)
    grouped = _group(files, wanted_contrasts)
    chosen = {key: found for key, found in grouped.items() if not sessions or key[1] in sessions}
    # What one task does not find, another one may.
    if task is None:
        if not chosen:
            raise NoInputError(_nothing_found(bids_dir, participants, sessions, grouped))
        _warn_unmatched(bids_dir, sessions, chosen, ages)

    tables = DatasetTables(bids_dir)
    dataset_flags += tables.dataset_flags()
    counts: dict[str, int] = {}
    for subject, _ in grouped:
        counts[subject] = counts.get(subject, 0) + 1
    result, checks = [], {}
    for (subject, session), found in chosen.items():
        choice = _choose(
            found, bids_dir, filters, preferences, check_image if check_images else None
        )
        images = [s.relative_path for s in choice.scans]
        images += [n.relative_path for n in found if n.relative_path not in images]
        age, age_flags = resolve_age(
            tables, subject, session, images, n_sessions=counts[subject], overrides=ages
        )
        flags = (*choice.flags, *age_flags, *dataset_flags)
        result.append(
            SessionInputs(subject, session, tuple(choice.scans), age, tuple(choice.ledger), flags)
        )
        checks.update(choice.checks)
    result += _absent(participants, grouped)
    return _flag_copies(sorted(result, key=_order), checks)


def ledger_rows(sessions: Iterable[SessionInputs], /) -> list[LedgerLine]:
    """All ledgers as rows for a table; a session without any image has one row that says so."""
    lines = []
    for inputs in sessions:
        for row in inputs.ledger:
            lines.append(
                LedgerLine(inputs.name, row.relative_path, row.suffix, row.status, row.reason)
            )
        if not inputs.ledger:
            lines.append(LedgerLine(inputs.name, '', '', 'rejected', 'no anatomical images'))
    return lines


def describe_age(age: Age, /) -> str:
    """An age in a few words: `6 months`, `25 gestational weeks`, `unknown`."""
    parts = []
    if age.months is not None:
        parts.append(f'{age.months:.4g} month{"" if age.months == 1 else "s"}')
    if age.gestational_weeks is not None:
        parts.append(f'{age.gestational_weeks:.4g} gestational weeks')
    return ', '.join(parts) or 'unknown'


def _check_dataset(bids_dir: Path) -> list[Flag]:
    """Refuse what is no dataset; flags about the dataset as a whole."""
    if not bids_dir.exists():
        raise UsageError(
            f'The dataset folder {bids_dir} does not exist. Check the path; inside a container, '
            'check that the folder is mounted.'
        )
    if not bids_dir.is_dir():
        raise UsageError(f'{bids_dir} is a file. Give the root folder of the BIDS dataset.')
    try:
        names = [p.name for p in bids_dir.iterdir()]
    except OSError as e:
        raise UsageError(
            f'The dataset folder {bids_dir} cannot be read ({e.strerror}). Check its permissions.'
        ) from e
    if not names:
        raise NoInputError(f'{bids_dir} is empty. Give the root folder of the BIDS dataset.')
    if 'dataset_description.json' not in names and not any(n.startswith('sub-') for n in names):
        raise UsageError(
            f'{bids_dir} is no BIDS dataset: it has neither a dataset_description.json nor any '
            'sub-* folder. Give the folder that holds them.'
        )
    flags = []
    description = read_json(bids_dir / 'dataset_description.json')
    problem = description.problem
    if 'dataset_description.json' not in names:
        problem = 'it is missing, so this may not be the root of a dataset'
    if problem:
        message = f'dataset_description.json: {problem}.'
        flags.append(Flag('dataset-description', 'info', message))
    elif description.content.get('DatasetType') == 'derivative':
        message = 'The dataset says that it is a derivative; babyseg is made for raw scans.'
        flags.append(Flag('dataset-derivative', 'warning', message))
    for name in sorted(n for n in names if n.upper() in ('README', 'README.MD', 'README.TXT')):
        if problem := file_problem(bids_dir / name):
            flags.append(Flag('dataset-readme', 'info', f'{name}: {problem}.'))
    return flags


def _share(
    bids_dir: Path, task: ArrayTask, participants: Sequence[str], sessions: Sequence[str]
) -> tuple[str, ...]:
    """The subjects of one task; refuses a dataset in which no task would find anything."""
    counts = count_sessions(bids_dir, participants, sessions)
    if not any(counts.values()):
        raise NoInputError(_nothing_found(bids_dir, participants, sessions, {}))
    return share(counts, task)


def _labels(labels: Sequence[str], prefix: str) -> tuple[str, ...]:
    """Bare labels, each once; one string counts as one label."""
    if isinstance(labels, str):
        labels = [labels]
    return tuple(dict.fromkeys(label.strip().removeprefix(prefix) for label in labels))


def _contrasts(contrasts: Sequence[str]) -> tuple[str, ...]:
    """Contrasts as BIDS spells them."""
    known = {c.lower(): c for c in KNOWN_CONTRASTS}
    result = []
    for name in [contrasts] if isinstance(contrasts, str) else contrasts:
        if name.lower() not in known:
            raise UsageError(
                f"--contrasts: '{name}' is no contrast that babyseg uses. Known: "
                f'{", ".join(KNOWN_CONTRASTS)}.'
            )
        result.append(known[name.lower()])
    return tuple(dict.fromkeys(result))


def _group(files: Iterable[str], contrasts: tuple[str, ...]) -> dict[Key, list[Named]]:
    """Images by subject and session of their folder."""
    grouped: dict[Key, list[Named]] = {}
    for file in files:
        named = classify(file, contrasts=contrasts)
        if named is not None:
            grouped.setdefault((named.subject, named.session), []).append(named)
    return grouped


def _choose(
    found: Sequence[Named],
    bids_dir: Path,
    filters: Mapping[str, Any] | None,
    preferences: Sequence[str],
    check: Check | None,
) -> Choice:
    """Scans, ledger and flags of one session."""
    candidates, rejected, flags = [], [], []
    for named in sorted(found, key=lambda n: natural_key(n.relative_path)):
        reason = named.rejection or filter_reason(named, filters)
        if not reason:
            candidates.append(named)
            continue
        rejected.append(LedgerRow(named.relative_path, named.suffix, 'rejected', reason))
        if named.serious:
            message = f'{named.relative_path} was left out: {reason}.'
            flags.append(Flag('image-name', 'warning', message))
    choice = choose_scans(candidates, bids_dir, check=check, preferences=preferences)
    choice.ledger += rejected
    choice.flags += flags
    if not choice.scans:
        message = 'No image of this session can be used; the ledger says why for each.'
        choice.flags.append(Flag('no-images', 'severe', message))
    return choice


def _absent(participants: Sequence[str], grouped: Mapping[Key, object]) -> Iterator[SessionInputs]:
    """Requested participants without any image in an anat folder, so that none is forgotten."""
    there = {subject for subject, _ in grouped}
    for label in participants:
        if label not in there:
            message = f'sub-{label} was asked for, but has no images in an anat folder.'
            yield SessionInputs(
                label, None, (), Age(), flags=(Flag('no-images', 'severe', message),)
            )


def _order(inputs: SessionInputs) -> tuple[object, ...]:
    return natural_key(inputs.subject), natural_key(inputs.session or '')


def _warn_unmatched(
    bids_dir: Path,
    sessions: Sequence[str],
    chosen: Mapping[Key, object],
    ages: AgeOverrides | None,
) -> None:
    """Tell the log of labels that match nothing while others do."""
    for label in sessions:
        if label not in {session for _, session in chosen}:
            _log.warning('No requested subject has images in a session ses-%s.', label)
    if ages is not None:
        named = [s for s in ages.unknown_subjects([]) if not (bids_dir / f'sub-{s}').is_dir()]
        if named:
            _log.warning('--age-months names sub-%s, which is not in the dataset.', named[0])


def _nothing_found(
    bids_dir: Path,
    participants: Sequence[str],
    sessions: Sequence[str],
    grouped: Mapping[Key, object],
) -> str:
    """What was looked for and what exists."""
    wanted = [f'sub-{p}' for p in participants[:5]] + [f'ses-{s}' for s in sessions[:5]]
    sought = 'for ' + ' '.join(wanted) if wanted else 'in any anat folder'
    subjects = sorted(
        (p.name for p in bids_dir.iterdir() if p.name.startswith('sub-')), key=natural_key
    )
    text = f'No anatomical image was found {sought} in {bids_dir}. '
    missing = [p for p in participants if f'sub-{p}' not in subjects]
    if not subjects:
        return text + 'It has no sub-* folder; check the path.'
    if missing:
        return text + f'It has these subjects: {_some(subjects)}.'
    if grouped:
        there = sorted({f'ses-{s}' if s else 'none' for _, s in grouped}, key=natural_key)
        return text + f'There are images in these sessions: {_some(there)}.'
    return text + (
        'Images are expected in sub-<label>/[ses-<label>/]anat/ with names such as '
        'sub-01_T1w.nii.gz.'
    )


def _some(items: Sequence[str], limit: int = 8) -> str:
    more = f' and {len(items) - limit} more' if len(items) > limit else ''
    return ', '.join(items[:limit]) + more


def _flag_copies(
    sessions: list[SessionInputs], checks: Mapping[str, ImageCheck]
) -> list[SessionInputs]:
    """Flag images that are copies of one another, in one session or across sessions.

    One brain filed under two names spoils every study that it is part of. The same voxels are a
    copy; exactly the same skull-stripped outline in another session is one after some processing.
    """
    scans = [(i, s) for i, inputs in enumerate(sessions) for s in inputs.scans]
    added: dict[int, list[Flag]] = {}
    copies: set[frozenset[str]] = set()
    for attribute, code, text in _COPIES:
        first: dict[str, tuple[int, Scan]] = {}
        for index, scan in scans:
            value = getattr(checks.get(scan.relative_path), attribute, '')
            if not value:
                continue
            other_index, other = first.setdefault(value, (index, scan))
            pair = frozenset((scan.relative_path, other.relative_path))
            same_session = other_index == index and attribute == 'outline'
            if other is scan or same_session or pair in copies:
                continue
            copies.add(pair)
            message = f'{other.relative_path} and {scan.relative_path} {text}.'
            for i in {index, other_index}:
                added.setdefault(i, []).append(Flag(code, 'warning', message))
    return [
        replace(s, flags=(*s.flags, *added[i])) if i in added else s
        for i, s in enumerate(sessions)
    ]
