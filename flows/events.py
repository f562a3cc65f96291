"""The events that a Prefect server is told of runs: their names, and what they carry. Alerts act on them."""

import math
from collections.abc import Mapping
from typing import Any

ITERATION_FINISHED = "grpo.iteration.finished"
CHECK_FAILED = "grpo.check.failed"
REWARD_COLLAPSED = "grpo.reward.collapsed"
VERIFY_FAILED = "grpo.verify.failed"
ALERT_TEST = "grpo.alert.test"
HEARTBEAT = "grpo.flow-run.heartbeat"
"""Of every process that works for a flow run. How often Prefect's own comes is a setting of whoever serves the flow."""
ENDED = "grpo.flow-run.ended"
"""Of a process that works no more for a flow run, however that ended: no heartbeat is to be expected."""
COLLAPSE_CHECK = "reward_not_collapsed"
MOST_IDS = 20
"""Failed rows that an event names; the dataset `checks` has them all."""
LONGEST_TEXT = 1000
"""Characters of a text in an event."""

Payload = dict[str, Any]
"""Numbers, texts and lists of texts, as JSON has them."""


def emit(event: str, run: str, path: str, payload: Payload) -> None:
    """Send an event about a run to Prefect, related to the flow run in which this is called. Never waits.

    Args:
        event: its name, of those above.
        run: the last part of the run's path or URL.
        path: the run's path or URL.
        payload: what it carries, besides the run.
    """
    from prefect.events import emit_event

    labels = {"prefect.resource.id": f"grpo.run.{run}", "prefect.resource.name": run, "grpo.path": path}
    emit_event(event, labels, payload={"run": run, "path": path, **payload})


def of_iteration(row: Mapping[str, Any]) -> Payload:
    """Return the payload of a finished iteration: the figures of its row of `metrics.parquet` that are known."""
    figures = {name: value for name, value in row.items() if _is_figure(value)}
    shown = {"reward": row["reward_mean"], "pass rate": row["pass_rate"], "held-out": row["eval_pass_at_1"]}
    said = ", ".join(f"{name} {value:.3f}" for name, value in shown.items() if value is not None)
    return {**figures, "message": f"iteration {row['iteration']} has finished{f': {said}' if said else ''}"}


def of_check(iteration: int, row: Mapping[str, Any]) -> Payload:
    """Return the payload of a failed check from its row of the dataset `checks`."""
    said = f"iteration {iteration}: check {row['name']!r} ({row['severity']}) has failed: {row['note']}"
    return {
        "iteration": iteration,
        "check": row["name"],
        "severity": row["severity"],
        "condition": row["condition"][:LONGEST_TEXT],
        "num_rows": row["num_rows"],
        "num_failed": row["num_failed"],
        "failed_ids": row["failed_ids"][:MOST_IDS],
        "message": f"{said}; condition: {row['condition']}"[:LONGEST_TEXT],
    }


def is_collapsed(metrics: Mapping[str, Any]) -> bool:
    """Return whether the rewards of a finished iteration have collapsed: in no group do they differ."""
    return bool(metrics["zero_variance_share"] == 1.0)


def is_collapse(check: Mapping[str, Any]) -> bool:
    """Return whether a failed check says that rewards have collapsed; the config may give it any name."""
    return str(check["condition"]).partition(" ")[0] == COLLAPSE_CHECK


def of_collapse(iteration: int, why: str) -> Payload:
    """Return the payload of rewards that have collapsed."""
    return {
        "iteration": iteration,
        "message": f"iteration {iteration}: the rewards have collapsed: {why}"[:LONGEST_TEXT],
    }


def _is_figure(value: object) -> bool:
    return isinstance(value, int | str) or (isinstance(value, float) and math.isfinite(value))
