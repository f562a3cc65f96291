"""Losses that stop a token whose probability has moved too far, and leave the others as they are.

The ratio of a likely token hardly moves when its probability does, and that of a rare token moves at once. So these
bound the probability.

Shapes: `N` trainable tokens of a microbatch, rows laid end to end. ``p`` is a token's probability under the weights
that are being trained, ``q`` under the proximal policy, ``r = p / q``, ``A`` its advantage.
"""

from typing import TYPE_CHECKING

from grpo.losses.base import LOG_RATIO_LIMIT, LossInputs, TokenLosses
from grpo.strict import NotNegative, Positive, PositiveOrNone

if TYPE_CHECKING:
    from torch import Tensor

MOST = 1 - 1e-7
"""Bound on a probability of which one minus it is taken, in float32."""


def dppo_tv(
    inputs: LossInputs, *, low: Positive = 0.2, high: Positive = 0.2, ratio_cap: PositiveOrNone = 20.0
) -> TokenLosses:
    """Return ``-min(r, ratio_cap) A log p`` of each token, the factor before ``A`` a constant, unless p has left q.

    DPPO with the total variation of "this token or another" (arXiv:2602.04879).

    Args:
        inputs: the tokens.
        low: no gradient for A < 0 once p is under q - low.
        high: no gradient for A > 0 once p is over q + high.
        ratio_cap: largest factor; none = no bound.

    Reasons: ``clipped_low`` and ``clipped_high``. Bounds: ``ratio_cap``.
    """
    low_N, high_N = _moved(inputs, low, high)
    return _stopped(inputs, low_N, high_N, ratio_cap)


def dppo_kl(
    inputs: LossInputs, *, low: Positive = 0.05, high: Positive = 0.05, ratio_cap: PositiveOrNone = 20.0
) -> TokenLosses:
    """Return the loss of `dppo_tv` with the bounds on KL(q || p) of "this token or another" (arXiv:2602.04879).

    Args:
        inputs: the tokens.
        low: no gradient for A < 0 once p is under q and the divergence over low.
        high: no gradient for A > 0 once p is over q and the divergence over high.
        ratio_cap: largest factor; none = no bound.

    Reasons: ``clipped_low`` and ``clipped_high``. Bounds: ``ratio_cap``.
    """
    log_ratio_N, advantage_N = inputs.log_ratio_N.detach(), inputs.advantage_N
    p_N, q_N = inputs.trainer_logprobs_N.detach().exp(), inputs.proximal_logprobs_N.exp()
    others_N = (1 - q_N) * ((-q_N.clamp(max=MOST)).log1p() - (-p_N.clamp(max=MOST)).log1p())
    divergence_N = others_N - q_N * log_ratio_N
    low_N = (advantage_N < 0) & (log_ratio_N < 0) & (divergence_N > low)
    high_N = (advantage_N > 0) & (log_ratio_N > 0) & (divergence_N > high)
    return _stopped(inputs, low_N, high_N, ratio_cap)


def dppo_k2(
    inputs: LossInputs, *, low: Positive = 0.2, high: Positive = 0.2, k2_coef: NotNegative = 1e-3
) -> TokenLosses:
    """Return ``-r A + k2_coef (log r)^2`` of each token; without the first term where p has left q, as in `dppo_tv`.

    The default loss of prime-rl, whose q is that of the sampler: so with ``update.proximal = "sampler"``.

    Args:
        inputs: the tokens.
        low: the first term stops for A < 0 once p is under q - low.
        high: the first term stops for A > 0 once p is over q + high.
        k2_coef: weight of the pull back to q, which every token has.

    Bounds: ``clipped_low`` and ``clipped_high``; with a k2_coef of 0 they are reasons.
    """
    low_N, high_N = _moved(inputs, low, high)
    policy_N = (-inputs.ratio_N * inputs.advantage_N).masked_fill(low_N | high_N, 0.0)
    bounded_N = inputs.log_ratio_N.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    stopped = {"clipped_low": low_N, "clipped_high": high_N}
    return TokenLosses(policy_N + k2_coef * bounded_N.square(), {} if k2_coef else stopped, stopped if k2_coef else {})


def _moved(inputs: LossInputs, low: float, high: float) -> "tuple[Tensor, Tensor]":
    """Return where p is too far below q for A < 0, and too far above it for A > 0; bool, shape [N] each."""
    change_N = inputs.trainer_logprobs_N.detach().exp() - inputs.proximal_logprobs_N.exp()
    return (inputs.advantage_N < 0) & (change_N < -low), (inputs.advantage_N > 0) & (change_N > high)


def _stopped(inputs: LossInputs, low_N: "Tensor", high_N: "Tensor", ratio_cap: float | None) -> TokenLosses:
    ratio_N = inputs.ratio_N.detach()
    weight_N = ratio_N if ratio_cap is None else ratio_N.clamp(max=ratio_cap)
    loss_N = -weight_N * inputs.advantage_N * inputs.trainer_logprobs_N
    return TokenLosses(
        loss_N.masked_fill(low_N | high_N, 0.0),
        {"clipped_low": low_N, "clipped_high": high_N},
        {"ratio_cap": weight_N < ratio_N},
    )


TO_SAMPLER = (dppo_k2,)
"""Whose ratio is that to the sampler."""
LOSSES = (dppo_tv, dppo_kl, dppo_k2)
