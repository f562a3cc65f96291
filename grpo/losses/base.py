"""The inputs and the result of a loss, and each token's share of the step's loss.

No module here imports torch: a loss is arithmetic on tensors by their own methods, and its options are its keyword
parameters, which a config is checked against long before there is a model.

Shapes: `N` trainable tokens of a microbatch, rows laid end to end; `B` rows of a microbatch. Masked tokens are absent
from `N` (see ``collate``), so no loss multiplies by a mask, and a NaN under a mask cannot reach one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Bound on a log ratio before exp: e^20 is far outside any clip and still finite in float32 and bfloat16."""


@dataclass(frozen=True)
class LossInputs:
    """The tokens of a microbatch, as losses and corrections see them. Only ``trainer_logprobs_N`` has a gradient."""

    trainer_logprobs_N: "Tensor"
    """Under the weights that are being trained."""
    proximal_logprobs_N: "Tensor"
    """Under the proximal policy."""
    sampling_logprobs_N: "Tensor"
    """Under the policy that sampled the token; NaN where unknown."""
    advantage_N: "Tensor"
    row_N: "Tensor"
    """Row of the token, ascending; a row is never cut, so sums over rows are whole."""
    num_rows: int

    @cached_property
    def log_ratio_N(self) -> "Tensor":
        """The log of trainer / proximal, with its gradient, unbounded."""
        return self.trainer_logprobs_N - self.proximal_logprobs_N

    @cached_property
    def ratio_N(self) -> "Tensor":
        """The importance ratio trainer / proximal, with its gradient."""
        return bounded_exp(self.log_ratio_N)

    @cached_property
    def tokens_N(self) -> "Tensor":
        """Trainable tokens of the token's row, in the dtype of the advantages."""
        return self.row_sum_N((self.row_N == self.row_N).to(self.advantage_N.dtype))

    def row_sum_N(self, x_N: "Tensor") -> "Tensor":
        """Return, at each token, the sum over its row, shape [N]."""
        return x_N.new_zeros(self.num_rows).index_add(0, self.row_N, x_N)[self.row_N]

    def row_mean_N(self, x_N: "Tensor") -> "Tensor":
        """Return, at each token, the mean over its row, shape [N]."""
        return self.row_sum_N(x_N) / self.tokens_N


@dataclass(frozen=True)
class TokenLosses:
    """The result of a loss."""

    loss_N: "Tensor"
    """To be minimised; has a gradient."""
    reasons: "Mapping[str, Tensor]"
    """Why a token has no gradient: name -> bool, shape [N]. The first of several is recorded."""
    bounds: "Mapping[str, Tensor]" = field(default_factory=dict)
    """What has changed a token's gradient and left some: name -> bool, shape [N]. Recorded where no reason is."""


def bounded_exp(x: "Tensor") -> "Tensor":
    """Return exp of the argument, elementwise: finite for any finite one. Where the bound acts, the gradient is 0."""
    return x.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def weigh_tokens(loss_N: "Tensor", weight_N: "Tensor", denominator_B: "Tensor", row_N: "Tensor") -> "Tensor":
    """Return each token's share of the optimizer step's loss, ``weight * loss / denominator``, shape [N].

    The loss of the step is the sum of the shares in all its microbatches, so the denominator must belong to the whole
    step, not to the microbatch (grpo/aggregation.py). A weight of 0 gives exactly 0, whatever the loss is; it does not
    change the denominator.
    """
    return (loss_N * weight_N / denominator_B[row_N]).masked_fill(weight_N == 0, 0.0)
