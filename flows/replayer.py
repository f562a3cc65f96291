"""Computes stored artifacts again from their stored inputs, into a scratch folder, and compares them.

On the same kind of machine they are equal to the bit. Another machine sums in another order: then every tensor and
column of floats must be within a tolerance, and everything else must be equal.

`grpo verify` must trust what only a model or a reward function can compute. Replay checks it: tokens and log
probabilities from the engine, scores from the functions, weights from the update. The run is only read.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact, open_artifact
from pipeline.chain import CHAIN, INITIAL, STEPS, When
from pipeline.errors import UsageError
from pipeline.files import remove_tree
from pipeline.manifest import canonical_json, is_finished, recipe_differences
from pipeline.prune import has_weights, is_resumable
from pipeline.reading import shorten
from pipeline.run_dir import RunDir
from pipeline.stage import run_stage
from stages.checkpoints import copy_tokenizer
from stages.config import RunConfig, recorded_config
from stages.engines.base import Engine
from stages.inspect.artifact_diff import TOLERANCE, Deviation, deviations, machine_changes, timed_out_rows
from stages.inspect.audit.by_name import audit_iteration
from stages.rewards.scorer import Scorer
from stages.trainers.base import Trainer
from stages.wiring import FUNCTIONS, Call, Wiring

DATASET_OF = {step.name: step.writes[-1] for step in CHAIN if step.when is not When.late}
"""Step -> its main dataset. A late step is compared with the step that it belongs to."""
STAGES = tuple(DATASET_OF)
NOT_COMPUTED = "not computed"


@dataclass(frozen=True, slots=True)
class Replayed:
    """A stored artifact, compared with the one that was computed again."""

    iteration: int
    stage: str
    dataset: str
    result: str
    """equal = to the bit; close = within the tolerance; differs; timed out = differs, but only in rewards for which
    time ran out in one of both; other recipe = the current code or settings have another recipe, so nothing was
    computed; not computed = an input is gone and cannot be made again."""
    stored: str
    computed: str | None
    found: str
    seconds: float
    deviations: Sequence[Deviation] = ()
    """The columns or tensors that are not equal to the bit."""
    machine: Sequence[str] = ()
    """How the machine differs from the one that stored the artifact; empty where the artifacts are equal."""

    @property
    def is_fine(self) -> bool:
        return self.result in ("equal", "close")


@dataclass(slots=True)
class Replayer:
    """Computes stages of a run again, and keeps the engine between them."""

    run: RunDir
    scratch: Path
    engine: Engine | None = None
    tolerance: float = TOLERANCE
    scorer: Scorer = field(default_factory=Scorer)
    config: RunConfig = field(init=False)
    _trainer: Trainer | None = None
    _made_again: dict[int, Artifact] = field(default_factory=dict)
    """Number of updates -> the policy whose dropped weights are in the scratch folder."""

    def __post_init__(self) -> None:
        self.config = recorded_config(self.run)

    def replay(self, stage: str, iteration: int) -> Iterator[Replayed]:
        """Compute one stage again, and yield a comparison for each of its outputs. The run is only read."""
        call = Wiring(self.config, self.run, imports=False).call(stage, iteration)
        stored = {name: open_artifact(place) for name, place in call.places.items()}
        main = list(stored.values())[-1]
        changed = changes(call, main, ignored=FUNCTIONS)
        if not changed:  # else nothing that the config names is imported
            call = Wiring(self.config, self.run).call(stage, iteration)
            changed = changes(call, main)
        if changed:
            for name, artifact in stored.items():
                yield Replayed(iteration, stage, name, "other recipe", artifact.digest, None, "; ".join(changed), 0.0)
            return
        call = replace(call, inputs=self._with_weights(call, iteration))
        folder = self.scratch / f"{iteration:06d}"
        places = {name: folder / name for name in call.places}
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        resources = self._resources(stage, iteration)
        outputs = dict(run_stage(replace(call, places=places), resources).outputs)
        if stage == "update" and is_finished(self.run.place(iteration, "optimizer")):
            stored["optimizer"] = self.run.open(iteration, "optimizer")
            outputs["optimizer"] = self._optimizer(resources, iteration, outputs["policy"], folder)
        seconds = round(time.monotonic() - started, 3)
        for name, artifact in outputs.items():
            digests = stored[name].digest, artifact.digest
            # contents, not digests: a state's digest vouches for its policy too, which may differ a little
            if stored[name].manifest.content == artifact.manifest.content:
                yield Replayed(iteration, stage, name, "equal", *digests, "", seconds)
                continue
            odd = deviations(name, stored[name], artifact, self.tolerance)
            word, found = "close" if all(d.is_close for d in odd) else "differs", _found(odd)
            if word == "differs" and (late := timed_out_rows(name, stored[name], artifact, odd)):
                word, found = "timed out", late
            machine = machine_changes(stored[name], artifact)
            yield Replayed(iteration, stage, name, word, *digests, found, seconds, odd, machine)

    def _optimizer(self, trainer: Trainer, iteration: int, policy: Artifact, folder: Path) -> Artifact:
        """Return the state of the trainer that has just made the policy."""
        call = Wiring(self.config, self.run).call("optimizer", iteration)
        call = replace(call, inputs={"policy": policy}, places={"optimizer": folder / "optimizer"})
        return run_stage(call, trainer).main

    def _resources(self, stage: str, iteration: int) -> Any:
        makers: dict[str, Callable[[], Any]] = {
            "engine": self._started_engine,
            "scorer": lambda: self.scorer,
            "auditor": lambda: audit_iteration,
            "trainer": lambda: self._trainer_at(iteration),
        }
        found = tuple(makers[name]() for name in STEPS[stage].uses)
        return found[0] if len(found) == 1 else found or None

    def _trainer_at(self, num_updates: int) -> Trainer:
        """Return a trainer with the weights in the files; with those made again where they were dropped.

        Dropped ones follow from the last policy before that has its weights and its state, and have the stored hash.
        """
        from stages.trainers.local import LocalTrainer, resolve_device
        from stages.trainers.resume import resume

        policy = open_artifact(self.run.policy_before(num_updates))
        is_there = has_weights(policy) and (num_updates == 0 or is_resumable(policy))
        if self._trainer is None or is_there or not self._trainer.is_at(policy):
            if self._trainer is not None:
                self._trainer.close()
            self._trainer = LocalTrainer(device=resolve_device(self.config.resources.device))
        resume(self._trainer, self.run, self.config.update, num_updates, is_stored=False)
        return self._trainer

    def _with_weights(self, call: Call, iteration: int) -> dict[str, Artifact]:
        """Return the call's inputs, of the run's policies without weights those made again in the scratch folder."""
        wanted = self.config.needed_policies(max(iteration, 0)) | {iteration, iteration + 1}
        for old in sorted(self._made_again.keys() - wanted):
            remove_tree(self._made_again.pop(old).path)
        return {name: self._whole(artifact) for name, artifact in call.inputs.items()}

    def _whole(self, artifact: Artifact) -> Artifact:
        num_updates = self.run.num_updates(artifact.path)
        if not num_updates or has_weights(artifact):  # an initial policy cannot be made again
            return artifact
        if num_updates not in self._made_again:
            trainer = self._trainer_at(num_updates)
            place = self.scratch / "policies" / f"{num_updates:06d}"
            remove_tree(place)
            place.mkdir(parents=True)
            copy_tokenizer(artifact.path, place)
            trainer.save_policy(place, artifact.manifest.recipe)
            self._made_again[num_updates] = Artifact(place, artifact.manifest)
        return self._made_again[num_updates]

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
        if self._trainer is not None:
            self._trainer.close()


def changes(call: Call, stored: Artifact, ignored: Collection[str] = ()) -> list[str]:
    """Return the differences between the call's recipe and the stored artifact's, but for some parameters."""
    found = []
    for part, name, was, now in recipe_differences(stored.manifest.recipe_parts(), call.recipe_parts()):
        if part == "stage":
            found.append(f"stage {was}, now {now}")
        elif part == "config":
            if name in ignored:
                continue
            found.append(f"{name} was {canonical_json(was)}, now {canonical_json(now)}")
        else:
            found.append(f"another input {name}")
    return found


def _found(odd: Sequence[Deviation]) -> str:
    """Return what is not equal: the first row or part beyond the tolerance, else the largest difference."""
    if not odd:
        return "equal values, other bytes on disk"
    beyond = [d for d in odd if not d.is_close]
    if not beyond:
        worst = max(odd, key=lambda d: d.relative or 0.0)
        return f"{len(odd)} within the tolerance, at most {_relative(worst)} in {worst.name}"
    first = min(beyond, key=lambda d: -1 if d.row is None else d.row)
    same = [d for d in beyond if d.where == first.where] if first.where else [first]
    parts = [_difference(d) for d in same]
    more = f" (and {len(beyond) - len(same)} more)" if len(beyond) > len(same) else ""
    return f"{first.where or first.part or 'rows'}: {'; '.join(parts)}{more}"


def _difference(odd: Deviation) -> str:
    if odd.a is None and odd.b is None and odd.row is None:
        of = "" if odd.relative is None else " of its largest magnitude"
        return f"{odd.name} differs by {_relative(odd)}{of}"
    return f"{odd.name} stored {shorten(odd.a)}, computed {shorten(odd.b)}"


def _relative(odd: Deviation) -> str:
    return "what no tolerance covers" if odd.relative is None else f"{odd.relative:.2g}"


def not_computed(iteration: int, stage: str, error: str) -> Replayed:
    """Return the result for an artifact that could not be computed."""
    return Replayed(iteration, stage, DATASET_OF[stage], NOT_COMPUTED, "", None, error, 0.0)


def wanted_stages(run: RunDir, iteration: int, stage: str | None) -> list[str]:
    """Return the stages of an iteration whose results are stored; with ``stage``, only that one. Read-only.

    Raises:
        UsageError: when there is no such stage.
    """
    if stage is not None and stage not in STAGES:
        raise UsageError(f"there is no stage {stage!r}: choose one of {', '.join(STAGES)}")
    if iteration == INITIAL:
        return ["evaluate"] if stage in (None, "evaluate") and is_finished(run.place(INITIAL, "evaluations")) else []
    stored = [name for name, dataset in DATASET_OF.items() if is_finished(run.place(iteration, dataset))]
    return [name for name in stored if stage in (None, name)]
