"""Rows of the batches dataset as the tensors of one microbatch.

Shapes: `B` rows of a microbatch; `T` input tokens, padded on the right; `N` trainable tokens, rows laid end to end in
row order. Masked completion tokens are inputs, but they are not among the `N`: nothing downstream needs a mask.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]

LISTS = ("loss_mask", "sampling_logprobs", "proximal_logprobs", "reference_logprobs")
"""Columns with one element per completion token."""
PAD_TOKEN_ID = 0
"""Any id of the vocabulary will do: causal attention never looks at the padding on the right."""


@dataclass(frozen=True)
class MicroBatch:
    """Everything one forward and backward needs, as tensors on one device."""

    input_ids_BT: Tensor
    """Prompt and completion without the last token, which predicts nothing; int64."""
    position_N: Tensor
    """Index into the flattened [B, T] grid of the token before the target: its hidden state predicts the target."""
    target_N: Tensor
    """Token id to be predicted; int64."""
    row_N: Tensor
    """Row of the token, ascending; int64."""
    completion_token_N: Tensor
    """Index of the token among the completion tokens of all rows laid end to end, masked ones included; int64."""
    sampling_logprobs_N: Tensor
    """Logprob under the policy that sampled the token, NaN where unknown; float32."""
    proximal_logprobs_N: Tensor
    """Logprob under the proximal policy, NaN where the policy at the start of the update is meant; float32."""
    reference_logprobs_N: Tensor
    """Logprob under the reference policy, NaN where there is none; float32."""
    advantage_B: Tensor
    """float32."""
    temperature_B: Tensor
    """Sampling temperature, by which logits are divided; float32."""
    loss_denominator_B: Tensor
    """What a row's summed token losses are divided by; float32."""

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the same microbatch on another device."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def collate(rows: pl.DataFrame) -> MicroBatch:
    """Return the microbatch that holds these rows, in their order.

    Columns: prompt_token_ids, completion_token_ids, loss_mask (null = every token trains), sampling_logprobs (null, or
    NaN, = unknown; a null list = all unknown), advantage, temperature, loss_denominator, and perhaps proximal_logprobs
    and reference_logprobs, like sampling_logprobs. A row may have no trainable token: it then only takes part in the
    forward.

    Raises:
        ValueError: if a prompt is empty or the lists of a completion differ in length, naming the completion.
    """
    _check_lengths(rows)
    prompt_B = _lengths(rows, "prompt_token_ids")
    completion_B = _lengths(rows, "completion_token_ids")
    tokens = _laid_end_to_end(rows.select(pl.concat_list("prompt_token_ids", "completion_token_ids")))
    ids = tokens.cast(pl.Int64).to_numpy()
    row, place = _rows_and_places(prompt_B + completion_B)

    num_inputs = max(int((prompt_B + completion_B).max(initial=0)) - 1, 1)
    input_ids = np.full((rows.height, num_inputs), PAD_TOKEN_ID, dtype=np.int64)
    is_input = place < (prompt_B + completion_B - 1)[row]
    input_ids[row[is_input], place[is_input]] = ids[is_input]

    completion_row, completion_place = _rows_and_places(completion_B)
    completion_place += prompt_B[completion_row]
    every_token = pl.lit(True).repeat_by(pl.col("completion_token_ids").list.len())
    mask = _laid_end_to_end(rows.select(pl.coalesce("loss_mask", every_token))).fill_null(False).to_numpy()
    trained = np.flatnonzero(mask)
    is_completion = place >= prompt_B[row]
    return MicroBatch(
        input_ids_BT=torch.from_numpy(input_ids),
        position_N=torch.from_numpy(completion_row[trained] * num_inputs + completion_place[trained] - 1),
        target_N=torch.from_numpy(ids[is_completion][trained]),
        row_N=torch.from_numpy(completion_row[trained]),
        completion_token_N=torch.from_numpy(trained),
        sampling_logprobs_N=_token_floats(rows, "sampling_logprobs", trained),
        proximal_logprobs_N=_token_floats(rows, "proximal_logprobs", trained),
        reference_logprobs_N=_token_floats(rows, "reference_logprobs", trained),
        advantage_B=_float_tensor(rows["advantage"]),
        temperature_B=_float_tensor(rows["temperature"]),
        loss_denominator_B=_float_tensor(rows["loss_denominator"]),
    )


def _lengths(rows: pl.DataFrame, column: str) -> IntArray:
    """Return the length of each list of a column, shape [B]."""
    return rows[column].list.len().cast(pl.Int64).to_numpy()


def _laid_end_to_end(rows: pl.DataFrame) -> pl.Series:
    """Return the elements of the only column's lists, one list after the other; an empty list gives none."""
    return rows.to_series().explode(empty_as_null=False, keep_nulls=False)


def _token_floats(rows: pl.DataFrame, column: str, trained: IntArray) -> Tensor:
    """Return a column of lists for the trainable tokens, shape [N]; NaN where it has no number, or does not exist."""
    unknown = pl.lit(None, dtype=pl.Float32).repeat_by(pl.col("completion_token_ids").list.len())
    known = [column] if column in rows.columns else []
    return _float_tensor(_laid_end_to_end(rows.select(pl.coalesce(*known, unknown))).fill_null(np.nan).gather(trained))


def _rows_and_places(length_B: IntArray) -> tuple[IntArray, IntArray]:
    """Return, for lists of these lengths laid end to end, each element's list and its index inside the list."""
    row = np.repeat(np.arange(len(length_B)), length_B)
    first_B = np.cumsum(length_B) - length_B
    return row, np.arange(len(row)) - first_B[row]


def _float_tensor(values: pl.Series) -> Tensor:
    """Return the values as a float32 tensor with memory of its own."""
    return torch.from_numpy(values.cast(pl.Float32).to_numpy().copy())


def _check_lengths(rows: pl.DataFrame) -> None:
    """Raise for rows whose lists do not belong together: an offset by one would train on the wrong tokens."""
    length = pl.col("completion_token_ids").list.len()
    lists = [name for name in LISTS if name in rows.columns]
    is_other = pl.any_horizontal((pl.col(name).list.len() != length).fill_null(False) for name in lists)
    wrong = rows.filter((pl.col("prompt_token_ids").list.len().fill_null(0) == 0) | is_other)
    if wrong.height > 0:
        raise ValueError(
            f"completion {wrong['completion_id'][0]} (and {wrong.height - 1} more) has an empty prompt, or a list "
            f"({', '.join(lists)}) whose length is not that of its completion_token_ids: expected one element per "
            "completion token; make the batch again from completions that pass verification"
        )
