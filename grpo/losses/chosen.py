"""The losses that a config can name."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from grpo.losses.base import LossInputs, TokenLosses
from grpo.losses.clip import ppo_clip
from grpo.losses.options import CustomLoss, LossConfig

LOSSES: dict[str, Callable[[LossInputs, Any], TokenLosses]] = {"ppo_clip": ppo_clip}
"""Name -> function of the inputs and of the options with this name (`LossConfig`)."""


def token_losses(inputs: LossInputs, config: LossConfig) -> TokenLosses:
    """Return the token losses of the loss that the config names.

    Raises:
        ValueError: when a custom function does not return a loss and reasons for each token.
    """
    if not isinstance(config, CustomLoss):
        return LOSSES[config.name](inputs, config)
    module, _, function = config.name.partition(":")
    result = getattr(importlib.import_module(module), function)(inputs, **config.arguments)
    return _checked(result, inputs.advantage_N.shape, config.name)


def _checked(result: Any, shape: torch.Size, name: str) -> TokenLosses:
    """Return the result of a custom function; a wrong shape would be broadcast silently."""
    if not isinstance(result, TokenLosses):
        found = type(result).__name__
    else:
        reasons = {reason: (tuple(held_N.shape), held_N.dtype) for reason, held_N in result.reasons.items()}
        if result.loss_N.shape == shape and all(kind == (tuple(shape), torch.bool) for kind in reasons.values()):
            return result
        found = f"TokenLosses with losses of shape {tuple(result.loss_N.shape)} and reasons {reasons}"
    raise ValueError(
        f"the loss {name} returned {found}: expected TokenLosses with one loss, and one bool of each reason, for each "
        f"of {shape[0]} tokens; correct the function"
    )
