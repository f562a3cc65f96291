"""The configuration of a run: one table per stage, named after it, and the checks that span several of them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, create_model, model_validator

from grpo.settings import UpdateConfig
from pipeline.artifact import open_artifact
from pipeline.chain import CHAIN, WRITER, load_stage
from pipeline.config import Place, StrictModel, apply_overrides, deciding, parse_toml, read_toml, validate
from pipeline.errors import ConfigError, RecipeMismatch
from pipeline.manifest import is_finished
from pipeline.retention import RetentionConfig
from pipeline.run_dir import RunDir
from stages.batch import BatchConfig
from stages.checkpoints import STARTER
from stages.checks.config import CheckConfig, CheckStageConfig, JudgeAnswered, OffPolicy, expanded
from stages.checks.outcome import blocking
from stages.evaluate import EvaluateConfig, EvaluateTaskConfig
from stages.generate import GenerateConfig
from stages.logprobs import CURRENT, PROXIMAL, REFERENCE
from stages.members import coming_members, member_updates
from stages.normalize import NormalizeConfig
from stages.policy import PolicyConfig
from stages.presets.merge import with_preset
from stages.prompts import PromptsConfig
from stages.score import ScoreConfig, find_rewards
from stages.starter.starter import StarterConfig
from stages.tracking import TrackingConfig

CHANGEABLE = ("iterations", "resources", "evaluate.every", "retention", "tracking")
"""Settings that may change between two starts of a run: they decide how far and where it runs, what stays on disk, and
who is told of it, not its results."""


class ResourcesConfig(StrictModel):
    """What the machine offers. Decides no result, so it is in no recipe."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the update."""
    gpu_memory_utilization: float = Field(0.5, gt=0, le=1)
    """Share of the GPU's memory that vLLM may take; the update needs the rest."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """Memory for vLLM's key-value cache on CPU, GiB."""
    reward_workers: int = Field(2, ge=1)
    """Processes for each reward function that is called once per completion."""
    retries: int = Field(2, ge=0, le=20)
    """How often a stage is tried again after what may pass: an engine that died, a store that cannot be reached."""
    retry_seconds: float = Field(10.0, ge=0, le=3600)
    """Seconds before the first retry; each later one waits twice as long, an hour at most."""


class OfflineConfig(StrictModel):
    """Stored completions that feed iterations of this run, instead of newly generated ones."""

    run: Place = Field(min_length=1)
    """Directory of the run that has them."""
    iterations: list[int] = Field(min_length=1)
    """Its iterations; each feeds one iteration of this run, in this order."""


