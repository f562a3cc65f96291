"""Each check of the audit on rows written for it, with numbers worked out by hand."""

from pathlib import Path
from random import Random

import polars as pl
import pytest

from pipeline.run_dir import RunDir
from stages.inspect.audit.audit import CHECKS
from stages.inspect.audit.findings import Outcome
from stages.inspect.audit.run_rows import load_run_rows
from stages.inspect.audit.thresholds import AuditConfig
from stages.ngrams import names_reference, repeated_share, sequences
from tests.audit_runs import Group, write_run

WORDS = [f"word{i}" for i in range(400)]


def outcome(run: RunDir, check: str, config: AuditConfig | None = None) -> Outcome:
    settings = config or AuditConfig()
    return CHECKS[check](load_run_rows(run, settings), settings)


def signs(found: Outcome) -> list[tuple[str, float | None]]:
    return [(finding.severity, finding.value) for finding in found.findings]


def text(random: Random, length: int = 30) -> list[str]:
    return random.choices(WORDS, k=length)


def graded(rewards: list[float] | dict[str, list[float]], count: int = 8, name: str = "q") -> list[Group]:
    return [Group(f"{name} {i}", ["a"] * 8, rewards) for i in range(count)]


def test_a_reward_for_brevity_has_a_negative_correlation(tmp_path: Path) -> None:
    group = [Group(f"q {i}", ["x" * n for n in range(1, 9)], [1 / n for n in range(1, 9)]) for i in range(8)]
    [finding] = outcome(write_run(tmp_path / "r", [group] * 5), "reward_length").findings
    assert (finding.severity, finding.value) == ("warning", pytest.approx(-1.0))
    assert "brevity" in finding.message


def test_length_that_tells_nothing_about_the_reward_is_clear(tmp_path: Path) -> None:
    # lengths 1 2 1 2, rewards 1 1 0 0: the ranks' products add up to 0
    group = [Group(f"q {i}", ["x", "xx"] * 4, [1.0, 1.0, 0.0, 0.0] * 2) for i in range(8)]
    found = outcome(write_run(tmp_path / "r", [group] * 5), "reward_length")
    assert (found.status, found.note) == ("clear", "the combined reward: rank correlation at most 0.00")


def test_a_part_that_makes_the_whole_spread_is_named_and_a_warning_only_when_another_falls(tmp_path: Path) -> None:
    # style 0 or 10, exact 0 or 1 independent of it: cov(style, sum) / var(sum) = 25 / 25.25
    parts = {"style": [0.0, 10.0] * 4, "exact": [0.0, 0.0, 1.0, 1.0] * 2}
    steady = outcome(write_run(tmp_path / "a", [graded(parts)] * 5), "dominant_part")
    assert signs(steady) == [("info", pytest.approx(25 / 25.25))]
    falls = [graded(parts), *[graded({**parts, "exact": [0.0] * 8})] * 4]
    [finding] = outcome(write_run(tmp_path / "b", falls), "dominant_part").findings
    assert finding.severity == "warning"
    assert "exact from 0.5 to 0 fell" in finding.message


def test_parts_of_equal_weight_are_clear(tmp_path: Path) -> None:
    parts = {"style": [0.0, 1.0] * 4, "exact": [0.0, 0.0, 1.0, 1.0] * 2}
    found = outcome(write_run(tmp_path / "r", [graded(parts)] * 5), "dominant_part")
    assert (found.status, found.note) == ("clear", "shares of the spread: style 50 %, exact 50 %")


@pytest.mark.parametrize("normalize", [{"weights": {"style": 0.1}}, {"combine": "normalize_each"}])
def test_parts_are_weighed_as_the_run_weighs_them(tmp_path: Path, normalize: dict[str, object]) -> None:
    parts = {"style": [0.0, 10.0] * 4, "exact": [0.0, 0.0, 1.0, 1.0] * 2}
    found = outcome(write_run(tmp_path / "r", [graded(parts)] * 5, normalize=normalize), "dominant_part")
    assert found.note == "shares of the spread: style 50 %, exact 50 %"


