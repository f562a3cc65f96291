"""Tests of grpo.aggregation: the denominators that make one mean or another of the token losses."""

import numpy as np
import pytest

from grpo.aggregation import AGGREGATIONS, StepRows
from tests.vectors import PROMPT, ROW_TOKENS

TOKENS, PROMPTS = ROW_TOKENS.numpy(), PROMPT.numpy()


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", [16.0, 16.0, 16.0]),  # 10 + 6 tokens
        ("row_mean", [25.0, 15.0, 10.0]),  # 3 + 2 rows
        ("row_sum", [5.0, 5.0, 5.0]),
        ("constant_length", [40.0, 40.0, 40.0]),  # 5 rows of 8
        ("prompt_mean", [24.0, 24.0, 6.0]),  # 2 + 1 prompts, of 8, 8 and 2 tokens
        ("token_sum", [1.0, 1.0, 1.0]),
    ],
)
def test_rows_that_tell_nothing_can_count_in_every_mean(aggregation: str, expected: list[float]) -> None:
    rows = StepRows(TOKENS[:3], PROMPTS[:3], constant=8, extra_tokens=6.0, extra_rows=2.0, extra_prompts=1.0)
    assert list(AGGREGATIONS[aggregation](rows)) == expected


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_rows_that_tell_nothing_shrink_a_mean_as_losses_of_0_would(aggregation: str) -> None:
    """With all rows of one length, so that it does not matter which of them are 0."""
    tokens, prompts = np.array([4, 4, 4, 4]), np.array([0, 0, 1, 1])
    kept = StepRows(tokens[:2], prompts[:2], constant=8, extra_tokens=8.0, extra_rows=2.0, extra_prompts=1.0)
    whole = StepRows(tokens, prompts, constant=8)
    assert list(AGGREGATIONS[aggregation](kept)) == list(AGGREGATIONS[aggregation](whole))[:2]


def test_constant_length_without_a_constant_is_refused() -> None:
    with pytest.raises(ValueError, match="has no constant: expected the tokens to divide by; set it"):
        AGGREGATIONS["constant_length"](StepRows(TOKENS, PROMPTS))
