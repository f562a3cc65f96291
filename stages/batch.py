"""batch: completions and advantages -> the training order as data, with the dropped rows and their reasons.

After this stage the trainer has no choice left: every kept row has its optimizer step, its microbatch and
the denominator of its loss.
"""

from collections.abc import Sequence
from typing import Literal, Self

import polars as pl
from pydantic import Field, model_validator

from grpo.aggregation import AGGREGATIONS, StepRows
from grpo.batching import cut_microbatches, full_vocabulary_logprobs, loss_tokens
from grpo.groups import group_numbers
from pipeline.config import StrictModel
from pipeline.files import identity
from pipeline.stage import Stage, StageTask
from stages.checks.outcome import quarantined

Aggregation = Literal["token_mean", "row_mean", "row_sum", "constant_length", "prompt_mean", "token_sum"]
IMPORTED = "import"
"""Stage and engine of completions whose sampling probabilities are unknown."""
NO_POLICY = "none"
"""The policy_digest of completions that no policy artifact wrote."""
NO_PLACE = {
    "optimizer_step": pl.lit(None, pl.Int32),
    "microbatch": pl.lit(None, pl.Int32),
    "row": pl.lit(None, pl.Int32),
    "loss_denominator": pl.lit(None, pl.Float64),
}
"""Values in a dropped row."""


class BatchConfig(StrictModel):
    """Config of the batch stage."""

    optimizer_steps: int = Field(1, ge=1)
    """Optimizer steps that an epoch over the rows is cut into. With one, no second forward is needed."""
    epochs: int = Field(1, ge=1)
    """How often each row is trained on."""
    microbatch_tokens: int = Field(8192, ge=1)
    """Padded tokens (rows x longest row) of a forward pass; a longer single row gets a pass of its own."""
    max_tokens: int | None = Field(None, ge=1)
    """Rows with more tokens, prompt and completion together, are dropped as ``too_long``; null = no limit."""
    drop_truncated: bool = False
    """Drop completions cut at max_tokens (DAPO's overlong filtering); their rewards stay in the group's mean."""
    aggregation: Aggregation = "token_mean"
    """Mean of the token losses of an optimizer step: over tokens; over rows, of their token means, of their token sums,
    or of these by aggregation_tokens; over prompts, of their token means; or their sum. See grpo/aggregation.py."""
    aggregation_tokens: int | None = Field(None, ge=1)
    """For constant_length: tokens that every row's sum is divided by."""
    zero_variance: Literal["drop", "keep_in_denominator"] = "drop"
    """What happens to groups with zero variance: dropped, or counted in the mean of the loss as 0. Dropped, they raise
    what the other tokens weigh, by 1 / share of informative groups; see docs/algorithm.md."""
    max_policy_age: int | None = Field(None, ge=0)
    """Rows written by a policy more than this many updates old, or from outside the run, are dropped as ``stale``; null
    = none are. Does not apply to offline iterations."""

    @model_validator(mode="after")
    def _constant_where_it_is_used(self) -> Self:
        if (self.aggregation == "constant_length") != (self.aggregation_tokens is not None):
            raise ValueError(
                f"aggregation is {self.aggregation}, aggregation_tokens {self.aggregation_tokens}: constant_length "
                "wants a number of tokens, for example generate.max_tokens, and no other mean takes one; set or "
                "remove aggregation_tokens"
            )
        return self


NEEDED = (
    "completion_id",
    "group_id",
    "prompt_token_ids",
    "completion_token_ids",
    "loss_mask",
    "sampling_logprobs",
    "kept_mass",
    "temperature",
    "finish_reason",
    "engine",
    "policy_digest",
    "policy_iteration",
)
"""Columns of completions that the order depends on, or that training reads: texts stay on disk."""


def batch_rows(
    completions: pl.DataFrame,
    advantages: pl.DataFrame,
    config: BatchConfig,
    *,
    seed: int,
    iteration: int,
    is_offline: bool = False,
    quarantined: Sequence[str] = (),
) -> pl.DataFrame:
    """Return the rows in training order, then the dropped ones.

    Groups are shuffled by a hash of the seed and dealt to the optimizer steps whole; inside a step rows are
    sorted by length, so that a microbatch has little padding. Rows of an offline iteration come from another run and
    have no age here: max_policy_age does not apply to them. ``quarantined`` are the completion_id that a check keeps
    from training; their rewards stay in the group's mean.
    """
    rows = completions.join(advantages, on="completion_id", how="left", validate="1:1", maintain_order="left")
    rows = (
        rows.with_columns(
            num_tokens=pl.col("prompt_token_ids").list.len() + pl.col("completion_token_ids").list.len(),
            loss_tokens=loss_tokens(),
            sampling_logprobs=full_vocabulary_logprobs(has_kept_mass=rows["kept_mass"].null_count() < len(rows)),
        )
        .with_columns(drop_reason=_drop_reason(config, None if is_offline else iteration, quarantined))
        .with_columns(pl.col("advantage").fill_null(0.0))
    )
    kept = rows.filter(pl.col("drop_reason").is_null())
    steps = [
        _step(part, config, step=epoch * config.optimizer_steps + index)
        for epoch in range(config.epochs)
        for index, part in enumerate(_deal(kept, config.optimizer_steps, seed, iteration, epoch))
    ]
    zero_variance = (
        rows.filter(pl.col("drop_reason") == "zero_variance") if config.zero_variance != "drop" else rows.clear()
    )
    ordered = [
        step.with_columns(loss_denominator=_denominators(step, zero_variance, len(steps), config)) for step in steps
    ]
    dropped = rows.filter(pl.col("drop_reason").is_not_null()).sort("completion_id").with_columns(**NO_PLACE)
    return pl.concat([*ordered, dropped], how="diagonal").select(
        "optimizer_step",
        "microbatch",
        "row",
        "completion_id",
        "group_id",
        "prompt_token_ids",
        "completion_token_ids",
        "loss_mask",
        "sampling_logprobs",
        "temperature",
        "advantage",
        "policy_digest",
        "loss_denominator",
        "drop_reason",
    )


