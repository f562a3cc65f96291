"""Constant weights for tokens that another policy or another engine sampled: proximal over sampler, bounded.

The clip of a loss compares the current weights with the proximal ones; the difference between the proximal
weights and the sampler is corrected here, by a factor outside the clip (decoupled PPO, arXiv:2110.00641).

Shapes: `N` trainable tokens of a microbatch, rows laid end to end; `B` rows of a microbatch. A correction never changes
a denominator: the other tokens would be scaled up exactly where the data is worst.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from grpo.correction_options import (
    CorrectionConfig,
    GeometricMask,
    K3Mask,
    NoCorrection,
    SequenceMask,
    SequenceTruncate,
    TokenClip,
    TokenMask,
    TokenTruncate,
    Veto,
)
from grpo.losses.base import LOG_RATIO_LIMIT, LossInputs


@dataclass(frozen=True)
class TokenWeights:
    """The result of a correction."""

    weight_N: Tensor
    """Never negative, finite, without gradient."""
    reasons: Mapping[str, Tensor]
    """Why a token has weight 0: name -> bool, shape [N]. The first of several is recorded."""


@dataclass(frozen=True)
class SamplerRatios:
    """``w = proximal / sampler`` of each token, and its sums and products over a row."""

    log_w_N: Tensor
    """0 where the sampler is unknown."""
    is_known_N: Tensor
    row_N: Tensor
    num_rows: int

    @cached_property
    def w_N(self) -> Tensor:
        """The ratio of each token; its logarithm is bounded before exp."""
        return _bounded_exp(self.log_w_N)

    @property
    def product_B(self) -> Tensor:
        """The product over each row."""
        return _bounded_exp(self.row_sum(self.log_w_N))

    def row_sum(self, x_N: Tensor) -> Tensor:
        """Return the sum over each row's tokens, shape [B]."""
        return x_N.new_zeros(self.num_rows).index_add(0, self.row_N, x_N)

    def row_mean(self, x_N: Tensor) -> Tensor:
        """Return the sum over each row's tokens, divided by the number of those with a known sampler, shape [B]."""
        return self.row_sum(x_N) / self.row_sum(self.is_known_N.to(x_N.dtype)).clamp(min=1)


def none(ratios: SamplerRatios, options: NoCorrection) -> Tensor:
    """Return 1, also where the sampler is unknown: no ratio is asked for."""
    return torch.ones_like(ratios.w_N)


def token_truncate(ratios: SamplerRatios, options: TokenTruncate) -> Tensor:
    """Return ``min(w, high)`` (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL")."""
    return ratios.w_N.clamp(max=options.high)


def token_clip(ratios: SamplerRatios, options: TokenClip) -> Tensor:
    """Return w, clipped to [low, high]."""
    return ratios.w_N.clamp(options.low, options.high)


def token_mask(ratios: SamplerRatios, options: TokenMask) -> Tensor:
    """Return w inside [low, high], else 0 (IcePop, arXiv:2510.18855)."""
    return torch.where(_is_inside(ratios.w_N, options.low, options.high), ratios.w_N, 0.0)


def sequence_truncate(ratios: SamplerRatios, options: SequenceTruncate) -> Tensor:
    """Return ``min(W, high)``, with W the product over the row."""
    return ratios.product_B.clamp(max=options.high)[ratios.row_N]


def sequence_mask(ratios: SamplerRatios, options: SequenceMask) -> Tensor:
    """Return W, the product over the row, inside [low, high], else 0."""
    product_B = ratios.product_B
    return torch.where(_is_inside(product_B, options.low, options.high), product_B, 0.0)[ratios.row_N]


def geometric_mask(ratios: SamplerRatios, options: GeometricMask) -> Tensor:
    """Return ``min(w, token_cap)`` where the geometric mean of w over the row is inside [low, high], else 0."""
    mean_B = _bounded_exp(ratios.row_mean(ratios.log_w_N))
    return _capped_rows(ratios, _is_inside(mean_B, options.low, options.high), options.token_cap)


def k3_mask(ratios: SamplerRatios, options: K3Mask) -> Tensor:
    """Return ``min(w, token_cap)`` where the mean of w - 1 - log w over the row is at most high, else 0."""
    bounded_N = ratios.log_w_N.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    keep_B = ratios.row_mean(bounded_N.expm1() - bounded_N) <= options.high
    return _capped_rows(ratios, keep_B, options.token_cap)


KINDS: dict[str, Callable[[SamplerRatios, Any], Tensor]] = {
    "none": none,
    "token_truncate": token_truncate,
    "token_clip": token_clip,
    "token_mask": token_mask,
    "sequence_truncate": sequence_truncate,
    "sequence_mask": sequence_mask,
    "geometric_mask": geometric_mask,
    "k3_mask": k3_mask,
}
"""Kind -> function of the ratios and of the options of this kind (`CorrectionConfig`).

Row products, geometric means and k3: Liu, Li et al. 2025, on the collapse from training-inference mismatch."""


@torch.no_grad()
def correct(inputs: LossInputs, options: CorrectionConfig) -> TokenWeights:
    """Return the weight of each token.

    A sampling logprob that is not finite is unknown: such a token takes no part in the products, means and vetoes of
    its row, and has weight 0 under every kind but ``none``. Vetoes use unbounded log ratios.

    Reasons: ``veto`` (a token of the row is extreme), ``unknown_sampler``, ``correction`` (the kind gives weight 0).
    """
    is_known_N = inputs.sampling_logprobs_N.isfinite()
    # The difference itself is replaced: arithmetic on an unknown value would spread its NaN over the row's sums.
    log_w_N = torch.where(is_known_N, inputs.proximal_logprobs_N - inputs.sampling_logprobs_N, 0.0)
    ratios = SamplerRatios(log_w_N, is_known_N, inputs.row_N, inputs.num_rows)
    weight_N = KINDS[options.kind](ratios, options)
    is_vetoed_B = ratios.row_sum(_is_extreme(log_w_N, options).to(log_w_N.dtype)) > 0
    is_missed_N = ~is_known_N if options.kind != "none" else torch.zeros_like(is_known_N)
    reasons = {"veto": is_vetoed_B[inputs.row_N], "unknown_sampler": is_missed_N, "correction": weight_N == 0}
    return TokenWeights(torch.where(reasons["veto"] | is_missed_N, 0.0, weight_N), reasons)


def _is_inside(x: Tensor, low: float, high: float) -> Tensor:
    """Return where the value is inside [low, high]; elementwise."""
    return (x >= low) & (x <= high)


def _capped_rows(ratios: SamplerRatios, keep_B: Tensor, token_cap: float) -> Tensor:
    """Return the capped ratio of each token of the rows that are kept, else 0, shape [N]."""
    return torch.where(keep_B[ratios.row_N], ratios.w_N.clamp(max=token_cap), 0.0)


def _is_extreme(log_w_N: Tensor, veto: Veto) -> Tensor:
    """Return which tokens veto their row, shape [N]."""
    lowest = -math.inf if veto.veto_low is None else math.log(veto.veto_low)
    highest = math.inf if veto.veto_high is None else math.log(veto.veto_high)
    return (log_w_N < lowest) | (log_w_N > highest)


def _bounded_exp(x: Tensor) -> Tensor:
    """Return exp of the argument, bounded so that it stays finite; elementwise."""
    return x.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
