"""The clipped objective of PPO, which GRPO and DAPO share.

Shapes: `N` trainable tokens of a microbatch, rows laid end to end.
"""

import torch

from grpo.losses.base import LossInputs, TokenLosses
from grpo.losses.options import PpoClip


def ppo_clip(inputs: LossInputs, options: PpoClip) -> TokenLosses:
    """Return the loss ``-min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A)`` of each token.

    PPO clip with separate bounds (DAPO, arXiv:2503.14476); equal bounds give GRPO; a bound of None does not clip, and
    without both the loss is the plain ratio policy gradient ``-r * A``.
    ``dual_clip=c`` bounds the loss of A < 0 by ``c * |A|`` (arXiv:1912.09729): nothing else clips a large ratio there.

    Reasons: ``clipped_low`` and ``clipped_high``, each on the side that the sign of the advantage makes active (A < 0
    and r < 1 - clip_low; A > 0 and r > 1 + clip_high), and ``dual_clip``, where that bound is the loss.
    """
    ratio_N, advantage_N = inputs.ratio_N, inputs.advantage_N
    low_N = high_N = dual_N = torch.zeros_like(advantage_N, dtype=torch.bool)
    objective_N = ratio_N * advantage_N
    lowest = None if options.clip_low is None else 1 - options.clip_low
    highest = None if options.clip_high is None else 1 + options.clip_high
    if lowest is not None or highest is not None:
        objective_N = torch.minimum(objective_N, ratio_N.clamp(lowest, highest) * advantage_N)
    if lowest is not None:
        low_N = (advantage_N < 0) & (ratio_N < lowest)
    if highest is not None:
        high_N = (advantage_N > 0) & (ratio_N > highest)
    if options.dual_clip is not None:
        bound_N = options.dual_clip * advantage_N
        dual_N = (advantage_N < 0) & (objective_N < bound_N)
        objective_N = torch.where(advantage_N < 0, torch.maximum(objective_N, bound_N), objective_N)
    return TokenLosses(-objective_N, {"clipped_low": low_N, "clipped_high": high_N, "dual_clip": dual_N})
