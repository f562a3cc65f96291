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
from pipeline.errors import ArtifactMissing, CheckFailed, ConfigError, RecipeMismatch, UsageError
from pipeline.run_dir import RunDir
from pipeline.stage import run_stage
from stages.config import check_unchanged
from stages.inspect.audit.by_name import audit_iteration
from stages.inspect.verify.verify import verify_run
from stages.wiring import Wiring
from tests.checked_run import ANSWERED, BY_LENGTH, HALF_NULL, LONG_ONES, NEVER, NOT_BY_LENGTH, STEPS, Place
from tests.finished import forge, problems_of
from tests.small_run import EXACT


@pytest.fixture
def place(tmp_path: Path, tiny_policy: Path) -> Place:
    return Place(tmp_path, tiny_policy)


def reasons(run: RunDir, iteration: int = 0) -> list[str | None]:
    return run.open(iteration, "batches").read()["drop_reason"].to_list()


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
    with place.session(config) as session, pytest.raises(CheckFailed):
        session.perform("batch", 0)
    assert problems(place.run) == []
    with pytest.raises(CheckFailed):
        place.go(config)  # the same again: the stored verdict
    calls, completions = place.calls, place.run.open(0, "completions").digest
    held = {name: place.run.open(0, name).digest for name in ("rewards", "advantages", "checks")}
    place.go(place.config(checks, EXACT))
    assert (place.calls, place.run.open(0, "completions").digest) == (calls, completions)
    assert place.run.has(0, "policy")
    assert place.run.open(0, "checks").read()["passed"].to_list() == [True]
    assert all(place.run.held(0, name, digest).is_dir() for name, digest in held.items())
    assert problems(place.run) == []


def test_the_message_of_a_held_iteration_names_the_condition_and_rows(place: Place) -> None:
    checks = '[[checks]]\nname = "short"\nwhere = "num_tokens > 4"\nseverity = "block"\n'
    with pytest.raises(CheckFailed) as raised:
        place.go(place.config(checks))
    ids = place.run.open(0, "checks").read()["failed_ids"][0].to_list()
    assert f"check 'short' (num_tokens > 4): {len(ids)} of 8 rows" in str(raised.value)
    assert ", ".join(ids[:3]) in str(raised.value)
    assert "grpo rows" in str(raised.value)


def test_other_checks_let_a_held_iteration_go_on(place: Place) -> None:
    with pytest.raises(CheckFailed):
        place.go(place.config(ANSWERED, HALF_NULL))
    rewards = place.run.open(0, "rewards").digest
    place.go(place.config(ANSWERED.replace("block", "warn"), HALF_NULL))
    assert place.run.open(0, "rewards").digest == rewards
    assert place.run.has(0, "policy")
    assert "warning: iteration 0: check 'judge_answered' (judge_answered): null rewards" in place.notes.lines[-1]


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
    place.go(place.config(LONG_ONES))
    ids = place.run.open(0, "checks").read()["failed_ids"][0].to_list()
    batches = place.run.open(0, "batches")
    dropped = batches.read().filter(pl.col("drop_reason") == "quarantined")
    assert sorted(dropped["completion_id"]) == sorted(ids)
    assert len(ids) == 2
    assert batches.manifest.drops["quarantined"] == 2
    assert place.run.read_metrics()["num_quarantined"].to_list() == [2]
    assert not set(place.run.open(0, "training_records").read()["completion_id"]) & set(ids)
    assert batches.manifest.inputs["checks"]["digest"] == place.run.open(0, "checks").digest
    assert any("2 completions do not train" in line for line in place.notes.lines)
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
    place.go(config, STEPS[:4])
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
    place.go(place.config(ANSWERED, iterations=2), iterations=2)
    capsys.readouterr()
    check(str(place.run.root), None, Format.jsonl)
    stored = [place.run.open(i, "checks").read().to_dicts()[0] for i in (0, 1)]
    assert printed(capsys) == [{"iteration": i, **row} for i, row in enumerate(stored)]
    file = tmp_path / "checks.toml"
    file.write_text(NEVER + '[[checks]]\nname = "jumps"\ncheck = "jumps"\n')
    with pytest.raises(typer.Exit) as raised:
        check(str(place.run.root), file, Format.jsonl)
    assert raised.value.exit_code == 1
    found = [(row["iteration"], row["name"], row["passed"]) for row in printed(capsys)]
    assert found == [(0, "never", False), (1, "never", False), (None, "jumps", True)]


def test_grpo_check_of_a_run_without_checks_asks_for_some(place: Place) -> None:
    place.go(place.config(""))
    with pytest.raises(ConfigError, match=r"config.resolved.json has no \[\[checks\]\]: name a file"):
        check(str(place.run.root), None, Format.table)


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


def test_verify_finds_an_iteration_that_has_trained_although_a_check_holds_it(place: Place) -> None:
    place.go(place.config(""))
    config = place.config(NEVER)
    place.run.record_config("", config.model_dump(mode="json"))
    run_stage(Wiring(config, place.run).call("check", 0), audit_iteration)
    assert [problem.row for problem in problems_of(place.run, "checks")] == ["never"]
