"""Constant weights for tokens that another policy or another engine sampled: proximal over sampler, bounded.

The clip of a loss compares the current weights with the proximal ones; the difference between the proximal
weights and the sampler is corrected here, by a factor outside the clip (decoupled PPO, arXiv:2110.00641). As in
grpo/losses, no torch is imported, and the keyword parameters of a kind are its options in the table
[update.correction].

Shapes: `N` trainable tokens of a microbatch, rows laid end to end. A correction never changes a denominator: the other
tokens would be scaled up exactly where the data is worst.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from grpo.losses.base import LOG_RATIO_LIMIT, LossInputs, bounded_exp
from grpo.options import given, one_of, options_of
from grpo.strict import Positive, StrictModel

if TYPE_CHECKING:
    from torch import Tensor

LowerBound = Annotated[float, Field(ge=0, le=1)]
"""Of a ratio: on-policy it is 1, which every bound allows."""
UpperBound = Annotated[float, Field(ge=1)]


@dataclass(frozen=True)
class TokenWeights:
    """The result of a correction."""

    weight_N: "Tensor"
    """Never negative, finite, without gradient."""
    reasons: "Mapping[str, Tensor]"
    """Why a token has weight 0: name -> bool, shape [N]. The first of several is recorded."""


@dataclass(frozen=True)
class SamplerRatios:
    """``w = proximal / sampler`` of each token, and its products and means over the token's row."""

    inputs: LossInputs
    log_w_N: "Tensor"
    """0 where the sampler is unknown."""
    is_known_N: "Tensor"

    @cached_property
    def w_N(self) -> "Tensor":
        """The ratio of each token; its logarithm is bounded before exp."""
        return bounded_exp(self.log_w_N)

    @cached_property
    def product_N(self) -> "Tensor":
        """The product over the token's row."""
        return bounded_exp(self.inputs.row_sum_N(self.log_w_N))

    def known_mean_N(self, x_N: "Tensor") -> "Tensor":
        """Return the sum over the token's row, divided by the number of those with a known sampler."""
        return self.inputs.row_sum_N(x_N) / self.inputs.row_sum_N(self.is_known_N.to(x_N.dtype)).clamp(min=1)


def none(ratios: SamplerRatios) -> "Tensor":
    """Return 1, also where the sampler is unknown: no ratio is asked for."""
    return ratios.log_w_N * 0 + 1


def token_truncate(ratios: SamplerRatios, *, high: UpperBound = 2.0) -> "Tensor":
    """Return ``min(w, high)`` (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL")."""
    return ratios.w_N.clamp(max=high)


def token_clip(ratios: SamplerRatios, *, low: LowerBound = 0.5, high: UpperBound = 5.0) -> "Tensor":
    """Return w, clipped to [low, high], by default with the bounds of OpenRLHF."""
    return ratios.w_N.clamp(low, high)


def token_mask(ratios: SamplerRatios, *, low: LowerBound = 0.5, high: UpperBound = 5.0) -> "Tensor":
    """Return w inside [low, high], else 0 (IcePop, arXiv:2510.18855)."""
    return _inside(ratios.w_N, ratios.w_N, low, high)


def sequence_truncate(ratios: SamplerRatios, *, high: UpperBound = 2.0) -> "Tensor":
    """Return ``min(W, high)``, with W the product over the row."""
    return ratios.product_N.clamp(max=high)


def sequence_mask(ratios: SamplerRatios, *, low: LowerBound = 0.0, high: UpperBound = 3.0) -> "Tensor":
    """Return W, the product over the row, inside [low, high], else 0; by default with the bounds of TRL."""
    return _inside(ratios.product_N, ratios.product_N, low, high)


def geometric_mask(
    ratios: SamplerRatios, *, low: LowerBound = 0.99, high: UpperBound = 1.01, token_cap: UpperBound = 2.0
) -> "Tensor":
    """Return ``min(w, token_cap)`` where the geometric mean of w over the row is inside [low, high], else 0.

    Made for the mismatch of two engines, too strict for stale rows.
    """
    mean_N = bounded_exp(ratios.known_mean_N(ratios.log_w_N))
    return _inside(ratios.w_N.clamp(max=token_cap), mean_N, low, high)


def k3_mask(ratios: SamplerRatios, *, high: Positive = 0.01, token_cap: UpperBound = 2.0) -> "Tensor":
    """Return ``min(w, token_cap)`` where the mean of w - 1 - log w over the row is at most high, else 0.

    The mean estimates KL(sampler || proximal) per token. Made for the mismatch of two engines, too strict for stale
    rows.
    """
    bounded_N = ratios.log_w_N.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    mean_N = ratios.known_mean_N(bounded_N.expm1() - bounded_N)
    return ratios.w_N.clamp(max=token_cap).masked_fill(mean_N > high, 0.0)


