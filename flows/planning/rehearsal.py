"""A rehearsal of a run: the flow's own loop with a session that decides about every artifact and computes none.

What decides is what decides in a run: `train_all`, the rules of `Session`, the calls of `Wiring`, `find_finished`.
Nothing is written: what an offline iteration refers to is kept in memory.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.brakes import may_change, refuse_held
from flows.planning.planned import Planned, Reason, Verdict
from flows.planning.stand_ins import AtOnce, ChainAlone, NoteKeeper, RehearsedRun
from flows.session import Session, starters_root
from flows.training import PlainWork, step_tasks, train_all
from pipeline.artifact import Artifact, open_artifact
from pipeline.chain import CHAIN, INITIAL, STEPS, WRITER, From, Step
from pipeline.errors import CheckFailed, GrpoError, RecipeMismatch
from pipeline.manifest import MANIFEST_VERSION, Manifest, RecipeDifference, is_finished, recipe_differences
from pipeline.run_dir import RunDir, state_of
from pipeline.stage import Progress, StageResult, check_inputs, find_finished
from stages.config import RunConfig
from stages.starter.starter import starter_call
from stages.trainers.resume import resumed_from
from stages.wiring import TAKEN, Call


@dataclass
class Rehearsal(Session):
    """A session that decides about every artifact in the order of a run, and computes none."""

    planned: dict[Path, Planned] = field(default_factory=dict)
    """Main place -> what a run does about it, in order."""
    _trained: int | None = None
    """Updates after which the trainer of a run is by now; None = it has none."""

    def initial_policy(self) -> Artifact:
        """Decide about the starter, if there is one, and the initial policy."""
        if self.config.starter is not None:
            root = starters_root(self.run)
            call = starter_call(self.config.starter, self.config.prompts, self.config.held_out_share, root)
            made = self._decide("starter", None, call.places, lambda: call)
            if self._is_coming(made.main):
                places = {"policy": self.run.initial_policy}
                return _expected(self._decide("policy", None, places, None, {"starter": made.main}))
        was_told = len(self.notes())
        policy = Session.initial_policy(self)
        return self._kept(policy) if len(self.notes()) > was_told else policy

    def member_policy(self, name: str) -> Artifact:
        """Decide about the run's copy of a policy from outside."""
        was_told = len(self.notes())
        policy = Session.member_policy(self, name)
        return self._kept(policy) if len(self.notes()) > was_told else policy

    def held_out_prompts(self) -> Artifact:
        """Decide about the prompts of every evaluation."""
        if self._is_coming(self.run.initial_policy):
            places = {"prompts": self.run.held_out_prompts}
            reads = {"policy": self.run.initial_policy}
            return _expected(self._decide("prompts", None, places, None, reads))
        return Session.held_out_prompts(self)

    def is_evaluated(self, iteration: int) -> bool:
        """Return False, so that a stored evaluation is decided about like every artifact."""
        return False

    def is_done(self, iteration: int) -> bool:
        """Return whether every artifact up to the next policy exists, made with this config."""
        if self.config.stored(iteration):
            self._refer(iteration)
        if not Session.is_done(self, iteration):
            return False
        state = self.run.place(iteration, "optimizer")
        if is_finished(state) and (self._is_coming(self.run.policy_before(iteration + 1)) or self.has_state(iteration)):
            self._is_found("optimizer", iteration)
        return True

    def has_state(self, iteration: int) -> bool:
        """Return whether a run would by now have the optimizer's state after the iteration."""
        found = self.planned.get(self.run.place(iteration, "optimizer"))
        if found is not None:
            return True
        return not self._is_coming(self.run.policy_before(iteration + 1)) and Session.has_state(self, iteration)

    def warm_up(self, iteration: int) -> None:
        """Start nothing."""

    def metrics(self, iteration: int) -> Path:
        """Measure nothing."""
        return self.run.metrics

    def report_evaluation(self, iteration: int) -> None:
        """Tell nothing."""

    def _is_found(self, name: str, iteration: int) -> bool:
        return self._decide_step(name, iteration).verdict is Verdict.reuse

    def _execute(self, step: Step, iteration: int) -> Artifact:
        return _expected(self._decide_step(step.name, iteration))

    def _decide_step(self, name: str, iteration: int) -> Planned:
        call, reads = self.wiring.call, self.wiring.reads(name, iteration)
        places = {dataset: self.run.place(iteration, dataset) for dataset in STEPS[name].writes}
        if name == "batch" and self.config.executes("check", iteration):
            reads = {**reads, "checks": self.run.place(iteration, "checks")}  # it waits for those that block, too
        return self._decide(name, iteration, places, lambda: call(name, iteration), reads)

    def _starter(self) -> Path:
        assert self.config.starter is not None
        root = starters_root(self.run)
        call = starter_call(self.config.starter, self.config.prompts, self.config.held_out_share, root)
        return open_artifact(list(call.places.values())[-1]).fetch()

    def _run(self, label: str, call: Call, resources: Any = None, progress: Progress | None = None) -> StageResult:
        planned = self._decide(label, None, call.places, lambda: call)
        return StageResult({"": _expected(planned)}, reused=planned.verdict is Verdict.reuse)

    def _refer(self, iteration: int) -> Artifact:
        """Decide about what an offline iteration takes from another run."""
        error: GrpoError | None = None
        try:
            if self._is_coming(self.run.initial_policy):  # whose tokenizer is not known yet
                source, index = self.wiring.stored(iteration)
                for dataset in TAKEN:
                    self.run.refer(iteration, dataset, source.open(index, dataset))
            else:
                self.wiring.refer_stored(iteration)
        except GrpoError as problem:
            error = problem
        for dataset in TAKEN:
            place = self.run.place(iteration, dataset)
            verdict, reason = Verdict.reuse, Reason.referred
            if error is not None:
                verdict, reason = Verdict.refuse, Reason.unusable
            told = "" if error is None else str(error)
            step = WRITER[dataset].name
            self.planned.setdefault(place, Planned(step, iteration, {dataset: place}, verdict, reason, error=told))
        return _expected(self.planned[place])

    def _remove_stale_state(self, iteration: int) -> None:
        """Remove nothing; `_decide` asks `state_of` about the state."""

    def _decide(
        self,
        step: str,
        iteration: int | None,
        places: Mapping[str, Path],
        make_call: Callable[[], Call] | None,
        reads: Mapping[str, Path] | None = None,
    ) -> Planned:
        """Return what a run does about a step's artifacts, decided once.

        Args:
            step: its name.
            iteration: None = of no iteration.
            places: dataset -> directory.
            make_call: returns the call; used only when all of ``reads`` are stored as they are wanted.
            reads: input -> its place.
        """
        main = list(places.values())[-1]
        if main not in self.planned:
            found = self._verdict(step, iteration, places, make_call, reads or {})
            self.planned[main] = found
            self._note_trainer(found)
        return self.planned[main]

    def _verdict(
        self,
        step: str,
        iteration: int | None,
        places: Mapping[str, Path],
        make_call: Callable[[], Call] | None,
        reads: Mapping[str, Path],
    ) -> Planned:
        def planned(verdict: Verdict, reason: Reason, **more: Any) -> Planned:
            return Planned(step, iteration, places, verdict, reason, **more)

        main = list(places.values())[-1]
        coming = tuple(name for name, place in reads.items() if self._is_coming(place))
        is_refused = any(self._is_refused(reads[name]) for name in coming)
        of_inputs: dict[str, Any] = {"inputs": coming, "inputs_are_refused": is_refused}
        may_be_replaced = iteration is not None and may_change(self.config, self.run, step, iteration)
        if coming and is_finished(main) and not may_be_replaced:
            return planned(Verdict.refuse if is_refused else Verdict.reuse, Reason.inputs, **of_inputs)
        call: Call | None = None
        try:
            if coming:
                for name in (name for name in reads if name not in coming):
                    self._open(iteration, name, reads[name]).check_sizes()
                return planned(Verdict.compute, Reason.inputs, again=self._trained_again(step, iteration), **of_inputs)
            if step == "optimizer" and is_finished(main) and state_of(open_artifact(reads["policy"])) is None:
                return planned(Verdict.compute, Reason.stale, again=self._trained_again(step, iteration))
            assert make_call is not None
            call = make_call()
            if may_be_replaced and is_finished(main) and open_artifact(main).manifest.recipe != call.recipe():
                return planned(Verdict.compute, Reason.replaced)
            if find_finished(call) is not None:
                if step == "check" and iteration is not None:
                    refuse_held(self.run, iteration, open_artifact(main))
                return planned(Verdict.reuse, Reason.finished)
            check_inputs(call)
            return planned(Verdict.compute, Reason.missing, again=self._trained_again(step, iteration))
        except CheckFailed as error:
            return planned(Verdict.refuse, Reason.held, error=str(error))
        except RecipeMismatch as error:
            assert call is not None
            return planned(Verdict.refuse, Reason.recipe, differences=_differences(call), error=str(error))
        except GrpoError as error:
            return planned(Verdict.refuse, Reason.unusable, error=str(error))

    def _open(self, iteration: int | None, name: str, place: Path) -> Artifact:
        """Return an input that is stored, here or in another run."""
        is_referred = iteration is not None and not is_finished(place)
        return self.run.open(iteration, name) if is_referred else open_artifact(place)  # type: ignore[arg-type]

    def _trained_again(self, step: str, iteration: int | None) -> range:
        """Return the iterations whose batches a run trains on again, to bring its trainer to the policy of a step."""
        num_updates = _trainer_at(step, iteration)
        if num_updates is None or num_updates == self._trained or self._is_coming(self.run.policy_before(num_updates)):
            return range(0)
        return range(resumed_from(self.run, num_updates), num_updates)

    def _note_trainer(self, planned: Planned) -> None:
        num_updates = _trainer_at(planned.step, planned.iteration)
        if planned.verdict is Verdict.compute and num_updates is not None:
            self._trained = num_updates + (planned.step == "update")

    def _is_coming(self, place: Path) -> bool:
        """Return whether what is there now, if anything, is not what a run would go on with."""
        found = self.planned.get(place)
        return found is not None and (found.verdict is not Verdict.reuse or found.reason is Reason.inputs)

    def _is_refused(self, place: Path) -> bool:
        found = self.planned[place]
        return found.verdict is Verdict.refuse or found.inputs_are_refused

    def _kept(self, policy: Artifact) -> Artifact:
        places = {"policy": policy.path}
        self.planned[policy.path] = Planned("policy", None, places, Verdict.reuse, Reason.kept)
        return policy

    def notes(self) -> Sequence[str]:
        """Return the lines that a run would print for the user."""
        assert isinstance(self.reporter, NoteKeeper)
        return self.reporter.notes