@pytest.mark.parametrize(("best", "severity"), [("sibling", "warning"), ("current", "info")])
def test_a_policy_that_takes_all_the_advantage_is_named(tmp_path: Path, best: str, severity: str) -> None:
    policies = ["current", "sibling"] * 4
    rewards = [float(policy == best) for policy in policies]
    groups = [Group(f"q {i}", ["a"] * 8, list(rewards), policies=policies) for i in range(8)]
    assert signs(outcome(write_run(tmp_path / "r", [groups] * 5), "policy_share")) == [(severity, 1.0)]


def test_references_of_another_form_are_not_compared_with(tmp_path: Path) -> None:
    groups = [Group(f"q {i}", ["free words"] * 8, [0.0, 1.0] * 4, "something else") for i in range(8)]
    found = outcome(write_run(tmp_path / "r", [groups] * 5), "reward_against_reference")
    assert found.status == "not applicable"
    assert "another form" in found.note


def test_passing_answers_that_never_named_the_reference_are_an_info(tmp_path: Path) -> None:
    # half of the answers name it, all pass, from the beginning
    groups = [Group(f"q {i}", ["12", "13"] * 4, [1.0] * 8, "12") for i in range(8)]
    assert signs(outcome(write_run(tmp_path / "r", [groups] * 5), "reward_against_reference")) == [("info", 0.5)]


def test_saturation_that_held_out_answers_do_not_confirm_is_a_warning(tmp_path: Path) -> None:
    iterations = [graded([0.0, 1.0] * 4), *[graded([1.0] * 8)] * 4]
    half = {"sampled": [True, False] * 40}
    [finding] = outcome(write_run(tmp_path / "a", iterations, evaluation=half), "saturation").findings
    assert (finding.severity, finding.value) == ("warning", 1.0)
    assert "but 50 % of the answers to held-out questions pass" in finding.message
    confirmed = write_run(tmp_path / "b", iterations, evaluation={"sampled": [True] * 80})
    assert signs(outcome(confirmed, "saturation")) == [("info", 1.0)]


def test_groups_that_fail_alike_more_and_more_are_a_warning(tmp_path: Path) -> None:
    # 2 of 8 groups fail alike at first, 6 of 8 in the end
    first = graded([0.0, 1.0] * 4, 6) + graded([0.0] * 8, 2, "hard")
    last = graded([0.0, 1.0] * 4, 2) + graded([0.0] * 8, 6, "hard")
    assert signs(outcome(write_run(tmp_path / "r", [first, *[last] * 4]), "saturation")) == [("warning", 0.5)]


def test_prompts_that_are_lost_are_named(tmp_path: Path) -> None:
    iterations = [graded([1.0] * 8, 24), graded([0.0] * 8, 6) + graded([1.0] * 8, 24)[6:], *[graded([0.0] * 8, 1)] * 3]
    # 24 solved prompts come again, of which 6 are lost
    [finding] = outcome(write_run(tmp_path / "r", iterations), "class_change").findings
    assert (finding.severity, finding.value) == ("warning", 0.25)
    assert {row.iteration for row in finding.rows} == {1}


def test_a_jump_of_the_kl_is_a_warning_and_of_the_entropy_an_info(tmp_path: Path) -> None:
    numbers = [{"entropy": 1.0, "kl_to_sampler": 0.001} for _ in range(6)]
    numbers[3] = {"entropy": 1.0, "kl_to_sampler": 0.201}
    run = write_run(tmp_path / "a", [graded([0.0, 1.0] * 4)] * 6, training=numbers)
    found = outcome(run, "jumps").findings
    assert [(f.severity, f.rows[0].iteration, f.value) for f in found] == [
        ("warning", 3, pytest.approx(0.2)),
        ("warning", 4, pytest.approx(-0.2)),
    ]
    numbers[3:] = [{"entropy": 0.25, "kl_to_sampler": 0.001}] * 3
    run = write_run(tmp_path / "b", [graded([0.0, 1.0] * 4)] * 6, training=numbers)
    assert signs(outcome(run, "jumps")) == [("info", pytest.approx(-0.75))]


