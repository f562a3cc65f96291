"""What a run keeps alive between its stages: engine, trainer, reward processes, reporter."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from flows.brakes import lift_hold, refuse_held, report, set_aside
from flows.reporter import Reporter, SilentReporter
from pipeline.artifact import Artifact, open_artifact
from pipeline.chain import CHAIN, STEPS, From, Step, When
from pipeline.errors import EngineError, GrpoError, UsageError
from pipeline.manifest import is_finished
from pipeline.prune import num_finished, prunable, prune
from pipeline.run_dir import RunDir, state_of
from pipeline.runs import beside, lock, publish, share
from pipeline.stage import Progress, StageResult, find_finished, run_stage, silent
from pipeline.writer import remove_artifact
from stages.checkpoints import check_policy, checkpoint_path, context_length, looks_local
from stages.config import RunConfig
from stages.engines.base import Engine, EngineConfig, EngineSettings
from stages.engines.process import EngineProcess
from stages.evaluate import summarize
from stages.generate import used_context
from stages.inspect.audit.by_name import audit_iteration
from stages.inspect.metrics import append_metrics, iteration_metrics, recorded_metrics, rising_kl
from stages.rewards.scorer import Scorer
from stages.score import find_rewards
from stages.starter.starter import make_starter
from stages.trainers.base import Trainer
from stages.trainers.local import LocalTrainer, resolve_device
from stages.trainers.resume import resume
from stages.wiring import Call, Wiring


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
    """Something finished is not published yet."""

    @property
    def wiring(self) -> Wiring:
        return Wiring(self.config, self.run)

    def perform(self, name: str, iteration: int) -> Artifact:
        """Return the main artifact of a step in an iteration, computed or found; see `pipeline.chain`.

        In an offline iteration another run's prompts and completions take the place of its own.

        Raises:
            UsageError: when it would generate for an iteration that refers to another run's completions.
        """
        step = STEPS[name]
        if not self.config.executes(name, iteration):
            raise UsageError(
                f"iteration {iteration} of {self.run.name} has no step {name}: its config gives it nothing to do"
            )
        if name in ("prompts", "generate") and self.config.stored(iteration):
            return self._refer(iteration)
        if name in ("prompts", "generate"):
            self._check_own(iteration)
        if name == "optimizer":
            self._remove_stale_state(iteration)
        return self._execute(step, iteration)

    def _execute(self, step: Step, iteration: int) -> Artifact:
        """Return the main artifact of a step that this run makes itself."""
        if step.name == "batch":
            if self.config.executes("check", iteration):
                refuse_held(self.run, iteration, self.run.open(iteration, "checks"))
            else:
                lift_hold(self.run, iteration, self.reporter.note)
        if step.name == "check":
            self._check_untrained(iteration)
        call = self.wiring.call(step.name, iteration)
        set_aside(self.config, self.run, call, iteration, self.reporter.note)
        in_background = step.when in (When.ahead, When.late)  # the reporter shows one stage at a time
        try:
            resources = None if find_finished(call) else self._resources(step, iteration)
            result = self._run(step.name, call, resources, silent if in_background else None)
        except EngineError:
            self._end_engine()  # a retry starts another one
            raise
        if step.name == "check":
            report(self.run, iteration, result.main, self.reporter)
        return result.main

    def _refer(self, iteration: int) -> Artifact:
        """Let another run's prompts and completions be those of an offline iteration; return the completions."""
        return self.wiring.refer_stored(iteration)

    def _run(self, label: str, call: Call, resources: Any = None, progress: Progress | None = None) -> StageResult:
        """Return the artifacts of a call, computed or found, after publishing them and telling the reporter."""
        result = run_stage(call, resources, progress or self.reporter.stage(label))
        self._is_due |= not result.reused
        while self._is_due and self._publishing.acquire(blocking=False):  # else the publishing thread does it
            try:
                self._is_due = False
                publish(self.run)
            except BaseException:
                self._is_due = True
                raise
            finally:
                self._publishing.release()
        self.reporter.finished(label, result)
        return result

    def initial_policy(self) -> Artifact:
        """Return the initial policy that the config names; make a starter first, unless it exists."""
        model = self.config.policy.model
        source = None
        if self.config.starter is not None:
            source = self._starter()
        try:
            if self.config.starter is None and looks_local(model):
                source = checkpoint_path(model)
            call = self.wiring.initial_policy(source)
        except (GrpoError, OSError):
            if not is_finished(self.run.initial_policy):
                raise
            self.reporter.note(f"{model} is not there any more as it was: the run has its copy")
            return open_artifact(self.run.initial_policy)
        return self._run("policy", call, source).main

    def _starter(self) -> Path:
        """Return the directory of the starter, made or found."""
        made = starter(self.config, starters_root(self.run), self.reporter.stage("starter")).main
        return share(self.run, made).fetch()

    def member_policy(self, name: str) -> Artifact:
        """Return the run's copy of the policy of a group member from outside."""
        member = next(m for m in self.config.generate.plan() if m.name == name)
        place = self.run.member(name)
        try:
            call = self.wiring.member_policy(member)
        except (GrpoError, OSError):
            if not is_finished(place):
                raise
            self.reporter.note(f"{member.policy} is not there any more as it was: the run has its copy")
            return open_artifact(place)
        return self._run("policy", call, checkpoint_path(member.policy)).main

    def held_out_prompts(self) -> Artifact:
        """Return the prompts of every evaluation."""
        return self._run("prompts", self.wiring.held_out_prompts()).main

    def metrics(self, iteration: int) -> Path:
        """Add the iteration's row to `metrics.parquet`, show it, return the file. May run in the background."""
        row = recorded_metrics(self.run, iteration)
        if row is None:
            row = iteration_metrics(self.run, iteration, self.config.evaluate.pass_threshold)
            if (kl := rising_kl(append_metrics(self.run, row), iteration)) is not None:
                self.reporter.note(
                    f"warning: kl_to_sampler has risen {len(kl) - 1} times in a row, to {kl[-1]:.3g}: the policy moves "
                    "away from the one that wrote its rows; newer rows, fewer updates on them or a lower learning rate "
                    "hold it back"
                )
        self.reporter.iteration(row)
        return self.run.metrics

    def retain(self) -> Path:
        """Drop the checkpoints that [retention] does not keep; return the run. May run in the background."""
        if self.config.retention is not None:
            needed = self.config.needed_policies(num_finished(self.run))
            list(prune(prunable(self.run, self.config.retention, needed)))
        return self.run.root

    def is_done(self, iteration: int) -> bool:
        """Return whether every artifact up to the next policy exists, made with this config. Read-only.

        Checks are left out: what has trained has passed those of its time.
        """
        if not is_finished(self.run.place(iteration, "policy")):
            return False
        taken = ("prompts", "generate") if self.config.stored(iteration) else ()
        in_time = (step.name for step in CHAIN if step.when in (When.in_order, When.ahead))
        taken = (*taken, "check")
        needed = (name for name in in_time if name not in taken and self.config.executes(name, iteration))
        return all(self._is_found(name, iteration) for name in needed)

    def _is_found(self, name: str, iteration: int) -> bool:
        """Return whether the artifacts of a step exist, made with this config. Read-only."""
        return find_finished(self.wiring.call(name, iteration)) is not None

    def has_state(self, iteration: int) -> bool:
        """Return whether the optimizer's state that belongs to the policy after the iteration exists. Read-only."""
        return state_of(open_artifact(self.run.policy_before(iteration + 1))) is not None

    def is_evaluated(self, iteration: int) -> bool:
        """Return whether the evaluation of the policy after the iteration exists, made with this config. Read-only."""
        run = self.run
        if not (is_finished(run.place(iteration, "evaluations")) and is_finished(run.held_out_prompts)):
            return False
        find_finished(self.wiring.held_out_prompts())
        return find_finished(self.wiring.call("evaluate", iteration)) is not None

    def report_evaluation(self, iteration: int) -> None:
        """Tell the reporter what the evaluation of the policy after the iteration found."""
        evaluations = open_artifact(self.run.place(iteration, "evaluations")).read()
        self.reporter.evaluation(iteration + 1, summarize(evaluations))

    def _check_own(self, iteration: int) -> None:
        if self.run.refers(iteration, "completions"):
            raise UsageError(
                f"iteration {iteration} of {self.run.name} refers to the completions of another run, so nothing is "
                "generated for it; to train on them, fork that run (grpo fork), or name it under [[offline]]"
            )

    def _check_untrained(self, iteration: int) -> None:
        if self.run.has(iteration, "policy") and not self.run.has(iteration, "checks"):
            raise UsageError(
                f"iteration {iteration} of {self.run.name} has trained already, so nothing can hold it: make checks "
                "over it with `grpo check`, which writes nothing"
            )

    def _remove_stale_state(self, iteration: int) -> None:
        """Remove an optimizer state that belongs to an earlier policy in this place."""
        place = self.run.place(iteration, "optimizer")
        if is_finished(place) and not self.has_state(iteration):
            remove_artifact(place)

    def _resources(self, step: Step, iteration: int) -> Any:
        """Return what the step uses: nothing, one helper, or several as a tuple."""
        after = step.reads.get("policy") is From.after
        makers: dict[str, Callable[[], Any]] = {
            "engine": self.ready_engine,
            "scorer": self.scorer,
            "auditor": lambda: audit_iteration,
            "trainer": lambda: self.trainer_after(iteration + 1 if after else iteration),
        }
        found = tuple(makers[name]() for name in step.uses)
        return found[0] if len(found) == 1 else found or None

    def warm_up(self, iteration: int) -> None:
        """Start engine and reward processes in the background if this iteration will need them."""
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
        """Return the engine; the first call starts it in its own process and does not wait for it."""
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
        """Return the trainer as it is after ``num_updates`` iterations; it keeps model and optimizer between them."""
        if self._trainer is None:
            self._trainer = LocalTrainer(device=resolve_device(self.config.resources.device))
            self.run.logs.mkdir(parents=True, exist_ok=True)
        resume(self._trainer, self.run, self.config.update, num_updates, self.reporter.note, self.run.logs)
        return self._trainer

    def close(self) -> None:
        """End the processes of engine and reward functions, with their descendants; release the trainer."""
        self._end_engine()
        if self._scorer is not None:
            self._scorer.close()
            self._scorer = None
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = None

    def _end_engine(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def engine_settings(config: RunConfig, policy: Path) -> EngineSettings:
    """Return the engine's settings for a run."""
    generate, resources = config.generate, config.resources
    shared = generate.model_dump(include=set(EngineConfig.model_fields) - {"max_model_len"})
    return EngineSettings(
        **shared,
        max_model_len=used_context(generate, context_length(check_policy(str(policy)))),
        gpu_memory_utilization=resources.gpu_memory_utilization,
        kv_cache_gib=resources.kv_cache_gib,
    )


def starters_root(run: RunDir) -> Path:
    """Return the folder of the starters: next to the runs, which share them."""
    return beside(run, "starters")


def starter(config: RunConfig, root: Path, progress: Progress) -> StageResult:
    """Return the policy artifact that the config's [starter] table describes; make it unless it exists."""
    assert config.starter is not None
    return make_starter(config.starter, config.prompts, config.held_out_share, root, progress)


@contextmanager
def open_session(config: RunConfig, run: RunDir, reporter: Reporter | None = None) -> Iterator[Session]:
    """Lock the run for writing; leave no child process behind."""
    with lock(run):
        session = Session(config, run, reporter or SilentReporter())
        try:
            yield session
        finally:
            session.close()
