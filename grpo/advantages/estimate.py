"""Advantages of scored groups: a baseline, a scale, and the reasons for an advantage of 0.

Everything here is float64 and keyed by ``group_id``: groups may be uneven, scattered over the frame, and hold unscored
members. Sums run over each group in row order in one thread, so that the same rows give the same bits. No torch.
"""

from typing import Literal

import numpy as np
import polars as pl

from grpo.advantages.baselines import BASELINES
from grpo.advantages.scales import SCALES
from grpo.groups import group_numbers, groups_of, known

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


def advantages(
    rewards: pl.DataFrame,
    *,
    baseline: str = "group_mean",
    scale: str = "none",
    ddof: Literal[0, 1] = 1,
    eps: float = 1e-4,
) -> pl.DataFrame:
    """Return ``ADVANTAGE_COLUMNS``, one row per input row, in input row order.

    ``rewards`` has completion_id, group_id and reward, as `combine` returns them. The advantage is what ``baseline``
    (of `BASELINES`) leaves of the reward, made comparable by ``scale`` (of `SCALES`); ``ddof`` is that of every
    standard deviation.

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
    number = group_numbers(rewards)
    shown = groups_of(known(rewards["reward"]), number, ddof)
    groups = groups_of(known(rewards["signal"]), number, ddof) if "signal" in rewards.columns else shown

    is_compared = baseline != "none" or scale != "none"
    reason = np.full(len(number), -1, dtype=np.int8)
    if is_compared:
        reason[groups.statistics.is_flat[number]] = 2
        reason[groups.size < 2] = 1
    reason[np.isnan(groups.values)] = 0
    with np.errstate(invalid="ignore", divide="ignore"):
        raw = SCALES[scale](BASELINES[baseline](groups), groups, eps)
    return rewards.select(
        "completion_id",
        "group_id",
        pl.Series("reward", shown.values).fill_nan(None),
        pl.Series("group_reward_mean", shown.statistics.mean[number]).fill_nan(None),
        pl.Series("group_reward_std", shown.std).fill_nan(None),
        pl.Series("group_size", shown.size, dtype=pl.Int32),
        pl.Series("advantage", np.where(reason < 0, raw, 0.0)),
        REASONS.gather(pl.Series(reason).replace(-1, None).cast(pl.UInt32)),
    )


def _check_options(baseline: str, scale: str, ddof: int, eps: float) -> None:
    """Raise for options that would otherwise surface as a KeyError or as infinite advantages."""
    for name, found, allowed in (
        ("baseline", baseline, tuple(BASELINES)),
        ("scale", scale, tuple(SCALES)),
        ("ddof", ddof, (0, 1)),
    ):
        if found not in allowed:
            choices = ", ".join(str(choice) for choice in allowed)
            raise ValueError(f"{name} is {found!r}: expected one of {choices}; choose one")
    if eps < 0:
        raise ValueError(f"eps is {eps}: expected zero or more, since it is added to a standard deviation; raise it")
