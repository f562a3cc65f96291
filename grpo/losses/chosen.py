"""The loss that a config names."""

import importlib
from typing import Any

from grpo.losses.base import LossInputs, TokenLosses
from grpo.losses.options import LOSSES, CustomLoss, LossConfig
from grpo.options import given


def token_losses(inputs: LossInputs, config: LossConfig) -> TokenLosses:
    """Return the token losses of the loss that the config names.

    Raises:
        ValueError: when a custom function does not return a loss and reasons for each token.
    """
    if not isinstance(config, CustomLoss):
        loss = LOSSES[config.name]
        return loss(inputs, **given(loss, config))
    module, _, function = config.name.partition(":")
    result = getattr(importlib.import_module(module), function)(inputs, **config.arguments)
    return _checked(result, inputs, config.name)


def _checked(result: Any, inputs: LossInputs, name: str) -> TokenLosses:
    """Return the result of a custom function; a wrong shape would be broadcast silently."""
    is_any_N = inputs.advantage_N.isnan()
    shape, kind = is_any_N.shape, (is_any_N.shape, is_any_N.dtype)
    if not isinstance(result, TokenLosses):
        found = type(result).__name__
    else:
        named = {**result.reasons, **result.bounds}
        found = f"TokenLosses with losses of shape {tuple(result.loss_N.shape)} and " + str(
            {reason: (tuple(held_N.shape), held_N.dtype) for reason, held_N in named.items()}
        )
        if result.loss_N.shape == shape and all((held_N.shape, held_N.dtype) == kind for held_N in named.values()):
            return result
    raise ValueError(
        f"the loss {name} returned {found}: expected TokenLosses with one loss, and one bool of each reason and bound, "
        f"for each of {shape[0]} tokens; correct the function"
    )