def rehearse(config: RunConfig, run: RunDir) -> Rehearsal:
    """Return the rehearsal of a run to its end. Read-only."""
    rehearsal = Rehearsal(config, RehearsedRun(run.root, run.copy), NoteKeeper())
    work = PlainWork()
    steps = step_tasks(rehearsal, work)
    tasks = ChainAlone({step.name: steps[step.name] for step in CHAIN})
    train_all(rehearsal, work, tasks, AtOnce(tasks))
    return rehearsal


def _trainer_at(name: str, iteration: int | None) -> int | None:
    """Return after how many updates the trainer is that a step uses; None = it uses none."""
    if iteration is None or iteration == INITIAL or "trainer" not in STEPS[name].uses:
        return None
    return iteration + (STEPS[name].reads.get("policy") is From.after)


def _differences(call: Call) -> tuple[RecipeDifference, ...]:
    """Return the differences between the stored recipe and the wanted one."""
    stored = (open_artifact(place).manifest for place in call.places.values())
    odd = next(manifest for manifest in stored if manifest.recipe != call.recipe())
    return tuple(recipe_differences(odd.recipe_parts(), call.recipe_parts()))


def _expected(planned: Planned) -> Artifact:
    """Return what stands for an artifact that may not exist yet: its path, with a manifest that says nothing."""
    text, table = "", dict[str, Any]()
    manifest = Manifest(
        MANIFEST_VERSION, planned.step, 0, text, table, table, table, table, None, table, table, text, 0, *[text] * 3
    )
    return Artifact(planned.main, manifest)
