"""Advantages of scored groups: a baseline, a scale, and the reasons for an advantage of 0.

Everything here is float64 and keyed by ``group_id``: groups may be uneven, scattered over the frame, and hold unscored
completions. Sums run over each group in row order in one thread, so that the same rows give the same bits. No torch.
"""

from typing import Literal

import numpy as np
import polars as pl

from grpo.advantages.baselines import BASELINES, Baseline
from grpo.advantages.scales import SCALES, Scale
from grpo.groups import Flags, Floats, group_numbers, groups_of, known

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
    baseline: str | Baseline = "group_mean",
    scale: str | Scale = "none",
    ddof: Literal[0, 1] = 1,
    eps: float = 1e-4,
) -> pl.DataFrame:
    """Return ``ADVANTAGE_COLUMNS``, one row per input row, in input row order.

    ``rewards`` has completion_id, group_id and reward, as `combine` returns them. The advantage is the
    reward minus the ``baseline``, divided by the ``scale``: names of `BASELINES` and `SCALES`, or functions like those.
    ``ddof`` is that of every standard deviation.

    A column ``signal``, as `normalize_each` returns it, replaces the reward in the advantage; the group statistics
    stay those of the reward. Columns ``tokens``, ``policy`` and ``log_weight`` are those of `Groups`, which some
    baselines and scales need.

    A reward that is null, NaN or infinite is unknown: it enters no statistic, and its advantage is 0. The advantage is
    also 0 in a group with one scored completion or zero variance, unless baseline and scale are both ``none``.
    ``drop_reason`` says which: ``unscored``, ``singleton``, ``zero_variance``.

    ``group_size`` counts scored completions; ``group_reward_std`` is null where ``ddof`` leaves it undefined.

    Raises:
        ValueError: for an unknown option; for a function that does not give every compared completion a finite number.
    """
    _check_options(baseline, scale, ddof, eps)
    number = group_numbers(rewards)
    shown = groups_of(known(rewards["reward"]), number, ddof)
    more = {name: rewards[name].to_numpy() for name in ("tokens", "policy", "log_weight") if name in rewards.columns}
    groups = groups_of(known(rewards["signal" if "signal" in rewards.columns else "reward"]), number, ddof, **more)

    is_compared = baseline != "none" or scale != "none"
    reason = np.full(len(number), -1, dtype=np.int8)
    if is_compared:
        reason[groups.statistics.is_flat[number]] = 2
        reason[groups.size < 2] = 1
    reason[np.isnan(groups.values)] = 0
    with np.errstate(invalid="ignore", divide="ignore"):
        raw = (BASELINES[baseline] if isinstance(baseline, str) else baseline)(groups)
        _check_finite(raw, reason < 0, "baseline")
        raw = (SCALES[scale] if isinstance(scale, str) else scale)(raw, groups, eps)
        _check_finite(raw, reason < 0, "scale")
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


def _check_finite(raw: Floats, is_used: Flags, of: str) -> None:
    """Raise unless there is one number for each completion, finite where it is used."""
    if np.shape(raw) != is_used.shape:
        raise ValueError(f"the {of} gave an array of shape {np.shape(raw)}: expected {is_used.shape}; correct it")
    odd = np.flatnonzero(is_used & ~np.isfinite(raw))
    if len(odd):
        raise ValueError(
            f"the {of} gave {raw[odd[0]]} for member {odd[0]} (and {len(odd) - 1} more): expected a finite number for "
            "each that is compared; correct it, or raise eps"
        )


def _check_options(baseline: str | Baseline, scale: str | Scale, ddof: int, eps: float) -> None:
    """Raise for options that would otherwise surface as a KeyError or as infinite advantages."""
    for name, found, allowed in (
        ("baseline", baseline, tuple(BASELINES)),
        ("scale", scale, tuple(SCALES)),
        ("ddof", ddof, (0, 1)),
    ):
        if not callable(found) and found not in allowed:
            choices = ", ".join(str(choice) for choice in allowed)
            raise ValueError(f"{name} is {found!r}: expected one of {choices}; choose one")
    if eps < 0:
        raise ValueError(f"eps is {eps}: expected zero or more, since it is added to a standard deviation; raise it")
