"""Rows before training: trainable tokens, logprobs, and the cut into microbatches. No torch: the order becomes data
long before a forward.
"""

from collections.abc import Sequence

import polars as pl


def loss_tokens() -> pl.Expr:
    """Return the number of trainable tokens of each row of completions or batches."""
    masked = pl.col("loss_mask").list.eval(pl.element().cast(pl.Int32)).list.sum()
    return pl.when(pl.col("loss_mask").is_null()).then(pl.col("completion_token_ids").list.len()).otherwise(masked)


def known_tokens() -> pl.Expr:
    """Return the number of trainable tokens of each row of batches whose sampling logprob is known."""
    every = pl.lit(True).repeat_by(pl.col("completion_token_ids").list.len())
    mask = pl.coalesce("loss_mask", every).list.eval(pl.element().fill_null(False).cast(pl.Int32))
    known = pl.col("sampling_logprobs").list.eval(pl.element().is_finite().fill_null(False).cast(pl.Int32))
    return (mask * known).list.sum().fill_null(0)


def full_vocabulary_logprobs(*, has_kept_mass: bool) -> pl.Expr:
    """Return the sampling logprobs of completions without the renormalization of truncated sampling.

    The trainer's ratios then compare like with like. ``has_kept_mass`` says whether any row has a kept_mass.
    """
    logprobs, mass = pl.col("sampling_logprobs"), pl.col("kept_mass")
    if not has_kept_mass:
        return logprobs
    return pl.when(mass.is_null()).then(logprobs).otherwise(logprobs + mass.list.eval(pl.element().log()))


def cut_microbatches(lengths: Sequence[int], budget: int) -> list[int]:
    """Return the microbatch index of each row, ascending from 0, for rows in the order given.

    A microbatch takes the next row as long as rows x longest length stays within ``budget``, its padded tokens. A row
    longer than the budget gets a microbatch of its own. Sort by length first, to pad little.

    Raises:
        ValueError: if the budget is not positive.
    """
    if budget < 1:
        raise ValueError(f"the budget of a microbatch is {budget} tokens: expected at least 1; raise it")
    indices = []
    index, num_rows, longest = 0, 0, 0
    for length in lengths:
        longest = max(longest, length)
        if num_rows > 0 and (num_rows + 1) * longest > budget:
            index, num_rows, longest = index + 1, 0, length
        num_rows += 1
        indices.append(index)
    return indices
