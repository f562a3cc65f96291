"""replay: compute stored artifacts again from their stored inputs, into a scratch folder, and compare digests.

What `grpo verify` must take on trust is what only a model or a reward function can say. This is the check of it: tokens
and log probabilities from the engine, scores from the functions, weights from the update. The run is only read.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact, canonical_json, is_finished, open_artifact
from pipeline.compare import first_difference
from pipeline.errors import UsageError
from pipeline.run_dir import RunDir, open_run
from pipeline.stage import StageCall, run_stage
from pipeline.view import Format, print_rows
from stages.config import RunConfig, recorded_config
from stages.engines.base import Engine
from stages.evaluate import EvaluateResources
from stages.iteration import Wiring
from stages.rewards.scorer import Scorer

STAGES = ("prompts", "generate", "score", "normalize", "batch", "update", "evaluate")


@dataclass(frozen=True, slots=True)
class Replayed:
    """A stored artifact beside the one that was computed again."""

    iteration: int
    stage: str
    dataset: str
    result: str
    """equal; differs; other recipe = today's code or settings ask for something else, so nothing was computed."""
    stored: str
    computed: str | None
    found: str
    seconds: float

    @property
    def is_equal(self) -> bool:
        return self.result == "equal"


@dataclass(slots=True)
class Replayer:
    """Computes stages of a run again, and keeps the engine between them."""

    run: RunDir
    scratch: Path
    engine: Engine | None = None
    scorer: Scorer = field(default_factory=Scorer)
    config: RunConfig = field(init=False)

    def __post_init__(self) -> None:
        self.config = recorded_config(self.run)

    def call(self, stage: str, iteration: int) -> StageCall:
        """Return the call of a stage as the run would make it now. ``evaluate`` is of the policy after the update."""
        wiring = Wiring(self.config, self.run)
        calls = {name: getattr(wiring, name) for name in STAGES}
        call: StageCall = calls[stage](iteration + 1 if stage == "evaluate" else iteration)
        return call

    def replay(self, stage: str, iteration: int) -> Iterator[Replayed]:
        """Compute one stage again, and yield a comparison for each of its outputs. The run is only read."""
        call = self.call(stage, iteration)
        stored = {name: open_artifact(place) for name, place in call.places.items()}
        changed = changes(call, list(stored.values())[-1])
        if changed:
            for name, artifact in stored.items():
                yield Replayed(iteration, stage, name, "other recipe", artifact.digest, None, "; ".join(changed), 0.0)
            return
        folder = self.scratch / f"{iteration:06d}"
        places = {name: folder / name for name in call.places}
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        result = run_stage(replace(call, places=places), resources=self._resources(stage))
        seconds = round(time.monotonic() - started, 3)
        for name, artifact in result.outputs.items():
            is_equal = artifact.digest == stored[name].digest
            found = "" if is_equal else _first(name, stored[name], artifact)
            word = "equal" if is_equal else "differs"
            yield Replayed(iteration, stage, name, word, stored[name].digest, artifact.digest, found, seconds)

    def _resources(self, stage: str) -> Any:
        if stage == "score":
            return self.scorer
        if stage == "evaluate":
            return EvaluateResources(self._started_engine(), self.scorer)
        if stage == "generate":
            return self._started_engine()
        if stage == "update":
            from stages.update import Trainer, resolve_device

            return Trainer(device=resolve_device(self.config.resources.device))  # new: weights come from the files
        return None

    def _started_engine(self) -> Engine:
        if self.engine is None:
            from flows.session import engine_settings
            from stages.engines.process import EngineProcess

            engine = EngineProcess(engine_settings(self.config, self.run.initial_policy), self.scratch / "engine.log")
            engine.start(self.run.initial_policy)
            self.engine = engine
        return self.engine

    def close(self) -> None:
        """End the processes of engine and reward functions, if any were started."""
        self.scorer.close()
        if self.engine is not None:
            self.engine.close()


def changes(call: StageCall, stored: Artifact) -> list[str]:
    """Return in which respects the call's recipe differs from the stored artifact's: empty = it asks for the same."""
    wanted, manifest = call.recipe_parts(), stored.manifest
    found = []
    if (manifest.stage, manifest.stage_version) != (wanted["stage"], wanted["version"]):
        was, now = f"{manifest.stage} {manifest.stage_version}", f"{wanted['stage']} {wanted['version']}"
        found.append(f"stage {was}, now {now}")
    for key in sorted({*manifest.config, *wanted["config"]}):
        before, after = manifest.config.get(key), wanted["config"].get(key)
        if canonical_json(before) != canonical_json(after):
            found.append(f"{key} was {canonical_json(before)}, now {canonical_json(after)}")
    for name in sorted({*manifest.inputs, *wanted["inputs"]}):
        if manifest.inputs.get(name, {}).get("digest") != wanted["inputs"].get(name):
            found.append(f"another input {name}")
    return found


def _first(name: str, stored: Artifact, computed: Artifact) -> str:
    """Say where the rows or files part first."""
    differences = first_difference(name, stored, computed)
    if not differences:
        return "ids alone differ"
    parts = [f"{d.what} stored {str(d.a)[:60]}, computed {str(d.b)[:60]}" for d in differences]
    return f"{differences[0].where}: {'; '.join(parts)}"


def wanted_stages(run: RunDir, iteration: int, stage: str | None) -> list[str]:
    """Return the stages of an iteration whose results are stored, or the one that is asked for. Read-only.

    Raises:
        UsageError: when there is no such stage.
    """
    if stage is not None:
        if stage not in STAGES:
            raise UsageError(f"there is no stage {stage!r}: choose one of {', '.join(STAGES)}")
        return [stage]
    places = dict(
        zip(
            STAGES, ("prompts", "completions", "rewards", "advantages", "batches", "policy", "evaluations"), strict=True
        )
    )
    return [name for name in STAGES if is_finished(run.place(iteration, places[name]))]


def print_replay(
    path: str | Path,
    iterations: Sequence[int] | None,
    stage: str | None,
    format_: Format,
    *,
    scratch: Path | None = None,
    engine: Engine | None = None,
) -> bool:
    """Compute stages again, print a row for each artifact, and return whether all are equal. The run is only read.

    Args:
        path: the run.
        iterations: which ones; None = all.
        stage: one stage; None = all whose results are stored.
        format_: how to print.
        scratch: folder that keeps what is computed; None = a temporary one.
        engine: a running engine; None = one of the run's settings is started when it is needed.
    """
    run = open_run(path)
    folder = Path(tempfile.mkdtemp(prefix="grpo-replay-")) if scratch is None else scratch
    replayer = Replayer(run, folder, engine)
    rows: list[Replayed] = []
    try:
        for iteration in run.iterations() if iterations is None else iterations:
            for name in wanted_stages(run, iteration, stage):
                rows += replayer.replay(name, iteration)
            if scratch is None:
                shutil.rmtree(folder / f"{iteration:06d}", ignore_errors=True)
    finally:
        replayer.close()
        if scratch is None:
            shutil.rmtree(folder, ignore_errors=True)
    print_rows(
        [
            {
                "iteration": r.iteration,
                "stage": r.stage,
                "dataset": r.dataset,
                "result": r.result,
                "stored": r.stored[:16] if format_ is Format.table else r.stored,
                "computed": r.computed and (r.computed[:16] if format_ is Format.table else r.computed),
                "seconds": r.seconds,
                "found": r.found,
            }
            for r in rows
        ],
        format_,
        columns=("iteration", "stage", "dataset", "result", "stored", "computed", "seconds", "found"),
    )
    return bool(rows) and all(row.is_equal for row in rows)
