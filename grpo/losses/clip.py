"""Losses that hold each token's ratio to the proximal policy near 1.

Shapes: `N` trainable tokens of a microbatch, rows laid end to end. ``r`` is the ratio trainer / proximal of a token,
``A`` its advantage.
"""

import math

from grpo.losses.base import LossInputs, TokenLosses
from grpo.strict import PositiveOrNone


def ppo_clip(
    inputs: LossInputs,
    *,
    clip_low: PositiveOrNone = 0.2,
    clip_high: PositiveOrNone = 0.28,
    dual_clip: PositiveOrNone = 4.0,
) -> TokenLosses:
    """Return ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` of each token.

    PPO's clip with separate bounds (DAPO, arXiv:2503.14476); equal bounds give GRPO (arXiv:2402.03300).

    Args:
        inputs: the tokens.
        clip_low: no gradient for A < 0 once r is under 1 - clip_low; from 1 on, or with none, never.
        clip_high: no gradient for A > 0 once r is over 1 + clip_high; none = never. Without both bounds the loss is the
            plain ratio policy gradient ``-r A``.
        dual_clip: bound on r where A < 0, which the clip leaves open (arXiv:1912.09729); none = unbounded. It is the
            delta of INTELLECT-2 (arXiv:2505.07291), which bounds r there and, as it is above the clip, nowhere else.

    Reasons: ``clipped_low`` and ``clipped_high``, each on the side that the sign of the advantage makes active, and
    ``dual_clip``, where that bound is the loss.
    """
    ratio_N, advantage_N = inputs.ratio_N, inputs.advantage_N
    lowest = -math.inf if clip_low is None else 1 - clip_low
    highest = math.inf if clip_high is None else 1 + clip_high
    objective_N = (ratio_N * advantage_N).minimum(ratio_N.clamp(lowest, highest) * advantage_N)
    reasons = {
        "clipped_low": (advantage_N < 0) & (ratio_N < lowest),
        "clipped_high": (advantage_N > 0) & (ratio_N > highest),
    }
    if dual_clip is not None:
        bound_N = dual_clip * advantage_N
        reasons["dual_clip"] = (advantage_N < 0) & (objective_N < bound_N)
        objective_N = bound_N.where(reasons["dual_clip"], objective_N)
    return TokenLosses(-objective_N, reasons)


def check_ppo_clip(clip_high: float | None, dual_clip: float | None) -> None:
    """Raise ValueError for options of `ppo_clip` that cannot be meant."""
    highest = 1 + (clip_high or 0)
    if dual_clip is not None and dual_clip <= highest:
        raise ValueError(
            f"dual_clip is {dual_clip}, inside of the clip at 1 + clip_high = {highest}: raise it, "
            'or switch dual clipping off with "none"'
        )


LOSSES = (ppo_clip,)
CHECKS = {"ppo_clip": check_ppo_clip}
