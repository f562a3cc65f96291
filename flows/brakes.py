"""What follows from the checks of an iteration: lines for the user, a held run, room for a repaired one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.reporter import Reporter
from pipeline.artifact import Artifact, open_artifact
from pipeline.errors import CheckFailed
from pipeline.manifest import is_finished
from pipeline.run_dir import RunDir
from pipeline.stage import StageCall
from pipeline.writer import remove_artifact
from stages.checks.outcome import blocking
from stages.config import RunConfig, is_held

IDS_SHOWN = 3
REMADE = ("score", "logprobs", "normalize")
"""Steps of a held iteration that may be made again: nothing has been trained on what they wrote."""
AFTER_CHECKS = ("check", "batch")
"""Steps that may be made again while the iteration has not trained, because the checks may change."""


def set_aside(
    config: RunConfig, run: RunDir, call: StageCall[Any, Any], iteration: int, note: Callable[[str], None]
) -> None:
    """Move what a repaired reward, or another check, takes the place of to `RunDir.held`: nothing was trained on it."""
    main = list(call.places.values())[-1]
    if not is_finished(main) or not may_change(config, run, call.stage.name, iteration):
        return
    found = open_artifact(main)
    if found.manifest.recipe != call.recipe():
        aside = _move(run, iteration, found)
        note(f"iteration {iteration}: {found.manifest.dataset} are made again; those before are in {run.shown(aside)}")


def may_change(config: RunConfig, run: RunDir, step: str, iteration: int) -> bool:
    """Return whether another artifact may take the place of what a step has left. Read-only."""
    if is_finished(run.place(iteration, "policy")):
        return False
    if step in AFTER_CHECKS:
        return config.executes("check", iteration)
    return step in REMADE and is_held(run, iteration)


def lift_hold(run: RunDir, iteration: int, note: Callable[[str], None]) -> None:
    """Move the checks that hold an iteration to `RunDir.held`: the config has none any more."""
    if is_held(run, iteration):
        aside = _move(run, iteration, run.open(iteration, "checks"))
        note(f"iteration {iteration}: nothing holds it any more; the checks that did are in {run.shown(aside)}")


def _move(run: RunDir, iteration: int, found: Artifact) -> Path:
    """Move an artifact to `RunDir.held`; the same rows may be there already, of an earlier attempt."""
    aside = run.held(iteration, found.manifest.dataset, found.digest)
    if is_finished(aside):
        remove_artifact(found.path)
        return aside
    aside.parent.mkdir(parents=True, exist_ok=True)
    found.path.rename(aside)
    return aside


def report(run: RunDir, iteration: int, checks: Artifact, reporter: Reporter) -> None:
    """Tell of every check that failed.

    Raises:
        CheckFailed: when one of severity block has.
    """
    rows = checks.read()
    for row in rows.filter(~rows["passed"]).to_dicts():
        reporter.check(iteration, row)
        if row["severity"] == "warn":
            reporter.note(f"warning: iteration {iteration}: {_said(row)}")
        elif row["severity"] == "quarantine":
            reporter.note(f"iteration {iteration}: {_said(row)}; {len(row['failed_ids']):,} completions do not train")
    refuse_held(run, iteration, checks)


def refuse_held(run: RunDir, iteration: int, checks: Artifact) -> None:
    """Raise CheckFailed when a check of severity block holds the iteration."""
    rows = blocking(checks.read()).to_dicts()
    if not rows:
        return
    shown = run.shown(run.place(iteration, "rewards"))
    more = f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
    new = (
        f"the same command goes on from the stored completions after the reward is repaired, or once {shown} is deleted"
        if iteration == 0
        else f"a repaired reward goes on in a fork from the stored completions (grpo fork {run.name} CONFIG --at "
        f"{iteration}); the same command goes on with other [[checks]], or once {shown} is deleted"
    )
    raise CheckFailed(
        f"iteration {iteration} of {run.name} is held by {_said(rows[0])}{more}: nothing was trained on it; look at "
        f"`grpo rows {run.name} checks -i {iteration}`; {new}, which scores it again"
    )


def _said(row: dict[str, Any]) -> str:
    ids = row["failed_ids"]
    named = f", among them {', '.join(ids[:IDS_SHOWN])}" if ids else ""
    limit = f", at most {row['max_share']:.1%} may" if row["max_share"] is not None else ""
    return f"check {row['name']!r} ({row['condition']}): {row['note']}{named}{limit}"
