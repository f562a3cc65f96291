"""Checks of a run: a planted bad reward holds it before anything trains, a repaired one goes on, quarantine drops."""

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer

from flows.commands.check import check
from flows.printing import Format
from pipeline.artifact import open_artifact
from pipeline.errors import ArtifactMissing, CheckFailed, ConfigError, RecipeMismatch, UsageError
from pipeline.run_dir import RunDir
from pipeline.stage import run_stage
from stages.config import check_unchanged
from stages.inspect.audit.by_name import audit_iteration
from stages.inspect.verify.verify import verify_run
from stages.wiring import Wiring
from tests.checked_run import ANSWERED, BY_LENGTH, HALF_NULL, LONG_ONES, NEVER, NOT_BY_LENGTH, PASSES, STEPS, Place
from tests.finished import forge, problems_of
from tests.small_run import EXACT


@pytest.fixture
def place(tmp_path: Path, tiny_policy: Path) -> Place:
    return Place(tmp_path, tiny_policy)


def problems(run: RunDir) -> list[str]:
    return [f"{p.check} {p.where.path}: {p.found}" for p in verify_run(run).problems]


@pytest.mark.parametrize(
    ("bad", "checks"), [(HALF_NULL, ANSWERED), (BY_LENGTH, NOT_BY_LENGTH)], ids=["half null", "by length"]
)
def test_a_planted_reward_is_held_and_a_repaired_one_goes_on_from_the_stored_completions(
    place: Place, bad: str, checks: str
) -> None:
    config = place.config(checks, bad)
    with pytest.raises(CheckFailed, match=r"iteration 0 of .* is held by check .*: nothing was trained on it"):
        place.go(config)
    assert place.run.has(0, "checks")
    assert not place.run.has(0, "batches")
    assert not place.run.has(0, "policy")
    for step in ("check", "batch"):
        with place.session(config) as session, pytest.raises(CheckFailed):
            session.perform(step, 0)
    assert problems(place.run) == []
    with pytest.raises(CheckFailed):
        place.go(config)  # the same again: the stored verdict
    calls, completions = place.calls, place.run.open(0, "completions").digest
    held = {name: place.run.open(0, name).digest for name in ("rewards", "advantages", "checks")}
    place.go(place.config(checks, EXACT))
    assert (place.calls, place.run.open(0, "completions").digest) == (calls, completions)
    assert place.run.has(0, "policy")
    assert place.run.open(0, "checks").read()["passed"].to_list() == [True]
    for name, digest in held.items():
        aside = place.run.held(0, name, digest)
        assert open_artifact(aside).digest == digest
        told = f"iteration 0: {name} are made again; those before are in {place.run.shown(aside)}"
        assert told in place.notes.lines
    assert problems(place.run) == []


def test_the_logprobs_of_a_held_iteration_are_made_again_for_the_groups_that_differ_now(place: Place) -> None:
    with pytest.raises(CheckFailed):
        place.go(place.config(ANSWERED + "[update.kl]\n", HALF_NULL))
    held = place.run.open(0, "logprobs").digest
    place.go(place.config(ANSWERED + "[update.kl]\n", EXACT))
    assert place.run.has(0, "policy")
    assert open_artifact(place.run.held(0, "logprobs", held)).digest == held
    assert problems(place.run) == []


def test_a_repair_that_goes_back_to_an_earlier_reward_finds_its_rows_held_already(place: Place) -> None:
    checks = ANSWERED + NOT_BY_LENGTH
    for function in (HALF_NULL, BY_LENGTH, HALF_NULL, BY_LENGTH):
        with pytest.raises(CheckFailed):
            place.go(place.config(checks, function))
    place.go(place.config(checks, EXACT))
    assert place.run.has(0, "policy")
    kept = [path.name.partition("-")[0] for path in (place.run.root / "held" / "000000").iterdir()]
    assert [kept.count(name) for name in ("rewards", "advantages", "checks")] == [2, 2, 2]
    assert problems(place.run) == []


def test_the_message_of_a_held_iteration_names_the_condition_and_rows(place: Place) -> None:
    checks = '[[checks]]\nname = "short"\nwhere = "num_tokens > 4"\nseverity = "block"\nmax_share = 0.1\n'
    with pytest.raises(CheckFailed) as raised:
        place.go(place.config(checks + NEVER))
    said = str(raised.value)
    ids = place.run.open(0, "checks").read()["failed_ids"][0].to_list()
    assert f"check 'short' (num_tokens > 4): {len(ids)} of 8 rows (25.0%), among them {', '.join(ids[:3])}" in said
    assert ", at most 10.0% may (and 1 more): nothing was trained on it; look at `grpo rows " in said
    assert "the same command goes on from the stored completions after the reward is repaired" in said


