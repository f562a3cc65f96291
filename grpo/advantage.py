"""Advantages of scored groups, and the one combined reward of a completion.

Everything here is float64 and keyed by ``group_id``: groups may be uneven, scattered over the frame, and hold unscored
members. Sums run over each group in row order in one thread, so that the same rows give the same bits. No torch.
"""

from typing import Literal

import numpy as np
import polars as pl

from grpo.groups import _group_numbers, _known, _std, statistics

Baseline = Literal["group_mean", "leave_one_out", "none"]
Scale = Literal["none", "group_std", "batch_std"]


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
