"""Tests of grpo.aggregation: the denominators that make one mean or another of the token losses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grpo.aggregation import AGGREGATIONS, StepRows
from grpo.losses.base import weigh_tokens

LOSSES: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "grpo_vectors.json").read_text())["losses"]
FIXTURE: dict[str, Any] = LOSSES["fixture"]
MASK = torch.tensor(FIXTURE["mask"], dtype=torch.bool)
TOKENS = np.array([5, 3, 2, 0])
PROMPTS = np.array([0, 0, 1, 1])


def mean_loss(aggregation: str, variant: str, num_rows: int) -> float:
    """Return the loss of the fixture's first rows; the fourth one has no token that trains."""
    token_losses = LOSSES["variants"][variant]["per_token_loss_valid_else_0"]
    loss_N = torch.tensor(token_losses, dtype=torch.float64)[MASK]
    rows = StepRows(TOKENS[:num_rows], PROMPTS[:num_rows], constant=FIXTURE["L_max"])
    denominator_B = torch.from_numpy(np.asarray(AGGREGATIONS[aggregation](rows), dtype=np.float64))
    return float(weigh_tokens(loss_N, torch.ones_like(loss_N), denominator_B, MASK.nonzero()[:, 0]).sum())


@pytest.mark.parametrize("variant", ["ppo_clip_sym", "ppo_clip_higher", "ppo_dual_clip", "ratio_pg_no_clip"])
@pytest.mark.parametrize(
    ("aggregation", "num_rows", "mode"),
    [
        ("token_mean", 3, "token_mean"),
        ("row_mean", 3, "seq_mean_token_mean_active"),
        ("row_mean", 4, "seq_mean_token_mean_all"),
        ("constant_length", 4, "dr_grpo"),
        ("prompt_mean", 3, "prompt_mean"),
        ("prompt_mean", 4, "prompt_mean"),
    ],
)
def test_means_equal_the_golden_values(aggregation: str, num_rows: int, mode: str, variant: str) -> None:
    expected = LOSSES["variants"][variant]["scalar"][mode]
    assert mean_loss(aggregation, variant, num_rows) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", [16.0, 16.0, 16.0]),  # 10 + 6 tokens
        ("row_mean", [25.0, 15.0, 10.0]),  # 3 + 2 rows
        ("constant_length", [40.0, 40.0, 40.0]),  # 5 rows of 8
        ("prompt_mean", [24.0, 24.0, 6.0]),  # 2 + 1 prompts, of 8, 8 and 2 tokens
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
