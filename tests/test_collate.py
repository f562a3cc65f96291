"""Tests of grpo.collate: rows as tensors, and the cut into microbatches."""

from itertools import pairwise
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.batching import cut_microbatches
from grpo.collate import collate
from tests.builders import fill


def batch_rows(*rows: dict[str, Any]) -> pl.DataFrame:
    """Return rows of the batches dataset with defaults for what a test does not say."""
    given = [{"completion_id": f"c{i}", **row} for i, row in enumerate(rows)]
    return fill("batches", given, prompt_token_ids=[1], advantage=1.0, temperature=1.0, loss_denominator=10.0)


def test_the_token_before_a_target_predicts_it() -> None:
    batch = collate(
        batch_rows(
            {"prompt_token_ids": [11, 12], "completion_token_ids": [13, 14, 15]},
            {"prompt_token_ids": [21], "completion_token_ids": [22]},
        )
    )
    # The last token of the longest row predicts nothing, so it is no input.
    assert batch.input_ids_BT.tolist() == [[11, 12, 13, 14], [21, 0, 0, 0]]
    assert batch.target_N.tolist() == [13, 14, 15, 22]
    assert batch.input_ids_BT.flatten()[batch.position_N].tolist() == [12, 13, 14, 21]
    assert batch.row_N.tolist() == [0, 0, 0, 1]
    assert batch.completion_token_N.tolist() == [0, 1, 2, 3]


def test_a_masked_token_is_an_input_but_not_a_target() -> None:
    rows = batch_rows(
        {"completion_token_ids": [2, 3, 4], "loss_mask": [True, False, True], "sampling_logprobs": [-1.0, None, -3.0]},
        {"completion_token_ids": [5], "loss_mask": [False], "sampling_logprobs": [float("nan")]},
        {"completion_token_ids": [6], "sampling_logprobs": [-6.0]},
    )
    batch = collate(rows)
    assert batch.input_ids_BT.tolist() == [[1, 2, 3], [1, 0, 0], [1, 0, 0]]
    assert batch.target_N.tolist() == [2, 4, 6]
    assert batch.sampling_logprobs_N.tolist() == [-1.0, -3.0, -6.0]
    assert batch.row_N.tolist() == [0, 0, 2]
    assert batch.completion_token_N.tolist() == [0, 2, 4]


def test_an_unknown_sampling_logprob_is_nan() -> None:
    batch = collate(
        batch_rows({"completion_token_ids": [2, 3], "sampling_logprobs": [None, -1.0]}, {"completion_token_ids": [4]})
    )
    assert batch.sampling_logprobs_N.isnan().tolist() == [True, False, True]


def test_numbers_of_a_row_stay_with_their_row() -> None:
    batch = collate(
        batch_rows(
            {"completion_token_ids": [2], "advantage": 0.5, "temperature": 0.75, "loss_denominator": 4.0},
            {"completion_token_ids": [3], "advantage": -2.0, "temperature": 1.0, "loss_denominator": 8.0},
        )
    )
    assert batch.advantage_B.tolist() == [0.5, -2.0]
    assert batch.temperature_B.tolist() == [0.75, 1.0]
    assert batch.loss_denominator_B.tolist() == [4.0, 8.0]


def test_a_row_without_completion_has_no_target() -> None:
    batch = collate(batch_rows({"prompt_token_ids": [1, 2], "completion_token_ids": []}, {"completion_token_ids": [3]}))
    assert batch.input_ids_BT.tolist() == [[1], [1]]
    assert batch.row_N.tolist() == [1]


@pytest.mark.parametrize(
    "row",
    [
        {"completion_token_ids": [2, 3], "loss_mask": [True]},
        {"completion_token_ids": [2, 3], "sampling_logprobs": [-1.0, -1.0, -1.0]},
        {"completion_token_ids": [2], "prompt_token_ids": []},
        {"completion_token_ids": [2], "prompt_token_ids": None},
    ],
)
def test_lists_that_do_not_belong_together_are_refused_by_id(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"completion c1 .*expected"):
        collate(batch_rows({"completion_token_ids": [9]}, row))


def test_a_microbatch_holds_what_the_budget_of_padded_tokens_allows() -> None:
    assert cut_microbatches([2, 2, 2, 3, 3, 9, 9], budget=6) == [0, 0, 0, 1, 1, 2, 3]


def test_no_rows_give_no_microbatch() -> None:
    assert cut_microbatches([], budget=6) == []


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"budget .* is 0 tokens: expected"):
        cut_microbatches([1], budget=0)


@given(lengths=st.lists(st.integers(1, 40), max_size=30), budget=st.integers(1, 100))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_microbatches_are_contiguous_within_budget_and_as_full_as_can_be(lengths: list[int], budget: int) -> None:
    indices = cut_microbatches(sorted(lengths), budget)
    assert sorted(set(indices)) == list(range(len(set(indices))))
    assert indices == sorted(indices)
    parts = [[n for n, i in zip(sorted(lengths), indices, strict=True) if i == index] for index in sorted(set(indices))]
    assert all(len(part) == 1 or len(part) * max(part) <= budget for part in parts)
    assert all((len(part) + 1) * following[0] > budget for part, following in pairwise(parts))
