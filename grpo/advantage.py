"""Advantages of scored groups, and the one combined reward of a completion.

Everything here is float64 and keyed by ``group_id``: groups may be uneven, scattered over the frame, and hold unscored
members. Sums run over each group in row order in one thread, so that the same rows give the same bits. No torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

Baseline = Literal["group_mean", "leave_one_out", "none"]
Scale = Literal["none", "group_std", "batch_std"]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

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

REASONS = pl.Series("drop_reason", ["unscored", "singleton", "zero_variance"])
"""Values of drop_reason."""


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """One entry per group, of its scored members: those whose reward is a number."""

    size: Integers
    mean: Floats
    """NaN where no member is scored."""
    std: Floats
    """NaN where ddof leaves it undefined."""
    is_flat: Flags
    """All scored members are equal, but for rounding."""


def advantages(
    rewards: pl.DataFrame,
    *,
    baseline: Baseline = "group_mean",
    scale: Scale = "none",
    ddof: Literal[0, 1] = 1,
    eps: float = 1e-4,
) -> pl.DataFrame:
    """Return ``ADVANTAGE_COLUMNS``, one row per input row, in input row order.

    ``rewards`` has completion_id, group_id and reward, as `combine` returns them. With ``R`` the rewards of a group,
    ``n`` of them scored, and ``std`` taken with ``ddof``:

    - baseline: ``R - mean`` (DeepSeekMath, arXiv:2402.03300); ``n / (n - 1) * (R - mean)``, which is the reward minus
      the mean of the others (RLOO, arXiv:2402.14740); or ``R`` itself.
    - scale: undivided (Dr. GRPO, arXiv:2503.20783); divided by ``std(R) + eps``; or divided by the std, plus ``eps``,
      of ``R - mean`` over all members of groups with two or more scored.

    Where the frame has a column ``signal``, as `normalize_each` returns it, that takes the place of ``R`` in the
    advantage; the group statistics are still those of the reward.

    A reward that is null, NaN or infinite is unknown: it moves no statistic and gets advantage 0. So does the member of
    a group without comparison (one scored member, or all rewards equal), except where baseline and scale are both
    ``none`` and nothing is compared. ``drop_reason`` says which: ``unscored``, ``singleton``, ``zero_variance``.

    ``group_size`` counts scored members; ``group_reward_std`` is null where ``ddof`` leaves it undefined.

    Raises:
        ValueError: for an unknown option.
    """
    _check_options(baseline, scale, ddof, eps)
    group = _group_numbers(rewards)
    reward = _known(rewards["reward"])
    shown = statistics(reward, group, ddof)
    signal, used = reward, shown
    if "signal" in rewards.columns:
        signal = _known(rewards["signal"])
        used = statistics(signal, group, ddof)

    size = used.size[group]
    is_compared = baseline != "none" or scale != "none"
    is_unknown = np.isnan(signal)
    reason = np.full(len(group), -1, dtype=np.int8)
    if is_compared:
        reason[used.is_flat[group]] = 2
        reason[size < 2] = 1
    reason[is_unknown] = 0
    with np.errstate(invalid="ignore", divide="ignore"):
        centred = signal - used.mean[group]
        raw = {"group_mean": centred, "leave_one_out": centred * size / (size - 1), "none": signal}[baseline]
        if scale == "group_std":
            raw = raw / (used.std[group] + eps)
        elif scale == "batch_std":
            raw = raw / (_std(centred[~is_unknown & (size >= 2)], ddof) + eps)
    return rewards.select(
        "completion_id",
        "group_id",
        pl.Series("reward", reward).fill_nan(None),
        pl.Series("group_reward_mean", shown.mean[group]).fill_nan(None),
        pl.Series("group_reward_std", shown.std[group]).fill_nan(None),
        pl.Series("group_size", shown.size[group], dtype=pl.Int32),
        pl.Series("advantage", np.where(reason < 0, raw, 0.0)),
        REASONS.gather(pl.Series(reason).replace(-1, None).cast(pl.UInt32)),
    )


def statistics(values: Floats, group: Integers, ddof: int) -> GroupStatistics:
    """Return the statistics of each group; ``group`` has each row's group number from 0, NaN values are unknown."""
    num_groups = int(group.max()) + 1 if len(group) else 0
    known = ~np.isnan(values)
    values, group = values[known], group[known]
    if np.any(np.diff(group) < 0):  # members of a group stand apart
        order = np.argsort(group, kind="stable")
        values, group = values[order], group[order]
    size = np.bincount(group, minlength=num_groups)
    is_scored = size > 0
    starts = (np.cumsum(size) - size)[is_scored]

    def per_group(reduce: np.ufunc, of: Floats, without: float) -> Floats:
        result = np.full(num_groups, without)
        if len(of):
            result[is_scored] = reduce.reduceat(of, starts)
        return result

    with np.errstate(invalid="ignore", divide="ignore"):
        mean = per_group(np.add, values, np.nan) / size
        squares = per_group(np.add, (values - mean[group]) ** 2, np.nan)
        std = np.where(size > ddof, np.sqrt(squares / (size - ddof)), np.nan)
    lowest, highest = per_group(np.minimum, values, 0.0), per_group(np.maximum, values, 0.0)
    # Equal rewards have a mean that is off by rounding, and eps would blow the rest up into an advantage.
    magnitude = np.maximum(1.0, np.maximum(np.abs(lowest), np.abs(highest)))
    return GroupStatistics(size, mean, std, highest - lowest <= ZERO_VARIANCE_TOLERANCE * magnitude)