class RunConfig(StrictModel):
    """A whole run."""

    seed: int = Field(0, ge=0)
    """Every random choice of the run derives from it."""
    iterations: int = Field(10, ge=1)
    """Rounds of generate ... update. Raising it later continues a finished run."""
    policy: PolicyConfig
    prompts: PromptsConfig
    generate: GenerateConfig = GenerateConfig()
    score: ScoreConfig
    normalize: NormalizeConfig = NormalizeConfig()
    batch: BatchConfig = BatchConfig()
    update: UpdateConfig = UpdateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    starter: StarterConfig | None = None
    offline: list[OfflineConfig] = Field(default_factory=list)
    """What the first iterations train on; the iterations after them generate."""
    checks: list[CheckConfig] = Field(default_factory=list)
    """What an iteration's rows must be before they train; or the name of a file with [[checks]] alone."""
    resources: ResourcesConfig = ResourcesConfig()
    retention: RetentionConfig | None = None
    """Which policies and optimizer states stay on disk while the run goes on; null = all of them."""
    tracking: TrackingConfig | None = None
    """The experiment trackers that are told of the run; null = none."""

    @model_validator(mode="before")
    @classmethod
    def _one_seed(cls, tables: Any) -> Any:
        """Let the starter's seed follow the run's, unless it is set."""
        if isinstance(tables, dict) and isinstance(tables.get("starter"), dict) and "seed" in tables:
            return {**tables, "starter": {"seed": tables["seed"], **tables["starter"]}}
        return tables

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.policy.model == STARTER and self.starter is None:
            raise ValueError('policy.model is "starter", but there is no [starter] table: add one, or name a model')
        if self.starter is not None and self.policy.model != STARTER:
            raise ValueError(
                f'there is a [starter] table, but policy.model is "{self.policy.model}": set it to "starter", or leave '
                "the table out"
            )
        if self.retention is not None and self.retention.keep_best and not self.evaluate.every:
            raise ValueError(
                f"retention.keep_best is {self.retention.keep_best}, and evaluate.every is 0, so that no policy has "
                "figures to be the best by: set evaluate.every, or keep_best to 0"
            )
        names = [reward.name for reward in self.score.rewards]
        unknown = sorted(set(self.normalize.weights) - set(names))
        if unknown:
            raise ValueError(f"normalize.weights names {unknown}, score.rewards has {names}: correct the names")
        CheckStageConfig(checks=self.checks)
        asked = {check.reward for check in self.checks if isinstance(check, JudgeAnswered) and check.reward is not None}
        if unknown := sorted(asked - set(names)):
            raise ValueError(f"checks name the rewards {unknown}, score.rewards has {names}: correct the names")
        causes = self._sampler_differs() if self.update.correction.kind == "none" else []
        if causes:
            raise ValueError(
                f"update.correction.kind is none, but the sampler is not the policy that trains: {'; '.join(causes)}; "
                "nothing would weigh what its answers are worth to this policy: set the kind to token_truncate, or "
                "remove the cause"
            )
        return self

    def _sampler_differs(self) -> list[str]:
        """Return what makes any sampling logprob another one than the trainer's under the proximal policy."""
        if self.update.proximal == "sampler":
            return []  # they are the same, wherever the answers come from
        late = 1 << 30
        others = [m.policy for m in self.generate.plan() if member_updates(m, late) != late]
        causes = [f"generate.members has {policy}" for policy in others]
        if self.offline:
            causes.append("[[offline]] has answers of other policies")
        if self.generate.dtype != "float32":
            causes.append(f"generate.dtype is {self.generate.dtype}, and the trainer's weights are float32")
        if self.update.autocast_bf16:
            causes.append("update.autocast_bf16 has the trainer compute otherwise than the engine")
        if self.generate.is_truncated:
            causes.append("top_p, top_k or min_p of [generate] truncate sampling, and the trainer's probabilities not")
        return causes

    def stored(self, iteration: int) -> tuple[str, int] | None:
        """Return the run and its iteration whose completions feed this iteration, None when it generates."""
        plan = [(source.run, index) for source in self.offline for index in source.iterations]
        return plan[iteration] if iteration < len(plan) else None

    def executes(self, step: str, iteration: int) -> bool:
        """Return whether the iteration has this step.

        It has logprobs if its rows are looked at under other policies, and check if there are [[checks]].
        """
        if step == "check":
            return bool(self.checks)
        return step != "logprobs" or bool(self.named_policies(iteration))

    def named_policies(self, iteration: int) -> dict[str, int]:
        """Return the policies under which the rows of an iteration are looked at: name -> updates behind it.

        The proximal one, where it is that of an earlier iteration; the reference, where a KL to it is asked for; the
        current one, where the baseline weighs by it.
        """
        found = {}
        if "logprobs" in self.normalize.reads:
            found[CURRENT] = iteration
        if self.update.proximal == "phase" and iteration > 0 and self.stored(iteration) is not None:
            found[PROXIMAL] = 0
        if self.update.kl is not None:
            every = self.update.kl.refresh_every
            found[REFERENCE] = iteration // every * every if every else 0
        return found

    def needs(self, step: str, dataset: str, iteration: int) -> bool:
        """Return whether a step of the iteration reads a dataset that it can do without, see `pipeline.chain.From`.

        Only what a quarantine keeps from training decides batches, so they depend on no other checks.
        """
        if step == "normalize":
            return dataset in self.normalize.reads
        if dataset == "checks":
            return any(check.severity == "quarantine" for check in self.checks)
        if dataset == "training_records":
            asks = any(isinstance(check, OffPolicy) and check.max_kl is not None for check in self.checks)
            return asks and iteration > 0
        if dataset == "logprobs":
            return bool(self.named_policies(iteration).keys() & {PROXIMAL, REFERENCE})
        return self.executes(WRITER[dataset].name, iteration)

    def is_to_be_evaluated(self, num_updates: int) -> bool:
        """Return whether the policy after ``num_updates`` iterations is to be evaluated."""
        every = self.evaluate.every
        return every > 0 and (num_updates % every == 0 or num_updates == self.iterations)

    def needed_policies(self, num_updates: int) -> set[int]:
        """Return the existing policies that coming iterations read besides the last one, by the updates behind them.

        They are members of coming groups, and those under which coming rows are looked at. ``num_updates`` policies
        exist besides the initial one.
        """
        num_stored = sum(len(source.iterations) for source in self.offline)
        # later iterations that generate have the reference of the next one, or one that is still to be made;
        # after the last iteration, too: raising ``iterations`` continues a finished run
        coming = range(num_updates, max(num_stored, num_updates + 1))
        named = {number for iteration in coming for number in self.named_policies(iteration).values()}
        return coming_members(self.generate.plan(), num_updates) | {number for number in named if number <= num_updates}

    @property
    def held_out_share(self) -> float:
        """Share of the training source's questions that training and warm-up do not use."""
        return 0.0 if self.evaluate.source is not None else self.evaluate.held_out_share

    def evaluation(self) -> EvaluateTaskConfig:
        """Return the settings that decide an evaluation."""
        shared = set(EvaluateTaskConfig.model_fields) & set(GenerateConfig.model_fields)
        return EvaluateTaskConfig(
            num_samples=self.evaluate.num_samples,
            pass_threshold=self.evaluate.pass_threshold,
            score=self.score,
            normalize=self.normalize,
            **self.generate.model_dump(include=shared),
        )


