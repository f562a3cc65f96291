"""The losses that a config can name."""

from collections.abc import Callable

from grpo.losses.base import LossInputs, TokenLosses
from grpo.losses.clip import ppo_clip
from grpo.settings import UpdateConfig

LOSSES: dict[str, Callable[[LossInputs, UpdateConfig], TokenLosses]] = {"ppo_clip": ppo_clip}
