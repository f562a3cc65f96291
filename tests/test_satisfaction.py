"""Rewards from what people said: ratings and preferences, joined by completion_id."""

import json
import math
from pathlib import Path

import polars as pl
import pytest

from pipeline.errors import RewardError
from stages.rewards.answers.ratings import (
    bradley_terry,
    preference,
    preference_identity,
    rating,
    rating_identity,
)
from tests.preferences import jsonl


def answers(*ids: str, **groups: str) -> pl.DataFrame:
    """Return answers of the group g, or of the given one."""
    return pl.DataFrame({"completion_id": ids, "group_id": [groups.get(i, "g") for i in ids]})


def wins(path: Path, *pairs: tuple[str, str]) -> str:
    return jsonl(path, *({"chosen_id": a, "rejected_id": b} for a, b in pairs))


RATINGS = [
    {"completion_id": "a", "rater": "ann", "rating": 5},
    {"completion_id": "a", "rater": "bob", "rating": 2},
    {"completion_id": "b", "rater": "ann", "rating": None},
    {"completion_id": "c", "rater": "bob", "rating": 1},
]


# ratings


def test_a_rating_is_the_mean_over_raters_and_null_where_nobody_rated(tmp_path: Path) -> None:
    found = rating(answers("a", "b", "c", "d"), jsonl(tmp_path / "r.jsonl", *RATINGS))
    assert found["reward"].to_list() == [3.5, None, 1.0, None]
    assert found["error"].to_list() == [None, "nobody rated this answer", None, "nobody rated this answer"]


def test_the_detail_names_the_raters(tmp_path: Path) -> None:
    found = rating(answers("a"), jsonl(tmp_path / "r.jsonl", *RATINGS))
    ratings = [{"rater": "ann", "rating": 5.0}, {"rater": "bob", "rating": 2.0}]
    assert json.loads(found["detail"][0]) == {"mean": 3.5, "ratings": ratings}


def test_a_scale_maps_ratings_to_0_to_1(tmp_path: Path) -> None:
    found = rating(answers("a", "c"), jsonl(tmp_path / "r.jsonl", *RATINGS), lowest=1, highest=5)
    assert found["reward"].to_list() == [0.625, 0.0]  # (3.5 - 1) / 4


def test_who_rates_twice_counts_once(tmp_path: Path) -> None:
    rows = [("ann", 1), ("ann", 3), ("bob", 5), (None, 5), (None, 5)]
    file = jsonl(tmp_path / "r.jsonl", *({"completion_id": "a", "rater": r, "rating": v} for r, v in rows))
    assert rating(answers("a"), file)["reward"].to_list() == [4.25]  # ann 2, bob 5, two unknown 5


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_file_format_gives_the_same_ratings(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"r{suffix}"
    frame = pl.DataFrame(RATINGS)
    {".jsonl": frame.write_ndjson, ".csv": frame.write_csv, ".parquet": frame.write_parquet}[suffix](path)
    assert rating(answers("a", "b", "c"), str(path))["reward"].to_list() == [3.5, None, 1.0]


def test_numeric_ids_and_thumbs_are_read(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("completion_id,rating\n007,true\n7,False\n", encoding="utf-8")
    assert rating(answers("007", "7"), str(tmp_path / "r.csv"))["reward"].to_list() == [1.0, 0.0]
    file = jsonl(tmp_path / "r.jsonl", {"completion_id": "a", "rating": True}, {"completion_id": "b", "rating": False})
    assert rating(answers("a", "b"), file)["reward"].to_list() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("value", "said"), [("good", "with 'good': expected a number"), ("nan", "number"), ("6", "with 6: expected 1 to 5")]
)
def test_a_rating_off_the_scale_is_refused(tmp_path: Path, value: str, said: str) -> None:
    (tmp_path / "r.csv").write_text(f"completion_id,rating\na,{value}\n", encoding="utf-8")
    with pytest.raises(RewardError, match=said):
        rating(answers("a"), str(tmp_path / "r.csv"), lowest=1, highest=5)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("r.csv", "id,rating\na,1\n", r"expected also \['completion_id'\]"),
        ("r.txt", "", "expected .jsonl, .csv or .parquet"),
        ("r.jsonl", "{", "cannot be read"),
    ],
)
def test_a_file_that_holds_no_ratings_is_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(RewardError, match=said):
        rating(answers("a"), str(tmp_path / name))


def test_the_identity_follows_the_bytes_and_not_the_place(tmp_path: Path) -> None:
    first = jsonl(tmp_path / "a.jsonl", *RATINGS)
    same = jsonl(tmp_path / "b.jsonl", *RATINGS)
    other = jsonl(tmp_path / "c.jsonl", *RATINGS[:2])
    assert rating_identity(first) == rating_identity(same)
    assert rating_identity(first) != rating_identity(other)
    assert preference_identity(first, prior=1.0) != preference_identity(first, prior=2.0)
    assert str(tmp_path) not in json.dumps([rating_identity(first), preference_identity(first)])


