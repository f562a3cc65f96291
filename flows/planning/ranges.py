"""A plan in lines for people: consecutive iterations with the same verdicts stand in one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from flows.planning.estimate import Cost, Total, key_of
from flows.planning.plan import Plan, because
from flows.planning.planned import Planned, Reason, Verdict
from pipeline.chain import INITIAL, STEPS, From, When

COLUMNS = ("iterations", "steps", "verdict", "because", "seconds", "bytes", "unknown")
OUTSIDE = -2
"""Stands for artifacts of no iteration."""


@dataclass(slots=True)
class Line:
    """Artifacts of one verdict, for one reason, in an iteration or in several."""

    steps: tuple[str, ...]
    """Those of one place: paths in the run, of artifacts of no iteration."""
    verdict: Verdict
    because: str
    first: int
    last: int
    total: Total = field(default_factory=Total)

    @property
    def key(self) -> tuple[Any, ...]:
        """What lines of several iterations must have in common to be one."""
        return self.steps, self.verdict, self.because

    def row(self) -> dict[str, Any]:
        """Return the line as a row of COLUMNS."""
        known = self.total.unknown < self.total.artifacts
        return {
            "iterations": _iterations(self.first, self.last),
            "steps": " ".join(self.steps),
            "verdict": self.verdict.name,
            "because": self.because,
            "seconds": round(self.total.seconds, 1) if known else None,
            "bytes": self.total.num_bytes if known else None,
            "unknown": self.total.unknown,
        }


def lines(plan: Plan) -> list[Line]:
    """Return the lines of a plan: what belongs to no iteration, the evaluations, then ranges of iterations."""
    outside = [item for item in plan.artifacts if item[0].iteration is None]
    evaluations = [item for item in plan.artifacts if _is_evaluation(item[0])]
    rest = [item for item in plan.artifacts if item[0].iteration is not None and not _is_evaluation(item[0])]
    found = [line for item in outside for line in _of_iteration(plan, OUTSIDE, [item])]
    found += _ranges(plan, evaluations, has_gaps=True)
    return found + _ranges(plan, rest, has_gaps=False)


def _is_evaluation(planned: Planned) -> bool:
    return planned.iteration is not None and STEPS[planned.step].when is When.evaluation


def _ranges(plan: Plan, items: Sequence[tuple[Planned, Cost]], *, has_gaps: bool) -> list[Line]:
    """Return the lines of iterations, those of neighbours with the same verdicts put together."""
    by_iteration: dict[int, list[tuple[Planned, Cost]]] = {}
    for planned, cost in items:
        assert planned.iteration is not None
        by_iteration.setdefault(planned.iteration, []).append((planned, cost))
    groups: list[list[Line]] = []
    for index in sorted(by_iteration):
        now = list(_of_iteration(plan, index, by_iteration[index]))
        before = groups[-1] if groups else []
        is_next = bool(before) and (has_gaps or before[0].last == index - 1)
        if is_next and [line.key for line in before] == [line.key for line in now]:
            for old, new in zip(before, now, strict=True):
                old.last = index
                _join(old.total, new.total)
        else:
            groups.append(now)
    return [line for group in groups for line in group]


def _join(total: Total, more: Total) -> None:
    total.artifacts += more.artifacts
    total.seconds += more.seconds
    total.num_bytes += more.num_bytes
    total.unknown += more.unknown


def _of_iteration(plan: Plan, index: int, items: Sequence[tuple[Planned, Cost]]) -> Iterator[Line]:
    """Yield a line for each verdict and reason, in the order of the run."""
    together: dict[tuple[Any, ...], list[tuple[Planned, Cost]]] = {}
    for planned, cost in items:
        alone = because(planned) if planned.reason is not Reason.inputs else planned.inputs_are_refused
        together.setdefault((planned.verdict, planned.reason, alone, planned.again), []).append((planned, cost))
    for (verdict, *_), found in together.items():
        members = [planned for planned, _ in found]
        datasets = [name for planned in members for name in planned.places]
        inputs = list(dict.fromkeys(name for planned in members for name in _from_outside(planned, datasets)))
        steps = [key_of(planned, plan.run) if index == OUTSIDE else planned.step for planned in members]
        line = Line(tuple(steps), verdict, because(members[0], inputs or members[0].inputs), index, index)
        for planned, cost in found:
            line.total.add(cost, len(planned.places))
        yield line


def _from_outside(planned: Planned, datasets: Sequence[str]) -> Iterator[str]:
    """Yield the inputs that are none of the datasets of the same line."""
    reads = STEPS[planned.step].reads if planned.step in STEPS else {}
    for name in planned.inputs:
        is_inside = name in datasets and reads.get(name) in (From.here, From.if_made, From.after)
        if not is_inside:
            yield name


def _iterations(first: int, last: int) -> str:
    if first == OUTSIDE:
        return ""
    name = "initial" if first == INITIAL else str(first)
    return name if first == last else f"{name} to {last}"
