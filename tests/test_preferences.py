"""Preferences: the shapes of their files, what is left out and why, the replay of older ones."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.errors import SourceError
from stages.reward_model.preferences import draw_replay, read_preferences, without_duplicates
from tests.preferences import jsonl, store_run


def read(*files: str, runs: tuple[str, ...] = (), held_out_share: float = 0.0) -> list[dict[str, Any]]:
    return read_preferences(files, runs, source="new", default_margin=0.5, held_out_share=held_out_share).rows


def test_texts_of_several_shapes_are_the_same_preference(tmp_path: Path) -> None:
    question, yes, no = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "y"), ("assistant", "n")))
    shapes = [
        {"prompt": "q", "chosen": "y", "rejected": "n"},
        {"prompt": [question], "chosen": [yes], "rejected": [no]},
        {"messages": [question], "chosen": "y", "rejected": "n"},
        {"chosen": [question, yes], "rejected": [question, no]},
    ]
    rows = [read(jsonl(tmp_path / f"{i}.jsonl", shape))[0] for i, shape in enumerate(shapes)]
    assert {row["preference_id"] for row in rows} == {rows[0]["preference_id"]}
    assert [row["messages"] for row in rows] == [[question]] * 4
    assert [(row["chosen"], row["rejected"], row["margin"]) for row in rows] == [("y", "n", 0.5)] * 4


def test_ids_are_joined_to_stored_completions(tmp_path: Path) -> None:
    run = store_run(tmp_path / "run")
    rows = jsonl(tmp_path / "p.jsonl", {"chosen_id": "c1", "rejected_id": "c0", "margin": 2, "rater": "ann"})
    found = read_preferences([rows], [run], source="new", default_margin=0.0, held_out_share=0.0)
    [row] = found.rows
    assert (row["chosen"], row["rejected"], row["margin"], row["rater"]) == ("blue", "red", 2.0, "ann")
    assert row["messages"] == [{"role": "user", "content": "the sky"}]
    assert [name.partition(":")[0] for name in found.completions] == ["completions", "prompts"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen_id": "c1", "rejected_id": "zz"}, r"names the completions \['zz'\]"),
        ({"chosen_id": "c1", "rejected_id": "c2"}, "different questions"),
        ({"better": "c1"}, "expected chosen_id and rejected_id"),
        (
            {"prompt": "q", "chosen": [{"role": "a"}], "rejected": "n"},
            "in the column chosen: expected a list of objects with a role",
        ),
        ({"chosen": "y", "rejected": "n"}, "add a column prompt"),
        ({"prompt": "q", "chosen": "y", "rejected": "n", "margin": "big"}, "the margin 'big'"),
        ({"prompt": "q", "chosen": "y", "rejected": "n", "margin": [1]}, r"the margin \[1\]|the margin \[1.0\]"),
        ({"prompt": "q", "chosen": "y", "rejected": "n", "rater": ["ann"]}, r"has \['ann'\] in the column rater"),
        (
            {"prompt": [{"role": "user", "content": "q", "tool_calls": ["f"]}], "chosen": "y", "rejected": "n"},
            "a turn with tool_calls",
        ),
    ],
)
def test_a_row_that_says_nothing_clear_is_refused(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(SourceError, match=said) as found:
        read(jsonl(tmp_path / "p.jsonl", row), runs=(store_run(tmp_path / "run"),))
    assert "row 1 of" in str(found.value)


def test_rows_without_use_say_why(tmp_path: Path) -> None:
    file = jsonl(
        tmp_path / "p.jsonl",
        {"prompt": "q", "chosen": "y", "rejected": "n", "is_tie": False},
        {"prompt": "q", "chosen": "y", "rejected": "y", "is_tie": False},
        {"prompt": "q", "chosen": "y", "rejected": "n", "is_tie": True},
        {"prompt": "q", "chosen": "y", "rejected": "n", "is_tie": False},
    )
    assert [row["drop_reason"] for row in without_duplicates(read(file))] == [None, "equal", "tie", "duplicate"]


def test_the_same_choice_of_two_raters_counts_twice(tmp_path: Path) -> None:
    rows = ({"prompt": "q", "chosen": "y", "rejected": "n", "rater": rater} for rater in ("ann", "bob"))
    assert [r["drop_reason"] for r in without_duplicates(read(jsonl(tmp_path / "p.jsonl", *rows)))] == [None, None]


def test_a_question_is_held_out_with_all_its_preferences(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i % 50}", "chosen": f"y{i}", "rejected": "n"} for i in range(200)]
    found = pl.DataFrame(read(jsonl(tmp_path / "p.jsonl", *rows), held_out_share=0.3))
    held = pl.col("drop_reason").eq_missing("held_out")
    shares = found.group_by("messages").agg(held.mean())["drop_reason"].to_list()
    assert set(shares) == {0.0, 1.0}
    assert 0.1 < sum(shares) / 50 < 0.5


def test_a_replay_draws_the_nearest_number_of_older_rows_whatever_their_order() -> None:
    older = [
        {"preference_id": f"p{i}", "source": "older", "drop_reason": "held_out" if i < 5 else None} for i in range(40)
    ]
    new = [{"preference_id": "n", "source": "new", "drop_reason": None}]
    rows = draw_replay([*new, *older], share=0.1, seed=0)
    drawn = {r["preference_id"] for r in rows if r["drop_reason"] is None}
    assert len(drawn) == 1 + 4  # 3.5 of 35, rounded up
    assert [r["drop_reason"] for r in rows].count("held_out") == 5
    assert {r["preference_id"] for r in draw_replay(older[::-1] + new, 0.1, 0) if r["drop_reason"] is None} == drawn
    assert {r["preference_id"] for r in draw_replay(older + new, 0.1, 1) if r["drop_reason"] is None} != drawn


def test_a_margin_that_pandas_left_out_is_the_default(tmp_path: Path) -> None:
    file = tmp_path / "p.parquet"
    pl.DataFrame({"prompt": "q", "chosen": "y", "rejected": "n", "margin": [float("nan")]}).write_parquet(file)
    assert [row["margin"] for row in read(str(file))] == [0.5]
