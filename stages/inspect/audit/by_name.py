"""A check of the audit by its name, over the rows of one iteration: for `[[checks]]` of a run's config."""

from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl

from pipeline.config import validate
from pipeline.errors import ConfigError
from stages.checks.config import SHIPPED, AuditCheck, CheckConfig
from stages.checks.outcome import Frames, Outcome
from stages.inspect.audit.audit import CHECKS
from stages.inspect.audit.findings import Finding
from stages.inspect.audit.findings import Outcome as Found
from stages.inspect.audit.run_rows import iteration_rows
from stages.inspect.audit.thresholds import AuditConfig

OF_A_RUN = frozenset(
    {
        "rewarded_phrase",
        "reward_against_reference",
        "held_out_leak",
        "evaluation_gap",
        "saturation",
        "class_change",
        "jumps",
    }
)
"""Checks that compare iterations, or training with evaluation: one iteration alone says nothing to them."""


def check_audits(checks: Iterable[CheckConfig], *, of_a_run: bool = False) -> None:
    """Check that the audit knows the checks that are not those that ship, and their thresholds.

    Raises:
        ConfigError: naming the check; unless ``of_a_run``, also for one that needs more than an iteration.
    """
    for check in checks:
        if not isinstance(check, AuditCheck):
            continue
        if check.check not in CHECKS:
            known = ", ".join([*SHIPPED, *CHECKS])
            raise ConfigError(f"checks has check = {check.check!r}, expected one of {known}: correct the name")
        if check.check in OF_A_RUN and not of_a_run:
            raise ConfigError(
                f"checks has {check.check!r}, which compares iterations, and a check sees one of them: leave it to "
                "`grpo audit`, or to the file of `grpo check --checks`"
            )
        thresholds_of(check)


def thresholds_of(check: AuditCheck) -> AuditConfig:
    """Return a check's thresholds: the defaults of the audit where it says nothing.

    Raises:
        ConfigError: when it names a threshold that does not exist.
    """
    return validate(AuditConfig, check.thresholds, f"thresholds of the check {check.name!r}")


def audit_iteration(
    check: str, thresholds: Mapping[str, Any], frames: Frames, iteration: int, facts: Mapping[str, Any]
) -> Outcome:
    """Return the outcome of one check of the audit over one iteration; it fails when it has a warning.

    Raises:
        ConfigError: when it does not exist, or a threshold does not.
    """
    check_audits([named := AuditCheck(check=check, name=check, thresholds=dict(thresholds))])
    config = thresholds_of(named)
    rows = iteration_rows(frames, iteration, config, facts)
    return outcome_of(CHECKS[check](rows, config), rows.completions)


def outcome_of(found: Found, completions: pl.DataFrame) -> Outcome:
    """Return what the audit found as the outcome of a check."""
    warnings = [finding for finding in found.findings if finding.severity == "warning"]
    ids = [i for finding in warnings for i in _completion_ids(finding, completions)]
    failed = list(dict.fromkeys(ids))
    note = "; ".join(finding.message for finding in warnings) or f"{found.status}: {found.note}"
    return Outcome(completions.height, len(failed), failed, not warnings, note)


def _completion_ids(finding: Finding, completions: pl.DataFrame) -> list[str]:
    """Return the completions that a finding shows; of a group all members."""
    ids: list[str] = []
    for row in finding.rows:
        if row.completion_id is not None:
            ids.append(row.completion_id)
        elif row.group_id is not None:
            ids += completions.filter(pl.col("group_id") == row.group_id)["completion_id"].to_list()
    return ids
