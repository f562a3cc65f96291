"""Losses without an edge: a token's gradient fades as its ratio leaves 1.

Shapes: `N` trainable tokens of a microbatch, rows laid end to end. ``r`` is the ratio trainer / proximal of a token,
``A`` its advantage.
"""

from grpo.losses.base import LossInputs, TokenLosses
from grpo.strict import Positive


def sapo(inputs: LossInputs, *, temperature: Positive = 1.0, temperature_negative: Positive = 1.05) -> TokenLosses:
    """Return ``-4 / t sigmoid(t (r - 1)) A`` of each token, t the temperature (SAPO, arXiv:2511.20347).

    The gradient is that of ``-r A`` times ``sech^2(t (r - 1) / 2)``, which is 1 at r = 1.

    Args:
        inputs: the tokens.
        temperature: for A > 0; the larger, the sooner the gradient fades.
        temperature_negative: the same for A <= 0.
    """
    ratio_N, advantage_N = inputs.ratio_N, inputs.advantage_N
    temperature_N = (advantage_N * 0 + temperature_negative).masked_fill(advantage_N > 0, temperature)
    gate_N = (temperature_N * (ratio_N - 1)).sigmoid()
    return TokenLosses(-4 / temperature_N * gate_N * advantage_N, {})


def luffy(inputs: LossInputs, *, gamma: Positive = 0.1) -> TokenLosses:
    """Return ``-p / (p + gamma) A`` of each token, p its probability (LUFFY's shaping, arXiv:2504.14945).

    For tokens of which no ratio can be taken, as it reads no probability but p. Its gradient for log p,
    ``gamma p / (p + gamma)^2``, is largest at p = gamma: rare tokens of a demonstration are learned.

    Args:
        inputs: the tokens.
        gamma: probability at which the gradient is largest.
    """
    probability_N = inputs.trainer_logprobs_N.exp()
    return TokenLosses(-probability_N / (probability_N + gamma) * inputs.advantage_N, {})


LOSSES = (sapo, luffy)