def combine(rewards_long: pl.DataFrame, weights: Mapping[str, float]) -> pl.DataFrame:
    """Return completion_id, group_id and reward: the weighted sum of each completion's named rewards.

    Takes one row per completion and ``reward_name``; returns completions in order of first appearance. The sum is null
    when a reward of nonzero weight is null, NaN, infinite or has no row: a partial sum would compare members of a group
    by different measures. Rewards of weight 0, and names without a weight, do not take part.

    Raises:
        ValueError: if no weight is nonzero.
    """
    ids, columns, used = _columns(rewards_long, weights)
    return ids.with_columns(_weighted_sum(columns, used).alias("reward"))


def normalize_each(
    rewards_long: pl.DataFrame, weights: Mapping[str, float], *, ddof: Literal[0, 1] = 1, eps: float = 1e-4
) -> pl.DataFrame:
    """Return what `combine` does and ``signal``: the weighted sum of rewards normalized one by one (GDPO).

    Each reward is first normalized in its group, ``(R - mean) / (std + eps)``, and exactly 0 where the group's members
    have equal rewards; so a weight says how much influence a reward has, whatever its range. The paper
    (arXiv:2601.05242) then normalizes the sum over the batch: that is ``scale="batch_std"`` of `advantages`.

    Raises:
        ValueError: if no weight is nonzero.
    """
    ids, columns, used = _columns(rewards_long, weights)
    group = _group_numbers(ids)
    normalized = []
    # a member that lacks one of the rewards is unscored: the others must not move its group either
    is_scored = ~np.isnan(np.sum([_known(column) for column in columns], axis=0))
    for column in columns:
        values = np.where(is_scored, _known(column), np.nan)
        found = statistics(values, group, ddof)
        with np.errstate(invalid="ignore"):
            z = (values - found.mean[group]) / (found.std[group] + eps)
        is_silent = found.is_flat[group] | (found.size[group] < 2)
        normalized.append(pl.Series(np.where(is_silent & ~np.isnan(values), 0.0, z)).fill_nan(None))
    return ids.with_columns(
        _weighted_sum(columns, used).alias("reward"), _weighted_sum(normalized, used).alias("signal")
    )


def _columns(rewards_long: pl.DataFrame, weights: Mapping[str, float]) -> tuple[pl.DataFrame, list[pl.Series], Any]:
    """Return the completions' ids, a column for each reward of nonzero weight, and those weights."""
    used = {name: weight for name, weight in weights.items() if weight != 0}
    if not used:
        raise ValueError(
            f"reward weights {dict(weights)} combine nothing: at least one weight must be nonzero; set one"
        )
    wide = _strided(rewards_long, list(used))
    if wide is None:
        wide = _grouped(rewards_long, list(used))
    columns = [wide[f"_reward_{index}"] for index in range(len(used))]
    return wide.select("completion_id", "group_id"), columns, list(used.values())


def _strided(rewards_long: pl.DataFrame, names: list[str]) -> pl.DataFrame | None:
    """Return a row per completion where each has the same rewards in the same order, as `score` writes them."""
    present = rewards_long["reward_name"].unique(maintain_order=True).to_list()
    stride = len(present)
    if stride == 0 or len(rewards_long) % stride or not set(names) <= set(present):
        return None
    parts = [rewards_long.gather_every(stride, offset) for offset in range(stride)]
    first = parts[0]
    ids = first["completion_id"]
    for part, name in zip(parts, present, strict=True):
        if not (part["reward_name"] == name).all() or not (part["completion_id"] == ids).all():
            return None
    rewards = [pl.Series(f"_reward_{i}", parts[present.index(name)]["reward"]) for i, name in enumerate(names)]
    return first.select("completion_id", "group_id").with_columns(rewards)


def _grouped(rewards_long: pl.DataFrame, names: list[str]) -> pl.DataFrame:
    """Return a row per completion, in order of first appearance, from rows in any order."""
    named = [
        pl.when(pl.col("reward_name") == name).then(pl.col("reward").cast(pl.Float64)).alias(f"_reward_{index}")
        for index, name in enumerate(names)
    ]
    # A completion has one row for a name, so the maximum that skips nulls is that row's reward, or null without one.
    return (
        rewards_long.select("completion_id", "group_id", *named)
        .group_by("completion_id", maintain_order=True)
        .agg(pl.col("group_id").first(), pl.col("^_reward_.*$").max())
    )


def _weighted_sum(columns: list[pl.Series], weights: list[float]) -> pl.Series:
    total = np.zeros(len(columns[0]))
    for column, weight in zip(columns, weights, strict=True):
        total += _known(column) * weight
    return pl.Series(total).fill_nan(None)


def _group_numbers(frame: pl.DataFrame) -> Integers:
    """Return a number for each row's group, from 0 in order of first appearance."""
    groups = frame["group_id"]
    runs = groups.rle_id().to_numpy().astype(np.int64)
    starts = np.flatnonzero(np.diff(runs, prepend=-1))
    if groups.gather(starts).n_unique() == len(starts):  # every group stands together
        return runs
    numbers = groups.unique(maintain_order=True).to_frame().with_row_index("number")
    joined = groups.to_frame().join(numbers, on="group_id", how="left", maintain_order="left")
    return joined["number"].to_numpy().astype(np.int64)


def _known(values: pl.Series) -> Floats:
    """Return the values with NaN for everything that is not a number."""
    numbers = values.cast(pl.Float64).fill_null(float("nan")).to_numpy()
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _std(values: Floats, ddof: int) -> float:
    return float(np.std(values, ddof=ddof)) if len(values) > ddof else float("nan")


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
