"""Combines the named rewards of a completion into one."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import polars as pl

from grpo.groups import group_numbers, known, statistics


def combine(rewards_long: pl.DataFrame, weights: Mapping[str, float]) -> pl.DataFrame:
    """Return completion_id, group_id and reward: the weighted sum of each completion's named rewards.

    Takes one row per completion and ``reward_name``; returns completions in order of first appearance. The sum is null
    when a reward of nonzero weight is null, NaN, infinite or has no row: a partial sum would compare the completions of
    a group by different measures. Rewards of weight 0, and names without a weight, are ignored.

    Raises:
        ValueError: if no weight is nonzero, or a completion has two rewards of one name.
    """
    ids, columns, used = _columns(rewards_long, weights)
    return ids.with_columns(_weighted_sum(columns, used).alias("reward"))


def normalize_each(
    rewards_long: pl.DataFrame, weights: Mapping[str, float], *, ddof: Literal[0, 1] = 1, eps: float = 1e-4
) -> pl.DataFrame:
    """Return the columns of `combine` and ``signal``: the weighted sum of rewards normalized one by one (GDPO).

    Each reward is first normalized in its group, ``(R - mean) / (std + eps)``, and exactly 0 where the group has zero
    variance. So a weight is the influence of a reward, whatever the reward's range. The paper
    (arXiv:2601.05242) then normalizes the sum over the batch: that is ``scale="batch_std"`` of `advantages`.

    Raises:
        ValueError: as `combine`.
    """
    ids, columns, used = _columns(rewards_long, weights)
    group = group_numbers(ids)
    normalized = []
    # a completion that lacks one reward is unscored: its other rewards must not change the group's statistics
    is_scored = ~np.isnan(np.sum([known(column) for column in columns], axis=0))
    for column in columns:
        values = np.where(is_scored, known(column), np.nan)
        found = statistics(values, group, ddof)
        with np.errstate(invalid="ignore"):
            z = (values - found.mean[group]) / (found.std[group] + eps)
        is_silent = found.is_flat[group] & ~np.isnan(values)  # a member alone is flat as well
        normalized.append(pl.Series(np.where(is_silent, 0.0, z)).fill_nan(None))
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
    if wide is None or wide["completion_id"].n_unique() < len(wide):
        _check_single(rewards_long)
    if wide is None:
        wide = _grouped(rewards_long, list(used))
    columns = [wide[f"_reward_{index}"] for index in range(len(used))]
    return wide.select("completion_id", "group_id"), columns, list(used.values())


def _check_single(rewards_long: pl.DataFrame) -> None:
    """Raise if a completion has two rewards of one name: either would do, or it would count twice in its group."""
    repeated = rewards_long.filter(pl.struct("completion_id", "reward_name").is_duplicated())
    if len(repeated):
        first = repeated.row(0, named=True)
        raise ValueError(
            f"completion {first['completion_id']} has several rewards named {first['reward_name']} ({len(repeated)} "
            "such rows): expected one of each name; score the completions again"
        )


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
    # A completion has one row per name, so the maximum that skips nulls is that row's reward, or null without one.
    return (
        rewards_long.select("completion_id", "group_id", *named)
        .group_by("completion_id", maintain_order=True)
        .agg(pl.col("group_id").first(), pl.col("^_reward_.*$").max())
    )


def _weighted_sum(columns: list[pl.Series], weights: list[float]) -> pl.Series:
    total = np.zeros(len(columns[0]))
    for column, weight in zip(columns, weights, strict=True):
        total += known(column) * weight
    return pl.Series(total).fill_nan(None)
