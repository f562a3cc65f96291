"""Scales: what makes the advantages of different groups comparable. Each divides the reward minus the baseline.

All arrays have an entry per completion, in row order; ``eps`` is added to a standard deviation.
"""

from collections.abc import Callable

import numpy as np

from grpo.groups import ROUNDING, ZERO_VARIANCE_TOLERANCE, Floats, Groups, standard_deviation

Scale = Callable[[Floats, Groups, float], Floats]


def none(raw: Floats, groups: Groups, eps: float) -> Floats:
    """Return the values undivided (Dr. GRPO, arXiv:2503.20783)."""
    return raw


def group_std(raw: Floats, groups: Groups, eps: float) -> Floats:
    """Return the values divided by the standard deviation of their group (DeepSeekMath, arXiv:2402.03300)."""
    return raw / (groups.std + eps)


def batch_std(raw: Floats, groups: Groups, eps: float) -> Floats:
    """Return the values divided by the standard deviation of ``R - mean`` over all groups whose rewards differ.

    The others have no part in it. Their zeros would shrink it by the root of the share of informative groups, on top of
    what dropping them does to the mean of the loss.
    """
    return raw / (standard_deviation(groups.centred[groups.is_informative], groups.ddof) + eps)


def batch_raw_std(raw: Floats, groups: Groups, eps: float) -> Floats:
    """Return the values divided by the standard deviation of R over all scored completions (arXiv:2508.08221).

    It is what TRL calls ``scale_rewards="batch"``. Groups of unlike difficulty make it larger.
    """
    return raw / (standard_deviation(groups.values[~np.isnan(groups.values)], groups.ddof) + eps)


def leave_one_out_std(raw: Floats, groups: Groups, eps: float) -> Floats:
    """Return the values divided by the standard deviation of the group's other completions, as in NeMo-RL.

    Where that is 0, as for the only success of a group, or unknown, the value stays as it is.
    """
    size, mean = groups.size, groups.statistics.mean[groups.number]
    others = size - 1
    of_others = (mean * size - groups.values) / others
    squares_of_group = groups.sum((groups.values - mean) ** 2)
    squares = squares_of_group - (groups.values - mean) ** 2 - others * (of_others - mean) ** 2
    variance = np.where(others > groups.ddof, squares / (others - groups.ddof), 0.0)
    # what is left of squares that cancel, and what `statistics` calls flat, is no spread
    tolerated = np.maximum(ZERO_VARIANCE_TOLERANCE * np.abs(mean), ROUNDING) ** 2
    std = np.sqrt(np.where(variance > np.maximum(tolerated, ROUNDING * squares_of_group), variance, 0.0))
    return np.where(std > 0, raw / (std + eps), raw)


def group_mean(raw: Floats, groups: Groups, eps: float) -> Floats:
    """Return the values divided by the group's mean reward, 0 where that is not positive (MaxRL, arXiv:2602.02710)."""
    mean = groups.statistics.mean[groups.number]
    scaled: Floats = np.where(mean > 0, raw / (mean + eps), 0.0)
    return scaled


def token_whitened(raw: Floats, groups: Groups, eps: float) -> Floats:
    """Return the values minus their mean over tokens, divided by their standard deviation over tokens.

    Each completion counts as often as it has tokens (REINFORCE++ with a baseline, arXiv:2501.03262), of the groups
    whose rewards differ. The variance has ``eps^2`` added.
    """
    assert groups.tokens is not None, "the groups lack their tokens"
    tokens = np.where(groups.is_informative, groups.tokens, 0.0)
    count, values = tokens.sum(), np.nan_to_num(raw)
    mean = (tokens * values).sum() / count
    variance = (tokens * (values - mean) ** 2).sum() / (count - groups.ddof)
    whitened: Floats = (raw - mean) / np.sqrt(variance + eps**2)
    return whitened


SCALES: dict[str, Scale] = {
    "none": none,
    "group_std": group_std,
    "leave_one_out_std": leave_one_out_std,
    "group_mean": group_mean,
    "batch_std": batch_std,
    "batch_raw_std": batch_raw_std,
    "token_whitened": token_whitened,
}
OF_COMPLETIONS = ("token_whitened",)
"""Scales that need more of the completions than their rewards."""
