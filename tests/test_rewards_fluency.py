"""Rewards against loops, the wrong language and untidy text."""

from typing import Any

import pytest

from pipeline.errors import RewardError
from stages.rewards.text.fluency import MOST_PERIOD, language, language_identity, repetition
from stages.rewards.text.surface import surface
from stages.rewards.words import prose
from tests.work import check_case, instructions, reward_cases

ARABIC = (
    "\u062c\u0644\u0633\u062a \u0627\u0644\u0642\u0637\u0629 \u0639\u0644\u0649 "
    "\u0627\u0644\u0633\u062c\u0627\u062f\u0629 \u0648\u0646\u0638\u0631\u062a \u0625\u0644\u064a."
)
PATHOLOGICAL = ["a ", "(", '"', "`", '."', "A. ", "\n", "\u0e01", "\U0001f600"]


@pytest.mark.parametrize("case", reward_cases("fluency"), ids=lambda case: case["case"])
def test_the_tabulated_cases_hold(case: dict[str, Any]) -> None:
    check_case(case)


def test_a_collapsed_answer_gets_next_to_nothing() -> None:
    reward = repetition("a " * 500_000).reward
    assert reward == pytest.approx(2e-6, abs=1e-9)  # the first of 500,000 words is new


def test_a_long_unit_is_found_up_to_the_longest_period() -> None:
    unit = " ".join(f"w{i}" for i in range(MOST_PERIOD))
    detail = repetition(" ".join([unit] * 3)).detail
    assert detail["shares"]["word_loops"] == pytest.approx(2 / 3, abs=1e-6)
    assert detail["word_loop"]["copies"] == 3
    longer = " ".join([unit, "x"] * 3)
    assert repetition(longer).detail["shares"]["word_loops"] == 0.0


def test_two_loops_add_up_and_the_longer_is_named() -> None:
    detail = repetition("no no no but yes yes yes yes it is").detail
    assert detail["shares"]["word_loops"] == 0.5  # 2 + 3 of 10
    assert detail["word_loop"] == {"unit": "yes", "copies": 4}


def test_blank_lines_without_end_are_a_loop_and_paragraphs_are_not() -> None:
    assert repetition("one\n\n\n    two").reward == 1.0
    assert repetition("one" + "\n" * 97).reward == pytest.approx(0.04)  # 96 of 100 characters go on


def test_two_copies_are_no_loop() -> None:
    assert repetition("very very good").reward == 1.0


@pytest.mark.parametrize("arguments", [{"length": 0}, {"least_copies": 1}, {"least_copies_of_characters": 1}])
def test_senseless_arguments_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(RewardError, match=next(iter(arguments))):
        repetition("x", **arguments)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("en", "The cat sat on the mat and looked at me."),
        ("de-AT", "Die Katze sass auf der Matte und sah mich an."),
        ("FR", "Le chat \u00e9tait assis sur le tapis et me regardait."),
        ("zh", "\u732b\u5750\u5728\u57ab\u5b50\u4e0a\u770b\u7740\u6211\u3002"),
        (
            "ar",
            ARABIC,
        ),
        ("th", "\u0e41\u0e21\u0e27\u0e19\u0e31\u0e48\u0e07\u0e1a\u0e19\u0e40\u0e2a\u0e37\u0e48\u0e2d"),
    ],
)
def test_the_language_is_recognised(code: str, text: str) -> None:
    score = language(text, code)
    assert (score.reward, score.detail["detected"]) == (1.0, code.lower()[:2])
    assert 0.4 < score.detail["probability"] <= 1


def test_another_language_gets_0_and_is_named() -> None:
    score = language("Die Katze sass auf der Matte und sah mich an.", "en")
    assert (score.reward, score.detail["expected"], score.detail["detected"]) == (0.0, "en", "de")


def test_candidates_make_a_short_answer_certain() -> None:
    free = language("The answer is 42.", "en", least_letters=5)
    bound = language("The answer is 42.", "en", candidates=["en", "zh"], least_letters=5)
    assert free.detail["probability"] < 0.5 < 0.9 < bound.detail["probability"]


def test_an_uncertain_guess_is_null_when_asked() -> None:
    score = language("The answer is 42.", "en", least_letters=5, least_probability=0.5)
    assert (score.reward, score.detail["reason"]) == (None, "probability under 0.5: cannot tell")


def test_a_chinese_character_counts_three_letters() -> None:
    assert language("\u732b" * 6, "zh").reward is None
    assert language("\u732b\u5750\u5728\u57ab\u5b50\u4e0a\u4e86", "zh").reward is not None


def test_an_unknown_candidate_is_refused_before_the_run() -> None:
    with pytest.raises(RewardError, match=r"candidates has \['xx'\]"):
        language_identity(candidates=["en", "xx"])
    with pytest.raises(RewardError, match="language is 'de'"):
        language_identity(language="de", candidates=["en", "fr"])


def test_the_identity_of_the_language_reward_names_the_detectors_version() -> None:
    assert str(language_identity(language="en")["py3langid"]).startswith("0.")


def test_code_is_left_out_of_prose() -> None:
    assert prose("a `b` c") == "a   c"
    assert prose("a ```b``` c ```d") == "a   c "
    assert prose("an open ` backtick") == "an open  backtick"


@pytest.mark.parametrize(
    ("text", "check"),
    [
        ("a) one ) two", "brackets"),
        ("one (two]", "brackets"),
        ('He said "no and left.', "quotes"),
        ("\u00abno", "quotes"),
        ("It is THE the end.", "doubled_words"),
        ("Everything works well today. but not so well here", "sentence_case"),
        ("all of this begins small.", "sentence_case"),
        ("A first paragraph.\n\nand this begins small.", "sentence_case"),
        ("This has no full stop", "final_punctuation"),
        ("\u732b\u5750\u5728\u57ab\u5b50\u4e0a\u770b\u7740\u6211", "final_punctuation"),
    ],
)
def test_a_surface_error_is_found(text: str, check: str) -> None:
    assert surface(text).detail["findings"][check]


@pytest.mark.parametrize(
    "text",
    [
        "a) first\nb) second",
        "# A title of four words",
        "- an item of a list without a stop",
        'It is 5" wide and "good".',
        "A sentence that goes on\nin the next line of the text.",
        "They were red, green, etc.\nand all of them good.",
        "They were, e.g. the red ones, good.",
        "Use `foo` with care. `bar` is good to know.",
        "\u597d\u597d \u5b66\u4e60\u3002",
        ARABIC,
        "\U0001f600",
        "He asked: \u201cIs that so?\u201d",
    ],
)
def test_what_only_looks_like_an_error_passes(text: str) -> None:
    assert surface(text).reward == 1.0


@pytest.mark.parametrize("function", [repetition, surface])
def test_the_work_grows_with_the_answer_and_no_faster(function: Any) -> None:
    function("a b")
    small = instructions(lambda: function("a a (b. " * 1000))
    large = instructions(lambda: function("a a (b. " * 2000))
    assert large <= 2.1 * small


@pytest.mark.parametrize("unit", PATHOLOGICAL)
def test_a_megabyte_of_anything_is_scored(unit: str) -> None:
    # a quadratic step would need some 10^12 operations here
    answer = unit * (1_000_000 // len(unit))
    assert surface(answer).reward is not None
    reward = repetition(answer).reward
    assert reward is not None
    assert reward < 1e-5
    assert language(answer, "en").detail["expected"] == "en"
