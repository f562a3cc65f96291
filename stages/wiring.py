"""The stages of a run, bound to it: for each, its config, its inputs, and where its outputs go.

`pipeline.chain` says what is bound; this module adds what a step needs beyond that. Nothing is computed here. A
`StageCall` can be hashed, looked up or run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from grpo.settings import ForwardConfig
from pipeline.artifact import Artifact, open_artifact
from pipeline.chain import STEPS, From, Step, load_stage
from pipeline.errors import RecipeMismatch
from pipeline.functions import check_permitted
from pipeline.manifest import is_finished, recipe_differences
from pipeline.object_store import OTHER_MACHINE, local_path, url_of
from pipeline.run_dir import RunDir
from pipeline.runs import open_run
from pipeline.stage import StageCall
from stages import policy, prompts, update
from stages.checkpoints import (
    OPTIMIZER_FILE,
    check_policy,
    checkpoint_identity,
    checkpoint_path,
    context_length,
)
from stages.checks.config import AuditCheck, CheckStageConfig
from stages.config import RunConfig
from stages.custom_functions import SOURCES, is_custom, sources
from stages.generate import check_room
from stages.logprobs import LogprobsConfig
from stages.members import MemberConfig, check_same_tokenizer, member_updates
from stages.optimizer import OptimizerConfig, state_beside
from stages.policy import PolicyConfig
from stages.score import find_rewards
from stages.sources import SourceConfig, source_identity

Call = StageCall[Any, Any]
TAKEN = ("prompts", "completions")
"""Datasets that an offline iteration takes from another run."""
FUNCTIONS = ("reward_recipes", SOURCES)
"""Parameters of calls that identify functions, which must be imported for that."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """The calls of a run's stages. Inputs must be finished when their call is asked for."""

    config: RunConfig
    run: RunDir
    imports: bool = True
    """False = import no function that the config names; `FUNCTIONS` are then missing from the calls."""

    def call(self, name: str, iteration: int) -> Call:
        """Return the call of a step in an iteration; of ``evaluate`` in INITIAL, that of the initial policy."""
        step = STEPS[name]
        stage = load_stage(step)
        run_facts = {"seed": self.config.seed, "iteration": iteration}
        more = _PARAMETERS[name](self, iteration) if name in _PARAMETERS else {}
        return StageCall(
            stage,
            self._settings(name),
            self._inputs(step, iteration),
            {dataset: self.run.place(iteration, dataset) for dataset in step.writes},
            {**{wanted: run_facts[wanted] for wanted in stage.wants}, **more},
        )

    def _settings(self, name: str) -> BaseModel:
        """Return the part of the run's config that decides a step."""
        match name:
            case "prompts":
                return _source_alone(self.config.prompts)
            case "evaluate":
                return self.config.evaluation()
            case "optimizer":
                return OptimizerConfig()
            case "check":
                return CheckStageConfig(checks=self.config.checks)
            case "logprobs":
                forward = self.config.update.model_dump(include=set(ForwardConfig.model_fields))
                return LogprobsConfig(**forward, microbatch_tokens=self.config.batch.microbatch_tokens)
        table: BaseModel = getattr(self.config, name)
        return table

    def reads(self, name: str, iteration: int) -> dict[str, Path]:
        """Return the place of each input of a step in an iteration, finished or not."""
        found: dict[str, Path] = {}
        for dataset, source in STEPS[name].reads.items():
            match source:
                case From.here:
                    found[dataset] = self.run.place(iteration, dataset)
                case From.if_made if self.config.needs(name, dataset, iteration):
                    found[dataset] = self.run.place(iteration, dataset)
                case From.earlier if self.config.needs(name, dataset, iteration):
                    found[dataset] = self.run.place(iteration - 1, dataset)
                case From.initial:
                    found[dataset] = self.run.initial_policy
                case From.named:
                    for policy_name, num_updates in self.config.named_policies(iteration).items():
                        found[f"{dataset}:{policy_name}"] = self.run.policy_before(num_updates)
                case From.before:
                    found[dataset] = self.run.policy_before(iteration)
                case From.after:
                    found[dataset] = self.run.policy_before(iteration + 1)
                case From.held_out:
                    found[dataset] = self.run.held_out_prompts
                case From.members:
                    for member in self.config.generate.plan():
                        found[f"{dataset}:{member.name}"] = self._policy_of(member, iteration)
        return found

    def _inputs(self, step: Step, iteration: int) -> dict[str, Artifact]:
        found: dict[str, Artifact] = {}
        for name, place in self.reads(step.name, iteration).items():
            is_of_iteration = step.reads.get(name) in (From.here, From.if_made)  # perhaps another run's
            found[name] = self.run.open(iteration, name) if is_of_iteration else open_artifact(place)
        for member in outside_members(self.config):
            if (policy := found.get(f"policy:{member.name}")) is not None:
                initial = open_artifact(self.run.initial_policy)
                check_same_tokenizer(policy, initial, f"group member {member.name!r}")
        return found

    def _policy_of(self, member: MemberConfig, iteration: int) -> Path:
        """Return the place of the member's policy in this iteration."""
        num_updates = member_updates(member, iteration)
        return self.run.member(member.name) if num_updates is None else self.run.policy_before(num_updates)

    def initial_policy(self, source: Path | None) -> Call:
        """Return the call that makes the initial policy of a local checkpoint, or of the hub model of the config."""
        return self._policy(self.config.policy, source, self.run.initial_policy)

    def member_policy(self, member: MemberConfig) -> Call:
        """Return the call that brings a member's checkpoint from outside into the run."""
        config = PolicyConfig(model=member.policy, keep_optimizer=False)
        return self._policy(config, checkpoint_path(member.policy), self.run.member(member.name))

    def _policy(self, config: PolicyConfig, source: Path | None, place: Path) -> Call:
        if source is None:
            return StageCall(policy.STAGE, config, {}, {"policy": place})
        if (trained := policy_of_run(source)) is not None:
            # the policy of another run: its digest vouches for what that one was trained on
            anonymous = config.model_copy(update={"model": "policy of a run"})
            return StageCall(policy.STAGE, anonymous, with_optimizer(trained, config), {"policy": place})
        # a checkpoint is identified by its files, not by its path
        anonymous = config.model_copy(update={"model": "local files"})
        return StageCall(policy.STAGE, anonymous, {}, {"policy": place}, checkpoint_identity(source))

    def held_out_prompts(self) -> Call:
        """Return the call that draws the prompts of every evaluation."""
        evaluate = self.config.evaluate
        source = evaluate.source or self.config.prompts
        return StageCall(
            prompts.STAGE,
            _source_alone(source),
            {"policy": open_artifact(self.run.initial_policy)},
            {"prompts": self.run.held_out_prompts},
            {
                "seed": self.config.seed,
                "iteration": 0,
                "drawn_for": "held_out",
                "held_out_share": 1.0 if evaluate.source is not None else self.config.held_out_share,
                "count": evaluate.num_prompts,
                **self.of_prompts(source),
            },
        )

    def of_prompts(self, source: SourceConfig) -> dict[str, Any]:
        """Return what decides the prompts of a source beyond its settings."""
        initial = check_policy(str(open_artifact(self.run.initial_policy).fetch()))
        return {
            "max_prompt_tokens": check_room(self.config.generate, context_length(initial)),
            **source_identity(source),
        }

    def refer_stored(self, iteration: int) -> Artifact:
        """Refer to the stored completions that feed this iteration, and to their prompts; return the completions.

        Raises:
            ArtifactMissing: when the other run does not have them.
            PolicyError: when they were written with another tokenizer.
            RecipeMismatch: when the iteration has others.
        """
        source, index = self.stored(iteration)
        if is_finished(source.initial_policy):
            ours = open_artifact(self.run.initial_policy)
            check_same_tokenizer(open_artifact(source.initial_policy), ours, f"policy of {source.name}")
        for dataset in TAKEN:
            self.run.refer(iteration, dataset, source.open(index, dataset))
        return source.open(index, "completions")

    def stored(self, iteration: int) -> tuple[RunDir, int]:
        """Return the run, and its iteration, whose completions feed this offline iteration."""
        stored = self.config.stored(iteration)
        assert stored is not None
        if local_path(stored[0]) is None:
            check_permitted(stored[0], OTHER_MACHINE)
        return open_run(stored[0]), stored[1]


