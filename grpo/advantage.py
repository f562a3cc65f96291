"""Advantages of scored groups, and the one combined reward of a completion, as lazy polars expressions.

Everything here is float64 and keyed by ``group_id``: groups may be uneven, scattered over the frame, and hold unscored
members. No torch.
"""

from collections.abc import Mapping
from typing import Literal

import polars as pl

Baseline = Literal["group_mean", "leave_one_out", "none"]
Scale = Literal["none", "group_std", "batch_std"]

ZERO_VARIANCE_TOLERANCE = 1e-9
"""Relative spread below which a group says nothing: sums of equal float64 rewards differ by less than this."""

ADVANTAGE_COLUMNS = (
    "completion_id",
    "group_id",
    "reward",
    "group_reward_mean",
    "group_reward_std",
    "group_size",
    "advantage",
    "drop_reason",
)


def advantages(
    rewards: pl.DataFrame | pl.LazyFrame,
    *,
    baseline: Baseline = "group_mean",
    scale: Scale = "none",
    ddof: Literal[0, 1] = 1,
    eps: float = 1e-4,
) -> pl.LazyFrame:
    """Return ``ADVANTAGE_COLUMNS``, one row per input row, in input row order.

    With ``R`` the rewards of a group, ``n`` of them scored, and ``std`` taken with ``ddof``:

    - baseline: ``R - mean`` (DeepSeekMath, arXiv:2402.03300); ``n / (n - 1) * (R - mean)``, which is the reward minus
      the mean of the others (RLOO, arXiv:2402.14740); or ``R`` itself.
    - scale: undivided (Dr. GRPO, arXiv:2503.20783); divided by ``std(R) + eps``; or divided by the std, plus ``eps``,
      of ``R - mean`` over all members of groups with two or more scored.

    A reward that is null, NaN or infinite is unknown: it moves no statistic and gets advantage 0. So does the member of
    a group without comparison (one scored member, or all rewards equal), except where baseline and scale are both
    ``none`` and nothing is compared. ``drop_reason`` says which: ``unscored``, ``singleton``, ``zero_variance``.

    ``group_size`` counts scored members; ``group_reward_std`` is null where ``ddof`` leaves it undefined.

    Raises:
        ValueError: for an unknown option.
    """
    _check_options(baseline, scale, ddof, eps)
    reward = pl.col("reward")
    size = pl.col("group_size")
    mean = pl.col("group_reward_mean")
    centred = reward - mean

    frame = rewards.lazy().with_columns(_known(reward.cast(pl.Float64)).alias("reward"))
    frame = frame.join(_statistics(frame, ddof), on="group_id", how="left", maintain_order="left")

    is_compared = baseline != "none" or scale != "none"
    # Equal rewards have a mean that is off by rounding, and eps would blow the rest up into an advantage.
    magnitude = pl.max_horizontal(pl.lit(1.0), pl.col("_lowest").abs(), pl.col("_highest").abs())
    is_flat = (pl.col("_highest") - pl.col("_lowest")) <= ZERO_VARIANCE_TOLERANCE * magnitude
    drop_reason = (
        pl.when(reward.is_null())
        .then(pl.lit("unscored"))
        .when(pl.lit(is_compared) & (size < 2))
        .then(pl.lit("singleton"))
        .when(pl.lit(is_compared) & is_flat)
        .then(pl.lit("zero_variance"))
    )
    raw = {"group_mean": centred, "leave_one_out": centred * size / (size - 1), "none": reward}[baseline]
    divisor = {
        "none": pl.lit(1.0),
        "group_std": pl.col("group_reward_std") + eps,
        # As one list, for the reason given at _statistics.
        "batch_std": centred.filter(size >= 2).implode().list.std(ddof) + eps,
    }[scale]
    frame = frame.with_columns(drop_reason.alias("drop_reason"))
    advantage = pl.when(pl.col("drop_reason").is_null()).then(raw / divisor).otherwise(0.0)
    return frame.with_columns(advantage.alias("advantage")).select(ADVANTAGE_COLUMNS)


def _statistics(frame: pl.LazyFrame, ddof: int) -> pl.LazyFrame:
    """Return size, mean, std, lowest and highest scored reward of each group.

    Each group is summed as one list, in row order. The aggregations of ``over`` and ``group_by`` add up partial sums in
    an order that differs from call to call, and with it the last bit of a mean or a std.
    """
    scored = pl.col("reward").list
    return (
        frame.group_by("group_id", maintain_order=True)
        .agg(pl.col("reward").drop_nulls())
        .select(
            "group_id",
            scored.len().cast(pl.Int32).alias("group_size"),
            scored.mean().alias("group_reward_mean"),
            scored.std(ddof).alias("group_reward_std"),
            scored.min().alias("_lowest"),
            scored.max().alias("_highest"),
        )
    )


def combine(rewards_long: pl.DataFrame | pl.LazyFrame, weights: Mapping[str, float]) -> pl.LazyFrame:
    """Return completion_id, group_id and reward: the weighted sum of each completion's named rewards.

    Takes one row per completion and ``reward_name``; returns completions in order of first appearance. The sum is null
    when a reward of nonzero weight is null, NaN, infinite or has no row: a partial sum would compare members of a group
    by different measures. Rewards of weight 0, and names without a weight, do not take part.

    Raises:
        ValueError: if no weight is nonzero.
    """
    used = {name: weight for name, weight in weights.items() if weight != 0}
    if not used:
        raise ValueError(
            f"reward weights {dict(weights)} combine nothing: at least one weight must be nonzero; set one"
        )
    reward = _known(pl.col("reward").cast(pl.Float64))
    columns = [f"_reward_{index}" for index in range(len(used))]
    named = [
        pl.when(pl.col("reward_name") == name).then(reward).alias(column)
        for column, name in zip(columns, used, strict=True)
    ]
    # A completion has one row for a name, so the maximum that skips nulls is that row's reward, or null without one.
    per_completion = (
        rewards_long.lazy()
        .select("completion_id", "group_id", *named)
        .group_by("completion_id", maintain_order=True)
        .agg(pl.col("group_id").first(), pl.col(columns).max())
    )
    total = pl.lit(0.0)
    for column, weight in zip(columns, used.values(), strict=True):
        total = total + pl.col(column) * weight
    return per_completion.select("completion_id", "group_id", total.alias("reward"))


def _known(reward: pl.Expr) -> pl.Expr:
    """Return the reward with everything that is not a number turned into null: aggregations skip null only."""
    return pl.when(reward.is_finite()).then(reward)


def _check_options(baseline: str, scale: str, ddof: int, eps: float) -> None:
    """Raise for options that would otherwise surface as a KeyError or as infinite advantages."""
    for name, found, allowed in (
        ("baseline", baseline, ("group_mean", "leave_one_out", "none")),
        ("scale", scale, ("none", "group_std", "batch_std")),
        ("ddof", ddof, (0, 1)),
    ):
        if found not in allowed:
            choices = ", ".join(str(choice) for choice in allowed)
            raise ValueError(f"{name} is {found!r}: expected one of {choices}; choose one")
    if eps < 0:
        raise ValueError(f"eps is {eps}: expected zero or more, since it is added to a standard deviation; raise it")
