"""Baselines: what a reward is measured against. Each is a function of the groups that returns ``R - baseline``.

All arrays have an entry per completion, in row order; NaN where the reward is unknown.
"""

from collections.abc import Callable

from grpo.groups import Floats, Groups

Baseline = Callable[[Groups], Floats]


def none(groups: Groups) -> Floats:
    """Return R itself."""
    return groups.values


def group_mean(groups: Groups) -> Floats:
    """Return ``R - mean`` (DeepSeekMath, arXiv:2402.03300)."""
    return groups.centred


def leave_one_out(groups: Groups) -> Floats:
    """Return ``n / (n - 1) * (R - mean)``: R minus the mean of the other completions (RLOO, arXiv:2402.14740)."""
    return groups.centred * groups.size / (groups.size - 1)


BASELINES: dict[str, Baseline] = {
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
    "none": none,
}
