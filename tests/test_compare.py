"""Comparison of runs: settings key by key, the first recipe, the first row."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest

from flows.commands.diff import print_diff
from flows.printing import Format
from pipeline.artifact import open_artifact
from pipeline.run_dir import RunDir
from stages.inspect.run_diff import Difference, compare_runs, first_difference
from tests.builders import completion_rows, write_artifact
from tests.finished import finished_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Path:
    """Return a folder with two runs that differ in the learning rate, not to be changed."""
    path = tmp_path_factory.mktemp("compare")
    finished_run(path, tiny_policy, name="one", learning_rate=1e-3)
    finished_run(path, tiny_policy, name="two", learning_rate=2e-3)
    return path / "runs"


def test_a_run_equals_itself_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "one", tmp_path / "elsewhere")
    assert compare_runs(RunDir(folder / "one"), RunDir(tmp_path / "elsewhere")) == []


def test_the_first_recipe_and_the_first_row_are_named(folder: Path) -> None:
    found = compare_runs(RunDir(folder / "one"), RunDir(folder / "two"))
    assert found == [
        Difference("config", "update.learning_rate", "setting", 0.001, 0.002),
        Difference("recipe", "iteration 0 training_records", "config learning_rate", 0.001, 0.002),
        Difference("rows", "iteration 0 optimizer_steps row 0", "learning_rate", 0.001, 0.002),
    ]


def test_a_run_that_ended_earlier_differs_in_what_is_missing(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "one", tmp_path / "shorter")
    shutil.rmtree(RunDir(tmp_path / "shorter").iteration(1))
    (found,) = compare_runs(RunDir(folder / "one"), RunDir(tmp_path / "shorter"))
    assert (found.kind, found.where, found.b) == ("missing", "iteration 1 prompts", "absent")


def test_settings_in_lists_are_compared_by_their_key(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "one", tmp_path / "renamed")
    run = RunDir(tmp_path / "renamed")
    config = json.loads(run.resolved_config.read_text())
    config["score"]["rewards"][0]["arguments"] = {"strict": True}
    run.resolved_config.write_text(json.dumps(config))
    assert compare_runs(RunDir(folder / "one"), run) == [
        Difference("config", "score.rewards.0.arguments", "setting", {}, "(absent)"),
        Difference("config", "score.rewards.0.arguments.strict", "setting", "(absent)", True),
    ]


def test_rows_that_differ_in_ids_alone_say_the_same(tmp_path: Path) -> None:
    a = write_artifact(tmp_path / "a", "completions", completion_rows({}, {}))
    b = write_artifact(tmp_path / "b", "completions", completion_rows({"completion_id": "x", "group_id": "y"}, {}))
    assert first_difference("completions", a, b) == []


def test_the_first_differing_row_is_given_with_each_column(tmp_path: Path) -> None:
    a = write_artifact(tmp_path / "a", "completions", completion_rows({}, {}, {}))
    b = write_artifact(
        tmp_path / "b", "completions",
        completion_rows({}, {"completion": "8", "completion_token_ids": [8, 1]}, {"completion": "9"}),
    )  # fmt: skip
    assert first_difference("completions", a, b) == [
        Difference("rows", "completions row 1 c1", "completion_token_ids", [7, 1], [8, 1]),
        Difference("rows", "completions row 1 c1", "completion", "7", "8"),
    ]


def test_equal_rows_followed_by_more_differ_in_their_number(tmp_path: Path) -> None:
    a = write_artifact(tmp_path / "a", "completions", completion_rows({}, {}))
    b = write_artifact(tmp_path / "b", "completions", completion_rows({}))
    assert first_difference("completions", a, b) == [Difference("rows", "completions", "number of rows", 2, 1)]


def test_no_rows_at_all_are_equal(tmp_path: Path) -> None:
    a = write_artifact(tmp_path / "a", "completions", completion_rows({})[:0])
    assert first_difference("completions", a, a) == []


def test_policies_differ_in_files(folder: Path) -> None:
    places = [RunDir(folder / name).policy_before(1) for name in ("one", "two")]
    a, b = (open_artifact(place) for place in places)
    odd = [d.what for d in first_difference("policy", a, b)]
    assert odd == ["file model.safetensors"]


def test_the_command_says_whether_runs_are_equal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_diff(folder / "one", folder / "one", Format.table)
    assert "are equal" in capsys.readouterr().out
    assert not print_diff(folder / "one", folder / "two", Format.jsonl)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert pl.DataFrame(rows)["kind"].to_list() == ["config", "recipe", "rows"]