def test_only_what_a_check_holds_is_made_again_and_never_its_completions(place: Place) -> None:
    place.go(place.config(ANSWERED + NEVER.replace("block", "warn")), STEPS[:6])
    with pytest.raises(RecipeMismatch, match="scored by other versions"):
        place.go(place.config(ANSWERED, BY_LENGTH))
    with_other_score = place.config(ANSWERED, HALF_NULL)
    with place.open(with_other_score) as session, pytest.raises(RecipeMismatch):
        session.perform("score", 0)
    for dataset in ("rewards", "advantages", "checks"):
        shutil.rmtree(place.run.place(0, dataset))
    with pytest.raises(CheckFailed):
        place.go(with_other_score, STEPS[2:])
    for name in ("prompts", "generate"):
        other = with_other_score.model_copy(update={"seed": 7})
        with place.open(other) as session, pytest.raises(RecipeMismatch):
            session.perform(name, 0)
    assert not (place.run.root / "held").exists()


def test_checks_change_until_the_iteration_has_trained(
    place: Place, tmp_path: Path, tiny_policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Batches depend on the checks of a quarantine, and the logprobs of an offline iteration on none."""
    place.go(place.config("", iterations=2), iterations=2)
    other = Place(tmp_path / "other", tiny_policy, place.source)
    other.folder.mkdir()
    offline = f'[[offline]]\nrun = "{place.run.root}"\niterations = [0, 1]\n'
    off_policy = '[[checks]]\ncheck = "off_policy"\nmax_age = 0\n'
    other.go(other.config(LONG_ONES + offline, iterations=2))
    other.go(other.config(LONG_ONES + offline, iterations=2), STEPS[:7], iterations=2)
    assert other.run.has(1, "logprobs")
    config = other.config(LONG_ONES + off_policy + offline, iterations=2)
    other.go(config, iterations=2)
    checks = other.run.open(1, "checks")
    assert checks.read()["note"][1] == "no age: offline"
    assert "training_records" not in checks.manifest.inputs
    assert "audited" not in checks.manifest.config
    check(str(other.run.root), None, Format.jsonl)
    assert [row["note"] for row in printed(capsys)][1::2] == ["no age: offline"] * 2
    assert {path.name.rpartition("-")[0] for path in (other.run.root / "held" / "000001").iterdir()} == {
        "checks",
        "batches",
    }
    assert problems(other.run) == []
    with other.session(config) as session:
        stored = other.run.open(1, "checks").digest
        assert session.perform("check", 1).digest == stored
    with other.session(other.config(LONG_ONES + offline, iterations=2)) as session, pytest.raises(RecipeMismatch):
        session.perform("check", 1)
    assert other.run.open(1, "checks").digest == stored


def test_a_check_of_the_audit_has_the_settings_of_the_run(place: Place) -> None:
    config = place.config(NOT_BY_LENGTH + '[normalize]\ncombine = "normalize_each"\nweights = {exact = 2.0}\n')
    evaluate = config.evaluate.model_copy(update={"pass_threshold": 0.5})
    place.go(config.model_copy(update={"evaluate": evaluate}), STEPS[:6])
    audited = {"pass_threshold": 0.5, "weights": {"exact": 2.0}, "combine": "normalize_each"}
    assert place.run.open(0, "checks").manifest.config["audited"] == audited


def test_other_checks_let_a_held_iteration_go_on(place: Place) -> None:
    with pytest.raises(CheckFailed):
        place.go(place.config(ANSWERED, HALF_NULL))
    rewards = place.run.open(0, "rewards").digest
    place.go(place.config(ANSWERED.replace("block", "warn"), HALF_NULL))
    assert place.run.open(0, "rewards").digest == rewards
    assert place.run.has(0, "policy")
    assert "warning: iteration 0: check 'judge_answered' (judge_answered): null rewards" in place.notes.lines[-1]


def test_without_checks_a_held_iteration_goes_on_and_its_rewards_are_those_of_the_run(place: Place) -> None:
    with pytest.raises(CheckFailed):
        place.go(place.config(ANSWERED, HALF_NULL))
    place.go(place.config("", HALF_NULL))
    assert place.run.has(0, "policy")
    assert "iteration 0: nothing holds it any more; the checks that did are in " in place.notes.lines[-1]
    assert problems(place.run) == []
    with pytest.raises(RecipeMismatch, match="scored by other versions"):
        place.go(place.config("", EXACT, iterations=2))


def test_a_reward_can_be_repaired_and_the_checks_taken_out_at_once(place: Place) -> None:
    with pytest.raises(CheckFailed):
        place.go(place.config(ANSWERED, HALF_NULL))
    held = {name: place.run.open(0, name).digest for name in ("rewards", "advantages", "checks")}
    place.go(place.config("", EXACT))
    assert place.run.has(0, "policy")
    assert not place.run.has(0, "checks")
    assert all(open_artifact(place.run.held(0, name, digest)).digest == digest for name, digest in held.items())
    assert problems(place.run) == []


def test_rewards_that_were_deleted_are_scored_again_after_a_check_held_them(place: Place) -> None:
    """A judge that was down has the recipe of one that is up."""
    config = place.config(ANSWERED, HALF_NULL)
    with pytest.raises(CheckFailed):
        place.go(config)
    shutil.rmtree(place.run.place(0, "rewards"))
    with pytest.raises(CheckFailed):
        place.go(config)
    assert problems(place.run) == []


def test_a_repaired_reward_cannot_go_on_where_the_old_one_has_trained(place: Place) -> None:
    place.go(place.config(""))
    with pytest.raises(CheckFailed, match=r"iteration 1 .*grpo fork .* --at 1"):
        place.go(place.config(NEVER, iterations=2), iterations=2)
    with pytest.raises(RecipeMismatch, match="scored by other versions"):
        place.go(place.config("", BY_LENGTH, iterations=2))


def test_what_has_trained_is_not_checked_again_and_a_new_check_begins_with_the_next_iteration(place: Place) -> None:
    place.go(place.config(""))
    config = place.config(NEVER, iterations=2)
    with place.session(config) as session:
        assert session.is_done(0)
        with pytest.raises(UsageError, match="has trained already"):
            session.perform("check", 0)
    assert not place.run.has(0, "checks")
    assert problems(place.run) == []


def test_quarantined_rows_do_not_train_and_verify_says_so_of_others(place: Place, tmp_path: Path) -> None:
    place.go(place.config(LONG_ONES + PASSES))
    ids = place.run.open(0, "checks").read()["failed_ids"][0].to_list()
    batches = place.run.open(0, "batches")
    dropped = batches.read().filter(pl.col("drop_reason") == "quarantined")
    assert sorted(dropped["completion_id"]) == sorted(ids)
    assert len(ids) == 2
    assert batches.manifest.drops["quarantined"] == 2
    assert place.run.read_metrics()["num_quarantined"].to_list() == [2]
    assert not set(place.run.open(0, "training_records").read()["completion_id"]) & set(ids)
    assert batches.manifest.inputs["checks"]["digest"] == place.run.open(0, "checks").digest
    (line,) = place.notes.lines  # what passes is not told
    assert line.startswith("iteration 0: check 'long' (num_tokens > 4): 2 of 8 rows (25.0%), among them ")
    assert line.endswith("; 2 completions do not train")
    assert place.notes.failed == [(0, "long")]
    assert problems(place.run) == []
    with pytest.raises(RecipeMismatch, match="checks was"):
        check_unchanged(place.run, place.config(""))


def test_batches_do_not_depend_on_checks_that_decide_no_row(place: Place, tmp_path: Path, tiny_policy: Path) -> None:
    place.go(place.config(""))
    other = Place(tmp_path / "other", tiny_policy, place.source)
    other.folder.mkdir()
    other.go(other.config(ANSWERED))
    for name in ("batches", "policy"):
        assert other.run.open(0, name).digest == place.run.open(0, name).digest
    assert not place.run.has(0, "checks")
    with place.session(place.config("")) as session, pytest.raises(UsageError, match="no step check"):
        session.perform("check", 0)


def test_a_batch_is_not_made_before_the_checks(place: Place) -> None:
    config = place.config(ANSWERED)
    place.go(config, STEPS[:5])
    with place.session(config) as session, pytest.raises(ArtifactMissing):
        session.perform("batch", 0)


def test_the_kl_of_the_update_before_is_an_input(place: Place) -> None:
    checks = '[[checks]]\ncheck = "off_policy"\nmax_kl = 1e-12\nmax_age = 0\n'
    place.go(place.config(checks, iterations=2), iterations=2)
    first, second = (place.run.open(i, "checks") for i in (0, 1))
    assert "training_records" not in first.manifest.inputs
    records = place.run.open(0, "training_records")
    assert second.manifest.inputs["training_records"]["digest"] == records.digest
    assert second.read()["note"][0].startswith("age at most 0, 0 unknown; KL to the sampler")
    assert problems(place.run) == []


def printed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_grpo_check_says_with_its_exit_code_whether_a_finished_run_would_have_been_held(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    off_policy = '[[checks]]\ncheck = "off_policy"\nmax_kl = 9.0\n'
    place.go(place.config(ANSWERED + off_policy, iterations=2), iterations=2)
    capsys.readouterr()
    check(str(place.run.root), None, Format.jsonl)
    stored = [{"iteration": i, **row} for i in (0, 1) for row in place.run.open(i, "checks").read().to_dicts()]
    assert printed(capsys) == stored
    file = tmp_path / "checks.toml"
    file.write_text(NEVER + '[[checks]]\nname = "jumps"\ncheck = "jumps"\n' + NOT_BY_LENGTH)
    with pytest.raises(typer.Exit) as raised:
        check(str(place.run.root), file, Format.jsonl)
    assert raised.value.exit_code == 1
    rows = printed(capsys)
    assert [(row["iteration"], row["name"], row["passed"]) for row in rows] == [
        *((0, "never", False), (1, "never", False), (None, "jumps", True), (None, "not paid by length", True))
    ]
    assert [row["note"].partition(":")[0] for row in rows[2:]] == ["not applicable", "found"]
    file.write_text(NEVER.replace("block", "warn") + PASSES)
    check(str(place.run.root), file, Format.table)
    said = capsys.readouterr().out
    assert "4 checks of 2 iterations, 2 failed" in said
    assert "passes" not in said


def test_grpo_check_of_a_run_without_checks_asks_for_some(place: Place) -> None:
    place.go(place.config(""))
    with pytest.raises(ConfigError, match=r"config.resolved.json has no \[\[checks\]\]: name a file"):
        check(str(place.run.root), None, Format.table)
    file = place.folder / "checks.toml"
    file.write_text('[[checks]]\nname = "jump"\ncheck = "jump"\n')
    with pytest.raises(ConfigError, match="expected one of judge_answered"):
        check(str(place.run.root), file, Format.table)
    file.write_text(NEVER)
    shutil.rmtree(place.run.place(0, "advantages"))
    with pytest.raises(ArtifactMissing, match="small has no scored iteration yet"):
        check(str(place.run.root), file, Format.table)


def less_quarantine(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.with_columns(failed_ids=pl.col("failed_ids").list.head(1))


def let_pass(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.with_columns(passed=pl.lit(True))


@pytest.mark.parametrize("change", [less_quarantine, let_pass])
def test_verify_finds_checks_that_say_something_else_than_their_rows(place: Place, change: Any) -> None:
    place.go(place.config(LONG_ONES))
    forge(place.run, place.run.place(0, "checks"), change)
    assert problems_of(place.run, "checks")


def test_verify_finds_batches_that_leave_out_nothing_although_the_config_says_so(place: Place) -> None:
    place.go(place.config(""))
    place.run.record_config("", place.config(LONG_ONES).model_dump(mode="json"))
    assert [problem.where.dataset for problem in problems_of(place.run, "checks")] == ["batches"]


def test_verify_finds_checks_of_another_quarantine_than_the_configs(place: Place) -> None:
    place.go(place.config(LONG_ONES))
    place.run.record_config("", place.config(LONG_ONES.replace("> 4", "> 3")).model_dump(mode="json"))
    assert [problem.where.dataset for problem in problems_of(place.run, "checks")] == ["checks"]


def test_verify_finds_an_iteration_that_has_trained_although_a_check_holds_it(place: Place) -> None:
    place.go(place.config(""))
    config = place.config(NEVER)
    place.run.record_config("", config.model_dump(mode="json"))
    run_stage(Wiring(config, place.run).call("check", 0), audit_iteration)
    assert [problem.row for problem in problems_of(place.run, "checks")] == ["never"]
    with place.session(place.config("")) as session:
        session.perform("batch", 0)
    assert place.run.has(0, "checks"), "what has trained stays on record"
