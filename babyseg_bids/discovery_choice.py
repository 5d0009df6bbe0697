"""Choose the scans of one session among its candidates, and the one that leads.

The rules are deterministic: nothing depends on the order in which a file system lists files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from babyseg_bids.discovery_names import CONTRASTS, KNOWN_CONTRASTS, Named
from babyseg_bids.errors import UsageError
from babyseg_bids.files import natural_key
from babyseg_bids.preflight import ImageCheck
from babyseg_bids.records import Flag, LedgerRow, Scan

# Time and memory grow with each scan, and repeats beyond a few add little.
MAX_SCANS = 8

Check = Callable[[Path], ImageCheck]


@dataclass
class Choice:
    """What became of the candidates of one session."""

    scans: list[Scan] = field(default_factory=list)
    ledger: list[LedgerRow] = field(default_factory=list)
    flags: list[Flag] = field(default_factory=list)
    checks: dict[str, ImageCheck] = field(default_factory=dict)


def check_reference(reference: str | None, /) -> tuple[str, ...]:
    """Split `--reference-anat` into preferences, best first (`T2w`, `acq-mprage_T1w,T2w`).

    Raises
    ------
    UsageError
        When a preference names no contrast.
    """
    preferences = tuple(p.strip() for p in (reference or '').split(',') if p.strip())
    known = {c.lower() for c in KNOWN_CONTRASTS}
    for preference in preferences:
        if preference.rpartition('_')[2].lower() not in known:
            raise UsageError(
                f"--reference-anat: '{preference}' names no contrast. Give one of "
                f'{", ".join(KNOWN_CONTRASTS)}, also with entities (acq-mprage_T1w).'
            )
    return preferences


def choose_scans(
    candidates: Sequence[Named],
    bids_dir: Path,
    *,
    check: Check | None,
    preferences: Sequence[str] = (),
) -> Choice:
    """Check candidates and order the good ones, the reference first.

    1. Candidates are taken in turns: the first of each contrast by name, then the second of each,
       and so on, so that many repeats of one contrast do not displace another contrast.
    2. Each is read once by `check` until `MAX_SCANS` are accepted; the rest is left out.
    3. Of two files of one image (.nii and .nii.gz, `run-1` and `run-01`) the first that can be
       read is used. A `chunk-`, a part of the head, is used only where there is nothing else, and
       one `echo-` only where the image that they were combined into is missing.
    4. The reference is the first that fits `preferences`; else T1w before T2w before UNIT1, FLAIR,
       PDw, T2starw and the others; among those of one contrast a complete head before a slab, then
       the thinner slices, then the finer voxel, then the name. Without `check`, contrast and name
       decide.
    """
    choice = Choice()
    candidates = _without_parts(candidates, choice)
    accepted: list[Named] = []
    used: dict[tuple[str, ...], Named] = {}
    for candidate in _in_turns(candidates):
        twin = used.get(candidate.identity)
        if twin is not None:
            reason = f'the same image as {Path(twin.relative_path).name}, by its name'
            choice.ledger.append(_row(candidate, 'rejected', reason))
        elif len(accepted) == MAX_SCANS:
            reason = f'at most {MAX_SCANS} scans of a session are used'
            choice.ledger.append(_row(candidate, 'rejected', reason))
        elif _check(candidate, bids_dir, check, choice):
            used[candidate.identity] = candidate
            accepted.append(candidate)
    if accepted:
        _order(accepted, bids_dir, preferences, choice)
    return choice


def _without_parts(candidates: Sequence[Named], choice: Choice) -> list[Named]:
    """Candidates without parts of the head, or of an image, where there is the whole."""
    whole = [c for c in candidates if 'chunk' not in c.entities]
    rest = []
    for candidate in candidates:
        entities = candidate.entities
        combined = [
            c
            for c in whole
            if 'echo' in entities
            and c.suffix == candidate.suffix
            and 'echo' not in c.entities
            and _image_of(c) == _image_of(candidate)
        ]
        if whole and 'chunk' in entities:
            reason = f'chunk-{entities["chunk"]}: shows a part of the head; others show all'
        elif combined:
            name = Path(combined[0].relative_path).name
            reason = f'echo-{entities["echo"]}: one echo of the image that {name} combines'
        else:
            rest.append(candidate)
            continue
        choice.ledger.append(_row(candidate, 'rejected', reason))
    return rest


def _image_of(named: Named) -> dict[str, str]:
    """The entities that an echo shares with the image that it is part of."""
    return {k: v for k, v in named.entities.items() if k not in ('echo', 'part', 'rec')}


def _in_turns(candidates: Sequence[Named]) -> list[Named]:
    """The first of each contrast by name, then the second of each, ..."""
    turns: dict[str, int] = {}
    keys = {}
    for c in sorted(candidates, key=_name_key):
        turns[c.suffix] = turns.get(c.suffix, -1) + 1
        keys[c.relative_path] = (turns[c.suffix], _contrast_rank(c), _name_key(c))
    return sorted(candidates, key=lambda c: keys[c.relative_path])


def _name_key(named: Named) -> tuple[object, ...]:
    # The plain name before its variants; .nii.gz, the form BIDS recommends, before .nii.
    return (
        len(named.entities),
        natural_key('_'.join(f'{k}-{v}' for k, v in named.entities.items())),
        not named.relative_path.endswith('.gz'),
        named.relative_path,
    )


def _contrast_rank(named: Named) -> int:
    suffix = named.suffix
    return CONTRASTS.index(suffix) if suffix in CONTRASTS else len(CONTRASTS)


def _check(candidate: Named, bids_dir: Path, check: Check | None, choice: Choice) -> bool:
    """Read one candidate; whether it can be used."""
    if check is None:
        return True
    result = check(bids_dir / candidate.relative_path)
    choice.checks[candidate.relative_path] = result
    if result.ok:
        choice.flags += result.flags
        return True
    choice.ledger.append(_row(candidate, 'rejected', result.reason))
    message = f'{candidate.relative_path} was left out: {result.reason}.'
    choice.flags.append(Flag('image-rejected', 'warning', message))
    return False


def _order(
    accepted: Sequence[Named], bids_dir: Path, preferences: Sequence[str], choice: Choice
) -> None:
    """Fill in scans and ledger, the reference first."""
    best = min(accepted, key=lambda c: _reference_key(c, choice.checks.get(c.relative_path)))
    reason = 'the only usable scan'
    if len(accepted) > 1:
        reason = 'first by contrast, completeness, voxel size and name'
    if preferences:
        fitting = [(p, c) for p in preferences for c in accepted if _fits(c, p)]
        if fitting:
            preference = fitting[0][0]
            best = min(
                (c for p, c in fitting if p == preference),
                key=lambda c: _reference_key(c, choice.checks.get(c.relative_path)),
            )
            reason = f'asked for with --reference-anat {preference}'
        else:
            message = (
                f'The session has no usable {" or ".join(preferences)}, which --reference-anat '
                f'asks for; {Path(best.relative_path).name} leads instead.'
            )
            choice.flags.append(Flag('reference-not-found', 'warning', message))
    ordered = [best, *(c for c in accepted if c is not best)]
    choice.scans = [_scan(c, bids_dir) for c in ordered]
    rows = [_row(best, 'reference', reason)]
    rows += [_row(c, 'used', 'further scan of the session') for c in ordered[1:]]
    choice.ledger = rows + choice.ledger


def _reference_key(candidate: Named, check: ImageCheck | None) -> tuple[object, ...]:
    quality: tuple[object, ...] = ()
    if check is not None:
        zooms = sorted((round(z, 2) for z in check.zooms), reverse=True)
        quality = (not check.complete, *zooms)
    return (_contrast_rank(candidate), quality, _name_key(candidate))


def _fits(candidate: Named, preference: str) -> bool:
    """Whether `acq-mprage_T1w` names a candidate: its suffix and each entity given."""
    *entities, suffix = preference.split('_')
    mine = {f'{k}-{v}' for k, v in candidate.entities.items()}
    return suffix.lower() == candidate.suffix.lower() and set(entities) <= mine


def _scan(named: Named, bids_dir: Path) -> Scan:
    return Scan(
        str(bids_dir / named.relative_path),
        named.relative_path,
        named.suffix,
        dict(named.entities),
    )


def _row(named: Named, status: str, reason: str) -> LedgerRow:
    return LedgerRow(named.relative_path, named.suffix, status, reason)  # type: ignore[arg-type]