def _source_alone(source: SourceConfig) -> SourceConfig:
    """Return the settings of a source without the others of its table."""
    return SourceConfig(**source.model_dump(include=set(SourceConfig.model_fields)))


def _of_prompts(wiring: Wiring, iteration: int) -> dict[str, Any]:
    config = wiring.config
    return {
        "drawn_for": "train",
        "held_out_share": config.held_out_share,
        "count": config.prompts.prompts_per_iteration,
        **wiring.of_prompts(config.prompts),
    }


def _of_generate(wiring: Wiring, iteration: int) -> dict[str, Any]:
    generate = wiring.config.generate
    updates = {member.name: member_updates(member, iteration) for member in generate.plan()}
    return {"policy_iterations": updates, **_sources(wiring, {"generate.engine": generate.engine})}


def _of_score(wiring: Wiring, iteration: int) -> dict[str, Any]:
    """Return the identities of the reward functions."""
    if not wiring.imports:
        return {}
    return {"reward_recipes": {reward.name: reward.recipe for reward in find_rewards(wiring.config.score)}}


def _of_check(wiring: Wiring, iteration: int) -> dict[str, Any]:
    """Return what the audit reads of the config, if one of its checks is there."""
    config = wiring.config
    facts = {
        "pass_threshold": config.evaluate.pass_threshold,
        "weights": dict(config.normalize.weights),
        "combine": config.normalize.combine,
    }
    has_audit = any(isinstance(check, AuditCheck) for check in config.checks)
    return {**_of_batch(wiring, iteration), **({"audited": facts} if has_audit else {})}


