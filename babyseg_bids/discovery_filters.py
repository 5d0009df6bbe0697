"""Restrict candidates with a filter file, as other BIDS Apps understand it.

`{"t1w": {"acquisition": "mprage", "run": [1, 2]}, "t2w": {"reconstruction": null}}`: one group a
contrast, named by its suffix in any case or by `suffix` inside it. A value is a label, a list of
labels, a regular expression (`"mprage.*"`), `null` for "has no such entity" or `"*"` for
"has one".
"""

import re
from collections.abc import Mapping
from typing import Any

from babyseg_bids.discovery_names import KNOWN_CONTRASTS, Named
from babyseg_bids.errors import UsageError

_SHORT = {
    'subject': 'sub', 'session': 'ses', 'acquisition': 'acq', 'ceagent': 'ce',
    'reconstruction': 'rec', 'direction': 'dir', 'modality': 'mod', 'nucleus': 'nuc',
    'volume': 'voi', 'staining': 'stain', 'tracer': 'trc',
}  # fmt: skip
_PLAIN = (
    'sub', 'ses', 'task', 'acq', 'ce', 'trc', 'stain', 'rec', 'dir', 'run', 'mod', 'echo',
    'flip', 'inv', 'mt', 'part', 'proc', 'hemi', 'nuc', 'voi', 'sample', 'chunk', 'space',
    'desc', 'label', 'res', 'suffix', 'extension', 'datatype',
)  # fmt: skip
_ABSENT, _PRESENT, _EITHER = 'Query.NONE', 'Query.ANY', 'Query.OPTIONAL'


def check_filters(filters: Mapping[str, Any] | None, /) -> None:
    """Refuse filters that cannot be understood.

    Raises
    ------
    UsageError
        Naming the group, the entity and what is possible.
    """
    for group, query in (filters or {}).items():
        if not isinstance(query, Mapping):
            raise UsageError(
                f"The filter '{group}' must be an object of entities, such as "
                '{"acquisition": "mprage"}.'
            )
        for name, value in query.items():
            if name == 'regex_search':
                continue
            if _short(name) not in _PLAIN:
                known = ', '.join(sorted({*_SHORT, *_PLAIN}))
                raise UsageError(
                    f"The filter '{group}' names '{name}', which is no entity. Known: {known}."
                )
            for pattern in value if isinstance(value, list) else [value]:
                _check_pattern(group, name, pattern)


def _check_pattern(group: str, name: str, pattern: Any) -> None:
    if pattern is not None and not isinstance(pattern, str | int):
        raise UsageError(
            f"The filter '{group}' has the value {pattern!r} for '{name}'. Give a label, a "
            'list of labels, null or "*".'
        )
    if isinstance(pattern, str) and pattern != '*':
        try:
            re.compile(pattern)
        except re.error as e:
            raise UsageError(
                f"The filter '{group}' has the expression '{pattern}' for '{name}', which cannot "
                f'be read ({e}).'
            ) from e


def filter_reason(named: Named, filters: Mapping[str, Any] | None, /) -> str:
    """Why a candidate is left out by the filters; '' when it passes."""
    for group, query in (filters or {}).items():
        if not _concerns(group, query, named.suffix):
            continue
        for name, wanted in query.items():
            if name in ('regex_search', 'suffix'):
                continue
            value = _value(named, _short(name))
            if not _passes(value, wanted, anywhere=bool(query.get('regex_search'))):
                has = f'has {value}' if value is not None else 'has none'
                return f"the filter '{group}' wants {name} {_show(wanted)}; it {has}"
    return ''


def _concerns(group: str, query: Mapping[str, Any], suffix: str) -> bool:
    """Whether a group speaks of images with this suffix.

    Filter files are shared between programs: groups such as `bold` concern nobody here.
    """
    wanted = query.get('suffix')
    if isinstance(wanted, str | list):
        return _passes(suffix, wanted, anywhere=bool(query.get('regex_search')))
    if group.lower() in ('anat', 'all'):
        return True
    return group.lower() in (suffix.lower(), suffix.lower().removesuffix('w'))


def _value(named: Named, entity: str) -> str | None:
    fixed = {
        'sub': named.subject,
        'ses': named.session,
        'suffix': named.suffix,
        'datatype': 'anat',
        'extension': '.nii.gz' if named.relative_path.endswith('.gz') else '.nii',
    }
    return fixed[entity] if entity in fixed else named.entities.get(entity)


def _passes(value: str | None, wanted: Any, *, anywhere: bool) -> bool:
    if isinstance(wanted, list):
        return any(_passes(value, w, anywhere=anywhere) for w in wanted)
    if wanted in (None, _ABSENT):
        return value is None
    if wanted == _EITHER:
        return True
    if wanted in ('*', _PRESENT):
        return value is not None
    if value is None:
        return False
    text = re.sub(r'^(sub|ses)-', '', str(wanted))
    if value == text or _same_number(value, text):
        return True
    found = re.search(text, value) if anywhere else re.fullmatch(text, value)
    return found is not None


def _same_number(a: str, b: str) -> bool:
    return a.isdecimal() and b.isdecimal() and a.lstrip('0') == b.lstrip('0')


def _short(name: str) -> str:
    return _SHORT.get(name, name)


def _show(wanted: Any) -> str:
    return (
        {None: 'absent', '*': 'present'}.get(wanted, str(wanted))
        if not isinstance(wanted, list)
        else ' or '.join(_show(w) for w in wanted)
    )


def unknown_groups(filters: Mapping[str, Any] | None, /) -> tuple[str, ...]:
    """Groups that concern no anatomical contrast, for a line in the log."""
    known = {c.lower() for c in KNOWN_CONTRASTS}
    known |= {c.removesuffix('w') for c in known} | {'anat', 'all'}
    return tuple(
        g for g, q in (filters or {}).items() if g.lower() not in known and 'suffix' not in q
    )
