"""What people say about the sessions of a group: covariates, ratings, and what was to be there."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from babyseg_bids.files import natural_key
from babyseg_bids.records import VERDICTS_FILE, Flag
from babyseg_bids.reports.files import Derivative
from babyseg_bids.tables import is_missing, read_json, read_table

RATINGS = ('accept', 'review', 'exclude')
RATINGS_FILE = 'group_desc-babyseg_ratings.tsv'
KEPT_PARTICIPANTS = 'logs/participants.tsv'


@dataclass(frozen=True)
class Rating:
    """What a person decided about a session."""

    rating: str
    comment: str = ''


@dataclass(frozen=True)
class Covariates:
    """Columns of participants.tsv with their descriptions, and each participant's values.

    `rows` are by (participant, session), session None for a row of all sessions.
    """

    columns: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rows: Mapping[tuple[str, str | None], Mapping[str, str]] = field(default_factory=dict)
    participants: tuple[str, ...] = ()

    def of(self, record: Derivative, /) -> Mapping[str, str]:
        """The values of a session: its own row first, then that of the participant."""
        own = self.rows.get((record.subject, record.session))
        return own if own is not None else self.rows.get((record.subject, None), {})


@dataclass(frozen=True)
class Absent:
    """A session or participant without results, and why."""

    name: str
    state: str
    reason: str


def read_ratings(out_dir: Path, /) -> tuple[dict[str, Rating], list[Flag]]:
    """The ratings that the group page saved, by session, and what is wrong with the file.

    The last row of a session counts, so that the files of several people can be joined.
    """
    path = out_dir / RATINGS_FILE
    if not path.exists():
        return {}, []
    table = read_table(path)
    flags = [
        Flag('ratings-file', 'warning', f'{path.name}: {problem}.') for problem in table.problems
    ]
    if table.columns and not {'participant_id', 'rating'} <= set(table.columns):
        text = f'{path.name} has no columns participant_id and rating; its ratings are not used.'
        return {}, [*flags, Flag('ratings-file', 'warning', text)]
    ratings, odd = {}, []
    for row in table.rows:
        rating = row['rating'].lower()
        session = row.get('session_id')
        name = 'sub-' + row['participant_id'].removeprefix('sub-')
        if session is not None and not is_missing(session):
            name += '_ses-' + session.removeprefix('ses-')
        if rating in RATINGS:
            comment = row.get('comment', '')
            ratings[name] = Rating(rating, '' if is_missing(comment) else comment)
        elif is_missing(rating):
            ratings.pop(name, None)
        else:
            odd.append(f'{name} ({rating})')
    if odd:
        text = (
            f'{path.name} has ratings that are not {", ".join(RATINGS[:-1])} or {RATINGS[-1]}: '
            f'{", ".join(odd[:5])}. They are not used.'
        )
        flags.append(Flag('ratings-file', 'warning', text))
    return ratings, flags


def read_covariates(out_dir: Path, bids_dir: Path | None, reserved: Sequence[str]) -> Covariates:
    """The participants' table that the participant level kept, or else the dataset's own.

    Parameters
    ----------
    reserved : columns of the group table; a covariate of the same name gets `participants_` before
        it.
    """
    places = [out_dir / KEPT_PARTICIPANTS]
    places += [bids_dir / 'participants.tsv'] if bids_dir else []
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        return Covariates()
    table = read_table(path)
    if 'participant_id' not in table.columns:
        return Covariates()
    about = read_json(path.with_suffix('.json')).content
    keys = ('participant_id', 'session_id')
    names = {
        c: f'participants_{c}' if c in reserved else c
        for c in table.columns
        if c and c not in keys
    }
    columns = {}
    for old, new in names.items():
        given = about.get(old)
        known = dict(given) if isinstance(given, dict) else {}
        columns[new] = {'Description': f'{old} in participants.tsv', **known}
    rows: dict[tuple[str, str | None], dict[str, str]] = {}
    for row in table.rows:
        subject = row['participant_id'].removeprefix('sub-')
        session = row.get('session_id', '')
        key = (subject, None if is_missing(session) else session.removeprefix('ses-'))
        values = {new: row[old] for old, new in names.items() if not is_missing(row[old])}
        rows.setdefault(key, values)
    people = tuple(dict.fromkeys(subject for subject, _ in rows if subject))
    return Covariates(columns, rows, people)


def _verdicts(folder: Path) -> dict[str, tuple[str, str]]:
    """What the last run that failed said of each session of a subject: (fate, reason)."""
    found: dict[str, tuple[str, str]] = {}
    # Names of runs begin with their time.
    for path in sorted(folder.glob(f'log/*/{VERDICTS_FILE}')):
        try:
            content = json.loads(path.read_text('utf-8'))
            found |= {str(v['name']): (str(v['fate']), str(v['reason'])) for v in content}
        except (OSError, ValueError, KeyError, TypeError) as error:
            found[folder.name] = ('unknown', f'{path.name} cannot be read ({error})')
    return found


def absent_sessions(
    out_dir: Path, records: Sequence[Derivative], covariates: Covariates
) -> list[Absent]:
    """Sessions that failed or are incomplete, and participants of whom there is nothing."""
    complete = {r.name for r in records if not r.problem}
    seen = {r.subject for r in records}
    absent = {
        r.name: Absent(r.name, 'incomplete', f'{r.problem}. Run the participant level again.')
        for r in records
        if r.problem
    }
    for folder in out_dir.glob('sub-*'):
        if not folder.is_dir():
            continue
        for name, (fate, reason) in _verdicts(folder).items():
            if name not in complete:
                absent[name] = Absent(name, fate, reason)
                seen.add(re.sub('_ses-.*', '', name).removeprefix('sub-'))
    for subject in covariates.participants:
        if subject not in seen:
            text = 'Listed in participants.tsv, without any results: run the participant level.'
            absent[f'sub-{subject}'] = Absent(f'sub-{subject}', 'missing', text)
    return sorted(absent.values(), key=lambda a: natural_key(a.name))
