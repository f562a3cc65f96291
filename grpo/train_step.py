"""The update: rows of the batches dataset in, changed weights and a record of every completion out.

Shapes: `N` trainable tokens of a microbatch, rows laid end to end; `B` rows of a microbatch; `T` input tokens, padded.

Three policies meet here. The current one is being trained. The proximal one is the weights at the start of the call;
the clip acts on current / proximal. The sampler wrote the tokens; the constant weight proximal / sampler corrects for
it, outside of the clip (decoupled PPO, arXiv:2110.00641). Nothing here is random.
"""

import math
from collections.abc import Callable

import polars as pl
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.aggregation import weigh_tokens
from grpo.collate import MicroBatch, collate
from grpo.correction import Correction, correction_weights
from grpo.kl import kl_to_sampler
from grpo.logprobs import token_logprobs
from grpo.losses.base import importance_ratio
from grpo.losses.clip import clip_masks, clipped_surrogate
from grpo.optimizer import Optimizer, learning_rate_at
from grpo.records import RECORD_SCHEMA, TOKEN_RECORD_SCHEMA, TokenFacts, completion_records
from grpo.settings import UpdateSettings

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
    settings: UpdateSettings,
    on_microbatch: Callable[[int, int], None] | None = None,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Train in place; return the records of the completions (``RECORD_SCHEMA``) and the steps (``STEP_SCHEMA``).

    With ``record_tokens`` the records are of ``TOKEN_RECORD_SCHEMA``; weights and all other numbers stay the same.

    ``frame`` holds the rows in training order with the columns that ``collate`` needs, and optimizer_step, microbatch
    and completion_id. An optimizer step is one gradient: the sum over its microbatches, each divided by the rows'
    ``loss_denominator``, so how rows are cut into microbatches changes nothing but rounding.

    The proximal logprobs of the first optimizer step are the current ones, detached: no forward is spent on them.
    Later steps get theirs from a forward before the first step. ``on_microbatch(optimizer_step, microbatch)`` is
    called after each microbatch.

    Raises:
        ArithmeticError: if a loss or a gradient is not finite, naming the completions; the weights of that step are
            not changed.
    """
    steps = frame.partition_by("optimizer_step", maintain_order=True) if frame.height > 0 else []
    proximal = [[], *(_proximal_logprobs(model, rows, settings) for rows in steps[1:])]
    schema = TOKEN_RECORD_SCHEMA if settings.record_tokens else RECORD_SCHEMA
    records, step_rows = [pl.DataFrame(schema=schema)], []
    for index, rows in enumerate(steps):
        optimizer.adamw.zero_grad(set_to_none=True)
        step_records = []
        for microbatch, batch_rows in enumerate(rows.partition_by("microbatch", maintain_order=True)):
            batch = collate(batch_rows).to(model.device)
            facts = _accumulate_gradient(model, batch, proximal[index][microbatch] if index > 0 else None, settings)
            record = completion_records(batch_rows, batch, facts, with_tokens=settings.record_tokens)
            _check_finite_loss(record)
            step_records.append(record)
            if on_microbatch is not None:
                on_microbatch(batch_rows["optimizer_step"][0], batch_rows["microbatch"][0])
        learning_rate, grad_norm = _take_step(model, optimizer, settings, rows)
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
    model: PreTrainedModel, batch: MicroBatch, proximal_logprobs_N: Tensor | None, settings: UpdateSettings
) -> TokenFacts:
    """Add the gradient of one microbatch to the parameters; return what the forward found out."""
    trainer_N, entropy_N = _logprobs(model, batch, settings)
    proximal_N = trainer_N.detach() if proximal_logprobs_N is None else proximal_logprobs_N
    sampling_N = batch.sampling_logprobs_N
    advantage_N = batch.advantage_B[batch.row_N]
    weight_N = correction_weights(proximal_N, sampling_N, batch.row_N, len(batch.advantage_B), settings.correction)
    ratio_N = importance_ratio(trainer_N, proximal_N)
    surrogate_N = clipped_surrogate(
        ratio_N,
        advantage_N,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
    )
    loss_N = weigh_tokens(surrogate_N, weight_N, batch.loss_denominator_B, batch.row_N)
    torch.autograd.backward(loss_N.sum())
    ratio_N = ratio_N.detach()
    low_N, high_N = clip_masks(ratio_N, advantage_N, clip_low=settings.clip_low, clip_high=settings.clip_high)
    return TokenFacts(
        trainer_logprobs=trainer_N.detach(),
        sampling_logprobs=sampling_N,
        importance_ratios=ratio_N,
        correction_weights=weight_N,
        entropies=entropy_N,
        kl_to_sampler=kl_to_sampler(trainer_N, sampling_N),
        logprob_differences=(proximal_N - sampling_N).abs(),
        is_clipped_low=low_N,
        is_clipped_high=high_N,
        losses=loss_N.detach(),
        is_dual_clipped=_dual_clipped(ratio_N, advantage_N, settings) if settings.record_tokens else None,
        is_vetoed=_vetoed(proximal_N, batch, settings.correction) if settings.record_tokens else None,
    )


def _dual_clipped(ratio_N: Tensor, advantage_N: Tensor, settings: UpdateSettings) -> Tensor:
    """Return which tokens have another loss with ``dual_clip`` than without, shape [N]."""
    with_N, without_N = (
        clipped_surrogate(
            ratio_N, advantage_N, clip_low=settings.clip_low, clip_high=settings.clip_high, dual_clip=bound
        )
        for bound in (settings.dual_clip, None)
    )
    return with_N != without_N


def _vetoed(proximal_N: Tensor, batch: MicroBatch, correction: Correction) -> Tensor:
    """Return the tokens of vetoed rows, shape [N]: those that a correction of nothing but vetoes gives weight 0."""
    vetoes = Correction("none", veto_low=correction.veto_low, veto_high=correction.veto_high, unknown="on_policy")
    weight_N = correction_weights(proximal_N, batch.sampling_logprobs_N, batch.row_N, len(batch.advantage_B), vetoes)
    return weight_N == 0


def _logprobs(model: PreTrainedModel, batch: MicroBatch, settings: UpdateSettings) -> tuple[Tensor, Tensor]:
    """Return logprobs and entropies of the trainable tokens, shape [N] each."""
    return token_logprobs(
        model,
        batch.input_ids_BT,
        batch.position_N,
        batch.target_N,
        batch.temperature_B[batch.row_N],
        chunk_tokens=settings.head_chunk_tokens,
        autocast_bf16=settings.autocast_bf16,
    )


@torch.no_grad()
def _proximal_logprobs(model: PreTrainedModel, rows: pl.DataFrame, settings: UpdateSettings) -> list[Tensor]:
    """Return the logprobs under the weights as they are, one tensor per microbatch."""
    batches = (collate(batch_rows) for batch_rows in rows.partition_by("microbatch", maintain_order=True))
    return [_logprobs(model, batch.to(model.device), settings)[0] for batch in batches]


def _take_step(
    model: PreTrainedModel, optimizer: Optimizer, settings: UpdateSettings, rows: pl.DataFrame
) -> tuple[float, float]:
    """Change the weights; return the learning rate used and the gradient norm before clipping."""
    limit = math.inf if settings.max_grad_norm is None else settings.max_grad_norm
    grad_norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
    if not math.isfinite(grad_norm):
        raise ArithmeticError(
            f"the gradient of {_named(rows)} has norm {grad_norm}: expected a finite one; lower the learning rate, or "
            "bound the correction and dual_clip, and look at these completions"
        )
    learning_rate = learning_rate_at(optimizer.num_steps, settings)
    for group in optimizer.adamw.param_groups:
        group["lr"] = learning_rate
    optimizer.adamw.step()
    optimizer.num_steps += 1
    return learning_rate, grad_norm


def _check_finite_loss(record: pl.DataFrame) -> None:
    """Raise if the loss of a completion is not finite."""
    wrong = record.filter(~pl.col("loss").is_finite())
    if wrong.height > 0:
        raise ArithmeticError(
            f"the loss of {_named(wrong)} is {wrong['loss'][0]}: expected a finite one; look at their advantages, "
            "loss_denominator and temperature, and at the weights of the policy"
        )


def _named(rows: pl.DataFrame) -> str:
    """Return the completions of these rows for a message: the first ones by id, the others by number."""
    shown = ", ".join(rows["completion_id"].head(8))
    return f"completions {shown}" + (f" and {rows.height - 8} more" if rows.height > 8 else "")
