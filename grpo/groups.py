"""Groups of rewards, and their statistics."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
ZERO_VARIANCE_TOLERANCE = 1e-9
"""Relative spread below which a group says nothing: sums of equal float64 rewards differ by less than this."""


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
