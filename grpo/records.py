"""What an update records about each completion: the rows of the training_records dataset.

Shapes: `N` trainable tokens of a microbatch, rows laid end to end; `B` rows of a microbatch. Sums and means are
float64, taken in token order on one thread, so that the same tokens always give the same bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from torch import Tensor

from grpo.collate import MicroBatch

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
FlagArray = npt.NDArray[np.bool_]
TextArray = npt.NDArray[np.str_]

RECORD_SCHEMA = pl.Schema(
    {
        "completion_id": pl.String(),
        "optimizer_step": pl.Int32(),
        "num_tokens": pl.Int32(),
        "importance_ratio_mean": pl.Float64(),
        "importance_ratio_max": pl.Float64(),
        "clipped_low_tokens": pl.Int32(),
        "clipped_high_tokens": pl.Int32(),
        "bounded_tokens": pl.Int32(),
        "correction_weight_mean": pl.Float64(),
        "masked_tokens": pl.Int32(),
        "known_tokens": pl.Int32(),
        "entropy_mean": pl.Float64(),
        "kl_to_sampler": pl.Float64(),
        "kl_to_reference": pl.Float64(),
        "logprob_difference_max": pl.Float64(),
        "loss": pl.Float64(),
        "trainer_logprobs": pl.List(pl.Float32),
        "sampling_logprobs": pl.List(pl.Float32),
        "importance_ratios": pl.List(pl.Float32),
        "correction_weights": pl.List(pl.Float32),
        "entropies": pl.List(pl.Float32),
    }
)
"""A statistic over no token is null, and so is one that needs an unknown sampling logprob."""

TOKEN_LISTS = ("trainer_logprobs", "sampling_logprobs", "importance_ratios", "correction_weights", "entropies")
"""One element per completion token, null where the token did not train; null lists unless tokens are recorded."""

TOKEN_RECORD_SCHEMA = pl.Schema(
    {
        **RECORD_SCHEMA,
        "clip_reasons": pl.List(pl.String),
        "mask_reasons": pl.List(pl.String),
        "token_losses": pl.List(pl.Float32),
    }
)
"""Schema of records with tokens. Others lack the last three columns, on which their bytes must not depend."""

FLOATS = (*TOKEN_LISTS, "kl_to_sampler", "kl_to_reference", "logprob_differences", "losses")
"""Float fields of `TokenFacts`."""

NONE = ""
"""No reason; null in the column."""


@dataclass(frozen=True)
class TokenFacts:
    """What one forward computed for the trainable tokens of a microbatch; shape [N], no gradient."""

    trainer_logprobs: Tensor
    sampling_logprobs: Tensor
    importance_ratios: Tensor
    correction_weights: Tensor
    entropies: Tensor
    kl_to_sampler: Tensor
    kl_to_reference: Tensor
    """NaN without a reference policy."""
    logprob_differences: Tensor
    """|proximal - sampler|: engine mismatch plus staleness, before this update has changed anything."""
    losses: Tensor
    """The token's share of the loss of the optimizer step."""
    clip_reasons: Mapping[str, Tensor]
    """Why a token has no gradient, from the loss: name -> bool."""
    bounds: Mapping[str, Tensor]
    """What has changed a token's gradient and left some, from the loss: name -> bool."""
    mask_reasons: Mapping[str, Tensor]
    """Why a token has weight 0, from the correction: name -> bool."""


