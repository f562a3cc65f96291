"""What decides an update besides rows, weights and the optimizer's state: the table [update] as it stands in a config.

Imports neither torch nor transformers: a config is read long before there is a model.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

CorrectionKind = Literal[
    "none",
    "token_truncate",
    "token_clip",
    "token_mask",
    "sequence_truncate",
    "sequence_mask",
    "geometric_mask",
    "k3_mask",
]


class StrictModel(BaseModel):
    """Base of every table: as strict as the one of `pipeline.config`, which this package does not import."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class AdamWConfig(StrictModel):
    """AdamW, its learning rate over the steps, and the longest gradient that it is given."""

    learning_rate: float = Field(1e-6, gt=0)
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate after the warm-up; linear and cosine fall to 0 at total_steps."""
    total_steps: int | None = Field(None, ge=1)
    """Optimizer steps of the whole run, for linear and cosine; constant needs none, so a run can be continued."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.99, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    """Of matrices; biases and norms have none."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients of a larger norm are scaled down to it; null = never."""

    @model_validator(mode="after")
    def _schedule_has_an_end(self) -> Self:
        if self.schedule != "constant" and self.total_steps is None:
            raise ValueError(f"schedule {self.schedule} falls to 0 at total_steps: set update.total_steps")
        if self.schedule != "constant" and (self.total_steps or 0) <= self.warmup_steps:
            raise ValueError(
                f"total_steps is {self.total_steps}, warmup_steps {self.warmup_steps}: the schedule must end after the "
                "warm-up"
            )
        return self


class UpdateConfig(AdamWConfig):
    """Config of the update stage."""

    clip_low: float | None = Field(0.2, gt=0, lt=1)
    """No gradient for A < 0 once the ratio to the proximal policy is under 1 - clip_low; null = never."""
    clip_high: float | None = Field(0.28, gt=0)
    """No gradient for A > 0 once the ratio is over 1 + clip_high; null = never."""
    dual_clip: float | None = Field(4.0, gt=1)
    """Bound on the ratio where A < 0, which the clip leaves open; null = unbounded."""
    correction: CorrectionKind = "token_truncate"
    """Weight for what lies between the proximal policy and the sampler; see grpo/correction.py."""
    correction_low: float = Field(0.0, ge=0)
    correction_high: float = Field(2.0, gt=0)
    correction_token_cap: float = Field(2.0, gt=0)
    """For geometric_mask and k3_mask: bound on the weights of the rows that they keep."""
    veto_low: float | None = Field(1e-4, gt=0)
    """A row with a token of a smaller proximal / sampler ratio gets weight 0; null = no such rule."""
    veto_high: float | None = Field(1e2, gt=0)
    """A row with a token of a larger ratio gets weight 0; null = no such rule."""
    head_chunk_tokens: int = Field(1024, ge=1)
    """Positions whose logits exist at the same time."""
    gradient_checkpointing: bool = False
    """Trade a second forward for memory."""
    autocast_bf16: bool = False
    """bfloat16 in the model's body; weights, head and loss stay float32."""
    record_tokens: bool = False
    """Keep lists in training_records with what became of each token: `grpo tokens` prints them. Changes no weight."""
    num_threads: int = Field(2, ge=1)
    """CPU threads; they change the bits of the result."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.correction_low > self.correction_high:
            raise ValueError(
                f"correction_low is {self.correction_low}, correction_high {self.correction_high}: swap or change them"
            )
        highest = 1 + (self.clip_high or 0)
        if self.dual_clip is not None and self.dual_clip <= highest:
            raise ValueError(
                f"dual_clip is {self.dual_clip}, inside of the clip at 1 + clip_high = {highest}: raise it, "
                "or leave dual clipping off with null"
            )
        return self
