"""Comparing two scorings of the same completions: what another reward, or another normalization, would have changed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

MOST_MOVED = 10


@dataclass(frozen=True, slots=True)
class Comparison:
    """The differences between scorings A and B of the same completions."""

    rewards: pl.DataFrame
    """One row per reward name and `combined`: completions scored by both, means, rank correlations, changed rewards."""
    advantages: Mapping[str, Any]
    """Counts over completions and groups: sign flips, groups that gain or lose signal."""
    groups: pl.DataFrame
    """One row per group that differs, the one with most sign flips first."""
    completions: pl.DataFrame
    """The completions whose advantage moved most, the farthest first."""

    @property
    def sign_flip_share(self) -> float:
        """Share of completions whose advantage has the opposite sign, or has one in one scoring only."""
        total = self.advantages["completions"]
        return float(self.advantages["sign_changes"] / total) if total else 0.0


def compare(
    rewards: tuple[pl.DataFrame, pl.DataFrame] | None, advantages: tuple[pl.DataFrame, pl.DataFrame]
) -> Comparison:
    """Return the differences between two scorings; rows are matched by completion_id, unmatched ones are left out.

    ``rewards`` are rows of that dataset, or None when both share them; ``advantages`` rows of that one. Both may have a
    column ``iteration``.
    """
    rows = _pairs(*advantages)
    return Comparison(
        rewards=_compare_rewards(rewards, rows),
        advantages=_counts(rows),
        groups=_groups(rows),
        completions=_moved(rows),
    )


def _pairs(a: pl.DataFrame, b: pl.DataFrame) -> pl.DataFrame:
    columns = [c for c in ("iteration", "completion_id", "group_id", "reward", "advantage", "drop_reason") if c in a]
    keys = [name for name in ("iteration", "completion_id") if name in a and name in b]  # one may feed several
    other = b.select(*keys, "reward", "advantage", "drop_reason")
    rows = a.select(columns).join(other, on=keys, how="inner", suffix="_b", maintain_order="left")
    return rows.rename({"reward": "reward_a", "advantage": "advantage_a", "drop_reason": "drop_reason_a"}).with_columns(
        sign_a=pl.col("advantage_a").sign(), sign_b=pl.col("advantage_b").sign()
    )


def _counts(rows: pl.DataFrame) -> dict[str, Any]:
    has_a, has_b = pl.col("signal_a"), pl.col("signal_b")
    groups = rows.group_by("group_id", maintain_order=True).agg(
        signal_a=(pl.col("advantage_a") != 0).any(), signal_b=(pl.col("advantage_b") != 0).any()
    )
    of_groups = groups.select(
        groups=pl.len(), gain_signal=(~has_a & has_b).sum(), lose_signal=(has_a & ~has_b).sum()
    ).row(0, named=True)
    of_rows = rows.select(
        completions=pl.len(),
        opposite_signs=(pl.col("sign_a") * pl.col("sign_b") < 0).sum(),
        sign_changes=(pl.col("sign_a") != pl.col("sign_b")).sum(),
        mean_size_a=pl.col("advantage_a").abs().mean(),
        mean_size_b=pl.col("advantage_b").abs().mean(),
        largest_move=(pl.col("advantage_b") - pl.col("advantage_a")).abs().max(),
        rank_correlation=pl.corr("advantage_a", "advantage_b", method="spearman").fill_nan(None),
    ).row(0, named=True)
    return {**of_rows, **of_groups}


def _compare_rewards(rewards: tuple[pl.DataFrame, pl.DataFrame] | None, rows: pl.DataFrame) -> pl.DataFrame:
    """Return a row for each reward that both have, one for each that only one has, and one for the combined reward."""
    combined = rows.select("group_id", pl.lit("combined").alias("reward_name"), "reward_a", "reward_b")
    parts = [combined]
    alone: list[dict[str, Any]] = []
    if rewards is not None:
        keys = [name for name in ("iteration", "completion_id", "reward_name") if all(name in f for f in rewards)]
        a, b = (frame.select(*keys, "group_id", "reward") for frame in rewards)
        both = a.join(b.drop("group_id"), on=keys, how="inner", suffix="_b", maintain_order="left").rename(
            {"reward": "reward_a"}
        )
        parts.insert(0, both.select("group_id", "reward_name", "reward_a", "reward_b"))
        for side, mine, other in (("only_a", a, b), ("only_b", b, a)):
            names = mine["reward_name"].unique(maintain_order=True)
            alone += [
                {"reward_name": name, "where": side}
                for name in names.filter(~names.is_in(other["reward_name"].unique().implode()))
            ]
    pairs = pl.concat(parts).filter(pl.col("reward_a").is_not_null() | pl.col("reward_b").is_not_null())
    overall = pairs.group_by("reward_name", maintain_order=True).agg(
        scored_by_both=(pl.col("reward_a").is_not_null() & pl.col("reward_b").is_not_null()).sum(),
        mean_a=pl.col("reward_a").mean(),
        mean_b=pl.col("reward_b").mean(),
        changed=pl.col("reward_a").ne_missing(pl.col("reward_b")).sum(),
        rank_correlation=pl.corr("reward_a", "reward_b", method="spearman"),
    )
    within = (
        pairs.drop_nulls()
        .group_by("reward_name", "group_id", maintain_order=True)
        .agg(correlation=pl.corr("reward_a", "reward_b", method="spearman"))
        .group_by("reward_name", maintain_order=True)
        .agg(rank_correlation_in_groups=pl.col("correlation").fill_nan(None).mean())
    )
    table = overall.join(within, on="reward_name", how="left", maintain_order="left").with_columns(
        pl.lit("both").alias("where"), pl.col("rank_correlation").fill_nan(None)
    )
    return pl.concat(
        [table, pl.DataFrame(alone, schema={"reward_name": pl.String, "where": pl.String})], how="diagonal"
    )


def _groups(rows: pl.DataFrame) -> pl.DataFrame:
    keys = [c for c in ("iteration", "group_id") if c in rows.columns]
    return (
        rows.group_by(keys, maintain_order=True)
        .agg(
            members=pl.len(),
            sign_changes=(pl.col("sign_a") != pl.col("sign_b")).sum(),
            rank_correlation=pl.corr("advantage_a", "advantage_b", method="spearman").fill_nan(None),
            had_signal=(pl.col("advantage_a") != 0).any(),
            has_signal=(pl.col("advantage_b") != 0).any(),
            largest_move=(pl.col("advantage_b") - pl.col("advantage_a")).abs().max(),
        )
        .filter((pl.col("sign_changes") > 0) | (pl.col("largest_move") > 0))
        .sort("sign_changes", "largest_move", descending=True, maintain_order=True)
    )


def _moved(rows: pl.DataFrame) -> pl.DataFrame:
    return (
        rows.with_columns(move=pl.col("advantage_b") - pl.col("advantage_a"))
        .filter(pl.col("move") != 0)
        .sort(pl.col("move").abs(), descending=True, maintain_order=True)
        .head(MOST_MOVED)
        .drop("sign_a", "sign_b")
    )
