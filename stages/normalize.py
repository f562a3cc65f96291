"""normalize: rewards -> advantages, one row per completion."""

from typing import Literal

import polars as pl
from pydantic import Field, ValidationInfo, field_validator

from grpo.advantages import baselines, scales
from grpo.advantages.baselines import BASELINES
from grpo.advantages.estimate import advantages
from grpo.advantages.scales import SCALES
from grpo.batching import full_vocabulary_logprobs, loss_tokens
from grpo.combine import combine, normalize_each
from pipeline.config import StrictModel
from pipeline.errors import ConfigError, RewardError
from pipeline.stage import Stage, StageTask
from stages.custom_functions import custom_function, is_custom
from stages.logprobs import CURRENT

COLUMNS = ("completion_id", "group_id", "reward_name", "reward_recipe", "reward")


class NormalizeConfig(StrictModel):
    """Config of the normalize stage. "GRPO normalization" is four choices; each is a field."""

    baseline: str = "group_mean"
    """What rewards are measured against: group_mean, leave_one_out, length_weighted, per_policy, importance_weighted,
    importance_weighted_squared, none, or module:function of your own."""
    scale: str = "none"
    """What advantages are divided by: none = Dr. GRPO; group_std = DeepSeekMath; leave_one_out_std; group_mean = MaxRL;
    batch_std, over all groups whose rewards differ; batch_raw_std; token_whitened = REINFORCE++; or module:function."""
    ddof: Literal[0, 1] = 1
    """Of the standard deviation: 1 = sample, 0 = population."""
    eps: float = Field(1e-4, ge=0)
    """Added to the standard deviation."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Reward name -> weight in the sum; a reward that is not named has weight 1."""
    combine: Literal["sum", "normalize_each"] = "sum"
    """sum = the weighted sum of the rewards is normalized; normalize_each = each reward is normalized in its group by
    its own mean and std, then the weighted sum is (GDPO with scale = "batch_std", or "token_whitened" as in verl)."""

    @property
    def reads(self) -> frozenset[str]:
        """The datasets beside the rewards that the baseline and the scale need."""
        found = set()
        if self.baseline in baselines.OF_COMPLETIONS or self.scale in scales.OF_COMPLETIONS:
            found.add("completions")
        if self.baseline in baselines.OF_POLICIES:
            found.add("logprobs")
        return frozenset(found)

    def functions(self) -> dict[str, str]:
        """Return the settings that may name a function from outside."""
        return {"normalize.baseline": self.baseline, "normalize.scale": self.scale}

    @field_validator("baseline", "scale")
    @classmethod
    def _known(cls, name: str, field: ValidationInfo) -> str:
        known = BASELINES if field.field_name == "baseline" else SCALES
        if name not in known and not is_custom(name):
            raise ValueError(
                f"found {name!r}, expected one of {', '.join(known)}, or module:function of your own: correct the name"
            )
        return name


def normalize_rows(
    rewards: pl.LazyFrame,
    config: NormalizeConfig,
    completions: pl.LazyFrame | None = None,
    logprobs: pl.LazyFrame | None = None,
) -> pl.DataFrame:
    """Return one row per completion of the long-format rewards.

    ``completions`` and ``logprobs`` are the datasets that ``config.reads`` names.

    Raises:
        ConfigError: when a weight names a reward that does not exist, or all weights are 0; when a function cannot be
            imported, or does not return a number for each completion.
        RewardError: when a group was scored by several versions of a reward function.
    """
    combined = combined_rewards(rewards, config)
    if completions is not None:
        facts = member_facts(completions, logprobs).collect()
        combined = combined.join(facts, on="completion_id", how="left", validate="1:1", maintain_order="left")
    baseline, scale = (
        custom_function(f"normalize.{setting}", name) if is_custom(name) else name
        for setting, name in (("baseline", config.baseline), ("scale", config.scale))
    )
    try:
        return advantages(combined, baseline=baseline, scale=scale, ddof=config.ddof, eps=config.eps)
    except ValueError as error:
        raise ConfigError(f"[normalize] with baseline {config.baseline} and scale {config.scale}: {error}") from error


