"""What decides an update besides rows, weights and the optimizer's state: the table [update] as it stands in a config.

Imports neither torch nor transformers: a config is read long before there is a model.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from grpo import correction
from grpo.correction import CorrectionConfig, UpperBound
from grpo.losses import options as losses
from grpo.losses.options import TO_SAMPLER, LossConfig
from grpo.strict import NoneIsNull, OrNone, PositiveOrNone, StrictModel


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
    max_grad_norm: PositiveOrNone = 1.0
    """Gradients of a larger norm are scaled down to it; "none" = never."""

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


class ForwardConfig(StrictModel):
    """What decides the bits of a forward besides rows and weights, and its memory."""

    head_chunk_tokens: int = Field(1024, ge=1)
    """Positions whose logits exist at the same time."""
    autocast_bf16: bool = False
    """bfloat16 in the model's body; weights, head and loss stay float32."""
    num_threads: int = Field(2, ge=1)
    """CPU threads; they change the bits of the result."""


class KlConfig(StrictModel):
    """The table [update.kl]: the KL divergence to a reference policy, in the loss of every token."""

    name: Literal["weighted_k3", "k1", "k2", "k3"] = "weighted_k3"
    """The estimate. weighted_k3 has the gradient of KL(trainer || reference), whoever sampled the tokens; k2 has it for
    tokens of the trainer; k3, the textbook's, has that of KL(reference || trainer); k1 has none in the mean."""
    coef: float = Field(1e-3, gt=0)
    """Weight in the loss."""
    ratio_cap: Annotated[UpperBound | None, *OrNone] = 2.0
    """For weighted_k3: bound on the ratio trainer / sampler; "none" = no bound."""
    refresh_every: int | None = Field(None, ge=1)
    """The reference is the policy that the last iteration divisible by this began with; null = the initial policy."""


class UpdateConfig(AdamWConfig, ForwardConfig):
    """Config of the update stage."""

    loss: LossConfig = losses.DEFAULT
    """What a token's loss is, without the correction's weight."""
    correction: CorrectionConfig = correction.DEFAULT
    """What a token's loss is multiplied by."""
    proximal: Literal["phase", "update", "sampler"] = "phase"
    """The policy that the clip compares with. update: the one that the iteration begins with. phase: the same, but over
    consecutive offline iterations the one that the first of them begins with, so that the clip bounds what all of them
    do with the stored rows. sampler: the one that wrote the tokens; nothing is left to correct then."""
    offline_kl_coef: float = Field(0.4, ge=0)
    """Weight of the KL to the proximal policy in the loss of offline iterations under "phase". The clip bounds the
    tokens that were sampled; this bounds the rest of each distribution, which drifts while rows are used again."""
    kl: Annotated[KlConfig | None, NoneIsNull] = None
    """What holds the policy to a reference; null or "none" = nothing does."""
    entropy_coef: float = 0.0
    """Weight of the mean entropy over an optimizer step's tokens, subtracted from the loss: above 0 it keeps the policy
    from becoming sure of itself. The mean is over tokens whatever the aggregation is."""
    gradient_checkpointing: bool = False
    """Trade a second forward for memory."""
    record_tokens: bool = False
    """Keep lists in training_records with what became of each token: `grpo tokens` prints them. Changes no weight."""

    @model_validator(mode="after")
    def _loss_has_its_sampler(self) -> Self:
        if self.loss.name in TO_SAMPLER and self.proximal != "sampler":
            raise ValueError(
                f"the loss {self.loss.name} compares with the sampler, and proximal is {self.proximal}: set "
                'update.proximal = "sampler"'
            )
        if self.loss.name == "reinforce" and self.proximal == "sampler":
            raise ValueError(
                'the loss reinforce has no ratio, and under proximal = "sampler" no correction weighs a token: nothing '
                'would make up for what another policy has sampled; set update.proximal = "update", or use cispo, '
                "which has the ratio to the sampler"
            )
        return self
