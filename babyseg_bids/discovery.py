"""Find the sessions of a dataset, their scans and their ages.

The files are listed with PyBIDS (`discovery_index`), judged by their names (`discovery_names`), by
filters (`discovery_filters`) and by their content (`preflight`); `discovery_choice` holds the
rules by which scans and the reference are chosen.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
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
from babyseg_bids.records import Age, Flag, LedgerRow, SessionInputs
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
    return Search(
        bids_dir,
        participants=participants,
        sessions=sessions,
        contrasts=contrasts,
        filters=filters,
        reference=reference,
        ages=ages,
        database_dir=database_dir,
        task=task,
    ).inspect(check_images=check_images)


class Search:
    """A dataset whose files are listed; its images are read for those sessions that are asked for.

    Reading the images of thousands of sessions takes hours: the first ones can be segmented long
    before the last ones are read.

    Parameters
    ----------
    bids_dir : Path
        The dataset; the others are those of `find_sessions`, which says what is raised.

    Attributes
    ----------
    keys : tuple of (subject, session)
        What there is to inspect, in natural order. A requested participant without any image is
        there with the session None.
    """

    def __init__(
        self,
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
    ) -> None:
        self._bids_dir = bids_dir = Path(bids_dir).absolute()
        self._dataset_flags = _check_dataset(bids_dir)
        participants = _labels(participants, 'sub-')
        sessions = _labels(sessions, 'ses-')
        wanted_contrasts = _contrasts(contrasts)
        self._preferences = check_reference(reference)
        check_filters(filters)
        if groups := unknown_groups(filters):
            _log.info('Filters that concern no anatomical image: %s', ', '.join(groups))
        self._filters, self._ages = filters, ages
        self._found: dict[Key, list[Named]] = {}
        self._counts: dict[str, int] = {}
        self._copies = _Copies()
        self.keys: tuple[Key, ...] = ()

        subjects = participants
        if task is not None:
            subjects = _share(bids_dir, task, participants, sessions)
            if not subjects:
                return
            participants = tuple(p for p in participants if p in subjects)
        files = list_anat_files(bids_dir, subjects, database_dir=database_dir)
        grouped = _group(files, wanted_contrasts)
        self._found = {
            k: found for k, found in grouped.items() if not sessions or k[1] in sessions
        }
        # What one task does not find, another one may.
        if task is None:
            if not self._found:
                raise NoInputError(_nothing_found(bids_dir, participants, sessions, grouped))
            _warn_unmatched(bids_dir, sessions, self._found, ages)
        for subject, _ in grouped:
            self._counts[subject] = self._counts.get(subject, 0) + 1
        absent: list[Key] = [(p, None) for p in participants if p not in self._counts]
        self.keys = tuple(sorted([*self._found, *absent], key=_order))
        self._tables = DatasetTables(bids_dir)
        self._dataset_flags += self._tables.dataset_flags()

    def inspect(
        self, keys: Iterable[Key] | None = None, *, check_images: bool = True
    ) -> list[SessionInputs]:
        """Read the images of some sessions, of all when `keys` is None, and choose among them.

        A copy of an image is also found among the sessions that were inspected before, whose
        records stay as they were given.
        """
        result, checks = [], {}
        for subject, session in self.keys if keys is None else keys:
            found = self._found.get((subject, session))
            if found is None:
                result.append(_absent(subject))
                continue
            choice = _choose(
                found,
                self._bids_dir,
                self._filters,
                self._preferences,
                check_image if check_images else None,
            )
            images = [s.relative_path for s in choice.scans]
            images += [n.relative_path for n in found if n.relative_path not in images]
            age, age_flags = resolve_age(
                self._tables,
                subject,
                session,
                images,
                n_sessions=self._counts[subject],
                overrides=self._ages,
            )
            flags = (*choice.flags, *age_flags, *self._dataset_flags)
            scans, ledger = tuple(choice.scans), tuple(choice.ledger)
            result.append(SessionInputs(subject, session, scans, age, ledger, flags))
            checks.update(choice.checks)
        return self._copies.flag(result, checks)


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
    odd = sorted(n for n in names if re.match(r'(?i)sub[-_ ]?[a-z0-9]*[0-9]', n))
    odd = [n for n in odd if not n.startswith('sub-') and (bids_dir / n).is_dir()]
    if odd:
        message = (
            f'The dataset has folders that are not named sub-<label> and were not looked at: '
            f'{_some(odd)}. Rename those that are subjects.'
        )
        flags.append(Flag('folder-name', 'warning', message))
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


def _absent(label: str) -> SessionInputs:
    """A requested participant without any image in an anat folder, so that none is forgotten."""
    message = f'sub-{label} was asked for, but has no images in an anat folder.'
    return SessionInputs(label, None, (), Age(), flags=(Flag('no-images', 'severe', message),))


def _order(key: Key) -> tuple[object, ...]:
    return natural_key(key[0]), natural_key(key[1] or '')


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


class _Copies:
    """Finds images that are copies of one another, in one session or across sessions.

    One brain filed under two names spoils every study that it is part of. The same voxels are a
    copy; exactly the same skull-stripped outline in another session is one after some processing.
    """

    def __init__(self) -> None:
        # By attribute and its value: the session and the image that had it first.
        self._first: dict[tuple[str, str], tuple[Key, str]] = {}

    def flag(
        self, sessions: Sequence[SessionInputs], checks: Mapping[str, ImageCheck]
    ) -> list[SessionInputs]:
        """Add flags to sessions; to those of an earlier call none can be added any more."""
        added: dict[Key, list[Flag]] = {}
        copies: set[frozenset[str]] = set()
        scans = [
            ((s.subject, s.session), scan.relative_path) for s in sessions for scan in s.scans
        ]
        for attribute, code, text in _COPIES:
            for key, path in scans:
                value = getattr(checks.get(path), attribute, '')
                if not value:
                    continue
                other_key, other = self._first.setdefault((attribute, value), (key, path))
                pair = frozenset((path, other))
                same_session = other_key == key and attribute == 'outline'
                if other == path or same_session or pair in copies:
                    continue
                copies.add(pair)
                for k in {key, other_key}:
                    message = f'{other} and {path} {text}.'
                    added.setdefault(k, []).append(Flag(code, 'warning', message))
        return [
            replace(s, flags=(*s.flags, *added.get((s.subject, s.session), ()))) for s in sessions
        ]