def config_class() -> type[RunConfig]:
    """Return `RunConfig`, extended by the tables of those stages in the chain that it does not list."""
    own = [step for step in CHAIN if step.name not in RunConfig.model_fields]
    tables = {step.name: load_stage(step).config for step in own if step.stage}
    if not tables:
        return RunConfig
    fields: dict[str, Any] = {name: (table, Field(default_factory=table)) for name, table in tables.items()}
    return create_model("RunConfig", __base__=RunConfig, **fields)


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Return the validated config of a TOML file with ``key=value`` overrides. Read-only.

    Raises:
        ConfigError: naming every wrong key, or that the path is no TOML file.
    """
    return parse_config(read_toml(path), str(path), overrides)


def parse_config(toml: str, source: str, overrides: list[str] | None = None) -> RunConfig:
    """Return the validated config of a TOML text; ``source`` names it in messages.

    Raises:
        ConfigError: naming every wrong key, or that the text is no TOML, or that there is no such preset.
    """
    tables = expanded(with_preset(apply_overrides(parse_toml(toml, source), overrides or [])))
    return validate(config_class(), tables, source)


def derive_tables(run: RunDir, tables: Mapping[str, Any], overrides: list[str] | None = None) -> dict[str, Any]:
    """Return the tables of a run's config with others in place of its own. Read-only.

    A given table replaces the run's table of that name as a whole; tables that are not given stay.
    """
    recorded = run.settings()
    found = apply_overrides({**recorded, **tables}, overrides or [])
    if "preset" in found:
        raise ConfigError(
            f"preset is {found['preset']!r}, but the settings of {run.name} stay where a table does not replace them: "
            "expected no preset; give the tables of stages/presets that you want"
        )
    return found if found.get("checks") == recorded.get("checks") else expanded(found)


def recorded_config(run: RunDir) -> RunConfig:
    """Return the config that a run was made with. Read-only."""
    return validate(config_class(), run.settings(), str(run.resolved_config))


def check_unchanged(run: RunDir, config: RunConfig) -> None:
    """Check that a run directory, if it exists, belongs to this config. Read-only.

    Raises:
        RecipeMismatch: naming the settings that differ and would change results, or reward functions that are not what
            they were.
        RewardError: when a reward function cannot be imported.
    """
    if changes := changed_settings(run, config):
        told = "; ".join(f"{c.setting} was {json.dumps(c.was)}, now {json.dumps(c.now)}" for c in changes)
        raise RecipeMismatch(
            f"{run.name} was made with another config ({told}): its artifacts are never overwritten; "
            "give this config a new run directory (--run), or go back to the old settings"
        )
    if (odd := changed_rewards(run, config)) is not None:
        raise RecipeMismatch(
            f"{run.name} was scored by other versions of the reward functions {odd}: its artifacts are never "
            "overwritten; give this config a new run directory (--run, or grpo rescore), or go back to the old ones"
        )


class Change(NamedTuple):
    """A setting that differs between two configs."""

    setting: str
    """Its tables and its name, joined by dots."""
    was: Any
    now: Any


def changed_settings(run: RunDir, config: RunConfig) -> list[Change]:
    """Return the settings that decide results and differ from those of a run, if it exists. Read-only."""
    if not run.resolved_config.is_file():
        return []
    return list(setting_changes(lasting(recorded_config(run)), lasting(config)))


def changed_rewards(run: RunDir, config: RunConfig) -> list[str] | None:
    """Return the reward functions that are not those which scored a run; None = all are. Read-only.

    Raises:
        RewardError: when a reward function cannot be imported.
    """
    if not run.resolved_config.is_file():
        return None
    scored = (run.place(index, "rewards") for index in run.iterations() if not is_held(run, index))
    first = next(filter(is_finished, scored), None)
    if first is None:
        return None
    before = open_artifact(first).manifest.config.get("reward_recipes")
    now = {reward.name: reward.recipe for reward in find_rewards(config.score)}
    return None if before == now else sorted(name for name in now if (before or {}).get(name) != now[name])


def lasting(config: RunConfig) -> dict[str, Any]:
    """Return the settings that must not change: without CHANGEABLE, and of the checks only those that decide rows."""
    found = deciding(config)
    found["checks"] = [check for check in found["checks"] if check["severity"] == "quarantine"]
    for table, _, name in (path.rpartition(".") for path in CHANGEABLE):
        (found[table] if table else found).pop(name)
    return found


def is_held(run: RunDir, iteration: int) -> bool:
    """Return whether a check holds an iteration: what stands behind its completions may be made again. Read-only."""
    if is_finished(run.place(iteration, "policy")) or not is_finished(run.place(iteration, "checks")):
        return False
    return not blocking(run.open(iteration, "checks").read()).is_empty()


def setting_changes(old: Any, new: Any, path: str = "") -> Iterator[Change]:
    """Yield the settings in which two configs differ, as `deciding` gives them, but for those of CHANGEABLE."""
    if path in CHANGEABLE:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from setting_changes(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield Change(path, old, new)