def test_senseless_arguments_are_refused_before_anything_is_scored(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "r.jsonl", *RATINGS)
    with pytest.raises(RewardError, match="does not exist"):
        rating_identity(str(tmp_path / "gone.jsonl"))
    with pytest.raises(RewardError, match="lowest < highest"):
        rating_identity(file, lowest=5, highest=1)
    with pytest.raises(RewardError, match="lowest < highest"):
        rating_identity(file, lowest=5)
    with pytest.raises(RewardError, match="win_rate or bradley_terry"):
        preference_identity(file, method="elo")  # type: ignore[arg-type]
    with pytest.raises(RewardError, match="more than 0"):
        preference_identity(file, prior=0.0)


# preferences


def test_a_win_rate_counts_a_tie_as_half(tmp_path: Path) -> None:
    file = jsonl(
        tmp_path / "p.jsonl",
        {"chosen_id": "a", "rejected_id": "b", "rater": "bob", "is_tie": False},
        {"chosen_id": "a", "rejected_id": "c", "rater": "ann", "is_tie": False},
        {"chosen_id": "b", "rejected_id": "a", "rater": "ann", "is_tie": True},
        {"chosen_id": "c", "rejected_id": "b", "rater": None, "is_tie": None},
    )
    found = preference(answers("a", "b", "c", "d"), file)
    assert found["reward"].to_list() == pytest.approx([2.5 / 3, 0.5 / 3, 0.5, None])
    assert json.loads(found["detail"][0]) == {"wins": 2, "losses": 0, "ties": 1, "raters": ["ann", "bob"]}
    assert found["error"][3] == "nobody compared this answer"


def test_bradley_terry_scores_of_one_comparison_are_those_of_the_formula() -> None:
    # the likelihood's slope is 0 where sigmoid(-2x) = prior x tanh(x / 2): with prior 0.6 at x = log 2
    scores = bradley_terry([("a", "b", False)], prior=0.6)
    assert scores == {"a": pytest.approx(math.log(2)), "b": pytest.approx(-math.log(2))}


def test_bradley_terry_scores_tell_the_odds_when_the_prior_is_weak() -> None:
    comparisons = [("a", "b", False)] * 3 + [("b", "a", False)]
    scores = bradley_terry(comparisons, prior=1e-6)
    assert scores["a"] - scores["b"] == pytest.approx(math.log(3), abs=1e-4)


def test_ties_alone_give_equal_scores() -> None:
    assert bradley_terry([("a", "b", True), ("a", "b", True)], prior=0.5) == {
        "a": pytest.approx(0.0, abs=1e-9),
        "b": pytest.approx(0.0, abs=1e-9),
    }


def test_bradley_terry_knows_whom_an_answer_has_beaten(tmp_path: Path) -> None:
    # b and d won one of one; b against a, which has beaten c twice
    pairs = [("a", "c"), ("a", "c"), ("b", "a"), ("d", "c")]
    rows = answers("a", "b", "c", "d")
    by_rate = preference(rows, wins(tmp_path / "p.jsonl", *pairs))["reward"].to_list()
    assert by_rate == pytest.approx([2 / 3, 1.0, 0.0, 1.0])
    by_score = preference(rows, str(tmp_path / "p.jsonl"), method="bradley_terry")["reward"].to_list()
    assert by_score[1] > by_score[3] > by_score[2]


def test_a_group_does_not_feel_the_comparisons_of_another(tmp_path: Path) -> None:
    alone = wins(tmp_path / "alone.jsonl", ("a", "b"))
    both = wins(tmp_path / "both.jsonl", ("x", "y"), ("a", "b"), ("x", "y"))
    first, second = (preference(answers("a", "b"), f, method="bradley_terry") for f in (alone, both))
    assert first["reward"].to_list() == second["reward"].to_list()


def test_the_rewards_do_not_depend_on_which_answers_are_asked_for(tmp_path: Path) -> None:
    file = wins(tmp_path / "p.jsonl", ("a", "b"), ("b", "c"))
    whole = preference(answers("a", "b", "c"), file, method="bradley_terry")["reward"].to_list()
    parts = [preference(answers(i), file, method="bradley_terry")["reward"][0] for i in ("a", "b", "c")]
    assert parts == whole


@pytest.mark.parametrize(
    ("pair", "said"), [(("a", "a"), "with itself"), (("a", "z"), "which answer different prompts")]
)
def test_comparisons_that_say_nothing_are_refused(tmp_path: Path, pair: tuple[str, str], said: str) -> None:
    with pytest.raises(RewardError, match=said):
        preference(answers("a", "z", z="other"), wins(tmp_path / "p.jsonl", pair))


def test_a_row_without_a_choice_is_left_out(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "p.jsonl", {"chosen_id": None, "rejected_id": "b"}, {"chosen_id": "a", "rejected_id": "b"})
    assert preference(answers("a", "b"), file)["reward"].to_list() == [1.0, 0.0]
