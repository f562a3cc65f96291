"""normalize: rewards -> advantages, one row per completion."""

from typing import Literal

import polars as pl
from pydantic import Field

from grpo.advantage import advantages, combine
from pipeline.config import StrictModel
from pipeline.errors import ConfigError
from pipeline.stage import Stage, StageTask


class NormalizeConfig(StrictModel):
    """Config of the normalize stage. "GRPO normalization" is four choices; each is a field."""

    baseline: Literal["group_mean", "leave_one_out", "none"] = "group_mean"
    scale: Literal["none", "group_std", "batch_std"] = "none"
    """none = Dr. GRPO; group_std = DeepSeekMath."""
    ddof: Literal[0, 1] = 1
    """Of the standard deviation: 1 = sample, 0 = population."""
    eps: float = Field(1e-4, ge=0)
    """Added to the standard deviation."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Reward name -> weight in the sum; a reward that is not named has weight 1."""


def normalize_rows(rewards: pl.LazyFrame, config: NormalizeConfig) -> pl.DataFrame:
    """Return one row per completion of the long-format rewards.

    Raises:
        ConfigError: when a weight names a reward that does not exist, or all weights are 0.
    """
    names = rewards.select(pl.col("reward_name").unique(maintain_order=True)).collect()["reward_name"].to_list()
    unknown = sorted(set(config.weights) - set(names))
    if unknown:
        raise ConfigError(f"normalize.weights names {unknown}, the rewards are {names}: correct the names")
    try:
        combined = combine(rewards, {name: config.weights.get(name, 1.0) for name in names})
    except ValueError as error:
        raise ConfigError(f"normalize.weights: {error}") from error
    return advantages(
        combined, baseline=config.baseline, scale=config.scale, ddof=config.ddof, eps=config.eps
    ).collect()


def compute(task: StageTask) -> None:
    """Write the advantages of an iteration."""
    task.writer.write_part(0, normalize_rows(task.inputs["rewards"].scan(), task.config))


STAGE = Stage("normalize", version=1, outputs=("advantages",), compute=compute)