def _denominators(step: pl.DataFrame, zero_variance: pl.DataFrame, num_steps: int, config: BatchConfig) -> pl.Series:
    """Return the divisor of each row's summed token losses; a step's mean counts its share of zero-variance rows."""

    def share(count: int) -> float:
        return count * config.epochs / num_steps

    rows = StepRows(
        tokens_B=step["loss_tokens"].cast(pl.Int64).to_numpy(),
        prompt_B=group_numbers(step),
        constant=config.aggregation_tokens,
        extra_tokens=share(int(zero_variance["loss_tokens"].sum())),
        extra_rows=share(zero_variance.height),
        extra_prompts=share(zero_variance["group_id"].n_unique()),
    )
    return pl.Series(AGGREGATIONS[config.aggregation](rows), dtype=pl.Float64)


def _drop_reason(config: BatchConfig, iteration: int | None, quarantined: Sequence[str]) -> pl.Expr:
    """First reason that applies, in this order; null = the row trains."""
    is_unscored = pl.col("advantage").is_null() | (pl.col("drop_reason") == "unscored")
    has_nothing = pl.col("loss_tokens") == 0
    is_imported = pl.col("engine") == IMPORTED
    reason = pl.when(is_unscored).then(pl.lit("unscored")).when(is_imported).then(pl.lit("not_sampled"))
    reason = reason.when(has_nothing).then(pl.lit("no_trainable_token"))
    reason = reason.when(pl.col("finish_reason") == "abort").then(pl.lit("aborted"))
    if quarantined:
        reason = reason.when(pl.col("completion_id").is_in(list(quarantined))).then(pl.lit("quarantined"))
    if config.drop_truncated:
        reason = reason.when(pl.col("finish_reason") == "length").then(pl.lit("truncated"))
    if config.max_tokens is not None:
        reason = reason.when(pl.col("num_tokens") > config.max_tokens).then(pl.lit("too_long"))
    if config.max_policy_age is not None and iteration is not None:
        age = iteration - pl.col("policy_iteration")
        reason = reason.when(age.is_null() | (age > config.max_policy_age)).then(pl.lit("stale"))
    return reason.otherwise(pl.col("drop_reason"))


def _deal(kept: pl.DataFrame, steps: int, seed: int, iteration: int, epoch: int) -> list[pl.DataFrame]:
    """Return the rows of each optimizer step; groups stay whole, ordered by a hash."""
    groups = kept["group_id"].unique(maintain_order=True).to_list()
    groups.sort(key=lambda group: identity(seed, iteration, epoch, group))
    step_of = {group: index * steps // max(len(groups), 1) for index, group in enumerate(groups)}
    numbered = kept.with_columns(_step=pl.col("group_id").replace_strict(step_of, default=None, return_dtype=pl.Int32))
    parts = [numbered.filter(pl.col("_step") == step).drop("_step") for step in range(steps)]
    return [part for part in parts if len(part)]


def _step(rows: pl.DataFrame, config: BatchConfig, *, step: int) -> pl.DataFrame:
    ordered = rows.sort("num_tokens", "completion_id")
    microbatch = cut_microbatches(ordered["num_tokens"].to_list(), config.microbatch_tokens)
    return ordered.with_columns(
        pl.lit(step).alias("optimizer_step"), pl.Series("microbatch", microbatch, dtype=pl.Int32)
    ).with_columns(row=pl.int_range(pl.len(), dtype=pl.Int32).over("microbatch"))


def compute(task: StageTask[BatchConfig, None]) -> None:
    """Order the rows of an iteration."""
    frame = batch_rows(
        task.inputs["completions"].scan().select(NEEDED).collect(),
        task.inputs["advantages"].scan().select("completion_id", "advantage", "drop_reason").collect(),
        task.config,
        seed=task.parameters["seed"],
        iteration=task.parameters["iteration"],
        is_offline=task.parameters.get("is_offline", False),
        quarantined=quarantined(task.inputs["checks"].read()) if "checks" in task.inputs else (),
    )
    task.writer.write_part(0, frame)


STAGE = Stage("batch", version=1, config=BatchConfig, compute=compute, wants=("seed", "iteration"))
