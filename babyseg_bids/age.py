"""Find the age at scan of a session in a dataset's tables, and flag what contradicts it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from babyseg_bids.age_cells import AgeReading
from babyseg_bids.age_option import AgeOverride, AgeOverrides, parse_age_option
from babyseg_bids.age_tables import DatasetTables, Row, read_row
from babyseg_bids.age_values import Span, parse_amount, to_span
from babyseg_bids.records import Age, Flag
from babyseg_bids.tables import is_missing, read_json

__all__ = ['AgeOverride', 'AgeOverrides', 'DatasetTables', 'parse_age_option', 'resolve_age']

# The network saw brains from birth to the end of the fifth year.
OLDEST_MONTHS = 72
TERM_WEEKS = 37
# Pregnancies after which a child is scanned alive, in weeks: bounds for an age counted twice.
PREGNANCY_WEEKS = (20, 45)
WEEKS_PER_MONTH = 365.25 / 12 / 7


@dataclass(frozen=True)
class _Found:
    """What was found: readings that may be used, best first, and others that only compare."""

    readings: tuple[AgeReading, ...]
    flags: tuple[Flag, ...]


def resolve_age(
    tables: DatasetTables,
    subject: str,
    session: str | None,
    images: Sequence[str],
    *,
    n_sessions: int = 1,
    overrides: AgeOverrides | None = None,
) -> tuple[Age, tuple[Flag, ...]]:
    """The age of one session, and all that is odd about how the dataset states it.

    Sources, best first: `--age-months`, the rows of the session's images in scans.tsv (the
    reference's first), sessions.tsv, participants.tsv, a scans.tsv at a place where BIDS does not
    look, a field `Age` in an image's JSON file. The first that gives an age is taken; every other
    one is compared with it.

    A row that names another subject's image is never used. One row of participants.tsv is not used
    for several sessions of a subject either: babies grow.

    Parameters
    ----------
    tables : DatasetTables
        The dataset's tables.
    subject, session : str
        Bare labels; the session is None where there are none.
    images : sequence of str
        The session's images, relative to the dataset, the reference first.
    n_sessions : int
        How many sessions with anatomical images the subject has.
    overrides : AgeOverrides, optional
        What was given to `--age-months`.

    Returns
    -------
    Age, tuple of Flag
        Never raises for what stands in a table.
    """
    given = overrides.find(subject, session) if overrides else None
    found = _search(tables, subject, session, images, n_sessions)
    flags = list(found.flags)
    if given is not None:
        flags += _against_option(given, found.readings)
        return given, tuple(_unique(flags + _range_flags(given)))
    if not found.readings:
        label = f'sub-{subject}' + (f'_ses-{session}' if session else '')
        message = (
            'No age was found for this session in its scans.tsv, sessions.tsv or '
            f'participants.tsv. Segmentation does not need one; give --age-months {label}=VALUE '
            'for the comparisons that do.'
        )
        return Age(), tuple(_unique([*flags, Flag('age-unknown', 'info', message)]))
    age, contradictions = _combine(found.readings)
    return age, tuple(_unique(flags + contradictions + _range_flags(age)))


def _search(
    tables: DatasetTables,
    subject: str,
    session: str | None,
    images: Sequence[str],
    n_sessions: int,
) -> _Found:
    """Read every source in order."""
    rows: list[Row] = []
    flags: list[Flag] = []
    for more, new in (
        tables.scans_rows(subject, session, images),
        tables.session_rows(subject, session),
        tables.participant_rows(subject, session, n_sessions),
        tables.stray_rows(subject, session, images),
    ):
        rows += more
        flags += new
    readings: list[AgeReading] = []
    for row in rows:
        new_readings, new = read_row(row)
        readings += new_readings
        flags += new
    for reading, flag in _sidecar_ages(tables.root, images):
        flags.append(flag)
        readings += [reading] if reading else []
    return _Found(tuple(readings), tuple(flags))


def _sidecar_ages(root: Path, images: Sequence[str]) -> Iterator[tuple[AgeReading | None, Flag]]:
    """Ages in the images' own JSON files, which BIDS does not define; each with a flag."""
    for image in images:
        name = PurePosixPath(image)
        stem = name.name.removesuffix('.gz').removesuffix('.nii')
        relative = name.with_name(f'{stem}.json')
        content = read_json(root / relative).content
        for key in ('Age', 'age', 'PatientAge', 'PatientsAge'):
            value = content.get(key)
            if not isinstance(value, str | int | float) or isinstance(value, bool):
                continue
            if is_missing(str(value)):
                continue
            amount = parse_amount(str(value))
            where = f'{relative}, field {key}'
            shown = f"{relative} has a field '{key}' ({str(value)[:40]}), which BIDS does not know"
            if amount is None or amount.unit is None:
                message = f'{shown}, and it names no unit that could be read. It was not used.'
                yield None, Flag('age-in-image-json', 'info', message)
                continue
            span = to_span(amount, amount.unit)
            message = f'{shown}. It is used only where the tables are silent.'
            yield (
                AgeReading(span, where, f'in {amount.unit}'),
                Flag('age-in-image-json', 'info', message),
            )
            break


