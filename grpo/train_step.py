"""The update: rows of the batches dataset in, changed weights and a record of every completion out.

Shapes: `N` trainable tokens of a microbatch, rows laid end to end; `B` rows of a microbatch; `T` input tokens, padded.

There are three policies. The current one is being trained. The proximal one is that of the rows' proximal_logprobs, or
the weights at the start of the call; the clip acts on current / proximal. The sampler wrote the tokens; the constant
weight proximal / sampler corrects for it, outside the clip (decoupled PPO, arXiv:2110.00641). Nothing here is random.
"""

import math
from collections.abc import Callable

import polars as pl
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.batching import loss_tokens
from grpo.collate import MicroBatch, collate
from grpo.correction import correct
from grpo.kl import k3, kl_losses, kl_to_sampler, weighted_k3
from grpo.losses.base import LossInputs, weigh_tokens
from grpo.losses.chosen import token_losses
from grpo.optimizer import Optimizer, clip_gradient, take_step
from grpo.policy_logprobs import batch_logprobs
from grpo.records import RECORD_SCHEMA, TOKEN_RECORD_SCHEMA, TokenFacts, completion_records
from grpo.settings import UpdateConfig

STEP_SCHEMA = pl.Schema(
    {
        "optimizer_step": pl.Int32,
        "learning_rate": pl.Float64,
        "grad_norm": pl.Float64,
        "loss": pl.Float64,
        "num_tokens": pl.Int64,
        "num_rows": pl.Int64,
    }
)


