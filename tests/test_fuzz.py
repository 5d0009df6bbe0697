"""Readers of what others wrote, fed with what nobody would write: a verdict, never an exception.

Each test tries the same examples every time; `BABYSEG_FUZZ=20000` tries more of them.
"""

import gzip
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_phantoms import head, write_dataset, write_image
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from babyseg_bids.age import DatasetTables, parse_age_option, resolve_age
from babyseg_bids.cli.parser import parse_command
from babyseg_bids.discovery import find_sessions
from babyseg_bids.discovery_filters import check_filters, filter_reason
from babyseg_bids.discovery_names import classify
from babyseg_bids.errors import BabySegError, UsageError
from babyseg_bids.preflight import check_image, load_image
from babyseg_bids.tables import read_json, read_table

fuzz = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=int(os.environ.get('BABYSEG_FUZZ', '100')),
    # Making an example that fails smaller can take minutes; it is left to whoever looks at it.
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
HEADER_BYTES = 352
# Where a changed byte means most: sizes, type, voxel sizes, offset, scaling, codes and matrices.
TELLING = (*range(40, 56), *range(70, 120), *range(252, 328), *range(344, 348))
edits = st.lists(
    st.tuples(
        st.one_of(st.sampled_from(TELLING), st.integers(0, HEADER_BYTES - 1)),
        st.integers(0, 255),
    ),
    max_size=6,
)
numbers = st.one_of(st.floats(), st.integers(-(10**20), 10**20))
cells = st.one_of(
    st.text(max_size=12),
    numbers.map(str),
    st.sampled_from(['n/a', '01', 'sub-01', 'ses-A', '3 months', '25 gw', '0x3', '1e999', '=1+1']),
)
names = st.one_of(
    st.sampled_from(['participant_id', 'session_id', 'filename', 'age', 'age_weeks', 'Age (mo)']),
    st.text(max_size=8),
)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | cells,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(cells, inner, max_size=3),
    max_leaves=8,
)
raw_tables = st.one_of(
    st.binary(max_size=200),
    st.lists(st.lists(cells, max_size=4).map('\t'.join), max_size=5).map(
        lambda lines: '\n'.join(lines).encode('utf-8', 'surrogatepass')
    ),
    st.tuples(
        st.lists(names, min_size=1, max_size=4).map('\t'.join),
        st.lists(st.lists(cells, max_size=5).map('\t'.join), max_size=4),
    ).map(lambda t: '\n'.join([t[0], *t[1]]).encode('utf-8', 'surrogatepass')),
)
raw_json = st.one_of(
    st.binary(max_size=100),
    json_values.map(lambda v: json.dumps(v).encode()),
)


@pytest.fixture(scope='module')
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A sound image, uncompressed."""
    folder = tmp_path_factory.mktemp('image')
    return write_image(folder / 'a.nii', head(size=12), (10.0, 10.0, 10.0)).read_bytes()


@fuzz
@given(changes=edits, length=st.integers(0, 5000), packed=st.booleans())
@example(changes=[], length=5000, packed=False)
def test_any_header_gets_a_verdict_and_what_passes_can_be_loaded(
    image: bytes, changes: list[tuple[int, int]], length: int, packed: bool
) -> None:
    raw = bytearray(image)
    for place, value in changes:
        raw[place] = value
    content = bytes(raw[:length])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ('x_T1w.nii.gz' if packed else 'x_T1w.nii')
        path.write_bytes(gzip.compress(content, 1, mtime=0) if packed else content)
        check = check_image(path)
        assert check.ok != bool(check.reason)
        assert '\n' not in check.reason
        if check.ok:
            loaded = load_image(path)
            assert loaded.shape == check.shape
            assert np.isfinite(loaded.get_fdata()).all()


@fuzz
@given(content=raw_tables)
def test_any_table_is_read_as_text_with_a_cell_for_each_column(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'participants.tsv'
        path.write_bytes(content)
        table = read_table(path)
        assert table.columns or table.problems
        for row in table.rows:
            assert set(row) == set(table.columns)
            assert all(isinstance(v, str) for v in row.values())


@fuzz
@given(content=raw_json)
def test_any_json_file_is_an_object_or_has_a_problem(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'x.json'
        path.write_bytes(content)
        found = read_json(path)
        assert isinstance(found.content, dict)
        assert found.content or found.problem or json.loads(content) == {}


@fuzz
@given(
    tables=st.fixed_dictionaries(
        {
            'participants.tsv': raw_tables,
            'participants.json': raw_json,
            'sub-01/sub-01_sessions.tsv': raw_tables,
            'sub-01/ses-A/sub-01_ses-A_scans.tsv': raw_tables,
            'sub-01/ses-A/sub-01_ses-A_scans.json': raw_json,
            'sub-01/ses-A/anat/sub-01_ses-A_T1w.json': raw_json,
        }
    )
)
def test_any_tables_give_an_age_in_months_or_none(tables: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in tables.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        found = DatasetTables(Path(folder))
        found.dataset_flags()
        image = 'sub-01/ses-A/anat/sub-01_ses-A_T1w.nii.gz'
        age, flags = resolve_age(found, '01', 'A', [image], n_sessions=1, overrides=None)
        assert age.months is None or np.isfinite(age.months)
        assert all(f.message for f in flags)


@fuzz
@given(content=raw_tables)
def test_any_age_table_of_the_option_is_used_or_refused_in_words(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'ages.tsv'
        path.write_bytes(content)
        try:
            parse_age_option(str(path))
        except UsageError as error:
            assert 'ages.tsv' in str(error)


@fuzz
@given(query=json_values)
def test_any_filter_file_is_used_or_refused_in_words(query: Any) -> None:
    named = classify('sub-01/anat/sub-01_acq-a_run-1_T1w.nii.gz', contrasts=())
    assert named is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'filter.json'
        path.write_text(json.dumps(query))
        words = [folder, f'{folder}/out', 'participant', '--bids-filter-file', str(path)]
        try:
            options, _ = parse_command(words)
            check_filters(options.bids_filter)
        except BabySegError as error:
            assert '\n' not in str(error)
        else:
            assert isinstance(filter_reason(named, options.bids_filter), str)


@settings(fuzz, max_examples=min(fuzz.max_examples, 25))
@given(content=raw_json)
@example(content=b'[]')
@example(content=b'{"Name": 3, "BIDSVersion": null}')
@example(content=b'{"DatasetType": {}, "GeneratedBy": "x"}')
def test_any_dataset_description_is_passed_over_or_named(content: bytes, tmp_path: Path) -> None:
    root = tmp_path / 'data'
    if not root.exists():
        write_dataset(root, '01')
    (root / 'dataset_description.json').write_bytes(content)
    try:
        (session,) = find_sessions(root, check_images=False)
    except UsageError as error:
        assert 'dataset_description.json' in str(error)
        return
    assert [s.suffix for s in session.scans] == ['T1w']
