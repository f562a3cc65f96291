"""Comparing words, numbers and choices: what holds for any answer, and what an auditor can rely on."""

import json
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import RewardError
from stages.rewards.answers.answer_part import answer_part, shown
from stages.rewards.answers.choice import choice_match
from stages.rewards.answers.matching import exact_match, token_f1
from stages.rewards.answers.numeric import numeric_match
from stages.rewards.words import occurs

PIECES = [*"AB 12.,-/%()$\\{}e^*\n\u00b2\u00bd\u0663\u2212\u5317", "A is", "answer", "\\frac{1}", "10^"]
ANSWERS = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


@given(ANSWERS)
@settings(max_examples=200, deadline=None)
def test_no_answer_whatever_makes_a_matching_reward_fail_or_leave_its_range(answer: str) -> None:
    scores = [
        exact_match(answer, "12", ignore_case=True, ignore_unicode_form=True, ignore_punctuation=True),
        token_f1(answer, "12"),
        numeric_match(answer, "12"),
        numeric_match(answer, "12", which="only", decimal=",", accounting=True),
        choice_match(answer, "B", ["12", "A B"]),
    ]
    for score in scores:
        assert score.reward is not None
        assert 0 <= score.reward <= 1
        json.dumps(score.detail, allow_nan=False)


@given(st.integers(-(10**12), 10**12), st.integers(0, 999))
@settings(max_examples=100, deadline=None)
def test_a_number_is_the_same_in_whatever_way_it_is_written(whole: int, thousandths: int) -> None:
    plain = f"{whole}.{thousandths:03d}"
    value = Fraction(plain)
    written = [
        plain,
        f"{whole:,}.{thousandths:03d}",
        f"{value.numerator}/{value.denominator}",
        f"{plain}e0",
        f"$ {plain}.",
    ]
    assert [numeric_match(text, plain, relative=0).reward for text in written] == [1.0] * 5
    german = plain.replace(".", ",")
    assert numeric_match(german, plain, relative=0, decimal=",").reward == 1.0


def test_a_tolerance_holds_on_both_sides_and_for_negative_references() -> None:
    rewards = [numeric_match(text, "-100", relative=0.01).reward for text in ("-99", "-101", "-98.9", "-101.1", "100")]
    assert rewards == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_the_order_of_words_does_not_count_for_token_f1() -> None:
    assert token_f1("mat the on sat cat", "cat sat on mat") == token_f1("the cat sat on mat", "cat sat on mat")


def test_a_detail_repeats_only_the_beginning_of_a_long_answer() -> None:
    detail = exact_match("x" * 100_000, "y").detail
    assert detail == {"answer": "x" * 200 + "...", "matched": None}


def test_the_last_match_of_within_counts_and_its_group_named_answer() -> None:
    assert answer_part("a1 b2", r"[ab](\d)") == "2"
    assert answer_part("a1 b2", r"([ab])(?P<answer>\d)") == "2"
    assert answer_part("a1 b2", r"[ab]\d") == "b2"
    assert answer_part("a1 b2", "c") is None


def test_the_choice_does_not_depend_on_the_case_and_marks_of_the_reference() -> None:
    assert {choice_match("B", text, ["ice", "fire"]).reward for text in ("B", "b", "(B)", "B.", "Fire", "fire.")} == {
        1.0
    }


def test_choices_that_are_no_choices_are_named() -> None:
    with pytest.raises(RewardError, match="the metadata key choices holds 'AB', expected at most 26 texts"):
        choice_match("A", "A", "AB")


@pytest.mark.parametrize(
    ("text", "phrase", "found"),
    [
        ("new york", "york", True),
        ("yorkshire york", "york", True),
        ("yorkshire", "york", False),
        ("a_york", "york", False),
        ("(york)", "york", True),
        ("15", "5", False),
        ("1,500", "500", False),
        ("500, 1", "500", True),
        ("हिन्दी", "हिन्द", False),
        ("東京都", "東京", True),
    ],
)
def test_a_phrase_occurs_as_whole_words_and_numbers(text: str, phrase: str, found: bool) -> None:
    assert occurs(text, phrase) is found


def test_what_is_shown_ends_after_200_characters() -> None:
    assert (shown("a" * 200), shown("a" * 201)) == ("a" * 200, "a" * 200 + "...")
