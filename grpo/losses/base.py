"""The inputs and the result of a loss, and each token's share of the step's loss.

Shapes: `N` trainable tokens of a microbatch, rows laid end to end; `B` rows of a microbatch. Masked tokens are absent
from `N` (see ``collate``), so no loss multiplies by a mask, and a NaN under a mask cannot reach one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Bound on a log ratio before exp: e^20 is far outside any clip and still finite in float32 and bfloat16."""


@dataclass(frozen=True)
class LossInputs:
    """The tokens of a microbatch, as losses and corrections see them. Only ``trainer_logprobs_N`` has a gradient."""

    trainer_logprobs_N: Tensor
    """Under the weights that are being trained."""
    proximal_logprobs_N: Tensor
    """Under the proximal policy."""
    sampling_logprobs_N: Tensor
    """Under the policy that sampled the token; NaN where unknown."""
    advantage_N: Tensor
    row_N: Tensor
    """Row of the token, ascending; a row is never cut, so sums over rows are whole."""
    num_rows: int

    @cached_property
    def ratio_N(self) -> Tensor:
        """The importance ratio trainer / proximal, with its gradient."""
        return importance_ratio(self.trainer_logprobs_N, self.proximal_logprobs_N)


@dataclass(frozen=True)
class TokenLosses:
    """The result of a loss."""

    loss_N: Tensor
    """To be minimised; has a gradient."""
    reasons: Mapping[str, Tensor]
    """Why a token has no gradient: name -> bool, shape [N]. The first of several is recorded."""


def importance_ratio(trainer_logprobs_N: Tensor, proximal_logprobs_N: Tensor) -> Tensor:
    """Return ``exp(trainer - proximal)``, shape [N], finite for any finite logprobs.

    Where the bound on the log ratio acts, the gradient is 0.
    """
    return (trainer_logprobs_N - proximal_logprobs_N).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def weigh_tokens(loss_N: Tensor, weight_N: Tensor, denominator_B: Tensor, row_N: Tensor) -> Tensor:
    """Return each token's share of the optimizer step's loss, ``weight * loss / denominator``, shape [N].

    The loss of the step is the sum of the shares in all its microbatches, so the denominator must belong to the whole
    step, not to the microbatch (grpo/aggregation.py). A weight of 0 gives exactly 0, whatever the loss is; it does not
    change the denominator.
    """
    share_N = loss_N * weight_N / denominator_B[row_N]
    return torch.where(weight_N == 0, torch.zeros_like(share_N), share_N)
