"""What the artifacts of a plan will take: seconds and bytes, as measured for the like in the manifests of a run."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from flows.planning.planned import Planned, Verdict
from pipeline.artifact import open_artifact
from pipeline.chain import CHAIN, INITIAL, STEPS
from pipeline.manifest import is_finished
from pipeline.run_dir import RunDir

RECENT = 20
"""Iterations that are asked for what a step takes: the last ones."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What making artifacts takes. None = unknown."""

    seconds: float | None
    num_bytes: int | None
    source: str | None = None
    """The run that says so."""


@dataclass(slots=True)
class Total:
    """The sum of costs."""

    artifacts: int = 0
    seconds: float = 0.0
    num_bytes: int = 0
    unknown: int = 0
    """Artifacts whose cost is unknown; they are not in the sums."""

    def add(self, cost: Cost, num_artifacts: int) -> None:
        """Add what a step takes in an iteration."""
        self.artifacts += num_artifacts
        self.seconds += cost.seconds or 0.0
        self.num_bytes += cost.num_bytes or 0
        self.unknown += num_artifacts * (cost.seconds is None)


NOTHING = Cost(0.0, 0)


@dataclass(slots=True)
class Estimator:
    """Knows what the steps took in the runs that it is given, the first of them preferred."""

    runs: Sequence[RunDir]
    _measured: list[Mapping[str, Cost]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._measured = [_measure(run) for run in self.runs]

    def of_key(self, key: str) -> Cost:
        """Return the median of what a step of the chain, or an artifact of no iteration, took; see `key_of`."""
        return next((measured[key] for measured in self._measured if key in measured), Cost(None, None))

    def of(self, planned: Planned, run: RunDir) -> Cost:
        """Return what making the artifacts takes, batches that are trained on again included; nothing for a reuse."""
        if planned.verdict is Verdict.reuse:
            return NOTHING
        cost = self.of_key(key_of(planned, run))
        if not planned.again or cost.seconds is None:
            return cost
        update = self.of_key("update").seconds
        seconds = None if update is None else cost.seconds + update * len(planned.again)
        return Cost(seconds, cost.num_bytes, cost.source)


def key_of(planned: Planned, run: RunDir) -> str:
    """Return by what the cost of artifacts is known: their step, or their path in the run if of no iteration."""
    if planned.iteration is not None or not planned.main.is_relative_to(run.root):
        return planned.step
    return planned.main.relative_to(run.root).as_posix()


def _measure(run: RunDir) -> dict[str, Cost]:
    """Return what each step, and each artifact of no iteration, took in a run. Read-only."""
    found: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for index in [INITIAL, *run.iterations()[-RECENT:]]:
        for step in CHAIN:
            places = [run.place(index, dataset) for dataset in step.writes]
            if all(map(is_finished, places)):
                manifests = [open_artifact(place).manifest for place in places]
                num_bytes = sum(facts["bytes"] for m in manifests for facts in m.files.values())
                found[step.name].append((manifests[-1].seconds, num_bytes))
    for place in run.outside_iterations():
        key = place.relative_to(run.root).as_posix()
        if is_finished(place) and key not in {name for step in STEPS.values() for name in step.writes}:
            manifest = open_artifact(place).manifest
            found[key].append((manifest.seconds, sum(facts["bytes"] for facts in manifest.files.values())))
    return {
        key: Cost(median(s for s, _ in costs), int(median(b for _, b in costs)), run.name)
        for key, costs in found.items()
    }
