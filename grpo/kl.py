"""Estimates of a KL divergence from logprobs of sampled tokens, per token, and the KL to the reference in a loss.

No torch is imported, as in grpo/losses.

Every function takes ``log_ratio``: the log of the other policy minus the log of the policy that the tokens were
sampled from, and estimates KL(sampled-from || other). Shapes: `N` tokens; any one shape works.

Values are not gradients. With tokens from the policy under training and ``log_ratio = ref - trainer``, the expected
gradient of k1 is 0, of k2 that of KL(trainer || ref), of k3 that of KL(ref || trainer). For a loss, use
``weighted_k3``.
"""

from typing import TYPE_CHECKING

from grpo.losses.base import LOG_RATIO_LIMIT, LossInputs, bounded_exp
from grpo.settings import KlConfig

if TYPE_CHECKING:
    from torch import Tensor


def k1(log_ratio_N: "Tensor") -> "Tensor":
    """Return ``-log_ratio``: unbiased, and negative for many single tokens (Schulman, Approximating KL Divergence)."""
    return -log_ratio_N


def k2(log_ratio_N: "Tensor") -> "Tensor":
    """Return ``log_ratio^2 / 2``: never negative, biased, close when the policies are close."""
    return log_ratio_N.square() / 2


def k3(log_ratio_N: "Tensor") -> "Tensor":
    """Return ``exp(log_ratio) - 1 - log_ratio``: never negative, unbiased, of low variance.

    The log ratio is bounded, so that the result is finite. ``expm1`` keeps the digits of small ratios: in float32, at
    1e-4, ``exp(x) - 1 - x`` is off by a factor of three.
    """
    bounded_N = log_ratio_N.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return bounded_N.expm1() - bounded_N


def weighted_k3(trainer_logprobs_N: "Tensor", sampled_logprobs_N: "Tensor", ref_logprobs_N: "Tensor") -> "Tensor":
    """Return ``exp(trainer - sampled) * k3(ref - trainer)``, shape [N], whose gradient flows through the ratio too.

    For tokens sampled by another policy than the one under training. The gradient is
    ``ratio * (trainer - ref) * grad trainer``, unbiased for KL(trainer || ref) (DeepSeek-V3.2, arXiv:2512.02556).
    Detaching the ratio would turn it into the gradient of KL(ref || trainer).
    """
    return bounded_exp(trainer_logprobs_N - sampled_logprobs_N) * k3(ref_logprobs_N - trainer_logprobs_N)


def kl_to_sampler(trainer_logprobs_N: "Tensor", sampling_logprobs_N: "Tensor") -> "Tensor":
    """Return the k3 estimate of KL(sampler || trainer) per token, shape [N], without gradient; NaN where unknown."""
    return k3((trainer_logprobs_N - sampling_logprobs_N).detach())


PLAIN = {"k1": k1, "k2": k2, "k3": k3}


def kl_losses(inputs: LossInputs, reference_logprobs_N: "Tensor", config: KlConfig) -> "Tensor":
    """Return what [update.kl] adds to the loss of each token, shape [N], before its mean is taken.

    It is multiplied by no advantage and no correction. The ratio of ``weighted_k3`` is that to the sampler, or to the
    proximal policy where the sampler is unknown; its gradient is ``min(ratio, ratio_cap) (trainer - reference)``.
    """
    if config.name != "weighted_k3":
        return config.coef * PLAIN[config.name](reference_logprobs_N - inputs.trainer_logprobs_N)
    trainer_N, sampling_N = inputs.trainer_logprobs_N, inputs.sampling_logprobs_N
    sampled_from_N = sampling_N.where(sampling_N.isfinite(), inputs.proximal_logprobs_N)
    kl_N = weighted_k3(trainer_N, sampled_from_N, reference_logprobs_N)
    if config.ratio_cap is None:
        return config.coef * kl_N
    ratio_N = bounded_exp((trainer_N - sampled_from_N).detach())
    return config.coef * (config.ratio_cap / ratio_N).clamp(max=1) * kl_N
