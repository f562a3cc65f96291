"""Losses of whole rows: each token carries its row's loss, so that a mean of row means is their mean over rows.

Shapes: `N` trainable tokens of a microbatch, rows laid end to end. ``r`` is the ratio trainer / proximal of a token,
``s`` the geometric mean of r over the row, ``A`` the advantage.
"""

from typing import TYPE_CHECKING

from grpo.losses.base import LossInputs, TokenLosses, bounded_exp
from grpo.strict import Positive

if TYPE_CHECKING:
    from torch import Tensor


def gspo(inputs: LossInputs, *, clip_low: Positive = 3e-4, clip_high: Positive = 4e-4) -> TokenLosses:
    """Return ``-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A)`` of each token's row.

    GSPO (arXiv:2507.18071). A is the row's: that of all its tokens.

    Args:
        inputs: the tokens.
        clip_low: no gradient for a row with A < 0 once s is under 1 - clip_low.
        clip_high: no gradient for a row with A > 0 once s is over 1 + clip_high.

    Reasons: ``clipped_low`` and ``clipped_high``, of all tokens of the row.
    """
    return _clipped(bounded_exp(inputs.row_mean_N(inputs.log_ratio_N)), inputs.advantage_N, clip_low, clip_high)


def gspo_token(inputs: LossInputs, *, clip_low: Positive = 3e-4, clip_high: Positive = 4e-4) -> TokenLosses:
    """Return `gspo` with the gradient of a row's ratio given to each token by its own A (arXiv:2507.18071).

    With one advantage for a row its value and gradient are those of `gspo` under a mean of row means.

    Args:
        inputs: the tokens.
        clip_low: as in `gspo`.
        clip_high: as in `gspo`.

    Reasons: ``clipped_low`` and ``clipped_high``.
    """
    row_ratio_N = bounded_exp(inputs.row_mean_N(inputs.log_ratio_N.detach()))
    own_N = inputs.trainer_logprobs_N - inputs.trainer_logprobs_N.detach()  # 0, with the token's gradient
    return _clipped(row_ratio_N * own_N.exp(), inputs.advantage_N, clip_low, clip_high)


def luspo(inputs: LossInputs, *, clip_low: Positive = 2e-3, clip_high: Positive = 2.5e-3) -> TokenLosses:
    """Return `gspo` times the row's tokens (LUSPO, arXiv:2602.05261): long rows do not count less per token.

    Args:
        inputs: the tokens.
        clip_low: as in `gspo`.
        clip_high: as in `gspo`.

    Reasons: ``clipped_low`` and ``clipped_high``, of all tokens of the row.
    """
    row = gspo(inputs, clip_low=clip_low, clip_high=clip_high)
    return TokenLosses(row.loss_N * inputs.tokens_N, row.reasons)


def gmpo(inputs: LossInputs, *, clip_low: Positive = 0.4, clip_high: Positive = 0.4) -> TokenLosses:
    """Return ``-A`` times the geometric mean of the row's clipped ratios, of each token's row (GMPO, arXiv:2507.20673).

    Args:
        inputs: the tokens.
        clip_low: for A < 0, log r counts as -clip_low once it is under that. A bound on the logarithm.
        clip_high: for A > 0, log r counts as clip_high once it is over that.

    Reasons: ``clipped_low`` and ``clipped_high``, of the token.
    """
    log_ratio_N, advantage_N = inputs.log_ratio_N, inputs.advantage_N
    low_N = (advantage_N < 0) & (log_ratio_N < -clip_low)
    high_N = (advantage_N > 0) & (log_ratio_N > clip_high)
    bounded_N = log_ratio_N.masked_fill(low_N, -clip_low).masked_fill(high_N, clip_high)
    loss_N = -advantage_N * bounded_exp(inputs.row_mean_N(bounded_N))
    return TokenLosses(loss_N, {"clipped_low": low_N, "clipped_high": high_N})


def _clipped(ratio_N: "Tensor", advantage_N: "Tensor", clip_low: float, clip_high: float) -> TokenLosses:
    """Return PPO's clipped objective of any ratio, to be minimised."""
    objective_N = (ratio_N * advantage_N).minimum(ratio_N.clamp(1 - clip_low, 1 + clip_high) * advantage_N)
    low_N = (advantage_N < 0) & (ratio_N < 1 - clip_low)
    high_N = (advantage_N > 0) & (ratio_N > 1 + clip_high)
    return TokenLosses(-objective_N, {"clipped_low": low_N, "clipped_high": high_N})


LOSSES = (gspo, gspo_token, luspo, gmpo)
