"""Evaluation: what counts as correct, and the estimates over it."""

from typing import Any

import polars as pl
import pytest

from stages.evaluate import summarize


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
    assert summarize(pl.DataFrame(rows)) == {"eval_pass_at_1": 1.0, "eval_pass_rate": 1.0, "eval_pass_at_k": 1.0}
