"""Checks: what each says of an iteration's rows, worked out by hand, and which tables of [[checks]] are accepted."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.conditions import parse_bounded
from pipeline.config import validate
from pipeline.errors import ConfigError
from stages.batch import BatchConfig, batch_rows
from stages.check import check_rows
from stages.checks.config import CheckStageConfig, expanded
from stages.checks.outcome import Outcome, quarantined
from stages.config import RunConfig, parse_config
from stages.inspect.audit.audit import CHECKS
from stages.inspect.audit.by_name import OF_A_RUN, audit_iteration, check_audits, outcome_of
from stages.inspect.audit.findings import Finding, RowRef, Severity
from stages.inspect.audit.findings import Outcome as Found
from tests.builders import advantage_rows, completion_rows, fill, prompt_rows, reward_rows

PAGE = (Path(__file__).parent.parent / "docs" / "checks.md").read_text(encoding="utf-8")
NOTHING: dict[str, Any] = {"iteration": 3}
RUN = """
[policy]
model = "m"
[prompts]
source = "s"
[[score.rewards]]
name = "exact"
function = "stages.rewards.answers.matching:exact_match"
"""


def frames(**given: pl.DataFrame) -> dict[str, pl.LazyFrame]:
    """Return the rows of an iteration of two completions; those that a test does not give are uneventful."""
    rows = {
        "prompts": prompt_rows({"reference_answer": "7"}),
        "completions": completion_rows(
            {"policy_iteration": 3, "completion_token_ids": [7, 7, 1]}, {"policy_iteration": 3}
        ),
        "rewards": reward_rows(c=[1, 0]),
        "advantages": advantage_rows({"reward": 1.0}, {"reward": 0.0}),
        **given,
    }
    return {name: frame.lazy() for name, frame in rows.items()}


def outcome(check: dict[str, Any], facts: Mapping[str, Any] = NOTHING, **given: pl.DataFrame) -> dict[str, Any]:
    config = validate(CheckStageConfig, {"checks": [check]}, "checks")
    row: dict[str, Any] = check_rows(config, frames(**given), facts, audit_iteration).row(0, named=True)
    return row


def told(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["num_rows"], row["num_failed"], row["failed_ids"], row["passed"]


@pytest.mark.parametrize(
    ("where", "max_share", "expected"),
    [
        ("reward < 0.5", 0.0, (2, 1, ["c1"], False)),
        ("reward < 0.5", 0.5, (2, 1, ["c1"], True)),
        ("reward < 0.5", 0.49, (2, 1, ["c1"], False)),
        ("num_tokens > 2", 0.0, (2, 1, ["c0"], False)),
        ("reference_answer = '7' AND reward > AVG(reward)", 0.0, (2, 1, ["c0"], False)),
        ("stop_reason = 'x'", 0.0, (2, 0, [], True)),  # unknown is no failure
    ],
)
def test_a_condition_fails_the_rows_for_which_it_is_true(where: str, max_share: float, expected: Any) -> None:
    row = outcome({"name": "n", "where": where, "max_share": max_share})
    assert told(row) == expected
    assert (row["condition"], row["max_share"], row["dataset"]) == (where, max_share, "completions")
    assert row["note"] == f"{expected[1]} of 2 rows ({50 * expected[1]:.1f}%)"


def test_every_completion_is_looked_at_once() -> None:
    """Its prompt may be asked twice, or have no row, and normalize may have left it out."""
    check, leaks = {"name": "n", "where": "reward IS NULL"}, {"check": "no_leaked_reference"}
    twice = prompt_rows({"reference_answer": "7"}, {"reference_answer": "7"})
    assert told(outcome(check, prompts=twice)) == told(outcome(leaks, prompts=twice)) == (2, 0, [], True)
    alone = advantage_rows({"reward": 1.0})
    assert told(outcome(check, advantages=alone, prompts=prompt_rows({"prompt_id": "q"}))) == (2, 1, ["c1"], False)


def test_a_completion_that_fails_by_two_rewards_is_named_once() -> None:
    rewards = pl.concat([reward_rows(c=[None, 0]), reward_rows(c=[None, None])])
    row = outcome({"name": "n", "where": "reward IS NULL", "dataset": "rewards"}, rewards=rewards)
    assert told(row) == (4, 3, ["c-0", "c-1"], False)


@pytest.mark.parametrize("share", [0.4, 0.5])
def test_judge_answered_looks_at_each_reward_by_itself(share: float) -> None:
    """A quarter of all rewards is null, half of the judge's."""
    judge = reward_rows(c=[None, 0]).with_columns(reward_name=pl.lit("judge"))
    row = outcome({"check": "judge_answered", "max_share": share}, rewards=pl.concat([reward_rows(c=[1, 0]), judge]))
    assert told(row) == (4, 1, ["c-0"], share >= 0.5)
    assert row["note"] == "null rewards: accuracy 0.0%, judge 50.0%"
    assert (row["dataset"], row["condition"], row["max_share"]) == ("rewards", "judge_answered", share)


