"""All that a run was asked to do: built once from the command line, passed on as an argument."""

import hashlib
import json
import tomllib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from time import strftime
from typing import Any, Literal

from babyseg_bids import __version__
from babyseg_bids.shares import ArrayTask, parse_array_task

Level = Literal['participant', 'group']

WORK_FOLDER = '.babyseg-work'

# Fields whose name differs from the option's; the others are spelled alike.
OPTIONS = {
    'level': 'analysis-level',
    'participants': 'participant-label',
    'sessions': 'session-label',
    'bids_filter': 'bids-filter-file',
    'ages': 'age-months',
    'database_dir': 'bids-database-dir',
    'plugin_file': 'use-plugin',
}
# Fields that are not plain text, numbers or truth values in TOML and JSON.
_PATHS = ('bids_dir', 'output_dir', 'work_dir', 'database_dir', 'plugin_file')
_TUPLES = ('participants', 'sessions', 'contrasts', 'output_spaces')


def new_run_uuid() -> str:
    """Time and a random part, so that runs sort by time and never collide."""
    return f'{strftime("%Y%m%d-%H%M%S")}_{uuid.uuid4().hex[:8]}'


def _plain(value: Any) -> Any:
    """Paths and tuples as text and lists."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _typed(name: str, value: Any) -> Any:
    """The inverse of `_plain` for the field `name`."""
    if name in _PATHS and value is not None:
        return Path(value)
    return tuple(value) if name in _TUPLES else value


def _toml_value(value: Any) -> str:
    """A string, number, truth value or list of them in TOML."""
    if isinstance(value, list):
        return '[' + ', '.join(_toml_value(v) for v in value) + ']'
    # JSON and TOML write strings, numbers and truth values alike, but for DEL.
    return json.dumps(value, ensure_ascii=False).replace('\x7f', '\\u007f')


@cache
def _file_checksum(model: str) -> str | None:
    """SHA-256 of the weights when `model` is a file: they may change under the same name."""
    path = Path(model)
    if not path.is_file():
        return None
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


@dataclass(frozen=True)
class Settings:
    """What to do with which data, and with how much of the machine.

    Attributes
    ----------
    bids_dir, output_dir : Path
        Dataset to read, folder to write.
    level : 'participant' or 'group'
    work_dir : Path, optional
        Intermediate files; `scratch` gives the folder that is used when it is None.
    participants, sessions, contrasts : tuple of str
        Bare labels (`01`, `A`, `T1w`); empty for all.
    array_task : str, optional
        `2/8`: only the share of the second of eight tasks, see `task`.
    bids_filter : dict, optional
        Content of the filter file.
    reference_anat : str, optional
        Contrast whose grid the results are on.
    ages : str, optional
        As given: a value, LABEL=VALUE pairs or the path of a TSV; `age.parse_age_option` reads it.
    nprocs, omp_nthreads : int
        Processors for all, and threads for one session; 0 until they are decided.
    mem_gb : float
        Memory for all, in GiB; 0 until it is decided.
    random_seed : int
        Fixes every random choice (alignment samples its voxels at random).
    bias_correction : 'none' or 'n4'
    denoise : bool
        Both as in `preprocessing.preprocess`.
    output_spaces : tuple of str
        As given, see `spaces.parse_space`.
    uncertainty_threshold : float
        From 0 to 1: voxels above it count as uncertain.
    """

    bids_dir: Path
    output_dir: Path
    level: Level = 'participant'
    work_dir: Path | None = None
    participants: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()
    array_task: str | None = None
    contrasts: tuple[str, ...] = ()
    bids_filter: dict[str, Any] | None = None
    skip_bids_validation: bool = False
    database_dir: Path | None = None
    reference_anat: str | None = None
    ages: str | None = None
    device: str = 'auto'
    model: str = 'default'
    bias_correction: str = 'none'
    denoise: bool = False
    random_seed: int = 0
    uncertainty_threshold: float = 0.3
    save_probabilities: bool = False
    output_spaces: tuple[str, ...] = ()
    report: bool = True
    overwrite: bool = False
    nprocs: int = 0
    omp_nthreads: int = 0
    mem_gb: float = 0.0
    low_mem: bool = False
    plugin_file: Path | None = None
    stop_on_first_crash: bool = False
    resource_monitor: bool = False
    clean_workdir: bool = False
    dry_run: bool = False
    reports_only: bool = False
    boilerplate_only: bool = False
    write_graph: bool = False
    verbose: int = 0
    run_uuid: str = field(default_factory=new_run_uuid)

    @property
    def task(self) -> ArrayTask | None:
        """The task of a job array that this run is, if it is one."""
        return parse_array_task(self.array_task) if self.array_task else None

    @property
    def work_root(self) -> Path:
        """Folder of intermediate files: `work_dir`, or one inside the output folder."""
        return self.work_dir or self.output_dir / WORK_FOLDER

    @property
    def scratch(self) -> Path:
        """Folder of this run's intermediate files: `work_root`, or a task's own part of it."""
        return self.work_root / self.task.folder if self.task else self.work_root

    def replace(self, **changes: Any) -> 'Settings':
        """A copy with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` is its inverse."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any], /) -> 'Settings':
        """Rebuild what `to_dict` gave."""
        return cls(**{f.name: _typed(f.name, d[f.name]) for f in fields(cls) if f.name in d})

    def to_toml(self) -> str:
        """The settings as TOML, which `--config-file` reads back; what is unset is left out."""
        lines = [f'# babyseg {__version__}']
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None or value == ():
                continue
            key = OPTIONS.get(f.name, f.name.replace('_', '-'))
            # TOML has no null, which filters may hold, so a filter is kept as JSON text.
            value = json.dumps(value) if f.name == 'bids_filter' else _plain(value)
            lines.append(f'{key} = {_toml_value(value)}')
        return '\n'.join(lines) + '\n'

    @classmethod
    def from_toml(cls, text: str, /) -> 'Settings':
        """Rebuild what `to_toml` gave."""
        table = tomllib.loads(text)
        names = {OPTIONS.get(f.name, f.name.replace('_', '-')): f.name for f in fields(cls)}
        d = {names[key]: value for key, value in table.items()}
        if 'bids_filter' in d:
            d['bids_filter'] = json.loads(d['bids_filter'])
        return cls.from_dict(d)

    def fingerprint(self) -> dict[str, Any]:
        """What changes the results: runs with equal fingerprints and inputs give equal outputs.

        The dictionary is the same after a round through JSON.
        """
        return {
            'version': __version__,
            'model': self.model,
            'model_sha256': _file_checksum(self.model),
            'contrasts': sorted(self.contrasts),
            'reference_anat': self.reference_anat,
            'bias_correction': self.bias_correction,
            'denoise': self.denoise,
            'random_seed': self.random_seed,
            'uncertainty_threshold': self.uncertainty_threshold,
            'save_probabilities': self.save_probabilities,
            'output_spaces': list(self.output_spaces),
        }
