"""Constant weights for tokens that another policy or another engine sampled: proximal over sampler, bounded.

The clip of ``loss`` compares the current weights with the proximal ones; what lies between the proximal weights and
the sampler is corrected here, by a factor outside of the clip (decoupled PPO, arXiv:2110.00641).

Shapes: `N` trainable tokens of a microbatch, rows laid end to end; `B` rows of a microbatch; ``row_N`` maps tokens to
rows. A correction never changes a denominator: survivors would be scaled up exactly where the data is worst.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from grpo.losses.base import LOG_RATIO_LIMIT

CorrectionKind = Literal[
    "none",
    "token_truncate",
    "token_clip",
    "token_mask",
    "sequence_truncate",
    "sequence_mask",
    "geometric_mask",
    "k3_mask",
]


@dataclass(frozen=True)
class Correction:
    """How ``w = proximal / sampler`` becomes the weight of a token."""

    kind: CorrectionKind = "token_truncate"
    """With ``w`` the ratio of a token and ``W`` the product over the row:

    none              1
    token_truncate    min(w, high)
    token_clip        w, moved into [low, high]
    token_mask        w inside [low, high], else 0
    sequence_truncate min(W, high)
    sequence_mask     W inside [low, high], else 0
    geometric_mask    min(w, token_cap) where the geometric mean of w over the row is inside [low, high], else 0
    k3_mask           min(w, token_cap) where the mean of w - 1 - log w over the row is at most high, else 0
    """
    low: float = 0.0
    """Lower bound; the unit depends on ``kind``."""
    high: float = 2.0
    """Upper bound; the unit depends on ``kind``."""
    token_cap: float = 2.0
    """Bound on the weights of tokens that a row mask keeps."""
    veto_low: float | None = None
    """A token with a smaller w gives its whole row weight 0."""
    veto_high: float | None = None
    """A token with a larger w gives its whole row weight 0."""
    unknown: Literal["mask", "on_policy"] = "mask"
    """What a token without sampling logprob gets: weight 0, or what ``kind`` makes of w = 1."""

    def __post_init__(self) -> None:
        """Raise for bounds that no ratio can meet."""
        if not 0 <= self.low <= self.high:
            raise ValueError(
                f"correction bounds are low={self.low}, high={self.high}: expected 0 <= low <= high, since ratios are "
                "positive; swap or raise them"
            )
        for name, bound in (
            ("token_cap", self.token_cap),
            ("veto_low", self.veto_low),
            ("veto_high", self.veto_high),
        ):
            if bound is not None and bound <= 0:
                raise ValueError(f"{name} is {bound}: expected a positive bound on a ratio; raise it, or leave it out")


@torch.no_grad()
def correction_weights(
    proximal_logprobs_N: Tensor, sampling_logprobs_N: Tensor, row_N: Tensor, num_rows: int, correction: Correction
) -> Tensor:
    """Return the weight of each token, shape [N], never negative, finite, without gradient.

    A sampling logprob that is not finite is unknown: such a token takes no part in the products, means and vetoes of
    its row, and gets what ``correction.unknown`` says, under every kind.

    Sources: truncation, Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training";
    token mask, IcePop (arXiv:2510.18855); row products, geometric means and k3, Liu, Li et al. 2025, on the collapse
    from training-inference mismatch. Log ratios are bounded before exp; vetoes see them unbounded.
    """
    is_known_N = sampling_logprobs_N.isfinite()
    # The difference itself is replaced: arithmetic on an unknown value would spread its NaN over the row's sums.
    log_w_N = torch.where(is_known_N, proximal_logprobs_N - sampling_logprobs_N, 0.0)
    w_N = _bounded_exp(log_w_N)
    low, high, token_cap = correction.low, correction.high, correction.token_cap
    num_known_B = _row_sums(is_known_N.to(log_w_N.dtype), row_N, num_rows).clamp(min=1)

    match correction.kind:
        case "none":
            weight_N = torch.ones_like(w_N)
        case "token_truncate":
            weight_N = w_N.clamp(max=high)
        case "token_clip":
            weight_N = w_N.clamp(low, high)
        case "token_mask":
            weight_N = torch.where((w_N >= low) & (w_N <= high), w_N, 0.0)
        case "sequence_truncate":
            weight_N = _bounded_exp(_row_sums(log_w_N, row_N, num_rows)).clamp(max=high)[row_N]
        case "sequence_mask":
            product_B = _bounded_exp(_row_sums(log_w_N, row_N, num_rows))
            weight_N = torch.where((product_B >= low) & (product_B <= high), product_B, 0.0)[row_N]
        case "geometric_mask":
            mean_B = _bounded_exp(_row_sums(log_w_N, row_N, num_rows) / num_known_B)
            keep_B = (mean_B >= low) & (mean_B <= high)
            weight_N = torch.where(keep_B[row_N], w_N.clamp(max=token_cap), 0.0)
        case "k3_mask":
            bounded_N = log_w_N.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            keep_B = _row_sums(bounded_N.expm1() - bounded_N, row_N, num_rows) / num_known_B <= high
            weight_N = torch.where(keep_B[row_N], w_N.clamp(max=token_cap), 0.0)

    if correction.unknown == "mask":
        weight_N = torch.where(is_known_N, weight_N, 0.0)
    is_vetoed_N = _is_extreme(log_w_N, correction)
    is_vetoed_B = _row_sums(is_vetoed_N.to(log_w_N.dtype), row_N, num_rows) > 0
    return torch.where(is_vetoed_B[row_N], 0.0, weight_N)


def _is_extreme(log_w_N: Tensor, correction: Correction) -> Tensor:
    """Return which tokens veto their row, shape [N]."""
    lowest = -math.inf if correction.veto_low is None else math.log(correction.veto_low)
    highest = math.inf if correction.veto_high is None else math.log(correction.veto_high)
    return (log_w_N < lowest) | (log_w_N > highest)


def _row_sums(x_N: Tensor, row_N: Tensor, num_rows: int) -> Tensor:
    """Return the sum over each row's tokens, shape [B]."""
    return x_N.new_zeros(num_rows).index_add(0, row_N, x_N)


def _bounded_exp(x: Tensor) -> Tensor:
    """Return exp of the argument bounded to what stays finite; elementwise."""
    return x.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
