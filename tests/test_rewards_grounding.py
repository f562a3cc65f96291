"""Rewards for keeping to the passage and to what the user said."""

from typing import Any

import pytest

from pipeline.errors import RewardError
from stages.rewards.text.grounding import MOST_QUOTES, conversation, overlap, quotes
from tests.work import check_case, instructions, reward_cases

PATHOLOGICAL = [
    "a ",
    '"',
    "'a ",
    "'",
    "\u201c",
    "\u201e",
    "\u00ab",
    "\u300c",
    "\u2018",
    '"a" ',
    "1,",
    "A ",
    "A. ",
    "\n",
]


@pytest.mark.parametrize("case", reward_cases("grounding"), ids=lambda case: case["case"])
def test_the_tabulated_cases_hold(case: dict[str, Any]) -> None:
    check_case(case)


def test_ngrams_do_not_span_two_passages() -> None:
    assert overlap("red apple", context=["big red", "apple tree"]).reward == 0.0


def test_earlier_turns_are_no_context_unless_asked_for() -> None:
    turns = [{"role": "user", "content": "red apple"}]
    assert overlap("red apple", context="pear", messages=turns).reward == 0.0
    assert overlap("red apple", context="pear", messages=turns, include_messages=True).reward == 1.0
    assert quotes('"red"', context="pear", messages=turns, include_messages=True).reward == 1.0


def test_a_message_without_text_is_no_evidence() -> None:
    assert conversation("Peter", messages=[{"role": "user", "content": None}]).reward is None


def test_a_context_counts_as_evidence_for_names_and_numbers() -> None:
    assert conversation("We met Peter in 1999.", context="Peter, 1999").reward == 1.0


def test_ngrams_of_no_words_are_refused() -> None:
    with pytest.raises(RewardError, match="length is 0"):
        overlap("x", context="x", length=0)


@pytest.mark.parametrize(
    ("answer", "found", "invented"),
    [
        ("\u00bbrot\u00ab", ["rot"], []),
        ("\u201drot\u201d och", ["rot"], []),
        ("\u201arot\u2018", ["rot"], []),
        ("\u2039rot\u203a", ["rot"], []),
        ("\u300erot\u300f", ["rot"], []),
        ("'rot' and 'blau'", ["rot"], ["blau"]),
        ('the "ROT." and "rot"', ["rot"], []),
        ('an open "rot', [], []),
        ('"..." and ""', [], []),
    ],
)
def test_quotation_marks_of_every_style(answer: str, found: list[str], invented: list[str]) -> None:
    detail = quotes(answer, context="gelb rot gr\u00fcn").detail
    assert (detail["found"], detail["invented"]) == (found, invented)


def test_a_quotation_spoken_inside_another_word_is_found_where_it_stands_alone() -> None:
    assert quotes('"art"', context="party of art").reward == 1.0


@pytest.mark.parametrize(
    ("passage", "quote", "reward"),
    [
        ("it is 2.5 km long", "5 km", 0.0),  # a number is one word
        ("it is 5 km long", "5 km", 1.0),
        ("\u0939\u093f\u0928\u094d\u0926\u0940", "\u0939\u093f\u0928\u094d\u0926", 0.0),  # cut before a vowel's mark
        ("\uc11c\uc6b8\uc740", "\uc11c\uc6b8", 1.0),  # Korean writes particles onto words
    ],
)
def test_a_quotation_stands_in_the_context_as_whole_words_of_any_script(
    passage: str, quote: str, reward: float
) -> None:
    assert quotes(f'"{quote}"', context=passage).reward == reward


def test_only_so_many_quotations_are_looked_up() -> None:
    answer = " ".join(f'"q{i}"' for i in range(MOST_QUOTES + 50))
    assert quotes(answer, context="q1").detail["num_quotes"] == 1000


def test_only_so_many_omissions_are_understood() -> None:
    assert quotes('"' + " ... ".join(["red"] * 11) + '"', context="red").reward == 1.0
    assert quotes('"' + " ... ".join(["red"] * 12) + '"', context="red").reward == 0.0


def test_words_in_capitals_are_no_names_in_a_shout() -> None:
    turns = [{"role": "user", "content": "hm"}]
    assert conversation("THIS IS ROME", messages=turns).detail["num_facts"] == 0
    assert conversation("This is Rome", messages=turns).detail["unsupported"] == ["rome"]


def test_a_capital_behind_a_combining_mark_is_inside_a_word() -> None:
    assert conversation("The eXs and e\u0301Xs", context="x").detail["num_facts"] == 0


@pytest.mark.parametrize("function", [overlap, quotes, conversation])
@pytest.mark.parametrize("unit", ["a cat ", '"a" ', "A 1 "])
def test_the_work_grows_with_the_answer_and_no_faster(function: Any, unit: str) -> None:
    function(unit, context="a cat")
    small = instructions(lambda: function(unit * 1000, context="a cat"))
    large = instructions(lambda: function(unit * 2000, context="a cat"))
    assert large <= 2.1 * small


@pytest.mark.parametrize("unit", PATHOLOGICAL)
def test_a_megabyte_of_anything_is_scored(unit: str) -> None:
    # a quadratic step would need some 10^12 operations here
    answer = unit * (1_000_000 // len(unit))
    functions: tuple[Any, ...] = (overlap, quotes, conversation)
    for function in functions:
        assert function(answer, context="a cat").reward is not None


def test_many_different_words_and_facts_are_looked_up_at_once() -> None:
    # a search through a list would need some 10^10 comparisons here
    answer = " ".join(f"x W{i} {i}" for i in range(100_000))
    assert overlap(answer, context="W0 " + answer[::-1], length=1).detail["num_ngrams"] == 200_001
    assert conversation(answer, context=answer).reward == 1.0
