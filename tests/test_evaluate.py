"""Evaluation: what counts as correct, and the estimates over it."""

from typing import Any

import polars as pl
import pytest

from stages.evaluate import pass_at_k, summarize


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (4, 1, 1, 0.25),
        (4, 4, 2, 1.0),
        (4, 0, 4, 0.0),
        (4, 1, 4, 1.0),
        # 1 - C(3, 2) / C(5, 2) = 1 - 3 / 10
        (5, 2, 2, 0.7),
    ],
)
def test_pass_at_k_is_the_chance_that_one_of_k_draws_without_replacement_is_correct(
    n: int, c: int, k: int, expected: float
) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected)


def answers(decoding: str, **groups: list[bool | None]) -> list[dict[str, Any]]:
    return [{"decoding": decoding, "group_id": g, "is_correct": c} for g, cs in groups.items() for c in cs]


def test_greedy_and_sampled_answers_are_told_apart() -> None:
    rows = answers("greedy", a=[True], b=[False]) + answers("sampled", a=[True, False, False], b=[False, False, False])
    assert summarize(pl.DataFrame(rows)) == {
        "eval_pass_at_1": 0.5,
        "eval_pass_rate": pytest.approx(1 / 6),
        "eval_pass_at_k": 0.5,
    }


def test_an_unscored_answer_counts_neither_way() -> None:
    rows = answers("greedy", a=[True], b=[None]) + answers("sampled", a=[True], b=[None])
    assert summarize(pl.DataFrame(rows))["eval_pass_at_1"] == 1.0
