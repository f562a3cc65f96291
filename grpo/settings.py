"""What decides an update besides rows, weights and the optimizer's state."""

from dataclasses import dataclass, field
from typing import Literal

from grpo.correction import Correction


@dataclass(frozen=True)
class UpdateSettings:
    """Everything that decides an update besides the rows, the weights and the optimizer's state."""

    learning_rate: float = 1e-6
    """Peak, after warmup."""
    warmup_steps: int = 0
    """Optimizer steps of a linear rise; the first one already moves the weights."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warmup: no change, or a fall to 0 at ``total_steps``."""
    total_steps: int | None = None
    """Optimizer steps of the whole run, warmup included; needed unless the schedule is constant."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Applied to matrices only: a decayed norm or bias has nothing to gain."""
    max_grad_norm: float | None = 1.0
    """Longer gradients are shortened to this; None leaves them."""
    clip_low: float | None = 0.2
    clip_high: float | None = 0.28
    dual_clip: float | None = 4.0
    correction: Correction = field(default_factory=Correction)
    head_chunk_tokens: int = 1024
    """Tokens whose logits exist at one time."""
    autocast_bf16: bool = False
    """Run the base model in bfloat16, with weights, head and loss in float32."""
    record_tokens: bool = False
    """Keep per-token lists in the records (``TOKEN_RECORD_SCHEMA``)."""

    def __post_init__(self) -> None:
        """Raise for settings that contradict each other."""
        if self.schedule != "constant" and (self.total_steps is None or self.total_steps <= self.warmup_steps):
            raise ValueError(
                f"schedule is {self.schedule!r} with total_steps={self.total_steps}: expected more steps than the "
                f"{self.warmup_steps} of the warmup, where the learning rate reaches 0; set total_steps"
            )
        if self.head_chunk_tokens < 1:
            raise ValueError(f"head_chunk_tokens is {self.head_chunk_tokens}: expected at least 1; raise it")