def completion_records(rows: pl.DataFrame, batch: MicroBatch, facts: TokenFacts, *, with_tokens: bool) -> pl.DataFrame:
    """Return one row of ``RECORD_SCHEMA`` for each row of the microbatch, in order.

    With tokens the rows have ``TOKEN_RECORD_SCHEMA``, and every list has one element per completion token. The float64
    sum of ``token_losses`` in token order is ``loss``.

    ``kl_to_sampler`` and ``logprob_difference_max`` are over the trainable tokens with a known sampling logprob, which
    ``known_tokens`` counts, everything else is over all trainable tokens. ``masked_tokens`` counts those whose
    correction weight is 0.
    """
    row_N: IntArray = batch.row_N.cpu().numpy()
    token: dict[str, FloatArray] = {name: getattr(facts, name).double().cpu().numpy() for name in FLOATS}
    clips: dict[str, FlagArray] = {name: is_so_N.cpu().numpy() for name, is_so_N in facts.clip_reasons.items()}
    bounds: dict[str, FlagArray] = {name: is_so_N.cpu().numpy() for name, is_so_N in facts.bounds.items()}
    masks: dict[str, FlagArray] = {name: is_so_N.cpu().numpy() for name, is_so_N in facts.mask_reasons.items()}
    told = {**clips, **bounds}
    is_known_N = np.isfinite(token["sampling_logprobs"])
    known_row_N = row_N[is_known_N]
    nowhere_N = np.zeros(len(row_N), dtype=np.bool_)
    num_rows = rows.height

    def count(is_counted_N: Any) -> IntArray:
        return np.bincount(row_N[is_counted_N], minlength=num_rows)

    columns: dict[str, Any] = {
        "completion_id": rows["completion_id"],
        "optimizer_step": rows["optimizer_step"],
        "num_tokens": np.bincount(row_N, minlength=num_rows),
        "importance_ratio_mean": _means(token["importance_ratios"], row_N, num_rows),
        "importance_ratio_max": _maxima(token["importance_ratios"], row_N, num_rows),
        "clipped_low_tokens": count(told.get("clipped_low", nowhere_N)),
        "clipped_high_tokens": count(told.get("clipped_high", nowhere_N)),
        "bounded_tokens": count(np.any([nowhere_N, *bounds.values()], axis=0)),
        "correction_weight_mean": _means(token["correction_weights"], row_N, num_rows),
        "masked_tokens": count(token["correction_weights"] == 0),
        "known_tokens": np.bincount(known_row_N, minlength=num_rows),
        "entropy_mean": _means(token["entropies"], row_N, num_rows),
        "kl_to_sampler": _means(token["kl_to_sampler"][is_known_N], known_row_N, num_rows),
        "kl_to_reference": _means(token["kl_to_reference"], row_N, num_rows).fill_nan(None),
        "logprob_difference_max": _maxima(token["logprob_differences"][is_known_N], known_row_N, num_rows),
        "loss": np.bincount(row_N, token["losses"], minlength=num_rows),
    }
    completion_B: IntArray = rows["completion_token_ids"].list.len().cast(pl.Int64).to_numpy()
    place_N: IntArray = batch.completion_token_N.cpu().numpy()
    for name in TOKEN_LISTS:
        columns[name] = as_lists(token[name], place_N, completion_B) if with_tokens else [None] * num_rows
    if not with_tokens:
        return pl.DataFrame(columns).cast(RECORD_SCHEMA)
    columns["clip_reasons"] = _as_texts(_first(told, len(row_N)), NONE, place_N, completion_B)
    columns["mask_reasons"] = _as_texts(_first(masks, len(row_N)), "loss_mask", place_N, completion_B)
    columns["token_losses"] = as_lists(token["losses"], place_N, completion_B)
    return pl.DataFrame(columns).cast(TOKEN_RECORD_SCHEMA)


def _first(reasons: Mapping[str, FlagArray], num_tokens: int) -> TextArray:
    """Return the first reason that applies to each token, `NONE` where none does."""
    if not reasons:
        return np.full(num_tokens, NONE)
    return np.select(list(reasons.values()), list(reasons), default=NONE)


def _means(x_N: FloatArray, row_N: IntArray, num_rows: int) -> pl.Series:
    """Return the mean over each row's tokens, null for a row without any."""
    count_B = np.bincount(row_N, minlength=num_rows)
    mean_B = np.bincount(row_N, x_N, minlength=num_rows) / np.maximum(count_B, 1)
    return _null_without_tokens(mean_B, count_B)


def _maxima(x_N: FloatArray, row_N: IntArray, num_rows: int) -> pl.Series:
    """Return the maximum over each row's tokens, null for a row without any."""
    maximum_B = np.full(num_rows, -np.inf)
    np.maximum.at(maximum_B, row_N, x_N)
    return _null_without_tokens(maximum_B, np.bincount(row_N, minlength=num_rows))


def _null_without_tokens(x_B: FloatArray, count_B: IntArray) -> pl.Series:
    """Return the values as a series, null where the count is 0."""
    return pl.Series(x_B).set(pl.Series(count_B == 0), None)


def as_lists(x_N: FloatArray, place_N: IntArray, completion_B: IntArray) -> pl.Series:
    """Return one list per row, as long as the completion, null for a token that does not train."""
    every = np.full(int(completion_B.sum()), np.nan, dtype=np.float32)
    every[place_N] = x_N
    return _cut(pl.Series(every).fill_nan(None), completion_B)


def _as_texts(text_N: TextArray, untrained: str, place_N: IntArray, completion_B: IntArray) -> pl.Series:
    """Return one list per row, as long as the completion, ``untrained`` for a token that does not train."""
    every = np.full(int(completion_B.sum()), untrained, dtype=object)
    every[place_N] = text_N
    texts = pl.Series(every.tolist(), dtype=pl.String)
    return _cut(texts.set(texts == NONE, None), completion_B)


def _cut(every: pl.Series, completion_B: IntArray) -> pl.Series:
    """Return the elements of all completions, laid end to end, as one list per row."""
    rows = pl.DataFrame({"row": np.arange(len(completion_B))})
    lists = (
        pl.DataFrame({"row": np.repeat(np.arange(len(completion_B)), completion_B), "x": every})
        .group_by("row", maintain_order=True)
        .agg("x")
    )
    joined = rows.join(lists, on="row", how="left", maintain_order="left")
    return joined["x"].fill_null(pl.Series([[]], dtype=pl.List(every.dtype)))