def test_judge_answered_looks_at_one_reward_where_it_is_named() -> None:
    judge = reward_rows(c=[None, 0]).with_columns(reward_name=pl.lit("judge"))
    rewards = pl.concat([reward_rows(c=[1, 0]), judge])
    assert told(outcome({"check": "judge_answered", "reward": "accuracy"}, rewards=rewards)) == (2, 0, [], True)


@pytest.mark.parametrize("share", [0.5, 0.6, 0.7])
def test_groups_inform_counts_groups_not_rows(share: float) -> None:
    """Two of three groups tell nothing; they have three of five rows. One has an informative member of two."""
    flat = {"group_id": "b", "drop_reason": "zero_variance"}
    rows = advantage_rows({}, {"drop_reason": "unscored"}, flat, flat, {"group_id": "c", "drop_reason": "unscored"})
    row = outcome({"check": "groups_inform", "max_share": share}, advantages=rows)
    assert told(row) == (5, 3, ["c2", "c3", "c4"], share == 0.7)
    assert (row["dataset"], row["condition"], row["max_share"]) == ("advantages", "groups_inform", share)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"repeated": 0.6}, (2, 1, ["c0"], False)),
        ({"repeated": 0.6, "max_share": 0.5}, (2, 1, ["c0"], True)),
        ({"repeated": 0.85}, (2, 0, [], True)),
        ({"repeated": 0.85, "min_words": 9}, (2, 1, ["c0"], False)),
        ({"repeated": 0.85, "min_words": 9, "min_characters": 24}, (2, 0, [], True)),
    ],
)
def test_no_repetition_counts_completions_that_say_the_same_again(options: dict[str, Any], expected: Any) -> None:
    """Eight equal words: 5 of 6 word 3-grams (0.83), and 19 of 22 pairs of characters (0.86), were there before."""
    rows = completion_rows({"completion": "go " * 8}, {"completion": "one two three four five six seven eight"})
    assert told(outcome({"check": "no_repetition", **options}, completions=rows)) == expected


@pytest.mark.parametrize(("characters", "is_passed"), [(100, True), (400, False)])
def test_no_repetition_reads_the_beginning_of_a_completion(characters: int, is_passed: bool) -> None:
    rows = completion_rows({"completion": " ".join(map(str, range(1000, 1020))) + " go" * 100})
    assert outcome({"check": "no_repetition", "characters": characters}, completions=rows)["passed"] is is_passed


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"min_characters": 2}, (2, 2, ["c0", "c1"], False)),
        ({"min_characters": 3}, (2, 0, [], True)),
        ({"max_share": 1.0}, (2, 2, ["c0", "c1"], True)),
    ],
)
def test_no_leaked_reference_looks_into_the_prompts(options: dict[str, Any], expected: Any) -> None:
    asked = [{"role": "user", "content": "It is 42. What is it?"}]
    given = prompt_rows({"messages": asked, "reference_answer": "42"})
    assert told(outcome({"check": "no_leaked_reference", **options}, prompts=given)) == expected


