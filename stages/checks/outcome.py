"""What a check returns, how it is judged, and the row of the dataset `checks` that it becomes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

Frames = Mapping[str, pl.LazyFrame]
"""Dataset -> its rows, of one iteration."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one check has seen."""

    num_rows: int
    """Rows that it looked at."""
    num_failed: int
    failed_ids: list[str]
    """completion_id of the rows that failed, each once, in the order of the rows."""
    is_passed: bool
    note: str
    """The numbers it saw."""


Auditor = Callable[[str, Mapping[str, Any], Frames, int, Mapping[str, Any]], Outcome]
"""``auditor(check, thresholds, frames, iteration, facts)``: a check of `grpo audit` over one iteration's rows."""


def judged(rows: pl.DataFrame, max_share: float, note: str = "") -> Outcome:
    """Return the outcome of rows with completion_id and is_failed, of which ``max_share`` may have failed."""
    failed = rows.filter(pl.col("is_failed"))
    is_passed = failed.height <= max_share * rows.height
    ids = failed["completion_id"].unique(maintain_order=True).to_list()
    return Outcome(rows.height, failed.height, ids, is_passed, note or counted(failed.height, rows.height))


def counted(num_failed: int, num_rows: int) -> str:
    """Return how many of the rows failed, for people."""
    return f"{num_failed:,} of {num_rows:,} rows ({num_failed / max(num_rows, 1):.1%})"


def quarantined(checks: pl.DataFrame) -> list[str]:
    """Return the completion_id of each row that a check of severity quarantine keeps from training."""
    failed = checks.filter(pl.col("severity") == "quarantine", ~pl.col("passed"))
    return failed["failed_ids"].explode(empty_as_null=False).unique(maintain_order=True).to_list()


def blocking(checks: pl.DataFrame) -> pl.DataFrame:
    """Return the rows of the checks that hold the run."""
    return checks.filter(pl.col("severity") == "block", ~pl.col("passed"))
