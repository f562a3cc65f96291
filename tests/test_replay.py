"""Replay: what is stored is computed again and compared; the run is only read."""

import json
from pathlib import Path

import polars as pl
import pytest

from flows.commands.replay import print_replay
from flows.printing import Format
from flows.replayer import STAGES
from pipeline.errors import ArtifactError, UsageError
from pipeline.prune import prunable, prune
from pipeline.retention import RetentionConfig
from pipeline.run_dir import RunDir
from stages.engines.base import Request
from stages.engines.scripted import ScriptedEngine
from tests.finished import answer, forge, replace_value
from tests.policies import EOS


def rows_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_stage_of_a_run_is_computed_again_to_the_same_digests(
    original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(original.rglob("*"))
    assert print_replay(original, None, None, Format.jsonl, engine=ScriptedEngine(answer))
    rows = rows_of(capsys)
    # the first evaluation; eight stages with ten outputs, of which iteration 0 has no evaluation
    expected = [(-1, "equal")] + [(0, "equal")] * 9 + [(1, "equal")] * 10
    assert [(r["iteration"], r["result"]) for r in rows] == expected
    assert {r["stage"] for r in rows} == {*STAGES} - {"logprobs", "check"}  # of offline iterations, of runs with checks
    assert sorted(original.rglob("*")) == before


def test_one_stage_is_replayed_where_it_is_stored(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_replay(original, None, "evaluate", Format.jsonl, engine=ScriptedEngine(answer))
    assert [(r["iteration"], r["stage"]) for r in rows_of(capsys)] == [(-1, "evaluate"), (1, "evaluate")]
    with pytest.raises(UsageError, match="no stored results of evaluate"):
        print_replay(original, [0], "evaluate", Format.jsonl)


def test_an_artifact_that_cannot_be_computed_does_not_lose_the_others(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    list(prune(prunable(run, RetentionConfig(keep_last=1), [], initial=True)))
    with pytest.raises(ArtifactError, match="1 of 1 artifacts could not be computed again, which is no proof"):
        print_replay(run.root, [1], "update", Format.jsonl)
    (row,) = rows_of(capsys)
    assert row["result"] == "not computed"
    assert "was dropped by `grpo prune`" in str(row["found"])


def test_a_forged_reward_that_no_file_can_tell_is_found(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    forge(run, run.place(1, "rewards"), replace_value("reward", 2, 0.25))
    assert not print_replay(run.root, [1], "score", Format.jsonl)
    (row,) = rows_of(capsys)
    stored = pl.read_parquet(run.place(1, "rewards") / "*.parquet")["completion_id"][2]
    assert row["result"] == "differs"
    assert str(row["found"]).startswith(f"rewards row 2 {stored}: reward stored 0.25, computed ")


@pytest.mark.parametrize(
    ("error", "result", "found"),
    [
        ("no reward within 60 s (time_limit)", "timed out", "1 timed out then, scored now; the first: rewards row 2 "),
        (
            "TimeoutError: no decision within 3 s",
            "timed out",
            "1 timed out then, scored now; the first: rewards row 2 ",
        ),
        ("ValueError: no number in it", "differs", "rewards row 2 "),
    ],
)
def test_a_reward_that_ran_out_of_time_is_told_from_one_that_differs(
    run: RunDir, capsys: pytest.CaptureFixture[str], error: str, result: str, found: str
) -> None:
    forge(run, run.place(1, "rewards"), replace_value("reward", 2, None))
    forge(run, run.place(1, "rewards"), replace_value("error", 2, error))
    assert not print_replay(run.root, [1], "score", Format.jsonl)
    (row,) = rows_of(capsys)
    assert row["result"] == result
    assert str(row["found"]).startswith(found)


def test_answers_of_another_model_are_found(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    def other(_: Request) -> list[int]:
        return [25, EOS]

    assert not print_replay(run.root, [0], "generate", Format.jsonl, engine=ScriptedEngine(other))
    (row,) = rows_of(capsys)
    assert "completion_token_ids stored" in str(row["found"])


def test_a_recipe_that_would_be_another_one_now_is_told_and_not_computed(
    run: RunDir, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = json.loads(run.resolved_config.read_text())
    config["normalize"]["eps"] = 0.5
    run.resolved_config.write_text(json.dumps(config))
    assert not print_replay(run.root, [0], "normalize", Format.jsonl, scratch=tmp_path / "scratch")
    (row,) = rows_of(capsys)
    assert (row["result"], row["found"], row["computed"]) == ("other recipe", "eps was 0.0001, now 0.5", None)
    assert not (tmp_path / "scratch").exists()


def test_scratch_keeps_what_was_computed(original: Path, tmp_path: Path) -> None:
    assert print_replay(original, [1], "batch", Format.table, scratch=tmp_path / "scratch")
    assert (tmp_path / "scratch" / "000001" / "batches" / "part-00000.parquet").is_file()


def test_an_unknown_stage_is_refused(original: Path) -> None:
    with pytest.raises(UsageError, match="no stage 'train': choose one of prompts, generate"):
        print_replay(original, [0], "train", Format.table)
