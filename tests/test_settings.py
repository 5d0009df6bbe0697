"""Settings: from the command line and files, to TOML and back, and what they say of results."""

import json
from pathlib import Path

import pytest

from babyseg_bids.cli.parser import build_parser, option_names, parse_settings
from babyseg_bids.errors import UsageError
from babyseg_bids.settings import Settings

PLACES = ['in', 'out', 'participant']


def parse(*words: str) -> Settings:
    return parse_settings([*PLACES, *words])


def config(folder: Path, text: str) -> str:
    path = folder / 'babyseg.toml'
    path.write_text(text)
    return f'--config-file={path}'


def test_three_arguments_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = parse()
    assert settings.bids_dir == tmp_path / 'in'
    assert settings.scratch == tmp_path / 'out' / '.babyseg-work'
    assert settings.level == 'participant'
    assert settings.random_seed == 0
    assert settings.report


def test_prefixes_commas_and_repetitions_of_labels_are_understood() -> None:
    settings = parse(
        '--participant-label', 'sub-01', '02,sub-03', '--participant-label', '01', '04',
        '--session-id', 'ses-A',
    )  # fmt: skip
    assert settings.participants == ('01', '02', '03', '04')
    assert settings.sessions == ('A',)


def test_every_option_may_be_written_with_underscores() -> None:
    for option in option_names(build_parser()):
        spelled = '--' + option[2:].replace('-', '_')
        with pytest.raises((UsageError, SystemExit)) as caught:
            parse_settings(['in', 'out', spelled])
        assert 'There is no option' not in str(caught.value)


def test_values_keep_their_underscores() -> None:
    assert parse('--model=my_model.pt', '--work_dir', '/a_b').work_dir == Path('/a_b')
    assert Path(parse('--model=my_model.pt').model).name == 'my_model.pt'


@pytest.mark.parametrize(
    ('words', 'gib'),
    [
        (['--mem', '8G'], 8),
        (['--mem_mb', '8192'], 8),
        (['--mem-gb', '8'], 8),
        (['--mem-gb', '1.5g'], 1.5),
    ],
)
def test_memory_options_share_one_meaning(words: list[str], gib: float) -> None:
    assert parse(*words).mem_gb == pytest.approx(gib)


def test_options_of_other_apps_are_accepted_without_effect() -> None:
    plain, more = parse(), parse('--notrack', '--fs-license-file', 'x', '--fs_license_file', 'y')
    assert more == plain.replace(run_uuid=more.run_uuid)


def test_an_option_with_many_values_may_stand_before_the_folders() -> None:
    settings = parse_settings(['--participant-label', '01', '02', *PLACES])
    assert settings.participants == ('01', '02')
    assert settings.output_dir.name == 'out'


def test_ages_in_a_relative_table_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'ages.tsv').write_text('participant_id\tage_months\n')
    monkeypatch.chdir(tmp_path)
    assert parse('--age-months', 'ages.tsv').ages == str(tmp_path / 'ages.tsv')
    assert parse('--age-months', 'sub-01=6', '02=7').ages == 'sub-01=6 02=7'


def test_a_filter_file_is_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / 'filter.json'
    path.write_text('{"t1w": {"acquisition": "mprage", "run": null}}')
    expected = {'t1w': {'acquisition': 'mprage', 'run': None}}
    assert parse('--bids-filter-file', str(path)).bids_filter == expected


