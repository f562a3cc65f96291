"""Pruning: checkpoints go, rows and manifests stay, and what a run needs is never dropped."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from flows.commands import prune as command
from flows.printing import Format
from flows.session import Session
from pipeline.artifact import PRUNED_NOTE, open_artifact, pruned_files
from pipeline.config import validate
from pipeline.errors import ArtifactMissing, ConfigError, UsageError
from pipeline.prune import prunable, prune
from pipeline.retention import RetentionConfig
from pipeline.run_dir import RunDir
from pipeline.runs import lock
from stages.config import recorded_config
from stages.engines.scripted import ScriptedEngine
from tests.finished import answer, finished_run
from tests.small_run import perform_iteration

GOING = {"policy": "model.safetensors", "optimizer": "state.safetensors"}


def files(run: RunDir) -> set[str]:
    return {p.relative_to(run.root).as_posix() for p in run.root.rglob("*") if p.is_file()}


def test_only_weights_and_optimizer_states_of_older_policies_go(run: RunDir) -> None:
    before = files(run)
    items = prune(prunable(run, RetentionConfig(keep_last=1), []))
    going = [(1, ("state.safetensors",)), (1, ("model.safetensors",))]  # the state first: it alone is of no use
    assert [(item.num_updates, item.files) for item in items] == going
    assert before - files(run) == {f"iterations/000000/{place}/{name}" for place, name in GOING.items()}
    assert files(run) - before == {f"iterations/000000/{place}/{PRUNED_NOTE}" for place in GOING}


def test_the_manifest_stays_and_the_note_repeats_its_hashes(run: RunDir) -> None:
    digest = open_artifact(run.policy_before(1)).digest
    list(prune(prunable(run, RetentionConfig(keep_last=1), [])))
    artifact = open_artifact(run.policy_before(1))
    assert artifact.digest == digest
    note = json.loads((artifact.path / PRUNED_NOTE).read_text())["files"]
    assert note == {"model.safetensors": artifact.manifest.files["model.safetensors"]["sha256"]}
    assert pruned_files(artifact) == {"model.safetensors"}


@pytest.mark.parametrize(("keep", "going"), [(1, [1, 1]), (2, []), (9, [])])
def test_the_last_policies_stay(run: RunDir, keep: int, going: list[int]) -> None:
    assert [item.num_updates for item in prunable(run, RetentionConfig(keep_last=keep), [])] == going


def test_the_initial_policy_goes_only_when_asked(run: RunDir) -> None:
    assert [item.num_updates for item in prunable(run, RetentionConfig(keep_last=1), [], initial=True)] == [0, 1, 1]


def test_a_needed_policy_stays(run: RunDir) -> None:
    assert prunable(run, RetentionConfig(keep_last=1), [1]) == []
    with pytest.raises(UsageError, match=r"the initial policy of .* must stay"):
        prunable(run, RetentionConfig(keep_last=1), [0], initial=True)


def test_the_last_policy_with_a_state_of_the_optimizer_stays(run: RunDir) -> None:
    """As after a full disk: the last state was lost, and without the one before it all would be trained again."""
    (run.place(1, "optimizer") / GOING["optimizer"]).unlink()
    assert prunable(run, RetentionConfig(keep_last=1), []) == []
    shutil.rmtree(run.place(1, "optimizer"))
    assert prunable(run, RetentionConfig(keep_last=1), []) == []
    shutil.rmtree(run.place(0, "optimizer"))
    assert [item.num_updates for item in prunable(run, RetentionConfig(keep_last=1), [])] == [1]
    with pytest.raises(UsageError, match="the last one with a state of the optimizer"):
        prunable(run, RetentionConfig(keep_last=1), [], initial=True)


def test_no_policy_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"keep_last: Input should be greater than or equal to 1, found 0"):
        validate(RetentionConfig, {"keep_last": 0}, "grpo prune")


def test_the_command_has_the_rules_of_the_table(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    rules = {"keep_every": 1, "dry_run": True, "initial": False, "format_": Format.jsonl}
    command.prune(run.root, 1, **rules)
    assert capsys.readouterr().out == ""
    command.prune(run.root, 1, states="last", **rules)
    (row,) = capsys.readouterr().out.splitlines()
    assert json.loads(row)["checkpoint"] == "iterations/000000/optimizer"
    with pytest.raises(ConfigError, match=r"best_by: Input should be 'eval_pass_at_1'"):
        command.prune(run.root, 1, best_by="reward", **rules)


def test_a_second_pruning_finds_nothing(run: RunDir) -> None:
    list(prune(prunable(run, RetentionConfig(keep_last=1), [])))
    assert prunable(run, RetentionConfig(keep_last=1), []) == []


def test_a_pruning_that_was_killed_goes_on(run: RunDir) -> None:
    """The note is whole before the first file goes; the rest goes next time, and the note still names all."""
    policy = open_artifact(run.policy_before(1))
    items = prunable(run, RetentionConfig(keep_last=1), [])
    list(prune(items))
    shutil.copyfile(run.policy_before(2) / "model.safetensors", policy.path / "model.safetensors")
    (again,) = prune(prunable(run, RetentionConfig(keep_last=1), []))
    assert again.files == ("model.safetensors",)
    assert pruned_files(policy) == {"model.safetensors"}


def test_a_policy_of_another_run_is_left_alone(run: RunDir, tmp_path: Path) -> None:
    (run.policy_before(1)).rename(tmp_path / "theirs")
    run.policy_before(1).symlink_to(tmp_path / "theirs", target_is_directory=True)
    assert [item.artifact.manifest.dataset for item in prunable(run, RetentionConfig(keep_last=1), [])] == ["optimizer"]


def test_policies_of_coming_groups_are_kept_by_the_command(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads(run.resolved_config.read_text())
    config["generate"]["members"] = [
        {"name": "now", "policy": "current", "count": 2},
        {"name": "before", "policy": "age:1", "count": 2},
    ]
    config["generate"]["group_size"] = None
    run.resolved_config.write_text(json.dumps(config))
    command.prune(run.root, 1, initial=False, dry_run=False, format_=Format.jsonl)
    assert capsys.readouterr().out == ""


def test_a_dry_run_drops_nothing(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(run)
    command.prune(run.root, 1, initial=False, dry_run=True, format_=Format.table)
    assert "bytes of 2 checkpoints would be dropped" in capsys.readouterr().out
    assert files(run) - {".lock"} == before - {".lock"}


def test_the_command_prints_what_went(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    command.prune(run.root, 1, initial=False, dry_run=False, format_=Format.jsonl)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["checkpoint"] for row in rows] == ["iterations/000000/optimizer", "iterations/000000/policy"]
    assert [(row["updates"], row["files"]) for row in rows] == [(1, 1), (1, 1)]
    assert not (run.policy_before(1) / "model.safetensors").exists()


def test_a_run_that_is_being_written_is_not_pruned(run: RunDir) -> None:
    with lock(run), pytest.raises(UsageError, match="another process is writing"):
        command.prune(run.root, 1, initial=False, dry_run=False, format_=Format.table)


def test_a_pruned_run_goes_on(tmp_path: Path, tiny_policy: Path) -> None:
    run = finished_run(tmp_path, tiny_policy)
    list(prune(prunable(run, RetentionConfig(keep_last=1), [])))
    with closing(Session(recorded_config(run), run, _engine=ScriptedEngine(answer))) as session:
        for k in range(3):
            perform_iteration(session, k)


def test_an_update_from_a_pruned_policy_is_refused(tmp_path: Path, tiny_policy: Path) -> None:
    run = finished_run(tmp_path, tiny_policy)
    list(prune(prunable(run, RetentionConfig(keep_last=1), [])))
    for name in ("policy", "training_records", "optimizer_steps"):
        shutil.rmtree(run.place(1, name))
    with (
        closing(Session(recorded_config(run), run, _engine=ScriptedEngine(answer))) as session,
        pytest.raises(ArtifactMissing, match="was dropped by `grpo prune`"),
    ):
        session.perform("update", 1)
