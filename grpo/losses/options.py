"""The table [update.loss]: the losses by name, and their options from their signatures."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import Field

from grpo.losses import clip, likelihood, sequence, soft, trust_region
from grpo.losses.base import TokenLosses
from grpo.options import one_of, options_of
from grpo.strict import StrictModel

FAMILIES = (clip, soft, likelihood, sequence, trust_region)
LOSSES: dict[str, Callable[..., TokenLosses]] = {loss.__name__: loss for family in FAMILIES for loss in family.LOSSES}
"""Name -> function of the inputs and of the options."""
OF_ROWS = frozenset(loss.__name__ for loss in sequence.LOSSES)
"""Losses of which a mean of row means is the mean over rows."""
TO_SAMPLER = frozenset(loss.__name__ for loss in (*likelihood.TO_SAMPLER, *trust_region.TO_SAMPLER))
"""Losses whose ratio is that to the sampler, and so must not be weighed by proximal / sampler as well."""


class LossOptions(StrictModel):
    """Base of the options of each loss."""

    name: str


class CustomLoss(StrictModel):
    """A function ``loss(inputs: LossInputs, **arguments) -> TokenLosses`` (grpo/losses/base.py)."""

    name: str = Field(pattern=r"^[\w.]+:\w+$")
    """``module:function``, importable from the current directory."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments."""


CHECKS = {name: check for family in FAMILIES for name, check in getattr(family, "CHECKS", {}).items()}
"""Name -> function of some of the options that refuses those which do not go together."""
OPTIONS = {name: options_of(loss, "name", LossOptions, CHECKS.get(name)) for name, loss in LOSSES.items()}
if TYPE_CHECKING:
    LossConfig = LossOptions | CustomLoss
else:
    LossConfig = one_of(OPTIONS.values(), "name", "ppo_clip", CustomLoss)
DEFAULT = OPTIONS["ppo_clip"](name="ppo_clip")
