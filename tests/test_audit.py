"""The audit: quiet on a clean run, and each planted hack is named by its check, with rows that show it."""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from flows.commands.audit import audit_run, print_report
from flows.printing import Format
from pipeline.errors import ArtifactMissing, ConfigError
from pipeline.run_dir import RunDir
from stages.inspect.audit.audit import CHECKS, audit, load_audit_config
from stages.inspect.audit.findings import AuditReport, Finding, Outcome, RowRef
from stages.inspect.audit.thresholds import AuditConfig
from tests import audit_runs
from tests.audit_runs import Group, iterations_of, write_run

ROOT = Path(__file__).parent.parent
COUNT = 12


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return write_run(tmp_path_factory.mktemp("audit") / "clean", iterations_of(audit_runs.clean, COUNT))


@pytest.fixture(scope="module")
def paid_by_length(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return write_run(tmp_path_factory.mktemp("audit") / "length", iterations_of(audit_runs.paid_by_length, COUNT))


@pytest.fixture(scope="module")
def paid_for_a_seven(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return write_run(tmp_path_factory.mktemp("audit") / "seven", iterations_of(audit_runs.paid_for_a_seven, COUNT))


@pytest.fixture(scope="module")
def leaked(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return write_run(tmp_path_factory.mktemp("audit") / "leaked", iterations_of(audit_runs.leaked, COUNT))


def report_of(run: RunDir) -> AuditReport:
    return audit(run, AuditConfig())


def warnings(report: AuditReport) -> dict[str, Finding]:
    return {finding.check: finding for finding in report.findings if finding.severity == "warning"}


def answers_at(run: RunDir, rows: list[RowRef]) -> list[str]:
    found = []
    for row in rows:
        frame = run.open(row.iteration, "completions").read()
        [answer] = frame.filter((frame["group_id"] == row.group_id) & (frame["completion_id"] == row.completion_id))[
            "completion"
        ].to_list()
        found.append(answer)
    return found


def test_a_clean_run_has_no_warning_though_it_saturates(clean: RunDir) -> None:
    report = report_of(clean)
    assert report.num_answers == 12 * 24 * 8
    assert warnings(report) == {}
    assert {finding.check for finding in report.findings} == {"saturation", "duplicates_in_group"}


def test_a_reward_that_pays_for_length_is_named_with_long_answers(paid_by_length: RunDir) -> None:
    found = warnings(report_of(paid_by_length))
    assert set(found) == {"reward_length", "reward_against_reference"}
    assert found["reward_length"].value == pytest.approx(1.0)
    assert found["reward_length"].threshold == 0.5
    assert min(len(answer) for answer in answers_at(paid_by_length, found["reward_length"].rows)) >= 3


def test_a_reward_that_pays_for_a_character_is_named_with_answers_that_have_it(paid_for_a_seven: RunDir) -> None:
    found = warnings(report_of(paid_for_a_seven))
    assert set(found) == {
        "rewarded_phrase",
        "reward_against_reference",
        "saturation",
        "duplicates_across_prompts",
    }
    assert "follows '7': 100 % of the better answers of a group have it, 0 % of the worse" in (
        found["rewarded_phrase"].message
    )
    assert found["rewarded_phrase"].value == 1.0
    assert set(answers_at(paid_for_a_seven, found["rewarded_phrase"].rows)) == {"777"}
    assert found["duplicates_across_prompts"].value == 1.0


def test_a_leaked_reference_is_named_with_the_iteration_where_it_began(leaked: RunDir) -> None:
    found = warnings(report_of(leaked))
    assert set(found) == {"reference_in_prompt"}
    assert found["reference_in_prompt"].value == 1.0
    assert "first in iteration 4" in found["reference_in_prompt"].message


def test_a_second_audit_says_the_same(paid_for_a_seven: RunDir) -> None:
    assert report_of(paid_for_a_seven).to_dict() == report_of(paid_for_a_seven).to_dict()


def test_a_report_is_json(paid_by_length: RunDir) -> None:
    told = json.loads(json.dumps(report_of(paid_by_length).to_dict(), allow_nan=False))
    outcome = next(o for o in told["outcomes"] if o["check"] == "reward_length")
    assert outcome["status"] == "found"
    assert set(outcome["findings"][0]) == {"check", "severity", "message", "value", "threshold", "rows"}
    assert set(outcome["findings"][0]["rows"][0]) == {"iteration", "group_id", "completion_id"}


def test_an_unscored_run_is_not_judged_by_rewards(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", iterations_of(audit_runs.clean, 6), with_rewards=False)
    outcomes = {outcome.check: outcome for outcome in report_of(run).outcomes}
    without = {
        "reward_length", "rewarded_phrase", "dominant_part", "saturation", "class_change"
    }  # fmt: skip
    assert {outcomes[check].note for check in without} == {"no iteration has rewards"}
    assert outcomes["reward_against_reference"].note == "no scored answer has a reference"
    assert {outcomes[check].status for check in without} == {"not applicable"}
    assert outcomes["truncated"].status == "clear"


def test_answers_that_are_not_scored_yet_do_not_hide_the_trend(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", iterations_of(audit_runs.paid_for_a_seven, COUNT))
    for dataset in ("rewards", "advantages"):
        shutil.rmtree(run.place(COUNT - 1, dataset))
    assert {"saturation", "reward_against_reference", "rewarded_phrase"} <= set(warnings(report_of(run)))


def test_a_run_of_one_iteration_has_no_trend(tmp_path: Path) -> None:
    report = report_of(write_run(tmp_path / "run", iterations_of(audit_runs.clean, 1)))
    outcomes = {outcome.check: outcome for outcome in report.outcomes}
    for check in ("jumps", "saturation", "reward_against_reference", "rewarded_phrase"):
        assert (outcomes[check].status, outcomes[check].note) == ("not applicable", "too few iterations for a trend")
    assert not report.has_warnings


def test_rewards_that_could_not_be_given_are_no_rewards(tmp_path: Path) -> None:
    group = Group("q", ["a"] * 8, [None] * 8)
    report = report_of(write_run(tmp_path / "run", [[group] * 8] * 6))
    assert report.findings == [finding for finding in report.findings if finding.check == "duplicates_in_group"]


def test_a_rescored_run_is_judged_by_its_own_rewards_over_another_runs_answers(
    tmp_path: Path, paid_for_a_seven: RunDir
) -> None:
    run = write_run(tmp_path / "rescored", [])
    for index in paid_for_a_seven.iterations():
        for dataset in ("prompts", "completions", "rewards", "advantages"):
            run.refer(index, dataset, paid_for_a_seven.open(index, dataset))
    assert "rewarded_phrase" in warnings(report_of(run))


def test_a_run_without_answers_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [])
    with pytest.raises(ArtifactMissing, match="no finished completions"):
        report_of(run)


def test_the_command_prints_findings_as_rows_and_answers_with_an_exit_code(
    clean: RunDir, paid_by_length: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit_run(clean.root, None, Format.jsonl) == 0
    capsys.readouterr()
    assert audit_run(paid_by_length.root, None, Format.jsonl) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["severity"] for row in rows] == sorted((row["severity"] for row in rows), reverse=True)
    assert rows[0]["check"] == "reward_length"
    assert rows[0]["rows"][0]["completion_id"].startswith(rows[0]["rows"][0]["group_id"])


def test_the_table_tells_what_was_not_checked_and_shows_a_models_brackets_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = [Group(f"question {i}", ["[red]no[/red]"] * 8, [0.0] * 8) for i in range(24)]
    assert audit_run(write_run(tmp_path / "run", [groups] * 6).root, None, Format.table) == 1
    printed = capsys.readouterr().out
    assert "warning: duplicates_across_prompts" in printed
    assert "'[red]no[/red]'" in printed
    assert "not applicable: policy_share (" in printed
    assert "grpo show" in printed


def test_a_command_to_paste_takes_an_id_as_one_word(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [RowRef(0, "g; touch x $(y)", "c")]
    outcome = Outcome("check", "found", "note", [Finding("check", "info", "message", 1.0, 1.0, rows)])
    print_report(AuditReport("run", 1, 1, [outcome]), "a run")
    assert "grpo show 'a run' -i 0 -g 'g; touch x $(y)'" in capsys.readouterr().out


def test_the_table_of_a_clean_run_lists_what_was_clear(clean: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit_run(clean.root, None, Format.table) == 0
    printed = capsys.readouterr().out
    assert "0 warnings, 2 for information" in printed
    assert "clear: rewarded_phrase" in printed


def test_the_config_file_holds_every_threshold_at_its_default() -> None:
    tables = tomllib.loads((ROOT / "configs" / "audit.toml").read_text(encoding="utf-8"))
    assert tables == AuditConfig().model_dump()
    assert load_audit_config(ROOT / "configs" / "audit.toml") == AuditConfig()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[truncated]\nshares = 0.3\n", "did you mean share?"),
        ("[truncated]\nshare = 2.0\n", "truncated.share"),
        ('disabled = ["jump"]\n', r"disabled names \['jump'\]"),
    ],
)
def test_a_wrong_threshold_is_refused_with_its_key(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "audit.toml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_audit_config(tmp_path / "audit.toml")


def test_a_disabled_check_is_left_out(tmp_path: Path, leaked: RunDir) -> None:
    (tmp_path / "audit.toml").write_text('disabled = ["reference_in_prompt"]\n')
    report = audit(leaked, load_audit_config(tmp_path / "audit.toml"))
    assert not report.has_warnings
    assert "reference_in_prompt" not in [outcome.check for outcome in report.outcomes]


def test_every_check_is_documented_and_names_itself(clean: RunDir) -> None:
    text = (ROOT / "docs" / "audit_checks.md").read_text(encoding="utf-8")
    assert [name for name in CHECKS if f"## {name}\n" not in text] == []
    assert [outcome.check for outcome in report_of(clean).outcomes] == list(CHECKS)


def test_the_audit_imports_nothing_heavy() -> None:
    heavy: Any = ("torch", "vllm", "prefect", "transformers")
    code = f"import sys, flows.commands.audit; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
