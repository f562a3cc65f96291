"""check: an iteration's rows -> what the run's checks say of them, before anything trains on them.

One row per check of `[[checks]]`. What follows from a check that fails is not decided here: the flow stops for a
``block``, and `batch` drops the rows of a ``quarantine``.
"""

from collections.abc import Mapping
from typing import Any

import polars as pl

from pipeline.manifest import canonical_json
from pipeline.schema import SCHEMAS
from pipeline.stage import Stage, StageTask
from stages.checks.conditions import check_condition
from stages.checks.config import AuditCheck, CheckConfig, CheckStageConfig, Condition
from stages.checks.outcome import Auditor, Frames, Outcome
from stages.checks.shipped import Shipped, check_shipped

DATASET = {
    "groups_inform": "advantages",
    "judge_answered": "rewards",
    "reward_not_collapsed": "advantages",
}
"""Check that ships -> the dataset whose rows it counts; the others count completions."""


def check_rows(
    config: CheckStageConfig, frames: Frames, parameters: Mapping[str, Any], auditor: Auditor | None
) -> pl.DataFrame:
    """Return one row per check.

    Args:
        config: the checks.
        frames: dataset -> rows of the iteration; training_records are those of the iteration before.
        parameters: ``iteration``; ``is_offline``, whether another run's completions feed it; ``audited``, what of the
            run's config the audit reads.
        auditor: makes the checks that `grpo audit` knows; None where there is none.
    """
    return _frame([_row(check, _outcome(check, frames, parameters, auditor)) for check in config.checks])


def audit_row(check: AuditCheck, outcome: Outcome) -> pl.DataFrame:
    """Return the row of a check of the audit, made over whichever rows."""
    return _frame([_row(check, outcome)])


def _frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=pl.DataFrame(SCHEMAS["checks"].empty_table()).schema)


def _outcome(check: CheckConfig, frames: Frames, parameters: Mapping[str, Any], auditor: Auditor | None) -> Outcome:
    iteration = parameters["iteration"]
    if isinstance(check, Condition):
        return check_condition(check.where, check.dataset, check.max_share, frames)
    if isinstance(check, AuditCheck):
        assert auditor is not None, "whoever computes this stage brings the auditor"
        return auditor(check.check, check.thresholds, frames, iteration, parameters["audited"])
    return check_shipped(check, frames, iteration, is_offline=parameters.get("is_offline", False))


def _row(check: CheckConfig, outcome: Outcome) -> dict[str, Any]:
    if isinstance(check, Condition):
        facts = {"dataset": check.dataset, "condition": check.where, "max_share": check.max_share}
    else:
        share = None if isinstance(check, AuditCheck) else check.max_share
        dataset = DATASET.get(check.check, "completions")
        facts = {"dataset": dataset, "condition": _described(check), "max_share": share}
    return {
        "name": check.name,
        "severity": check.severity,
        **facts,
        "num_rows": outcome.num_rows,
        "num_failed": outcome.num_failed,
        "failed_ids": outcome.failed_ids,
        "passed": outcome.is_passed,
        "note": outcome.note,
    }


def _described(check: Shipped | AuditCheck) -> str:
    """Return a check's name with its options."""
    options = check.model_dump(mode="json", exclude={"check", "name", "severity", "max_share"})
    fields = type(check).model_fields
    given = {n: value for n, value in options.items() if value != {} and (value, fields[n].default) != (None, None)}
    return f"{check.check} {canonical_json(given)}" if given else check.check


def compute(task: StageTask[CheckStageConfig, Auditor | None]) -> None:
    """Write the outcome of every check. ``task.resources`` makes the audit's."""
    frames = {name: artifact.scan() for name, artifact in task.inputs.items()}
    task.writer.write_part(0, check_rows(task.config, frames, task.parameters, task.resources))


STAGE = Stage("check", version=1, config=CheckStageConfig, compute=compute, wants=("iteration",))
