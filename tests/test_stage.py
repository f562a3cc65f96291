"""Stages: reuse, refusal, debris, and what a recipe depends on."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import Artifact
from pipeline.config import StrictModel
from pipeline.errors import ArtifactDamaged, OutOfSpace, RecipeMismatch
from pipeline.manifest import Recipe, is_finished, recipe_differences
from pipeline.stage import Stage, StageCall, StageTask, run_stage
from tests.builders import prompt_rows, reward_rows, write_artifact


class Config(StrictModel):
    value: float = 1.0


Task = StageTask[Config, None]


class Counter:
    """A stage that counts how often it computes."""

    def __init__(self, outputs: tuple[str, ...] = ("rewards",)) -> None:
        self.calls = 0
        self.outputs = outputs
        self.stage = Stage("score", version=1, config=Config, compute=self.compute)

    def compute(self, task: Task) -> None:
        self.calls += 1
        for writer in task.writers.values():
            writer.write_part(0, reward_rows(a=[task.config.value, 0.0]))

    def call(
        self, root: Path, value: float = 1.0, inputs: dict[str, Artifact] | None = None, **parameters: Any
    ) -> StageCall[Config, None]:
        places = {name: root / name for name in self.outputs}
        return StageCall(self.stage, Config(value=value), inputs or {}, places, parameters)


def test_the_same_call_computes_once(tmp_path: Path) -> None:
    counter = Counter()
    first = run_stage(counter.call(tmp_path), None)
    second = run_stage(counter.call(tmp_path), None)
    assert (first.reused, second.reused, counter.calls) == (False, True, 1)
    assert first.main.digest == second.main.digest


def test_an_artifact_of_another_recipe_is_refused_and_left_alone(tmp_path: Path) -> None:
    counter = Counter()
    before = run_stage(counter.call(tmp_path), None).main.digest
    with pytest.raises(RecipeMismatch, match=r"score\.value was 1\.0, now 2\.0.*new run directory"):
        run_stage(counter.call(tmp_path, value=2.0), None)
    assert run_stage(counter.call(tmp_path), None).main.digest == before


def test_the_refusal_names_a_changed_input(tmp_path: Path) -> None:
    counter = Counter()
    one = write_artifact(tmp_path / "one", "rewards", reward_rows(a=[1.0]))
    two = write_artifact(tmp_path / "two", "rewards", reward_rows(a=[0.0]))
    run_stage(counter.call(tmp_path, inputs={"x": one}), None)
    with pytest.raises(RecipeMismatch, match=f"its input x was {one.digest[:12]}, now {two.digest[:12]}"):
        run_stage(counter.call(tmp_path, inputs={"x": two}), None)


def test_the_recipe_does_not_depend_on_where_things_lie(tmp_path: Path) -> None:
    counter = Counter()
    here = write_artifact(tmp_path / "here", "rewards", reward_rows(a=[1.0]))
    there = write_artifact(tmp_path / "there", "rewards", reward_rows(a=[1.0]))
    assert (
        counter.call(tmp_path / "x", inputs={"i": here}).recipe()
        == counter.call(tmp_path / "y", inputs={"i": there}).recipe()
    )


def test_the_recipe_depends_on_parameters(tmp_path: Path) -> None:
    counter = Counter()
    assert counter.call(tmp_path, seed=0).recipe() != counter.call(tmp_path, seed=1).recipe()


def test_a_damaged_artifact_is_not_reused(tmp_path: Path) -> None:
    counter = Counter()
    part = run_stage(counter.call(tmp_path), None).main.files()[0]
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(ArtifactDamaged, match="delete the directory"):
        run_stage(counter.call(tmp_path), None)


def test_a_stage_whose_main_output_is_missing_is_computed_again_whole(tmp_path: Path) -> None:
    """A kill between the seals of two outputs leaves the first one alone."""
    rows = {"rewards": reward_rows(a=[1.0, 0.0]), "prompts": prompt_rows({})}
    calls = []

    def compute(task: Task) -> None:
        calls.append(task.recipe)
        for name, writer in task.writers.items():
            writer.write_part(0, rows[name])

    stage = Stage("both", 1, Config, compute)
    call = StageCall(stage, Config(), {}, {name: tmp_path / name for name in ("prompts", "rewards")})
    run_stage(call, None)
    shutil.rmtree(tmp_path / "rewards")
    assert not run_stage(call, None).reused
    assert run_stage(call, None).reused
    assert len(calls) == 2


def test_a_failing_stage_leaves_no_artifact_and_the_next_start_succeeds(tmp_path: Path) -> None:
    counter = Counter()

    def fail(task: Task) -> None:
        task.writer.write_part(0, reward_rows(a=[1.0, 0.0]))
        raise RuntimeError("killed")

    broken = Stage("score", version=1, config=Config, compute=fail)
    call = counter.call(tmp_path)
    with pytest.raises(RuntimeError, match="killed"):
        run_stage(StageCall(broken, call.config, call.inputs, call.places), None)
    assert not is_finished(tmp_path / "rewards")
    assert not run_stage(call, None).reused


def test_a_full_device_is_one_clear_error(tmp_path: Path) -> None:
    def full(task: Task) -> None:
        raise OSError(28, "No space left on device")

    call = StageCall(Stage("score", 1, Config, full), Config(), {}, {"rewards": tmp_path / "rewards"})
    with pytest.raises(OutOfSpace, match=r"no space left on the device that holds .*run the same command again"):
        run_stage(call, None)


def test_on_a_full_device_finished_parts_stay_and_half_a_checkpoint_makes_room(tmp_path: Path) -> None:
    def full(task: Task) -> None:
        task.writer.write_part(0, reward_rows(a=[1.0, 0.0]))
        (task.writer.directory / "optimizer").mkdir()
        (task.writer.directory / "optimizer" / "half.safetensors").touch()
        (task.writer.directory / "model.safetensors").touch()
        raise OSError(28, "No space left on device")

    call = StageCall(Stage("score", 1, Config, full), Config(), {}, {"rewards": tmp_path / "rewards"})
    with pytest.raises(OutOfSpace):
        run_stage(call, None)
    assert {p.name for p in (tmp_path / ".rewards.partial").iterdir()} == {"recipe", "part-00000.parquet"}


def test_recipes_differ_in_stage_config_and_inputs() -> None:
    chosen_a, chosen_b = {"kept": 1, "changed": 1, "older": None}, {"kept": 1, "changed": 1.0, "new": 5}
    inputs_a, inputs_b = {"prompts": "aa", "completions": "bb"}, {"prompts": "aa", "completions": "cc", "policy": "dd"}
    # of what only one has chosen, the other's value is its default
    a = Recipe("score", 1, chosen_a, inputs_a, {**chosen_a, "new": 4})
    b = Recipe("score", 2, chosen_b, inputs_b, chosen_b)
    found = [
        ("stage", "", "score 1", "score 2"),
        ("config", "changed", 1, 1.0),
        ("config", "new", 4, 5),
        ("input", "completions", "bb", "cc"),
        ("input", "policy", None, "dd"),
    ]
    assert list(recipe_differences(a, b)) == found
    assert list(recipe_differences(a, a)) == []
    assert ("config", "older", None, "(absent)") in list(recipe_differences(a, b, "(absent)"))
