"""The plan of a run: what would be reused and made, what it takes, and what would stop it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flows.planning.estimate import Cost, Estimator, Total
from flows.planning.planned import Planned, Reason, Verdict
from flows.planning.rehearsal import rehearse
from flows.prepare import check
from pipeline.config import deciding
from pipeline.errors import GrpoError, RecipeMismatch
from pipeline.files import WRITER_LOCK, is_locked
from pipeline.run_dir import RunDir
from stages.config import RunConfig, recorded_config, setting_changes
from stages.preflight import remarks

PLAN_VERSION = 1
"""Of the document; raised when a field changes its meaning or goes."""


@dataclass(frozen=True, slots=True)
class Way:
    """A command that does with stored completions what a refused run would not."""

    command: str
    does: str
    total: Total


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run of a config would do."""

    config: str
    run: RunDir
    artifacts: Sequence[tuple[Planned, Cost]]
    """In the order of the run."""
    refusals: Sequence[str]
    """What stops the run; the first one is what it says."""
    is_of_other_recipe: bool
    """What is stored in the run directory was made with other settings, inputs or functions."""
    notes: Sequence[str]

    def totals(self) -> dict[Verdict, Total]:
        """Return artifacts, seconds and bytes by verdict."""
        totals = {verdict: Total() for verdict in Verdict}
        for planned, cost in self.artifacts:
            totals[planned.verdict].add(cost, len(planned.places))
        return totals


def make_plan(settings: RunConfig, run: RunDir, estimator: Estimator, config: str = "") -> Plan:
    """Return the plan of a run. Read-only.

    Args:
        settings: the config with its overrides.
        run: the run directory, which need not exist.
        estimator: knows what the steps take.
        config: where the settings come from, for readers.
    """
    refusals: list[str] = []
    is_other, artifacts = False, []
    notes = remarks(settings)
    try:
        check(settings, run, "")
    except GrpoError as error:
        refusals.append(str(error))
        is_other = isinstance(error, RecipeMismatch)
    if is_locked(run.root / WRITER_LOCK):
        notes.append(f"a process is writing {run.name}: until it ends, no other run can begin there")
    try:
        rehearsal = rehearse(settings, run)
        artifacts = list(rehearsal.planned.values())
        notes += rehearsal.notes()
    except GrpoError as error:  # for example a source that is gone
        refusals.append(str(error))
    refusals += [planned.error for planned in artifacts if planned.verdict is Verdict.refuse and planned.error]
    is_other = is_other or any(planned.reason is Reason.recipe for planned in artifacts)
    for other in estimator.runs:
        if other.root != run.root and (odd := _unlike(other, settings)):
            notes.append(f"{other.name}, which says what steps take, was made with other settings: {odd}")
    costs = [(planned, estimator.of(planned, run)) for planned in artifacts]
    return Plan(config, run, costs, list(dict.fromkeys(refusals)), is_other, notes)


def _unlike(like: RunDir, settings: RunConfig) -> str:
    """Return the settings that differ from those of the run that costs are taken from, as text."""
    changes = setting_changes(deciding(recorded_config(like)), deciding(settings))
    return "; ".join(f"{c.setting} was {_short(c.was)}, now {_short(c.now)}" for c in changes)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def document(plan: Plan, ways: Sequence[Way] = ()) -> dict[str, Any]:
    """Return the plan as JSON-like values; docs/commands.md names its fields."""
    return {
        "plan_version": PLAN_VERSION,
        "config": plan.config,
        "run": plan.run.name,
        "is_refused": bool(plan.refusals),
        "refusals": list(plan.refusals),
        "notes": list(plan.notes),
        "artifacts": [_artifact(plan.run, planned, cost) for planned, cost in plan.artifacts],
        "totals": {verdict.name: _told(total) for verdict, total in plan.totals().items()},
        "ways": [{"command": way.command, "does": way.does, **_told(way.total)} for way in ways],
    }


def _told(total: Total) -> dict[str, Any]:
    return {
        "artifacts": total.artifacts,
        "seconds": round(total.seconds, 3),
        "bytes": total.num_bytes,
        "unknown": total.unknown,
    }


def _artifact(run: RunDir, planned: Planned, cost: Cost) -> dict[str, Any]:
    return {
        "step": planned.step,
        "iteration": planned.iteration,
        "datasets": list(planned.places),
        "path": run.shown(planned.main),
        "verdict": planned.verdict.name,
        "reason": planned.reason.name,
        "because": because(planned),
        "inputs": list(planned.inputs),
        "differences": [
            {"part": odd.part, "name": odd.name, "was": odd.a, "now": odd.b} for odd in planned.differences
        ],
        "trained_again": list(planned.again),
        "seconds": cost.seconds,
        "bytes": cost.num_bytes,
        "measured_in": cost.source,
    }


def because(planned: Planned, inputs: Sequence[str] | None = None) -> str:
    """Return the reason as a sentence; ``inputs`` are those that it names, all by default."""
    names = planned.inputs if inputs is None else inputs
    named = f"input{'s' if len(names) > 1 else ''} {', '.join(names)}"
    are = "are" if len(names) > 1 else "is"
    text = str(planned.reason)
    match planned.reason:
        case Reason.inputs if planned.verdict is Verdict.compute:
            text = f"{named} {are} refused" if planned.inputs_are_refused else f"{named} will be computed"
        case Reason.inputs if planned.verdict is Verdict.reuse:
            text = f"stored; used if {named} come out as before, else the run stops here"
        case Reason.inputs:
            text = f"stored, but {named} {are} refused"
        case Reason.recipe:
            text = "; ".join(_difference(planned.step, *odd) for odd in planned.differences)
        case Reason.unusable | Reason.held:
            text = planned.error
    if planned.again:
        first, last = planned.again[0], planned.again[-1]
        text += f"; the stored batches of iterations {first} to {last} are trained on again for it"
    return text


def _difference(step: str, part: str, name: str, was: Any, now: Any) -> str:
    if part == "input":
        return f"its input {name} is another one"
    if part == "stage":
        return f"it was made by version {was}, now {now}"
    if isinstance(was, dict) and isinstance(now, dict):
        odd = [key for key in sorted({*was, *now}) if was.get(key) != now.get(key)]
        return f"{step}.{name} differs in {', '.join(odd)}"
    return f"{step}.{name} was {_short(was)}, now {_short(now)}"
