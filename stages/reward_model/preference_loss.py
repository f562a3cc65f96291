"""Learning a reward from preferences: a model with one logit, trained so that the chosen answer gets the higher one.

The Bradley-Terry loss of a pair is -log sigmoid(r_chosen - r_rejected - margin), the margin as in Llama 2
(arXiv:2307.09288, section 3.2.2). Rewards are only determined up to a constant; ``centering`` x (r_chosen +
r_rejected)^2 keeps them around 0 (arXiv:2312.09244).

Shapes: `P` pairs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from grpo.optimizer import clip_gradient, make_optimizer, take_step
from grpo.settings import AdamWConfig
from stages.rewards.models.classifier import Encoding, class_logits


@dataclass(frozen=True, slots=True)
class Pair:
    """Two tokenized conversations that end with the answers."""

    preference_id: str
    chosen: Encoding
    rejected: Encoding
    margin: float = 0.0
    """By how much the chosen reward is to exceed the rejected one."""


@dataclass(frozen=True, slots=True)
class PreferenceStep:
    """Measures of one optimizer step, taken before it changed the weights."""

    loss: float
    accuracy: float
    grad_norm: float
    learning_rate: float


def preference_loss(chosen_P: Tensor, rejected_P: Tensor, margin_P: Tensor, centering: float) -> Tensor:
    """Return the loss of each pair from the rewards of its answers, shape [P]."""
    return -logsigmoid(chosen_P - rejected_P - margin_P) + centering * (chosen_P + rejected_P).square()


def preference_accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> float | None:
    """Return the share of pairs whose chosen answer has the higher reward, equal ones as a half; None without pairs."""
    right = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(chosen, rejected, strict=True)]
    return math.fsum(right) / len(right) if right else None


def train_on_preferences(
    model: PreTrainedModel,
    batches: Sequence[Sequence[Pair]],
    config: AdamWConfig,
    *,
    centering: float,
    pairs_per_forward: int,
    on_step: Callable[[int, PreferenceStep], None] | None = None,
) -> list[PreferenceStep]:
    """Train in place, one optimizer step per batch in the order given; return the steps.

    The gradient is that of the mean loss of a batch. It is summed over forwards of ``pairs_per_forward`` pairs of
    similar length, so these change nothing but memory and rounding. Nothing here is random: dropout is off.

    Raises:
        ArithmeticError: if a loss or a gradient is not finite, naming pairs.
    """
    optimizer = make_optimizer(model, config)
    steps: list[PreferenceStep] = []
    for batch in batches:
        optimizer.adamw.zero_grad(set_to_none=True)
        ordered = sorted(batch, key=lambda pair: -max(len(pair.chosen["input_ids"]), len(pair.rejected["input_ids"])))
        loss, right = 0.0, 0.0
        for start in range(0, len(ordered), pairs_per_forward):
            pairs = ordered[start : start + pairs_per_forward]
            chosen_P, rejected_P = _rewards(model, pairs)
            margin_P = torch.tensor([pair.margin for pair in pairs], device=chosen_P.device)
            loss_P = preference_loss(chosen_P, rejected_P, margin_P, centering) / len(batch)
            torch.autograd.backward(loss_P.sum())
            loss += loss_P.sum().item()
            right += (preference_accuracy(chosen_P.tolist(), rejected_P.tolist()) or 0.0) * len(pairs) / len(batch)
        grad_norm = clip_gradient(model, config.max_grad_norm)
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise ArithmeticError(
                f"the preferences {', '.join(p.preference_id for p in batch[:8])} (of {len(batch)} in a batch) gave "
                f"the loss {loss} and a gradient of norm {grad_norm}: expected finite ones; lower the learning rate, "
                "and look at their margins and at the base model's weights"
            )
        steps.append(PreferenceStep(loss, right, grad_norm, take_step(optimizer, config)))
        if on_step is not None:
            on_step(len(steps), steps[-1])
    model.zero_grad()
    return steps


@torch.no_grad()
def score_pairs(model: PreTrainedModel, pairs: Sequence[Pair], pairs_per_forward: int) -> list[tuple[float, float]]:
    """Return the rewards of chosen and rejected answer of each pair, in the order given."""
    found: list[tuple[float, float]] = []
    for start in range(0, len(pairs), pairs_per_forward):
        chosen_P, rejected_P = _rewards(model, pairs[start : start + pairs_per_forward])
        found += zip(chosen_P.tolist(), rejected_P.tolist(), strict=True)
    return found


def _rewards(model: PreTrainedModel, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Return the rewards of the chosen and of the rejected answers, shape [P] each, from one forward."""
    reward_2P = class_logits(model, [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]).squeeze(-1)
    return reward_2P[: len(pairs)], reward_2P[len(pairs) :]