def _of_batch(wiring: Wiring, iteration: int) -> dict[str, Any]:
    # completions stored by another run have no age in this one
    return {"is_offline": True} if wiring.config.stored(iteration) else {}


def _of_normalize(wiring: Wiring, iteration: int) -> dict[str, Any]:
    return _sources(wiring, wiring.config.normalize.functions())


def _of_logprobs(wiring: Wiring, iteration: int) -> dict[str, Any]:
    # without a comparison the rows of a group with zero variance train, too
    normalize = wiring.config.normalize
    is_compared = (normalize.baseline, normalize.scale) != ("none", "none")
    return {} if is_compared and not any(map(is_custom, normalize.functions().values())) else {"every_group": True}


def _of_update(wiring: Wiring, iteration: int) -> dict[str, Any]:
    return _sources(wiring, {"update.loss.name": wiring.config.update.loss.name})


def _of_evaluate(wiring: Wiring, iteration: int) -> dict[str, Any]:
    config = wiring.config
    functions = {"generate.engine": config.generate.engine, **config.normalize.functions()}
    return {"policy_iteration": iteration + 1, **_of_score(wiring, iteration), **_sources(wiring, functions)}


def _sources(wiring: Wiring, functions: Mapping[str, str]) -> dict[str, Any]:
    """Return the sources of the functions that settings name."""
    return sources(functions) if wiring.imports else {}


_PARAMETERS: Mapping[str, Callable[[Wiring, int], dict[str, Any]]] = {
    "prompts": _of_prompts,
    "generate": _of_generate,
    "score": _of_score,
    "logprobs": _of_logprobs,
    "normalize": _of_normalize,
    "check": _of_check,
    "batch": _of_batch,
    "update": _of_update,
    "evaluate": _of_evaluate,
}
"""What decides a step's result beyond its config, its inputs and the parameters that its stage wants."""


def check_settings(config: RunConfig, run: RunDir, name: str, iteration: int) -> None:
    """Check, before any function that the config names is imported, that a finished step has the config's settings.

    Raises:
        RecipeMismatch: naming the first setting or input that differs.
    """
    call = Wiring(config, run, imports=False).call(name, iteration)
    main = list(call.places.values())[-1]
    if not is_finished(main):
        return
    for part, setting, was, now in recipe_differences(open_artifact(main).manifest.recipe_parts(), call.recipe_parts()):
        if setting not in FUNCTIONS:
            raise RecipeMismatch(
                f"{main} is taken by an artifact of another recipe ({part} {setting} was {was}, now {now}): finished "
                "artifacts are never overwritten; use a new run directory, or go back to the old settings"
            )


def policy_of_run(path: Path) -> Artifact | None:
    """Return the artifact of a checkpoint that an update made, or of a fork's with an optimizer's state; else None."""
    found = open_artifact(path) if is_finished(path) else None
    if found is None:
        return None
    is_fork = OPTIMIZER_FILE in found.manifest.files and url_of(path) is None
    return found if found.manifest.stage == update.STAGE.name or is_fork else None


def with_optimizer(policy: Artifact, config: PolicyConfig) -> dict[str, Artifact]:
    """Return the inputs of a policy from a run: that policy and, unless unwanted, its optimizer's state.

    Raises:
        ArtifactMissing: when the state is not there.
    """
    if not config.keep_optimizer or OPTIMIZER_FILE in policy.manifest.files:
        return {"policy": policy}
    return {"policy": policy, "optimizer": state_beside(policy)}


def outside_members(config: RunConfig) -> list[MemberConfig]:
    """Return the members whose policy is a checkpoint from outside the run."""
    return [member for member in config.generate.plan() if member_updates(member, 1 << 30) is None]