@pytest.mark.parametrize(
    ("share", "expected"), [(0.49, (4, 2, ["c0", "c1"], False)), (0.5, (4, 0, [], True)), (0.7, (4, 0, [], True))]
)
def test_a_reward_has_collapsed_when_most_completions_get_the_same(share: float, expected: Any) -> None:
    rows = advantage_rows(*({"reward": reward} for reward in (0.0, 0.0, 1.0, 0.5, None)))
    row = outcome({"check": "reward_not_collapsed", "max_share": share}, advantages=rows)
    assert told(row) == expected
    unscored = outcome({"check": "reward_not_collapsed"}, advantages=advantage_rows({"reward": None}))
    assert told(unscored) == (0, 0, [], True)


@pytest.mark.parametrize(
    ("options", "facts", "expected"),
    [
        ({"max_age": 1}, {}, (3, 2, ["c1", "c2"], False)),
        ({"max_age": 2}, {}, (3, 1, ["c2"], False)),
        ({"max_age": 1, "max_share": 0.7}, {}, (3, 2, ["c1", "c2"], True)),
        ({"max_age": 1}, {"is_offline": True}, (3, 0, [], True)),
        ({"max_age": 2, "max_kl": 0.3}, {}, (3, 1, ["c2"], False)),
        ({"max_kl": 0.3}, {}, (3, 0, [], True)),
        ({"max_kl": 0.2}, {}, (3, 3, ["c0", "c1", "c2"], False)),
        ({"max_kl": 0.2, "max_share": 1.0}, {}, (3, 3, ["c0", "c1", "c2"], False)),
    ],
)
def test_off_policy_takes_the_age_of_the_rows_and_the_kl_of_the_update_before(
    options: dict[str, Any], facts: dict[str, Any], expected: Any
) -> None:
    """The KL is (0.1 x 1 + 0.3 x 3) / 4 = 0.25 nats per token; the rows without tokens do not count."""
    completions = completion_rows({"policy_iteration": 3}, {"policy_iteration": 1}, {"policy_iteration": None})
    known = [{"kl_to_sampler": kl, "known_tokens": n} for kl, n in ((0.1, 1), (0.3, 3), (None, 5))]
    records = pl.DataFrame(known)
    row = outcome(
        {"check": "off_policy", **options}, {**NOTHING, **facts}, completions=completions, training_records=records
    )
    assert told(row) == expected


def test_off_policy_passes_while_no_kl_is_known() -> None:
    unknown = pl.DataFrame(
        {"kl_to_sampler": [None], "known_tokens": [5]}, schema_overrides={"kl_to_sampler": pl.Float64}
    )
    check = {"check": "off_policy", "max_kl": 1e-9}
    for row in (outcome(check), outcome(check, training_records=unknown)):
        assert (row["passed"], row["note"]) == (True, "no KL is known yet")
        assert row["condition"] == 'off_policy {"max_kl":1e-09}'


def paid_by_length(groups: int) -> dict[str, pl.DataFrame]:
    """Return groups of four whose rewards are their lengths."""
    names = [f"{g}-{i}" for g in range(groups) for i in range(4)]
    scored = [{"completion_id": n, "group_id": n[:-2], "reward": i % 4 / 4} for i, n in enumerate(names)]
    texts = [{"completion_id": r["completion_id"], "group_id": r["group_id"]} for r in scored]
    return {
        "completions": completion_rows(*({**row, "completion": "x" * (i % 4 + 1)} for i, row in enumerate(texts))),
        "rewards": fill("rewards", scored, reward_name="a", reward_recipe="r"),
        "advantages": advantage_rows(*scored),
    }


