"""Scales: what makes the advantages of different groups comparable. Each divides the reward minus the baseline.

All arrays have an entry per completion, in row order; ``eps`` is added to a standard deviation.
"""

from collections.abc import Callable

from grpo.groups import Floats, Groups, standard_deviation

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


SCALES: dict[str, Scale] = {
    "none": none,
    "group_std": group_std,
    "batch_std": batch_std,
}