def test_a_reward_that_collapses_at_once_is_a_warning(tmp_path: Path) -> None:
    good, bad = graded([1.0] * 6 + [0.0] * 2), graded([0.0] * 8)
    assert signs(outcome(write_run(tmp_path / "r", [good] * 4 + [bad] * 2), "jumps")) == [("warning", -0.75)]


def test_a_steady_climb_is_no_jump(tmp_path: Path) -> None:
    climb = [graded([1.0] * k + [0.0] * (8 - k)) for k in range(1, 8)]
    assert outcome(write_run(tmp_path / "r", climb), "jumps").status == "clear"


@pytest.mark.parametrize(("cut", "expected"), [(0, []), (1, [("info", 0.125)]), (2, [("warning", 0.25)])])
def test_cut_answers_are_counted(tmp_path: Path, cut: int, expected: list[tuple[str, float]]) -> None:
    groups = [Group(f"q {i}", ["a"] * 8, [1.0] * 8, finish="length" if i < cut else "stop") for i in range(8)]
    assert signs(outcome(write_run(tmp_path / "r", [groups] * 5), "truncated")) == expected


@pytest.mark.parametrize(
    ("error", "late", "expected"),
    [
        ("no reward within 60 s (time_limit)", 1, [("info", 1 / 64)]),
        ("TimeoutError: no decision within 3 s", 4, [("warning", 4 / 64)]),
        ("no reward within 60 s (time_limit)", 0, []),
        ("ValueError: no number in it", 4, []),
    ],
)
def test_answers_whose_reward_ran_out_of_time_are_counted(
    tmp_path: Path, error: str, late: int, expected: list[tuple[str, float]]
) -> None:
    groups = [Group(f"q {i}", ["a"] * 8, [None if i < late else 1.0, *[0.0] * 7], error=error) for i in range(8)]
    assert signs(outcome(write_run(tmp_path / "r", [groups] * 5), "timed_out")) == expected


def test_held_out_answers_far_below_training_are_a_warning(tmp_path: Path) -> None:
    groups = graded([1.0] * 8, 10)
    correct = {"sampled": [True, False] * 40, "greedy": [True] * 80}
    run = write_run(tmp_path / "r", [groups] * 2, evaluation=correct)
    assert signs(outcome(run, "evaluation_gap")) == [("warning", -0.5)]