def test_a_check_of_the_audit_fails_when_it_has_a_warning() -> None:
    facts = {**NOTHING, "audited": {"pass_threshold": 1.0, "weights": {}, "combine": "sum"}}
    check = {"name": "length", "check": "reward_length", "severity": "block"}
    row = outcome(check, facts, **paid_by_length(16))
    assert (row["num_rows"], len(row["failed_ids"]), row["passed"]) == (64, 10, False)
    assert "rank correlation 1.00" in row["note"]
    assert (row["dataset"], row["condition"], row["max_share"]) == ("completions", "reward_length", None)
    few = outcome({**check, "thresholds": {"data": {"min_answers": 65}}}, facts, **paid_by_length(16))
    assert few["passed"]
    assert few["note"].startswith("not applicable")
    assert few["condition"] == 'reward_length {"thresholds":{"data":{"min_answers":65}}}'


def test_a_check_of_the_audit_reads_the_settings_of_the_run() -> None:
    facts = {"pass_threshold": 1.0, "weights": {}, "combine": "sum"}

    def note(check: str, settings: dict[str, Any], **given: pl.DataFrame) -> str:
        table = {"name": "n", "check": check, "thresholds": {"data": {"min_answers": 1}}}
        return str(outcome(table, {**NOTHING, "audited": {**facts, **settings}}, **given)["note"])

    one, ten = (reward_rows(c=[reward, 0]).with_columns(reward_name=pl.lit(f"r{reward}")) for reward in (1, 10))
    rewards = pl.concat([one, ten])
    assert "r10 90.9 %, r1 9.09 %" in note("dominant_part", {}, rewards=rewards)
    assert "r1 60 %, r10 40 %" in note("dominant_part", {"weights": {"r1": 15.0}}, rewards=rewards)
    assert "r10 50 %, r1 50 %" in note("dominant_part", {"combine": "normalize_each"}, rewards=rewards)
    empty = {
        "completions": completion_rows({"completion": ""}, {"completion": ""}),
        "advantages": advantage_rows({"reward": 0.5, "advantage": 0.0}, {"reward": 0.5, "advantage": 0.0}),
    }
    assert "too few late answers are rewarded" in note("empty_format", {}, **empty)
    assert note("empty_format", {"pass_threshold": 0.5}, **empty).startswith(
        "100 % of the rewarded late answers have no"
    )


def test_only_the_warnings_of_the_audit_fail_each_row_once() -> None:
    """A finding shows completions, or a group and with it all its members."""
    rows = completion_rows({}, {}, {"group_id": "h"}, {"group_id": "i"})

    def finding(severity: Severity, *refs: RowRef) -> Finding:
        return Finding("c", severity, severity, rows=[*refs])

    info = finding("info", RowRef(0, "i", "c3"))
    twice = [finding("warning", RowRef(0, "h", "c2"), RowRef(0, "g")), finding("warning", RowRef(0, "g", "c1"))]
    assert outcome_of(Found("c", "found", "", [info, *twice]), rows) == Outcome(
        4, 3, ["c2", "c0", "c1"], False, "warning; warning"
    )
    assert outcome_of(Found("c", "found", "n", [info]), rows) == Outcome(4, 0, [], True, "found: n")