def _combine(readings: Sequence[AgeReading]) -> tuple[Age, list[Flag]]:
    """The best reading, completed by the other kind of age, and the contradictions."""
    best = readings[0]
    flags = [
        Flag(
            'age-contradiction',
            'warning',
            f'Two ages that cannot both be right: {best} and {other}. The first was used.',
        )
        for other in readings[1:]
        if best.span.contradicts(other.span)
    ]
    other_kind = next((r for r in readings if r.span.gestational != best.span.gestational), None)
    spans = {best.span.gestational: best.span}
    source = best.source
    if other_kind is not None:
        if _fit(best.span, other_kind.span):
            spans[other_kind.span.gestational] = other_kind.span
            source += f'; {other_kind.source}'
        else:
            message = (
                f'Two ages that cannot both be right: {best} and {other_kind}. The first was used.'
            )
            flags.append(Flag('age-contradiction', 'warning', message))
    months, weeks = spans.get(False), spans.get(True)
    return Age(months.value if months else None, weeks.value if weeks else None, source), flags


def _fit(a: Span, b: Span) -> bool:
    """Whether an age since birth and a gestational age can be the same child's."""
    months, weeks = (b, a) if a.gestational else (a, b)
    shortest, longest = PREGNANCY_WEEKS
    return (
        weeks.low - longest <= months.high * WEEKS_PER_MONTH
        and months.low * WEEKS_PER_MONTH <= weeks.high - shortest
    )


def _against_option(given: Age, readings: Sequence[AgeReading]) -> list[Flag]:
    """Flag tables that say something else than the user."""
    flags = []
    for reading in readings:
        gestational = reading.span.gestational
        value = given.gestational_weeks if gestational else given.months
        if value is None:
            continue
        slack = 0.5
        if not reading.span.low - slack <= value <= reading.span.high + slack:
            message = (
                f'--age-months gives another age than the dataset: {reading}. The option won.'
            )
            flags.append(Flag('age-contradiction', 'info', message))
    return flags


def _range_flags(age: Age) -> list[Flag]:
    """Say when an age lies outside of what the network was made for."""
    if age.months is not None and age.months >= OLDEST_MONTHS:
        message = (
            f'The age, {age.months:.4g} months, is beyond the range from birth to 5 years that '
            'babyseg is made for. Look at the segmentation before using it.'
        )
        return [Flag('age-out-of-range', 'warning', message)]
    if age.months is None and age.gestational_weeks is not None:
        early = age.gestational_weeks < TERM_WEEKS
        message = (
            f'The age is {age.gestational_weeks:.4g} weeks counted from before birth; '
            'no age since birth can be told from it.'
        )
        if early:
            message += (
                ' That is before term, or a fetus: babyseg is made for the time after birth. '
                'Look at the segmentation before using it.'
            )
        return [Flag('age-gestational', 'warning' if early else 'info', message)]
    return []


def _unique(flags: Sequence[Flag]) -> list[Flag]:
    """Flags in order, each once."""
    return list(dict.fromkeys(flags))