KINDS: dict[str, Callable[..., "Tensor"]] = {
    kind.__name__: kind
    for kind in (
        none,
        token_truncate,
        token_clip,
        token_mask,
        sequence_truncate,
        sequence_mask,
        geometric_mask,
        k3_mask,
    )
}
"""Kind -> function of the ratios and of its options.

Row products, geometric means and k3: Liu, Li et al. 2025, on the collapse from training-inference mismatch."""


class CorrectionOptions(StrictModel):
    """What stands beside every kind: what takes a whole row out, off by default (docs/decisions/0015)."""

    kind: str
    veto_low: float | None = Field(None, gt=0, lt=1)
    """A row with a token of a smaller w gets weight 0; null = no such rule. Long rows meet it more often."""
    veto_high: float | None = Field(None, gt=1)
    """A row with a token of a larger w gets weight 0; null = no such rule. Long rows meet it more often."""
    off_policy_sequence_mask: float | None = Field(None, gt=0)
    """A row with A < 0 gets weight 0 when the mean of log(sampler / current) over it is larger: its answer has become
    unlikely by itself (DeepSeek-V3.2, arXiv:2512.02556). In nats per token; null = no such rule."""


OPTIONS = {name: options_of(kind, "kind", CorrectionOptions) for name, kind in KINDS.items()}
if TYPE_CHECKING:
    CorrectionConfig = CorrectionOptions
else:
    CorrectionConfig = one_of(OPTIONS.values(), "kind", "token_truncate")
DEFAULT: CorrectionConfig = OPTIONS["token_truncate"]()


def correct(inputs: LossInputs, options: CorrectionConfig) -> TokenWeights:
    """Return the weight of each token.

    A sampling logprob that is not finite is unknown: such a token takes no part in the products, means and vetoes of
    its row, and has weight 0 under every kind but ``none``. Vetoes use unbounded log ratios.

    Reasons: ``veto`` (a token of the row is extreme), ``off_policy_sequence_mask``, ``unknown_sampler``, ``correction``
    (the kind gives weight 0).
    """
    is_known_N = inputs.sampling_logprobs_N.isfinite()
    # The difference itself is replaced: arithmetic on an unknown value would spread its NaN over the row's sums.
    log_w_N = (inputs.proximal_logprobs_N.detach() - inputs.sampling_logprobs_N).masked_fill(~is_known_N, 0.0)
    ratios = SamplerRatios(inputs, log_w_N, is_known_N)
    kind = KINDS[options.kind]
    weight_N = kind(ratios, **given(kind, options))
    is_missed_N = ~is_known_N if options.kind != "none" else is_known_N & ~is_known_N
    reasons = {
        "veto": inputs.row_sum_N(_is_extreme(log_w_N, options).to(log_w_N.dtype)) > 0,
        "off_policy_sequence_mask": _has_become_unlikely(ratios, options.off_policy_sequence_mask),
        "unknown_sampler": is_missed_N,
        "correction": weight_N == 0,
    }
    silent_N = reasons["veto"] | reasons["off_policy_sequence_mask"] | is_missed_N
    return TokenWeights(weight_N.masked_fill(silent_N, 0.0), reasons)


def _inside(weight_N: "Tensor", x_N: "Tensor", low: float, high: float) -> "Tensor":
    """Return the weight where x is inside [low, high], else 0."""
    return weight_N.masked_fill((x_N < low) | (x_N > high), 0.0)


def _is_extreme(log_w_N: "Tensor", options: CorrectionOptions) -> "Tensor":
    """Return which tokens veto their row, shape [N]."""
    lowest = -math.inf if options.veto_low is None else math.log(options.veto_low)
    highest = math.inf if options.veto_high is None else math.log(options.veto_high)
    return (log_w_N < lowest) | (log_w_N > highest)


def _has_become_unlikely(ratios: SamplerRatios, most: float | None) -> "Tensor":
    """Return which tokens are of a row with A < 0 whose mean of log(sampler / current) is over ``most``."""
    inputs = ratios.inputs
    fallen_N = (inputs.sampling_logprobs_N - inputs.trainer_logprobs_N.detach()).masked_fill(~ratios.is_known_N, 0.0)
    return (inputs.advantage_N < 0) & (ratios.known_mean_N(fallen_N) > (math.inf if most is None else most))
