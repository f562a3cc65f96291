"""The per-token policy loss, its clip diagnostics, and the sum that turns tokens into one loss.

Shapes: `N` trainable tokens of a microbatch, rows laid end to end; `B` rows of a microbatch. Masked tokens are absent
from `N` (see ``collate``), so nothing here multiplies by a mask, and a NaN under a mask cannot reach a loss.
The elementwise functions take tensors of any one shape.
"""

import torch
from torch import Tensor


def clipped_surrogate(
    ratio_N: Tensor,
    advantage_N: Tensor,
    *,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None = None,
) -> Tensor:
    """Return the per-token loss ``-min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A)``, shape [N].

    PPO clip with separate bounds (DAPO, arXiv:2503.14476); equal bounds give GRPO; a bound of None does not clip, and
    without both the loss is the plain ratio policy gradient ``-r * A``.
    ``dual_clip=c`` bounds the loss of A < 0 by ``c * |A|`` (arXiv:1912.09729): there a large ratio is clipped by
    nothing else.

    Raises:
        ValueError: if a bound is negative, or ``dual_clip`` lies inside the clip.
    """
    _check_bounds(clip_low, clip_high, dual_clip)
    objective_N = ratio_N * advantage_N
    if clip_low is not None or clip_high is not None:
        lowest = None if clip_low is None else 1 - clip_low
        highest = None if clip_high is None else 1 + clip_high
        objective_N = torch.minimum(objective_N, ratio_N.clamp(lowest, highest) * advantage_N)
    if dual_clip is not None:
        bounded_N = torch.maximum(objective_N, dual_clip * advantage_N)
        objective_N = torch.where(advantage_N < 0, bounded_N, objective_N)
    return -objective_N


def clip_masks(
    ratio_N: Tensor, advantage_N: Tensor, *, clip_low: float | None, clip_high: float | None
) -> tuple[Tensor, Tensor]:
    """Return which tokens have no gradient because they are clipped from below, and from above: bool, shape [N] each.

    Only the side that the sign of the advantage makes active counts: A < 0 and r < 1 - clip_low; A > 0 and
    r > 1 + clip_high.
    """
    none_N = torch.zeros_like(ratio_N, dtype=torch.bool)
    low_N = none_N if clip_low is None else (advantage_N < 0) & (ratio_N < 1 - clip_low)
    high_N = none_N if clip_high is None else (advantage_N > 0) & (ratio_N > 1 + clip_high)
    return low_N, high_N


def _check_bounds(clip_low: float | None, clip_high: float | None, dual_clip: float | None) -> None:
    """Raise for bounds that would clip where they should not."""
    for name, bound in (("clip_low", clip_low), ("clip_high", clip_high)):
        if bound is not None and bound < 0:
            raise ValueError(
                f"{name} is {bound}: expected a distance from ratio 1, so zero or more; drop the sign, or set it to "
                "none to leave that side unclipped"
            )
    if dual_clip is not None and dual_clip <= 1 + (clip_high or 0):
        raise ValueError(
            f"dual_clip is {dual_clip}: expected a ratio above 1 + clip_high = {1 + (clip_high or 0)}; raise it, or "
            "set it to none"
        )