def test_greedy_answers_far_above_sampled_training_are_an_info(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", [graded([0.0] * 8, 10)] * 2, evaluation={"greedy": [True] * 80})
    assert signs(outcome(run, "evaluation_gap")) == [("info", 1.0)]


def test_a_held_out_question_in_training_is_found_whatever_its_case_and_spaces(tmp_path: Path) -> None:
    held_out = [("Add  3 + 4", "7"), ("add 3 - 4", "-1"), ("add 5 + 6", "11"), ("add 7 + 8", "15")]
    run = write_run(tmp_path / "r", [[Group("add 3 + 4 ", ["7"], [1.0], "7")]], held_out=held_out)
    [finding] = outcome(run, "held_out_leak").findings
    assert (finding.severity, finding.value) == ("warning", 0.25)
    assert [row.iteration for row in finding.rows] == [0]
    assert finding.rows[0].group_id is not None


def test_a_held_out_answer_that_training_answers_recite_is_found(tmp_path: Path) -> None:
    secret = " ".join(WORDS[:15])
    groups = [Group("asked", [f"I say: {secret.upper()}!", "no"], [1.0, 0.0], "short")]
    [finding] = outcome(write_run(tmp_path / "r", [groups], held_out=[("other", secret)]), "held_out_leak").findings
    assert (finding.severity, finding.value) == ("warning", 1.0)
    assert [row.completion_id[-3:] for row in finding.rows if row.completion_id] == ["000"]


def test_siblings_that_differ_in_one_word_are_near_duplicates_and_other_texts_are_not(tmp_path: Path) -> None:
    random = Random(0)
    similar, different = [], []
    for i in range(8):
        said = text(random, 60)
        # the last word differs: 57 of 59 different word 3-grams of a pair are shared
        similar.append(Group(f"q {i}", [" ".join([*said[:-1], f"end{k}"]) for k in range(8)], [1.0] * 8))
        different.append(Group(f"q {i}", [" ".join(text(random, 60)) for _ in range(8)], [1.0] * 8))
    assert signs(outcome(write_run(tmp_path / "a", [similar] * 5), "duplicates_in_group")) == [("warning", 1.0)]
    assert outcome(write_run(tmp_path / "b", [different] * 5), "duplicates_in_group").status == "clear"


def test_one_long_answer_to_many_prompts_is_found_though_a_word_differs(tmp_path: Path) -> None:
    random = Random(1)
    said = text(random, 120)
    groups = [Group(f"q {i}", [" ".join([*said, f"end{i}"])] * 2, [1.0, 0.0]) for i in range(12)]
    groups += [Group(f"r {i}", [" ".join(text(random)), " ".join(text(random))], [1.0, 0.0]) for i in range(12)]
    [finding] = outcome(write_run(tmp_path / "r", [groups] * 5), "duplicates_across_prompts").findings
    assert (finding.severity, finding.value) == ("warning", 0.5)
    assert "nearly the same answer" in finding.message


def test_one_answer_to_many_prompts_is_right_where_the_references_say_so(tmp_path: Path) -> None:
    groups = [Group(f"q {i}", ["yes"] * 4, [1.0] * 4, "yes" if i % 2 else "no") for i in range(24)]
    assert outcome(write_run(tmp_path / "r", [groups] * 5), "duplicates_across_prompts").status == "clear"


def test_answers_that_begin_to_repeat_themselves_are_a_warning(tmp_path: Path) -> None:
    plain = [Group(f"q {i}", ["the cat sat on a mat by the door"] * 8, [1.0] * 8) for i in range(8)]
    again = [Group(f"q {i}", ["so good " * 10] * 4 + ["7777777"] * 4, [1.0] * 8) for i in range(8)]
    assert signs(outcome(write_run(tmp_path / "a", [plain, *[again] * 4]), "repetition")) == [("warning", 1.0)]
    assert outcome(write_run(tmp_path / "b", [plain] * 5), "repetition").status == "clear"
    assert signs(outcome(write_run(tmp_path / "c", [again] * 5), "repetition")) == [("info", 1.0)]


def test_answers_that_begin_to_repeat_the_prompt_are_a_warning(tmp_path: Path) -> None:
    random = Random(2)
    asked = [" ".join(text(random)) for _ in range(8)]
    own = [Group(q, [" ".join(text(random)) for _ in range(8)], [1.0] * 8) for q in asked]
    copied = [Group(q, [f"Well: {q.upper()}"] * 8, [1.0] * 8) for q in asked]
    assert signs(outcome(write_run(tmp_path / "a", [own, *[copied] * 4]), "prompt_copy")) == [("warning", 1.0)]
    assert outcome(write_run(tmp_path / "b", [own] * 5), "prompt_copy").status == "clear"


def test_a_choice_among_given_answers_is_no_leak(tmp_path: Path) -> None:
    groups = [Group(f"{i}: yes or no?", ["yes"], [1.0], "yes" if i % 2 else "no") for i in range(24)]
    assert outcome(write_run(tmp_path / "r", [groups]), "reference_in_prompt").status == "not applicable"


def test_long_references_word_by_word_are_a_warning(tmp_path: Path) -> None:
    random = Random(3)
    groups = []
    for i in range(8):
        wanted = " ".join(text(random))
        groups.append(Group(f"q {i}", [f"It is {wanted}."] * 4 + ["no"] * 4, [1.0] * 4 + [0.0] * 4, wanted))
    assert signs(outcome(write_run(tmp_path / "r", [groups] * 5), "reference_verbatim")) == [("warning", 0.5)]


def opened(index: int, random: Random) -> list[Group]:
    """Return answers of which more and more begin with a phrase that pays."""
    groups = []
    for i in range(12):
        has = [random.random() < 0.2 + 0.1 * index for _ in range(8)]
        told = [("As an expert I say " if h else "") + " ".join(text(random)) for h in has]
        groups.append(Group(f"q {index} {i}", told, [float(h) for h in has]))
    return groups


def test_an_opening_that_pays_is_named_unless_it_is_expected(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", [opened(k, Random(k)) for k in range(8)])
    [finding] = outcome(run, "rewarded_phrase").findings
    assert (finding.severity, finding.value) == ("warning", 1.0)
    named = AuditConfig.model_validate({"rewarded_phrase": {"expected": ["As an expert I say"]}})
    assert outcome(run, "rewarded_phrase", named).status == "clear"


def test_a_phrase_of_right_answers_is_explained_by_the_references(tmp_path: Path) -> None:
    # all references begin with 9, which pays and spreads, as it should
    def iteration(index: int) -> list[Group]:
        right = min(8, index + 1)
        answers = ["95"] * right + ["15"] * (8 - right)
        return [Group(f"q {index} {i}", answers, [1.0] * right + [0.0] * (8 - right), "95") for i in range(12)]

    run = write_run(tmp_path / "r", [iteration(k) for k in range(7)])
    assert outcome(run, "rewarded_phrase").status == "clear"


def test_tags_without_content_are_found_and_signs_that_a_task_asks_for_are_not(tmp_path: Path) -> None:
    empty = [Group(f"q {i}", ["<answer> </answer>", "**\\boxed{}**"] * 4, [1.0] * 8) for i in range(8)]
    assert signs(outcome(write_run(tmp_path / "a", [empty] * 5), "empty_format")) == [("warning", 1.0)]
    asked = [Group(f"q {i}", ["<"] * 8, [1.0] * 8, "<") for i in range(8)]
    assert outcome(write_run(tmp_path / "b", [asked] * 5), "empty_format").status == "clear"


@pytest.mark.parametrize(
    ("told", "reference", "expected"),
    [
        ("It is 12.", "12", True),
        ("112", "12", False),
        ("NEW\nYork!", "New York", True),
        ("a", "", None),
        ("a", None, None),
    ],
)
def test_a_reference_is_named_in_whole_words(told: str, reference: str | None, expected: bool | None) -> None:
    frame = pl.DataFrame({"told": [told], "reference": [reference]}, schema={"told": pl.String, "reference": pl.String})
    assert frame.select(names_reference(pl.col("told"), pl.col("reference"))).item() is expected


def test_sequences_do_not_reach_into_the_next_text() -> None:
    frame = pl.DataFrame({"row": [0, 1, 2], "units": [["a", "b", "c"], ["d"], ["e", "f"]]})
    found = sequences(frame, "units", 2)
    assert found.rows() == [(0, "a\x1fb"), (0, "b\x1fc"), (2, "e\x1ff")]


def test_repetition_is_counted_in_pairs_of_characters_or_word_trigrams() -> None:
    told = ["7777", "1213", "123", "a b c a b c a b"]
    # 77 77 77: 2 of 3; 12 21 13: none; too short; abc bca cab abc bca cab: 3 of 6
    found = repeated_share(pl.DataFrame({"row": range(4), "completion": told}), min_words=8, min_characters=4)
    assert dict(found.rows()) == {0: pytest.approx(2 / 3), 1: 0.0, 3: 0.5}
