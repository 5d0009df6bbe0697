"""The plain records that pass between discovery, preflight, the workflow and the reports.

All are frozen and turn into JSON and back, so that they travel through Nipype nodes and files.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal['info', 'warning', 'severe']
# Beside a run's logs: what became of the sessions that have no results.
VERDICTS_FILE = 'verdicts.json'
SEVERITIES: tuple[Severity, ...] = ('severe', 'warning', 'info')


@dataclass(frozen=True)
class Flag:
    """One thing that a person should know about a session; it never stops a run.

    `code` is stable and machine-readable (`age-contradiction`), `message` is one plain sentence.
    """

    code: str
    severity: Severity
    message: str


@dataclass(frozen=True)
class Age:
    """Age at scan. `months` is None where unknown or only known as a gestational age.

    `gestational_weeks` is kept apart: it is time since conception, not since birth.
    `source` says in words where the value came from (file, row and column, or option).
    """

    months: float | None = None
    gestational_weeks: float | None = None
    source: str = 'unknown'


@dataclass(frozen=True)
class Scan:
    """One image file that may take part in a session's segmentation.

    `path` is absolute, `relative_path` is relative to the dataset, `entities` are its BIDS
    entities without `sub` and `ses` (`{'acq': 'mprage', 'run': '1'}`).
    """

    path: str
    relative_path: str
    suffix: str
    entities: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Entities and suffix as in the file name: `acq-mprage_run-1_T1w`."""
        return '_'.join([*(f'{k}-{v}' for k, v in self.entities.items()), self.suffix])


@dataclass(frozen=True)
class LedgerRow:
    """The fate of one candidate image, and why.

    `status`: `reference`, `used` or `rejected`.
    """

    relative_path: str
    suffix: str
    status: Literal['reference', 'used', 'rejected']
    reason: str


@dataclass(frozen=True)
class SessionInputs:
    """All that is known of one (subject, session) before any processing.

    `scans` holds the accepted scans, the reference first; empty when nothing can be used.
    `subject` and `session` are bare labels (`01`, `A`); `session` is None without sessions.
    """

    subject: str
    session: str | None
    scans: tuple[Scan, ...]
    age: Age
    ledger: tuple[LedgerRow, ...] = ()
    flags: tuple[Flag, ...] = ()

    @property
    def name(self) -> str:
        """File name stem: `sub-01_ses-A`."""
        return f'sub-{self.subject}' + (f'_ses-{self.session}' if self.session else '')

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any], /) -> 'SessionInputs':
        """Rebuild what `to_dict` gave."""
        return cls(
            subject=d['subject'],
            session=d['session'],
            scans=tuple(Scan(**s) for s in d['scans']),
            age=Age(**d['age']),
            ledger=tuple(LedgerRow(**r) for r in d['ledger']),
            flags=tuple(Flag(**f) for f in d['flags']),
        )