def member_facts(completions: pl.LazyFrame, logprobs: pl.LazyFrame | None) -> pl.LazyFrame:
    """Return completion_id and what baselines and scales know of a completion: tokens, policy, log_weight.

    The last is the sum over its tokens of log(current / sampler), null without logprobs; a token whose sampler is
    unknown counts 0, and so does a completion of a group that cannot train.
    """
    rows = completions.select(
        "completion_id",
        tokens=loss_tokens().cast(pl.Float64),
        policy=pl.col("policy_digest").rank("dense").cast(pl.Int64) - 1,
        sampling=full_vocabulary_logprobs(has_kept_mass=True),
    )
    if logprobs is None:
        return rows.drop("sampling")
    current = logprobs.filter(pl.col("policy_name") == CURRENT).select("completion_id", current="logprobs")
    difference = (pl.col("current") - pl.col("sampling")).list.eval(pl.element().cast(pl.Float64))
    known = difference.list.eval(pl.when(pl.element().is_finite()).then(pl.element()))
    joined = rows.join(current, on="completion_id", how="left", maintain_order="left")
    return joined.with_columns(log_weight=known.list.sum().fill_null(0.0)).drop("sampling", "current")


def combined_rewards(rewards: pl.LazyFrame, config: NormalizeConfig) -> pl.DataFrame:
    """Return completion_id, group_id and the combined reward; with ``normalize_each`` also its signal.

    Raises:
        ConfigError: when a weight names a reward that does not exist, all weights are 0, or a completion has two
            rewards of one name.
        RewardError: when a group was scored by several versions of a reward function.
    """
    few = pl.col("reward_name", "reward_recipe").cast(pl.Categorical)  # numbers instead of long texts
    rows = rewards.select(*COLUMNS).with_columns(few).collect()
    names = rows["reward_name"].unique(maintain_order=True).to_list()
    check_recipes(rows, names)
    unknown = sorted(set(config.weights) - set(names))
    if unknown:
        raise ConfigError(f"normalize.weights names {unknown}, the rewards are {names}: correct the names")
    weights = {name: config.weights.get(name, 1.0) for name in names}
    try:
        if config.combine == "sum":
            return combine(rows, weights)
        return normalize_each(rows, weights, ddof=config.ddof, eps=config.eps)
    except ValueError as error:
        raise ConfigError(f"[normalize]: {error}") from error


def check_recipes(rewards: pl.DataFrame, names: list[str]) -> None:
    """Check that within a group every reward comes from one version of its function.

    Raises:
        RewardError: naming a group that mixes them: its completions would be compared by different measures.
    """
    recipe = rewards["reward_recipe"]
    by_name = (recipe.filter(rewards["reward_name"] == name) for name in names)
    if all((found == found[0]).all() for found in by_name):
        return
    mixed = (
        rewards.group_by("group_id", "reward_name", maintain_order=True)
        .agg(
            pl.col("reward_recipe").n_unique().alias("versions"),
            pl.col("reward_recipe").unique().cast(pl.String).str.head(12),
        )
        .filter(pl.col("versions") > 1)
    )
    if len(mixed):
        group, name, _, recipes = mixed.row(0)
        raise RewardError(
            f"{len(mixed):,} groups mix versions of a reward, the first is group {group} with the versions "
            f"{sorted(recipes)} of {name!r}: its answers would be compared by different measures; score all of the "
            "group with one version (grpo rescore)"
        )


def compute(task: StageTask[NormalizeConfig, None]) -> None:
    """Write the advantages of an iteration."""
    read = {name: task.inputs[name].scan() for name in task.config.reads}
    task.writer.write_part(0, normalize_rows(task.inputs["rewards"].scan(), task.config, **read))


STAGE = Stage("normalize", version=4, config=NormalizeConfig, compute=compute)
