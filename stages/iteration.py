"""The stages of an iteration, bound to a run: for each, its config, its inputs, and where its outputs go.

This is the wiring of the pipeline; nothing here computes. A `StageCall` can be hashed, looked up or run.
"""

from dataclasses import dataclass
from pathlib import Path

from pipeline.artifact import Artifact, open_artifact
from pipeline.manifest import is_finished
from pipeline.object_store import url_of
from pipeline.run_dir import RunDir
from pipeline.runs import open_run
from pipeline.stage import StageCall
from stages import batch, evaluate, generate, normalize, optimizer, policy, prompts, score, update
from stages.checkpoints import OPTIMIZER_FILE, check_policy, checkpoint_identity, checkpoint_path, context_length
from stages.config import RunConfig
from stages.generate import check_room
from stages.members import MemberConfig, check_same_tokenizer, member_updates
from stages.optimizer import state_beside
from stages.policy import PolicyConfig
from stages.score import find_rewards
from stages.sources import SourceConfig, source_identity


@dataclass(frozen=True, slots=True)
class Wiring:
    """The calls of a run's stages. Inputs must be finished when their call is asked for."""

    config: RunConfig
    run: RunDir

    def initial_policy(self, source: Path | None) -> StageCall:
        """Return the call that makes the initial policy of a local checkpoint, or of the hub model of the config."""
        return self._policy(self.config.policy, source, self.run.initial_policy)

    def member_policy(self, member: MemberConfig) -> StageCall:
        """Return the call that takes a member's checkpoint from outside into the run."""
        config = PolicyConfig(model=member.policy, keep_optimizer=False)
        return self._policy(config, checkpoint_path(member.policy), self.run.member(member.name))

    def _policy(self, config: PolicyConfig, source: Path | None, place: Path) -> StageCall:
        if source is None:
            return StageCall(policy.STAGE, config, {}, {"policy": place})
        if (trained := _policy_of_run(source)) is not None:
            # the policy of another run: its digest vouches for what that one was trained on
            anonymous = config.model_copy(update={"model": "policy of a run"})
            return StageCall(policy.STAGE, anonymous, _with_optimizer(trained, config), {"policy": place})
        # a checkpoint is what its files are, wherever they lie
        anonymous = config.model_copy(update={"model": "local files"})
        return StageCall(policy.STAGE, anonymous, {}, {"policy": place}, checkpoint_identity(str(source)))

    def prompts(self, iteration: int) -> StageCall:
        """Return the call that draws the training prompts of an iteration."""
        count = self.config.prompts.prompts_per_iteration
        return self._prompts(self.config.prompts, "train", count, iteration, self.run.place(iteration, "prompts"))

    def held_out_prompts(self) -> StageCall:
        """Return the call that draws the prompts of every evaluation."""
        source = self.config.evaluate.source or self.config.prompts
        return self._prompts(source, "held_out", self.config.evaluate.num_prompts, 0, self.run.held_out_prompts)

    def _prompts(self, source: SourceConfig, split: str, count: int, iteration: int, place: Path) -> StageCall:
        initial = open_artifact(self.run.initial_policy)
        own_source = split == "held_out" and self.config.evaluate.source is not None
        return StageCall(
            prompts.STAGE,
            SourceConfig(**source.model_dump(include=set(SourceConfig.model_fields))),
            {"policy": initial},
            {"prompts": place},
            {
                "split": split,
                "held_out_share": 1.0 if own_source else self.config.held_out_share,
                "count": count,
                "seed": self.config.seed,
                "iteration": iteration,
                "max_prompt_tokens": check_room(
                    self.config.generate, context_length(check_policy(str(initial.fetch())))
                ),
                **source_identity(source),
            },
        )

    def generate(self, iteration: int) -> StageCall:
        """Return the call that samples the groups of an iteration."""
        inputs = {"prompts": self.run.open(iteration, "prompts")}
        iterations: dict[str, int | None] = {}
        for member in self.config.generate.plan():
            artifact, iterations[member.name] = self.author(member, iteration)
            inputs[f"policy:{member.name}"] = artifact
        return StageCall(
            generate.STAGE,
            self.config.generate,
            inputs,
            {"completions": self.run.place(iteration, "completions")},
            {"seed": self.config.seed, "iteration": iteration, "policy_iterations": iterations},
        )

    def author(self, member: MemberConfig, iteration: int) -> tuple[Artifact, int | None]:
        """Return the policy that writes a member in this iteration, and how many updates of this run it has seen."""
        num_updates = member_updates(member, iteration)
        if num_updates is None:
            artifact = open_artifact(self.run.member(member.name))
            check_same_tokenizer(artifact, open_artifact(self.run.initial_policy), f"group member {member.name!r}")
            return artifact, None
        return open_artifact(self.run.policy_before(num_updates)), num_updates

    def refer_stored(self, iteration: int) -> Artifact:
        """Make the stored completions that feed this iteration, and their prompts, datasets of it; return them.

        Raises:
            ArtifactMissing: when the other run does not have them.
            PolicyError: when they were written with another tokenizer.
        """
        stored = self.config.stored(iteration)
        assert stored is not None
        source = open_run(stored[0])
        if is_finished(source.initial_policy):
            ours = open_artifact(self.run.initial_policy)
            check_same_tokenizer(open_artifact(source.initial_policy), ours, f"policy of {source.name}")
        self.run.refer(iteration, "prompts", source.open(stored[1], "prompts"))
        completions = source.open(stored[1], "completions")
        self.run.refer(iteration, "completions", completions)
        return completions

    def score(self, iteration: int) -> StageCall:
        """Return the call that scores an iteration's completions; the functions' identities stand in its recipe."""
        inputs = {name: self.run.open(iteration, name) for name in ("prompts", "completions")}
        return StageCall(
            score.STAGE,
            self.config.score,
            inputs,
            {"rewards": self.run.place(iteration, "rewards")},
            {"reward_recipes": {reward.name: reward.recipe for reward in find_rewards(self.config.score)}},
        )

    def normalize(self, iteration: int) -> StageCall:
        """Return the call that turns an iteration's rewards into advantages."""
        return StageCall(
            normalize.STAGE,
            self.config.normalize,
            {"rewards": self.run.open(iteration, "rewards")},
            {"advantages": self.run.place(iteration, "advantages")},
        )

    def batch(self, iteration: int) -> StageCall:
        """Return the call that orders an iteration's rows for training."""
        inputs = {name: self.run.open(iteration, name) for name in ("completions", "advantages")}
        return StageCall(
            batch.STAGE,
            self.config.batch,
            inputs,
            {"batches": self.run.place(iteration, "batches")},
            {
                "seed": self.config.seed,
                "iteration": iteration,
                # answers stored by another run have no age in this one
                **({"is_offline": True} if self.config.stored(iteration) else {}),
            },
        )

    def update(self, iteration: int) -> StageCall:
        """Return the call that trains on an iteration's batches."""
        return StageCall(
            update.STAGE,
            self.config.update,
            {
                "batches": self.run.open(iteration, "batches"),
                "policy": open_artifact(self.run.policy_before(iteration)),
            },
            {name: self.run.place(iteration, name) for name in update.STAGE.outputs},
        )

    def optimizer(self, iteration: int) -> StageCall:
        """Return the call that keeps the optimizer's state after an iteration's update."""
        after = open_artifact(self.run.policy_before(iteration + 1))
        place = self.run.place(iteration, "optimizer")
        return StageCall(optimizer.STAGE, optimizer.OptimizerConfig(), {"policy": after}, {"optimizer": place})

    def evaluate(self, num_updates: int) -> StageCall:
        """Return the call that evaluates the policy after ``num_updates`` iterations."""
        return StageCall(
            evaluate.STAGE,
            self.config.evaluation(),
            {
                "prompts": open_artifact(self.run.held_out_prompts),
                "policy": open_artifact(self.run.policy_before(num_updates)),
            },
            {"evaluations": self.run.evaluations_of(num_updates)},
            {
                "seed": self.config.seed,
                "policy_iteration": num_updates,
                "reward_recipes": {reward.name: reward.recipe for reward in find_rewards(self.config.score)},
            },
        )

    def is_evaluated(self, num_updates: int) -> bool:
        """Return whether the policy after so many iterations is to be evaluated."""
        every = self.config.evaluate.every
        return every > 0 and (num_updates % every == 0 or num_updates == self.config.iterations)


def _policy_of_run(path: Path) -> Artifact | None:
    """Return the artifact when an update has made the checkpoint, or when it is a fork's, with a state inside."""
    found = open_artifact(path) if is_finished(path) else None
    if found is None:
        return None
    is_fork = OPTIMIZER_FILE in found.manifest.files and url_of(path) is None
    return found if found.manifest.stage == update.STAGE.name or is_fork else None


def _with_optimizer(policy: Artifact, config: PolicyConfig) -> dict[str, Artifact]:
    """Return the inputs of a policy that comes from a run: it, and unless unwanted the optimizer's state beside it.

    Raises:
        ArtifactMissing: when the state is not there.
    """
    if not config.keep_optimizer or OPTIMIZER_FILE in policy.manifest.files:
        return {"policy": policy}
    return {"policy": policy, "optimizer": state_beside(policy)}


def outside_members(config: RunConfig) -> list[MemberConfig]:
    """Return the members whose policy is a checkpoint from outside the run."""
    return [member for member in config.generate.plan() if member_updates(member, 1 << 30) is None]
