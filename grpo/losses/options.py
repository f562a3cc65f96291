"""The table [update.loss]: one class of options for each loss. Imports neither torch nor transformers."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from grpo.strict import PositiveOrNone, StrictModel

CUSTOM = "module:function"
"""Tag of a custom loss."""


class PpoClip(StrictModel):
    """Options of `grpo.losses.clip`."""

    name: Literal["ppo_clip"] = "ppo_clip"
    clip_low: PositiveOrNone = 0.2
    """No gradient for A < 0 once the ratio to the proximal policy is under 1 - clip_low; from 1 on, or with "none",
    never."""
    clip_high: PositiveOrNone = 0.28
    """No gradient for A > 0 once the ratio is over 1 + clip_high; "none" = never."""
    dual_clip: PositiveOrNone = 4.0
    """Bound on the ratio where A < 0, which the clip leaves open; "none" = unbounded."""

    @model_validator(mode="after")
    def _dual_clip_outside_of_the_clip(self) -> Self:
        highest = 1 + (self.clip_high or 0)
        if self.dual_clip is not None and self.dual_clip <= highest:
            raise ValueError(
                f"dual_clip is {self.dual_clip}, inside of the clip at 1 + clip_high = {highest}: raise it, "
                'or switch dual clipping off with "none"'
            )
        return self


class CustomLoss(StrictModel):
    """A function ``loss(inputs: LossInputs, **arguments) -> TokenLosses`` (grpo/losses/base.py)."""

    name: str = Field(pattern=r"^[\w.]+:\w+$")
    """``module:function``, importable from the current directory."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments."""


def _tag(value: Any) -> str | None:
    """Return the tag of a table's class; a table without a name has the first class."""
    name = value.get("name", "ppo_clip") if isinstance(value, dict) else getattr(value, "name", None)
    if not isinstance(name, str):
        return None
    return CUSTOM if ":" in name else name


LossConfig = Annotated[
    Annotated[PpoClip, Tag("ppo_clip")] | Annotated[CustomLoss, Tag(CUSTOM)],
    Discriminator(
        _tag,
        custom_error_type="unknown_loss",
        custom_error_message="name should be ppo_clip, or module:function of a loss of your own",
    ),
]
