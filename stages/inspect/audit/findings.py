"""What an audit says: findings with the rows that show them, and the outcome of every check."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import polars as pl

Severity = Literal["info", "warning"]
Status = Literal["found", "clear", "not applicable"]

MOST_ROWS = 10
"""Rows that a finding names: enough to look at, not a second dataset."""


@dataclass(frozen=True, slots=True)
class RowRef:
    """A row, or a group, or a whole iteration, where a finding can be seen."""

    iteration: int
    group_id: str | None = None
    completion_id: str | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check has seen."""

    check: str
    severity: Severity
    """info = worth knowing; warning = what reward hacking, a leak or a broken run looks like: look at the rows."""
    message: str
    value: float | None = None
    """The measured number."""
    threshold: float | None = None
    """What it was compared with, from the config."""
    rows: list[RowRef] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-like values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one check did."""

    check: str
    status: Status
    note: str
    """The numbers it saw, or why it does not apply."""
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class AuditReport:
    """The outcome of every check over one run."""

    run: str
    num_iterations: int
    num_answers: int
    outcomes: list[Outcome]

    @property
    def findings(self) -> list[Finding]:
        """All findings, warnings first, otherwise in the order of the checks."""
        found = [finding for outcome in self.outcomes for finding in outcome.findings]
        return sorted(found, key=lambda finding: finding.severity != "warning")

    @property
    def has_warnings(self) -> bool:
        return any(finding.severity == "warning" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-like values."""
        return asdict(self)


def checked(check: str, note: str, findings: list[Finding] | None = None) -> Outcome:
    """Return the outcome of a check that had its data."""
    return Outcome(check, "found" if findings else "clear", note, findings or [])


def not_applicable(check: str, reason: str) -> Outcome:
    """Return the outcome of a check that lacks data."""
    return Outcome(check, "not applicable", reason)


def graded(value: float, info_from: float, warning_from: float) -> tuple[Severity, float]:
    """Return how severe a value is that has reached ``info_from`` at least, and the threshold that says so."""
    return ("warning", warning_from) if value >= warning_from else ("info", info_from)


def row_refs(frame: pl.DataFrame, most: int = MOST_ROWS) -> list[RowRef]:
    """Return the first rows of a frame that has iteration and perhaps group_id and completion_id."""
    names = [name for name in ("iteration", "group_id", "completion_id") if name in frame.columns]
    return [RowRef(**row) for row in frame.select(names).head(most).iter_rows(named=True)]


def percent(value: float) -> str:
    """Return a share for a message: 0.256 -> "25.6 %"."""
    return f"{value * 100:.3g} %"