def test_checks_that_compare_iterations_are_refused_where_a_check_sees_one() -> None:
    assert set(CHECKS) > OF_A_RUN
    checks = validate(CheckStageConfig, {"checks": [{"name": "j", "check": "jumps"}]}, "checks").checks
    with pytest.raises(ConfigError, match="'jumps', which compares iterations"):
        check_audits(checks)
    check_audits(checks, of_a_run=True)
    (names,) = re.findall(r"Checks that\ncompare iterations \((.*?)\)", PAGE, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", names)) == OF_A_RUN


@pytest.mark.parametrize(
    ("check", "said"),
    [
        ({"check": "jump"}, "expected one of judge_answered"),
        ({"check": "truncated", "thresholds": {"x": {}}}, "x: unknown"),
    ],
)
def test_a_check_that_the_audit_does_not_know_is_refused(check: dict[str, Any], said: str) -> None:
    checks = validate(CheckStageConfig, {"checks": [{"name": "n", **check}]}, "checks").checks
    with pytest.raises(ConfigError, match=said):
        check_audits(checks)


@pytest.mark.parametrize(
    ("check", "said"),
    [
        ({"check": "judge_answered", "max_shar": 1.0}, r"checks\.0\.max_shar: unknown key; did you mean max_share\?"),
        ({"name": "x", "where": "nope > 1"}, 'unable to find column "nope"'),
        ({"name": "x", "where": "reward + 1"}, "gives Float64, expected true or false"),
        ({"name": "x", "where": "completion_id IN (SELECT x FROM read_csv('f'))"}, "is more than a condition"),
        ({"name": "x", "where": "num_tokens > 1", "dataset": "rewards"}, 'unable to find column "num_tokens"'),
        ({"where": "1 = 1"}, r"checks\.0\.name: "),
        ({"name": "x"}, "a check has a condition"),
        ({"name": "x", "check": "truncated", "severity": "quarantine"}, "should be 'warn' or 'block'"),
        ({"check": "off_policy"}, "neither max_age nor max_kl"),
        ({"check": "judge_answered", "reward": "zz"}, r"\['zz'\], score.rewards has \['exact'\]"),
    ],
)
def test_a_check_that_is_none_is_refused_with_what_was_expected(check: dict[str, Any], said: str) -> None:
    tables = {
        "policy": {"model": "m"},
        "prompts": {"source": "s"},
        "score": {"rewards": [{"name": "exact", "function": "m:f"}]},
    }
    with pytest.raises(ConfigError, match=said):
        validate(RunConfig, {**tables, "checks": [check]}, "config")


def test_two_checks_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\['judge_answered', 'judge_answered'\]: give each its own"):
        parse_config(RUN + 2 * '[[checks]]\ncheck = "judge_answered"\n', "config")


@pytest.mark.parametrize(
    "where",
    [
        "replace(completion, 'a', 'aa') = ''",
        "\"replace\"(completion, 'a', 'aa') = ''",
        "completion || 'x' = ''",
        "1 = 1" + " " * 2000,
    ],
)
def test_a_condition_makes_nothing_longer_than_its_rows(where: str) -> None:
    with pytest.raises(ValueError, match=r"calls|joins|characters"):
        parse_bounded(where)


def test_several_runs_share_a_file_of_checks(tmp_path: Path) -> None:
    file = tmp_path / "checks.toml"
    file.write_text('[[checks]]\ncheck = "judge_answered"\nseverity = "block"\n')
    config = parse_config(f'checks = "{file}"\n{RUN}', "config")
    assert config == parse_config(RUN + file.read_text(), "config")
    assert config.executes("check", 0)
    assert not parse_config(RUN, "config").executes("check", 0)
    file.write_text("seed = 1\n")
    with pytest.raises(ConfigError, match=r"\['seed'\], expected \[\[checks\]\] alone"):
        expanded({"checks": str(file)})
    file.write_text(f'checks = "{file}"\n')
    with pytest.raises(ConfigError, match="checks: Input should be a valid list"):
        parse_config(f'checks = "{file}"\n{RUN}', "config")


def test_only_a_quarantine_that_failed_keeps_rows_from_training() -> None:
    config = [
        {"name": "warn", "where": "reward = 0", "severity": "warn"},
        {"name": "block", "where": "reward = 0", "severity": "block"},
        {"name": "passed", "where": "reward = 0", "severity": "quarantine", "max_share": 0.5},
        {"name": "failed", "where": "reward = 1", "severity": "quarantine"},
        {"name": "again", "where": "reward > 0", "severity": "quarantine"},
    ]
    checks = validate(CheckStageConfig, {"checks": config}, "checks")
    assert quarantined(check_rows(checks, frames(), NOTHING, None)) == ["c0"]


def test_a_quarantined_row_has_its_reason_and_no_place() -> None:
    rows = batch_rows(
        completion_rows({}, {}),
        advantage_rows({}, {}).select("completion_id", "advantage", "drop_reason"),
        BatchConfig(),
        seed=0,
        iteration=0,
        quarantined=["c1"],
    )
    assert rows.select("completion_id", "drop_reason", "optimizer_step").rows() == [
        ("c0", None, 0),
        ("c1", "quarantined", None),
    ]
