"""What a run keeps alive between its stages: engine, trainer, reward processes, and somebody who watches."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from pipeline.artifact import open_artifact
from pipeline.errors import GrpoError, UsageError
from pipeline.manifest import is_finished
from pipeline.run_dir import RunDir, state_of
from pipeline.stage import Progress, StageCall, StageResult, find_finished, run_stage, silent
from pipeline.writer import remove_artifact
from stages.checkpoints import check_policy, checkpoint_path, context_length, looks_local
from stages.config import RunConfig
from stages.engines.base import Engine, EngineSettings
from stages.engines.process import EngineProcess
from stages.evaluate import EvaluateResources
from stages.inspect.metrics import append_metrics, iteration_metrics, recorded_metrics
from stages.iteration import Wiring
from stages.rewards.scorer import Scorer
from stages.score import find_rewards
from stages.starter.starter import make_starter
from stages.trainers.base import Trainer
from stages.trainers.local import LocalTrainer, resolve_device
from stages.trainers.resume import resume


class Reporter(Protocol):
    """Told what a run does."""

    def stage(self, label: str) -> Progress:
        """A stage begins; the returned callable hears how far it is."""
        ...

    def finished(self, label: str, result: StageResult) -> None:
        """A stage is done, or was found done."""
        ...

    def iteration(self, row: dict[str, Any]) -> None:
        """An iteration is done; the row is that of `metrics.parquet`."""
        ...

    def evaluation(self, num_updates: int, figures: dict[str, float | None]) -> None:
        """The policy after so many iterations was evaluated; called for the first and the last one."""
        ...

    def note(self, text: str) -> None:
        """Something worth one line."""
        ...


class SilentReporter:
    """Says nothing."""

    def stage(self, label: str) -> Progress:
        return silent

    def finished(self, label: str, result: StageResult) -> None: ...

    def iteration(self, row: dict[str, Any]) -> None: ...

    def evaluation(self, num_updates: int, figures: dict[str, float | None]) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(slots=True)
class Session:
    """One process working on one run."""

    config: RunConfig
    run: RunDir
    reporter: Reporter = field(default_factory=SilentReporter)
    _engine: Engine | None = None
    _trainer: Trainer | None = None
    _scorer: Scorer | None = None
    _publishing: Lock = field(default_factory=Lock)
    _is_due: bool = False
    """Something is finished that is not published."""

    @property
    def wiring(self) -> Wiring:
        return Wiring(self.config, self.run)

    def perform(
        self, label: str, call: StageCall, resources: Any = None, *, progress: Progress | None = None
    ) -> StageResult:
        """Return the stage's artifacts, computed or found; the reporter is told.

        A stage that runs beside others brings a ``progress`` of its own: the reporter shows one stage at a time.
        """
        result = run_stage(call, resources=resources, progress=progress or self.reporter.stage(label))
        self._is_due |= not result.reused
        while self._is_due and self._publishing.acquire(blocking=False):  # else the thread that is at it does this too
            try:
                self._is_due = False
                self.run.publish()
            finally:
                self._publishing.release()
        self.reporter.finished(label, result)
        return result

    def initial_policy(self) -> str:
        """Take the config's policy into the run; a starter is made first, unless it exists. Return its path."""
        model = self.config.policy.model
        source = None
        if self.config.starter is not None:
            made = starter(self.config, starters_root(self.run), self.reporter.stage("starter")).main
            source = self.run.share(made).fetch()
        try:
            if self.config.starter is None and looks_local(model):
                source = checkpoint_path(model)
            call = self.wiring.initial_policy(source)
        except (GrpoError, OSError):
            if not is_finished(self.run.initial_policy):
                raise
            self.reporter.note(f"{model} is not there any more as it was: the run has its copy")
            return str(self.run.initial_policy)
        return self._path("policy", call, source)

    def member_policy(self, name: str) -> str:
        """Take a member's checkpoint from outside into the run; return its path."""
        member = next(m for m in self.config.generate.plan() if m.name == name)
        return self._path("policy", self.wiring.member_policy(member), checkpoint_path(member.policy))

    def held_out_prompts(self) -> str:
        """Draw the questions of every evaluation; return their path."""
        return self._path("prompts", self.wiring.held_out_prompts())

    def prompts(self, iteration: int) -> str:
        """Draw the questions of an iteration; return their path. May run beside other stages."""
        if self.config.stored(iteration):
            return self.refer_stored(iteration)
        self._check_own(iteration)
        return str(self.perform("prompts", self.wiring.prompts(iteration), progress=silent).main.path)

    def refer_stored(self, iteration: int) -> str:
        """Take completions that another run has stored as those of an iteration; return their path."""
        return str(self.wiring.refer_stored(iteration).path)

    def generate(self, iteration: int) -> str:
        """Sample groups of answers; return their path."""
        if self.config.stored(iteration):
            return self.refer_stored(iteration)
        self._check_own(iteration)
        call = self.wiring.generate(iteration)
        return self._path("generate", call, None if find_finished(call) else self.ready_engine())

    def _check_own(self, iteration: int) -> None:
        """Raise UsageError when the iteration's completions are another run's: fresh ones would stand in their way."""
        if self.run.refers(iteration, "completions"):
            raise UsageError(
                f"iteration {iteration} of {self.run.name} refers to the completions of another run, so nothing is "
                "generated for it; to train on them, fork that run (grpo fork), or name it under [[offline]]"
            )

    def score(self, iteration: int) -> str:
        """Score the answers; return the rewards' path."""
        call = self.wiring.score(iteration)
        return self._path("score", call, None if find_finished(call) else self.scorer())

    def normalize(self, iteration: int) -> str:
        """Turn rewards into advantages; return their path."""
        return self._path("normalize", self.wiring.normalize(iteration))

    def batch(self, iteration: int) -> str:
        """Put the rows into training order; return their path."""
        return self._path("batch", self.wiring.batch(iteration))

    def update(self, iteration: int) -> str:
        """Train on the rows; return the next policy's path. Afterwards the trainer is at that policy."""
        call = self.wiring.update(iteration)
        trainer = None if find_finished(call) else self.trainer_after(iteration)
        return self._path("update", call, trainer)

    def optimizer(self, iteration: int) -> str:
        """Keep the optimizer's state after an iteration's update; return its path. May run beside other stages."""
        place = self.run.place(iteration, "optimizer")
        if is_finished(place) and state_of(open_artifact(self.run.policy_before(iteration + 1))) is None:
            remove_artifact(place)  # of a policy that lay here before
        call = self.wiring.optimizer(iteration)
        trainer = None if find_finished(call) else self.trainer_after(iteration + 1)
        return str(self.perform("optimizer", call, trainer, progress=silent).main.path)

    def evaluate(self, num_updates: int) -> str:
        """Answer the held-out questions; return the answers' path."""
        call = self.wiring.evaluate(num_updates)
        resources = None if find_finished(call) else EvaluateResources(self.ready_engine(), self.scorer())
        return self._path("evaluate", call, resources)

    def metrics(self, iteration: int) -> str:
        """Put the iteration's row into `metrics.parquet`, show it, return its path. May run beside other stages."""
        row = recorded_metrics(self.run, iteration)
        if row is None:
            row = iteration_metrics(self.run, iteration, self.config.evaluate.pass_threshold)
            append_metrics(self.run, row)
        self.reporter.iteration(row)
        return str(self.run.metrics)

    def _path(self, label: str, call: StageCall, resources: Any = None) -> str:
        return str(self.perform(label, call, resources).main.path)

    def warm_up(self, iteration: int) -> None:
        """Start engine and reward processes early, beside other work, when this iteration will need them."""
        if not self.run.has(iteration, "completions"):
            if self.config.stored(iteration) is None:
                self.engine()
            self.scorer().start(find_rewards(self.config.score))

    def ready_engine(self) -> Engine:
        """Return the engine once it answers."""
        engine = self.engine()
        self.reporter.stage("engine start")
        engine.info  # noqa: B018 (waits for the start that is under way)
        return engine

    def engine(self) -> Engine:
        """Return the engine, started when first asked for; it takes its time in a process of its own."""
        if self._engine is None:
            self.run.logs.mkdir(parents=True, exist_ok=True)
            policy = open_artifact(self.run.initial_policy).fetch()
            engine = EngineProcess(engine_settings(self.config, policy), self.run.logs / "engine.log")
            engine.start(policy)
            self._engine = engine
        return self._engine

    def scorer(self) -> Scorer:
        """Return the scorer, which keeps the processes of the reward functions between iterations."""
        if self._scorer is None:
            self.run.logs.mkdir(parents=True, exist_ok=True)
            self._scorer = Scorer(self.config.resources.reward_workers, self.run.logs / "rewards.log")
        return self._scorer

    def trainer_after(self, num_updates: int) -> Trainer:
        """Return the trainer as it is after so many iterations; it keeps model and optimizer between them."""
        if self._trainer is None:
            self._trainer = LocalTrainer(device=resolve_device(self.config.resources.device))
            self.run.logs.mkdir(parents=True, exist_ok=True)
        resume(self._trainer, self.run, self.config.update, num_updates, self.reporter.note, self.run.logs)
        return self._trainer

    def close(self) -> None:
        """End the processes of engine and reward functions and everything they started; let go of the trainer."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        if self._scorer is not None:
            self._scorer.close()
            self._scorer = None
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = None


def engine_settings(config: RunConfig, policy: Path) -> EngineSettings:
    """Return the engine's settings for a run."""
    generate, resources = config.generate, config.resources
    return EngineSettings(
        engine=generate.engine,
        dtype=generate.dtype,
        max_model_len=context_length(check_policy(str(policy))),
        max_num_seqs=generate.max_num_seqs,
        max_num_batched_tokens=generate.max_num_batched_tokens,
        prefix_caching=generate.prefix_caching,
        num_threads=generate.num_threads,
        gpu_memory_utilization=resources.gpu_memory_utilization,
        kv_cache_gib=resources.kv_cache_gib,
    )


def starters_root(run: RunDir) -> Path:
    """Return where starters lie: beside the runs, which share them."""
    return run.beside("starters")


def starter(config: RunConfig, root: Path, progress: Progress) -> StageResult:
    """Return the policy artifact that the config's [starter] table describes; it is made unless it exists."""
    assert config.starter is not None
    return make_starter(config.starter, config.prompts, config.held_out_share, root, progress)


@contextmanager
def open_session(config: RunConfig, run: RunDir, reporter: Reporter | None = None) -> Iterator[Session]:
    """Hold the run for writing; whatever happens, leave no child process behind."""
    with run.lock():
        session = Session(config, run, reporter or SilentReporter())
        try:
            yield session
        finally:
            session.close()
