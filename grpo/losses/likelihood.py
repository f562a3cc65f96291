"""Losses that raise the log probability of a token by a constant factor: no ratio has a gradient, so none vanishes.

Shapes: `N` trainable tokens of a microbatch, rows laid end to end. ``p`` is a token's probability under the weights
that are being trained, ``r`` its ratio to the proximal policy, ``R`` the product of r over the row,
``A`` the advantage.
"""

from grpo.losses.base import LossInputs, TokenLosses, bounded_exp
from grpo.strict import NotNegative, Positive


def reinforce(inputs: LossInputs) -> TokenLosses:
    """Return ``-A log p`` of each token: the policy gradient of the policy that sampled the tokens."""
    return TokenLosses(-inputs.advantage_N * inputs.trainer_logprobs_N, {})


def cispo(inputs: LossInputs, *, ratio_cap: Positive = 5.0, ratio_floor: NotNegative = 0.0) -> TokenLosses:
    """Return ``-clip(r, ratio_floor, ratio_cap) A log p`` of each token, the clipped ratio a constant.

    CISPO (MiniMax-M1, arXiv:2506.13585): a token outside of the bounds keeps a gradient.

    Args:
        inputs: the tokens.
        ratio_cap: largest factor, itself and not what it is above 1: what others call epsilon_high is ratio_cap - 1.
        ratio_floor: smallest factor; the paper has none.

    Bounds: ``ratio_floor`` and ``ratio_cap``.
    """
    ratio_N = inputs.ratio_N.detach()
    loss_N = -ratio_N.clamp(ratio_floor, ratio_cap) * inputs.advantage_N * inputs.trainer_logprobs_N
    return TokenLosses(loss_N, {}, {"ratio_floor": ratio_N < ratio_floor, "ratio_cap": ratio_N > ratio_cap})


def topr(inputs: LossInputs) -> TokenLosses:
    """Return ``-A log p`` of each token where A >= 0, and ``-min(R, 1) A log p`` elsewhere, the factor a constant.

    TOPR (arXiv:2503.14286), whose R is that to the sampler: so with ``update.proximal = "sampler"``.

    Bounds: ``ratio_cap``, where A < 0 and R > 1.
    """
    product_N = bounded_exp(inputs.row_sum_N(inputs.log_ratio_N.detach()))
    is_negative_N = inputs.advantage_N < 0
    weight_N = product_N.clamp(max=1.0).masked_fill(~is_negative_N, 1.0)
    loss_N = -weight_N * inputs.advantage_N * inputs.trainer_logprobs_N
    return TokenLosses(loss_N, {}, {"ratio_cap": is_negative_N & (product_N > 1)})


def vespo(
    inputs: LossInputs,
    *,
    power: Positive = 2.0,
    decay: Positive = 3.0,
    power_negative: Positive = 3.0,
    decay_negative: Positive = 2.0,
) -> TokenLosses:
    """Return ``-R^k exp(decay (1 - R)) A log p`` of each token, k the power, the factor a constant: 1 at R = 1.

    VESPO (arXiv:2602.10693), whose R is that to the sampler: so with ``update.proximal = "sampler"``. TRL's R is the
    same, and it multiplies by no weight beside it.

    Args:
        inputs: the tokens.
        power: for A >= 0; the larger, the less a row counts that has become less likely.
        decay: for A >= 0; the larger, the less a row counts that has become more likely.
        power_negative: power for A < 0.
        decay_negative: decay for A < 0.
    """
    log_product_N = inputs.row_sum_N(inputs.log_ratio_N.detach())
    is_negative_N = inputs.advantage_N < 0
    power_N = (log_product_N * 0 + power).masked_fill(is_negative_N, power_negative)
    decay_N = (log_product_N * 0 + decay).masked_fill(is_negative_N, decay_negative)
    weight_N = bounded_exp(power_N * log_product_N + decay_N * (1 - bounded_exp(log_product_N)))
    return TokenLosses(-weight_N * inputs.advantage_N * inputs.trainer_logprobs_N, {})


TO_SAMPLER = (topr, vespo)
"""Whose ratio is that to the sampler."""
LOSSES = (reinforce, cispo, topr, vespo)
