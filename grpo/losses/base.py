"""What losses share."""

from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Bound on a log ratio before exp: e^20 is far outside any clip and still finite in float32 and bfloat16."""


def importance_ratio(trainer_logprobs_N: Tensor, proximal_logprobs_N: Tensor) -> Tensor:
    """Return ``exp(trainer - proximal)``, shape [N], finite for any finite logprobs.

    Where the bound on the log ratio acts, the gradient is 0.
    """
    return (trainer_logprobs_N - proximal_logprobs_N).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