def train_on_batches(
    model: PreTrainedModel,
    optimizer: Optimizer,
    frame: pl.DataFrame,
    config: UpdateConfig,
    on_microbatch: Callable[[int, int], None] | None = None,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Train in place; return the records of the completions (``RECORD_SCHEMA``) and the steps (``STEP_SCHEMA``).

    With ``record_tokens`` the records have ``TOKEN_RECORD_SCHEMA``; weights and all other numbers stay the same.

    ``frame`` holds the rows in training order with the columns that ``collate`` needs, and optimizer_step, microbatch
    and completion_id. An optimizer step is one gradient: the sum over its microbatches, each divided by the rows'
    ``loss_denominator``, so the cut into microbatches changes only rounding.

    Where rows bring no proximal_logprobs, those of the first optimizer step are the current ones, detached: no forward
    is spent on them. Later steps get theirs from a forward before the first step. Where rows bring some under
    ``proximal = "phase"``, the loss of a token also has ``offline_kl_coef`` times its KL(current || proximal). Under
    ``kl`` rows bring reference_logprobs.
    ``on_microbatch(optimizer_step, microbatch)`` is called after each microbatch.

    Raises:
        ArithmeticError: if a loss or a gradient is not finite, naming the completions; the weights of that step are
            not changed.
    """
    if config.proximal == "sampler":
        frame = frame.with_columns(proximal_logprobs="sampling_logprobs")
    steps = frame.partition_by("optimizer_step", maintain_order=True) if frame.height > 0 else []
    at_start = [[], *(_logprobs_at_start(model, rows, config) for rows in steps[1:])]
    schema = TOKEN_RECORD_SCHEMA if config.record_tokens else RECORD_SCHEMA
    records, step_rows = [pl.DataFrame(schema=schema)], []
    for index, rows in enumerate(steps):
        optimizer.adamw.zero_grad(set_to_none=True)
        num_tokens = int(rows.select(loss_tokens().sum()).item())
        step_records = []
        for microbatch, batch_rows in enumerate(rows.partition_by("microbatch", maintain_order=True)):
            batch = collate(batch_rows).to(model.device)
            start_N = at_start[index][microbatch] if index > 0 else None
            facts = _accumulate_gradient(model, batch, start_N, num_tokens, config)
            record = completion_records(batch_rows, batch, facts, with_tokens=config.record_tokens)
            _check_finite_loss(record)
            step_records.append(record)
            if on_microbatch is not None:
                on_microbatch(batch_rows["optimizer_step"][0], batch_rows["microbatch"][0])
        learning_rate, grad_norm = _take_step(model, optimizer, config, rows)
        records += step_records
        done = pl.concat(step_records)
        step_rows.append(
            {
                "optimizer_step": rows["optimizer_step"][0],
                "learning_rate": learning_rate,
                "grad_norm": grad_norm,
                "loss": done["loss"].sum(),
                "num_tokens": done["num_tokens"].sum(),
                "num_rows": rows.height,
            }
        )
    return pl.concat(records), pl.DataFrame(step_rows, schema=STEP_SCHEMA)


def _accumulate_gradient(
    model: PreTrainedModel, batch: MicroBatch, logprobs_at_start_N: Tensor | None, num_tokens: int, config: UpdateConfig
) -> TokenFacts:
    """Add the gradient of one microbatch to the parameters; return what the forward computed.

    ``num_tokens`` are the trainable tokens of the whole optimizer step.
    """
    trainer_N, entropy_N = batch_logprobs(model, batch, config)
    start_N = trainer_N.detach() if logprobs_at_start_N is None else logprobs_at_start_N
    proximal_N = torch.where(batch.proximal_logprobs_N.isfinite(), batch.proximal_logprobs_N, start_N)
    sampling_N = batch.sampling_logprobs_N
    advantage_N = batch.advantage_B[batch.row_N]
    inputs = LossInputs(trainer_N, proximal_N, sampling_N, advantage_N, batch.row_N, len(batch.advantage_B))
    weights = correct(inputs, config.correction)
    token = token_losses(inputs, config.loss)
    token_loss_N = token.loss_N
    if config.proximal == "phase":
        is_stored_N = batch.proximal_logprobs_N.isfinite()
        kl_N = weighted_k3(trainer_N, proximal_N, proximal_N)  # the correction's weight leads from there to the sampler
        token_loss_N = token_loss_N + config.offline_kl_coef * kl_N * is_stored_N
    denominator_N = batch.loss_denominator_B[batch.row_N]
    loss_N = weigh_tokens(token_loss_N, weights.weight_N, batch.loss_denominator_B, batch.row_N)
    if config.kl is not None:
        loss_N = loss_N + kl_losses(inputs, batch.reference_logprobs_N, config.kl) / denominator_N
    if config.entropy_coef:
        loss_N = loss_N - config.entropy_coef * entropy_N / num_tokens
    torch.autograd.backward(loss_N.sum())
    return TokenFacts(
        trainer_logprobs=trainer_N.detach(),
        sampling_logprobs=sampling_N,
        importance_ratios=inputs.ratio_N.detach(),
        correction_weights=weights.weight_N,
        entropies=entropy_N.detach(),
        kl_to_sampler=kl_to_sampler(trainer_N, sampling_N),
        kl_to_reference=k3(batch.reference_logprobs_N - trainer_N.detach()),
        logprob_differences=(proximal_N - sampling_N).abs(),
        losses=loss_N.detach(),
        clip_reasons=token.reasons,
        bounds=token.bounds,
        mask_reasons=weights.reasons,
    )


@torch.no_grad()
def _logprobs_at_start(model: PreTrainedModel, rows: pl.DataFrame, config: UpdateConfig) -> list[Tensor | None]:
    """Return the logprobs under the current weights of each microbatch; None where the rows' own say everything."""
    batches = (collate(batch_rows) for batch_rows in rows.partition_by("microbatch", maintain_order=True))
    return [
        None
        if bool(batch.proximal_logprobs_N.isfinite().all())
        else batch_logprobs(model, batch.to(model.device), config)[0]
        for batch in batches
    ]


def _take_step(
    model: PreTrainedModel, optimizer: Optimizer, config: UpdateConfig, rows: pl.DataFrame
) -> tuple[float, float]:
    """Change the weights; return the learning rate used and the gradient norm before clipping."""
    grad_norm = clip_gradient(model, config.max_grad_norm)
    if not math.isfinite(grad_norm):
        raise ArithmeticError(
            f"the gradient of {_named(rows)} has norm {grad_norm}: expected a finite one; lower the learning rate, or "
            "bound the correction and dual_clip, and look at these completions"
        )
    return take_step(optimizer, config), grad_norm


def _check_finite_loss(record: pl.DataFrame) -> None:
    """Raise if the loss of a completion is not finite."""
    wrong = record.filter(~pl.col("loss").is_finite())
    if wrong.height > 0:
        raise ArithmeticError(
            f"the loss of {_named(wrong)} is {wrong['loss'][0]}: expected a finite one; look at their advantages, "
            "loss_denominator and temperature, and at the weights of the policy"
        )


def _named(rows: pl.DataFrame) -> str:
    """Return the completions of these rows for a message: the first ones by id, the rest as a count."""
    shown = ", ".join(rows["completion_id"].head(8))
    return f"completions {shown}" + (f" and {rows.height - 8} more" if rows.height > 8 else "")
