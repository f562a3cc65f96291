"""Groups of rewards, and their statistics."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
ZERO_VARIANCE_TOLERANCE = 1e-9
"""Spread below which a group has zero variance, relative to its largest value: sums of equal rewards differ by less."""
ROUNDING = 1e-12
"""Spread below which it always has: where parts of a reward cancel, what is left of a sum is rounding."""


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """One entry per group, over its scored completions: those whose reward is a number."""

    size: Integers
    mean: Floats
    """NaN where no completion is scored."""
    std: Floats
    """NaN where ddof leaves it undefined."""
    is_flat: Flags
    """Zero variance: all scored completions have the same reward, up to rounding."""


@dataclass(frozen=True)
class Groups:
    """The values to compare, one per completion, and their groups.

    Arrays have an entry per completion, in row order, except those of ``statistics``.
    """

    values: Floats
    """Rewards, or signals in their place; NaN where unknown."""
    number: Integers
    """Number of the completion's group, from 0."""
    statistics: GroupStatistics
    """Of the values; one entry per group."""
    ddof: int
    """Of every standard deviation."""
    tokens: Floats | None = None
    """Trainable tokens of the completion."""
    policy: Integers | None = None
    """Number of the policy that wrote the completion, from 0."""
    log_weight: Floats | None = None
    """Log of the completion's probability under the policy that trains / under the one that wrote it."""

    @cached_property
    def size(self) -> Integers:
        """Number of scored completions in the completion's group."""
        return self.statistics.size[self.number]

    @cached_property
    def centred(self) -> Floats:
        """The values minus the mean of their group."""
        return self.values - self.statistics.mean[self.number]

    @property
    def std(self) -> Floats:
        """The standard deviation of the completion's group."""
        return self.statistics.std[self.number]

    def sum(self, x: Floats) -> Floats:
        """Return the sum over the completion's group; NaN counts 0."""
        sums: Floats = np.bincount(self.number, np.nan_to_num(x), minlength=len(self.statistics.size)).astype(
            np.float64
        )
        return sums[self.number]

    @property
    def is_informative(self) -> Flags:
        """Whether the completion is scored, in a group whose values differ."""
        return ~np.isnan(self.values) & ~self.statistics.is_flat[self.number]


def groups_of(values: Floats, number: Integers, ddof: int, **more: Any) -> Groups:
    """Return the groups of these values, with their statistics; ``more`` are further fields of `Groups`."""
    return Groups(values, number, statistics(values, number, ddof), ddof, **more)


def statistics(values: Floats, group: Integers, ddof: int) -> GroupStatistics:
    """Return the statistics of each group; ``group`` has each row's group number from 0, NaN values are unknown."""
    num_groups = int(group.max()) + 1 if len(group) else 0
    is_known = ~np.isnan(values)
    values, group = values[is_known], group[is_known]
    if np.any(np.diff(group) < 0):  # the completions of a group are not adjacent
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
    # Rounding shifts the mean of equal rewards, and division by eps would turn the difference into an advantage.
    magnitude = np.maximum(np.abs(lowest), np.abs(highest))
    tolerated = np.maximum(ZERO_VARIANCE_TOLERANCE * magnitude, ROUNDING)
    return GroupStatistics(size, mean, std, highest - lowest <= tolerated)


def differ(reward: pl.Expr) -> pl.Expr:
    """Return whether rewards differ by more than rounding, as an aggregation; what `statistics` calls not flat."""
    lowest, highest = reward.min(), reward.max()
    magnitude = pl.max_horizontal(lowest.abs(), highest.abs())
    return highest - lowest > pl.max_horizontal(ZERO_VARIANCE_TOLERANCE * magnitude, ROUNDING)


def group_numbers(frame: pl.DataFrame) -> Integers:
    """Return a number for each row's group, from 0 in order of first appearance."""
    groups = frame["group_id"]
    runs = groups.rle_id().to_numpy().astype(np.int64)
    starts = np.flatnonzero(np.diff(runs, prepend=-1))
    if groups.gather(starts).n_unique() == len(starts):  # the completions of every group are adjacent
        return runs
    numbers = groups.unique(maintain_order=True).to_frame().with_row_index("number")
    joined = groups.to_frame().join(numbers, on="group_id", how="left", maintain_order="left")
    return joined["number"].to_numpy().astype(np.int64)


def known(values: pl.Series) -> Floats:
    """Return the values with NaN for everything that is not a number."""
    numbers = values.cast(pl.Float64).fill_null(float("nan")).to_numpy()
    return np.where(np.isfinite(numbers), numbers, np.nan)


def standard_deviation(values: Floats, ddof: int) -> float:
    """Return the standard deviation, NaN where ddof leaves it undefined."""
    return float(np.std(values, ddof=ddof)) if len(values) > ddof else float("nan")
