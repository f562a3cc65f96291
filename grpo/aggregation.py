"""The sum that turns tokens into one loss."""

import torch
from torch import Tensor


def weigh_tokens(loss_N: Tensor, weight_N: Tensor, denominator_B: Tensor, row_N: Tensor) -> Tensor:
    """Return each token's share of the optimizer step's loss, ``weight * loss / denominator``, shape [N].

    The loss of the step is the sum of all shares, over whatever microbatches they come from: so the denominator must
    belong to the whole step, not to the microbatch. A weight of 0 gives exactly 0, whatever the loss is; it does not
    change the denominator.

    With the number of trainable tokens of the step as everyone's denominator this is the token mean. A denominator
    per row gives the other means: ``num_rows * row_tokens`` the mean of row means (original GRPO),
    ``num_rows * constant`` Dr. GRPO, ``num_prompts * prompt_tokens`` the mean over prompts (DAPO as written).
    """
    share_N = loss_N * weight_N / denominator_B[row_N]
    return torch.where(weight_N == 0, torch.zeros_like(share_N), share_N)
