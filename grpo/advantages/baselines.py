"""Baselines: what a reward is measured against. Each is a function of the groups that returns ``R - baseline``.

All arrays have an entry per completion, in row order; NaN where the reward is unknown.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from grpo.groups import Floats, Groups, statistics

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


def length_weighted(groups: Groups) -> Floats:
    """Return ``R - sum(T R) / sum(T)``, T the tokens of each completion (OPO, arXiv:2505.23585).

    0 in a group without a token that trains.
    """
    tokens = np.where(np.isnan(groups.values), 0.0, _given(groups.tokens))
    total = groups.sum(tokens)
    return np.where(total > 0, groups.values - groups.sum(tokens * groups.values) / total, groups.values * 0.0)


def per_policy(groups: Groups) -> Floats:
    """Return R minus the mean of those of the group's completions that the same policy wrote (RePO, arXiv:2506.09340).

    A completion that is the only one of its policy has 0, and so have those of a policy whose rewards are equal.
    """
    policy = _given(groups.policy)
    of_policy = groups.number * (int(policy.max(initial=0)) + 1) + policy
    _, number = np.unique(of_policy, return_inverse=True)
    found = statistics(groups.values, number, groups.ddof)
    return np.where(found.is_flat[number], groups.values * 0.0, groups.values - found.mean[number])


def importance_weighted(groups: Groups) -> Floats:
    """Return ``R - sum(W R) / sum(W)`` over the group's other completions, W the ratio of trainer to sampler.

    The baseline estimates the mean reward of the policy that trains, not that of those who wrote the group.
    """
    return _weighted_by_others(groups, 1.0)


def importance_weighted_squared(groups: Groups) -> Floats:
    """Return `importance_weighted` with W^2 in the place of W: of less variance in the gradient (arXiv:2602.17616)."""
    return _weighted_by_others(groups, 2.0)


def _weighted_by_others(groups: Groups, power: float) -> Floats:
    """Return R minus the weighted mean of the group's other completions."""
    log_weight = np.where(np.isnan(groups.values), -np.inf, power * _given(groups.log_weight))
    baseline, value = np.full(len(log_weight), np.nan), np.nan_to_num(groups.values)
    order = np.argsort(groups.number, kind="stable")
    for rows in np.split(order, np.cumsum(np.bincount(groups.number))[:-1]):
        others = np.where(np.eye(len(rows), dtype=np.bool_), -np.inf, log_weight[rows])
        # the largest of the others is 1: a weight beside which they vanish is not among them
        weight = np.exp(others - others.max(axis=1, keepdims=True, initial=-np.inf))
        baseline[rows] = (weight * value[rows]).sum(axis=1) / weight.sum(axis=1)
    result: Floats = groups.values - baseline
    return result


def _given(x: Any) -> Any:
    """Return what a baseline needs beside the rewards."""
    assert x is not None, "the groups lack what this baseline needs"
    return x


BASELINES: dict[str, Baseline] = {
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
    "length_weighted": length_weighted,
    "per_policy": per_policy,
    "importance_weighted": importance_weighted,
    "importance_weighted_squared": importance_weighted_squared,
    "none": none,
}
OF_POLICIES = ("importance_weighted", "importance_weighted_squared")
"""Baselines that need the logprobs of the policy that trains."""
OF_COMPLETIONS = ("length_weighted", "per_policy", *OF_POLICIES)
"""Baselines that need more of the completions than their rewards."""
