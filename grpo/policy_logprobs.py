"""Logprobs of rows under a policy: those of one microbatch with gradient, those of a whole frame without."""

from collections.abc import Callable

import numpy as np
import polars as pl
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.collate import MicroBatch, collate
from grpo.logprobs import token_logprobs
from grpo.records import as_lists
from grpo.settings import ForwardConfig


def batch_logprobs(model: PreTrainedModel, batch: MicroBatch, config: ForwardConfig) -> tuple[Tensor, Tensor]:
    """Return logprobs and entropies of the trainable tokens of a microbatch, shape [N] each."""
    return token_logprobs(
        model,
        batch.input_ids_BT,
        batch.position_N,
        batch.target_N,
        batch.temperature_B[batch.row_N],
        chunk_tokens=config.head_chunk_tokens,
        autocast_bf16=config.autocast_bf16,
    )


@torch.no_grad()
def frame_logprobs(
    model: PreTrainedModel,
    frame: pl.DataFrame,
    config: ForwardConfig,
    on_microbatch: Callable[[int, int], None] | None = None,
) -> pl.DataFrame:
    """Return completion_id and logprobs (one element per completion token, null where it does not train).

    ``frame`` holds rows as `train_on_batches` takes them; of a completion that trains in several epochs the first row
    counts. ``on_microbatch(optimizer_step, microbatch)`` is called after each forward.

    Raises:
        ArithmeticError: if a logprob is not finite, naming the completion.
    """
    found = [pl.DataFrame(schema={"completion_id": pl.String, "logprobs": pl.List(pl.Float32)})]
    once = frame.filter(pl.col("completion_id").is_first_distinct())
    for rows in once.partition_by("optimizer_step", "microbatch", maintain_order=True) if once.height else []:
        batch = collate(rows)
        logprobs_N = batch_logprobs(model, batch.to(model.device), config)[0].double().cpu().numpy()
        lengths = rows["completion_token_ids"].list.len().cast(pl.Int64).to_numpy()
        if len(odd := batch.row_N.numpy()[~np.isfinite(logprobs_N)]):
            name = rows["completion_id"][int(odd[0])]
            raise ArithmeticError(
                f"completion {name} has a logprob that is not finite: expected finite ones; look at its temperature, "
                "and at the weights of the policy"
            )
        lists = as_lists(logprobs_N, batch.completion_token_N.numpy(), lengths)
        found.append(rows.select("completion_id").with_columns(logprobs=lists))
        if on_microbatch is not None:
            on_microbatch(rows["optimizer_step"][0], rows["microbatch"][0])
    return pl.concat(found)