@pytest.mark.parametrize(
    ('words', 'expected'),
    [
        (['--particpant-label', '01'], 'Did you mean --participant-label?'),
        (['--mem', '8'], 'did you mean 8G?'),
        (['--mem', 'lots'], "'lots'"),
        (['--nprocs', '0'], 'at least 1'),
        (['--device', 'gpu'], 'cuda'),
        (['--random-seed', '-1'], "'-1'"),
        (['--uncertainty-threshold', '30'], 'from 0 to 1'),
        (['--participant-label', 'sub-0_1'], "'0_1'"),
        (['--output-spaces', 'MNI152'], 'MNI152'),
        (['--bids-filter-file', 'no-such.json'], 'no-such.json'),
        (['--config-file', 'no-such.toml'], 'no-such.toml'),
        (['extra'], 'extra'),
    ],
)
def test_what_is_wrong_is_named_in_one_line(words: list[str], expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(*words)
    assert expected in str(caught.value)
    assert '\n' not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_settings_file_sets_options_by_their_names(tmp_path: Path) -> None:
    text = """
    participant-label = ['sub-01', '02']
    session_label = 'A'
    mem = '4G'
    nprocs = 3
    low-mem = true
    overwrite = false
    verbose = 2
    no-report = true
    uncertainty-threshold = 0.5
    """
    settings = parse(config(tmp_path, text))
    assert settings.participants == ('01', '02')
    assert settings.sessions == ('A',)
    assert (settings.mem_gb, settings.nprocs, settings.verbose) == (4, 3, 2)
    assert (settings.low_mem, settings.overwrite, settings.report) == (True, False, False)
    assert settings.uncertainty_threshold == 0.5


def test_the_command_line_wins_over_the_settings_file(tmp_path: Path) -> None:
    file = config(tmp_path, "nprocs = 3\nparticipant-label = '01'\nverbose = 2\ndevice = 'cpu'")
    settings = parse(file, '--nprocs', '5', '--participant-label', '07', '-v')
    assert (settings.nprocs, settings.verbose) == (5, 1)
    assert settings.participants == ('07',)
    assert settings.device == 'cpu'


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('particpants-label = "01"', 'Did you mean participant-label?'),
        ('nprocs = "many"', "'many'"),
        ('nprocs = [1, 2]', 'one value'),
        ('nprocs = true', 'takes a value'),
        ('low-mem = "yes"', 'true or false'),
        ('[mem]\nsize = 3', 'table'),
        ('nprocs = ', 'not TOML'),
    ],
)
def test_a_bad_settings_file_is_named_with_its_fault(
    tmp_path: Path, text: str, expected: str
) -> None:
    with pytest.raises(UsageError) as caught:
        parse(config(tmp_path, text))
    assert expected in str(caught.value)
    assert 'babyseg.toml' in str(caught.value)


def full_settings() -> Settings:
    return parse(
        '--participant-label', '01', '--age-months', 'sub-01=6', '--mem', '4G', '--no-report',
        '--bids-filter-file', '{"t1w": {"acquisition": "it\'s \\"µ\\"", "run": null}}',
        '-w', '/work "dir"', '--nprocs', '2', '--random-seed', '7', '--contrasts', 'T1w', '-vv',
    )  # fmt: skip


def test_settings_survive_toml_and_json() -> None:
    settings = full_settings()
    assert Settings.from_toml(settings.to_toml()) == settings
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_recorded_settings_can_be_given_back_as_a_settings_file(tmp_path: Path) -> None:
    settings = full_settings()
    again = parse(config(tmp_path, settings.to_toml()))
    assert again == settings.replace(run_uuid=again.run_uuid)
    assert again.run_uuid != settings.run_uuid


def test_fingerprints_tell_what_changes_results_from_what_does_not() -> None:
    plain = parse().fingerprint()
    same = parse('--nprocs', '7', '--participant-label', '01', '-v', '-w', 'x', '--overwrite')
    assert same.fingerprint() == plain
    for words in (['--random-seed', '1'], ['--contrasts', 'T1w'], ['--reference-anat', 'T2w'],
                  ['--save-probabilities'], ['--uncertainty-threshold', '0.4']):  # fmt: skip
        assert parse(*words).fingerprint() != plain
    assert json.loads(json.dumps(plain)) == plain


def test_fingerprints_notice_new_weights_under_the_same_name(tmp_path: Path) -> None:
    weights = [tmp_path / name for name in ('a.safetensors', 'b.safetensors')]
    for path, content in zip(weights, ('first', 'second'), strict=True):
        path.write_text(content)
    first, second = (parse('--model', str(p)).fingerprint() for p in weights)
    assert first['model_sha256'] != second['model_sha256']
