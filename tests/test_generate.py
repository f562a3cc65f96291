"""Generation: who writes which row, seeds, parts, and what a restart does."""

import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.artifact import Artifact, open_artifact
from pipeline.errors import ConfigError
from pipeline.stage import StageCall, StageResult, run_stage
from stages import generate
from stages.engines.base import Request
from stages.engines.scripted import ScriptedEngine
from stages.generate import GenerateConfig, check_room
from stages.members import MemberConfig
from stages.rollout.base import request_seed
from tests.builders import prompt_rows, write_artifact
from tests.policies import EOS


def answer(request: Request) -> list[int]:
    """Answer with a digit that the seed decides."""
    return [19 + request.seed % 10, EOS]


def make_call(root: Path, tiny_artifact: Artifact, config: GenerateConfig, num_prompts: int = 3) -> StageCall:
    rows = [{"prompt_id": f"p{i}", "prompt_token_ids": [5, 6 + i]} for i in range(num_prompts)]
    rows.append({"prompt_id": "long", "prompt_token_ids": [5] * 99, "drop_reason": "too_long"})
    place = root / "prompts"
    prompts = open_artifact(place) if place.exists() else write_artifact(place, "prompts", prompt_rows(*rows))
    inputs = {"prompts": prompts, **{f"policy:{m.name}": tiny_artifact for m in config.plan()}}
    parameters: dict[str, Any] = {
        "seed": 0,
        "iteration": 4,
        "policy_iterations": {m.name: 4 if m.policy == "current" else None for m in config.plan()},
    }
    return StageCall(generate.STAGE, config, inputs, {"completions": root / "completions"}, parameters)


def run(root: Path, tiny_artifact: Artifact, engine: ScriptedEngine | None = None, **config: Any) -> StageResult:
    call = make_call(root, tiny_artifact, GenerateConfig(max_tokens=8, **config))
    return run_stage(call, engine or ScriptedEngine(answer))


def test_every_prompt_that_is_used_gets_one_group(tmp_path: Path, tiny_artifact: Artifact) -> None:
    rows = run(tmp_path, tiny_artifact, group_size=4).main.read()
    groups = rows.group_by("group_id").agg(pl.col("prompt_id").n_unique(), pl.col("completion_index").sort())
    assert groups["prompt_id"].to_list() == [1, 1, 1]
    assert groups["completion_index"].to_list() == [[0, 1, 2, 3]] * 3
    assert "long" not in rows["prompt_id"]
    assert rows["completion_id"].n_unique() == 12


def test_text_token_ids_and_logprobs_belong_together(tmp_path: Path, tiny_artifact: Artifact) -> None:
    row = run(tmp_path, tiny_artifact, group_size=2).main.read().row(0, named=True)
    assert row["completion_token_ids"] == [19 + row["seed"] % 10, EOS]
    assert row["completion"] == str(row["seed"] % 10)
    assert row["sampling_logprobs"] == [-1.0, -1.0]
    assert row["finish_reason"] == "stop"


def test_seeds_are_all_different_and_depend_on_iteration_and_run(tmp_path: Path, tiny_artifact: Artifact) -> None:
    seeds = run(tmp_path, tiny_artifact, group_size=4).main.read()["seed"]
    assert seeds.n_unique() == 12
    assert request_seed(0, 4, 0, 0) in seeds.to_list()
    assert len({request_seed(r, i, 0, 0) for r in range(10) for i in range(10)}) == 100


def test_members_write_their_share_under_their_own_name(tmp_path: Path, tiny_artifact: Artifact) -> None:
    members = [MemberConfig(name="now", count=3), MemberConfig(name="sibling", policy="elsewhere", count=1)]
    engine = ScriptedEngine(answer)
    rows = run(tmp_path, tiny_artifact, engine, members=members).main.read()
    by_group = rows.sort("completion_index").group_by("group_id").agg("policy_name", "policy_iteration")
    assert by_group["policy_name"].to_list() == [["now"] * 3 + ["sibling"]] * 3
    assert by_group["policy_iteration"].to_list() == [[4, 4, 4, None]] * 3
    assert len(engine.policies) == 2  # one load for each author, not for each group


def test_a_restart_generates_the_missing_parts_only_and_ends_the_same(tmp_path: Path, tiny_artifact: Artifact) -> None:
    whole = run(tmp_path / "whole", tiny_artifact, group_size=2, groups_per_part=1).main

    class Killed(ScriptedEngine):
        def generate(self, requests: Any, sampling: Any, on_progress: Any) -> Any:
            if len(self.requests) == 4:
                raise KeyboardInterrupt
            return super().generate(requests, sampling, on_progress)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", tiny_artifact, Killed(answer), group_size=2, groups_per_part=1)
    engine = ScriptedEngine(answer)
    finished = run(tmp_path / "killed", tiny_artifact, engine, group_size=2, groups_per_part=1).main
    assert len(engine.requests) == 2  # one part of three
    assert finished.digest == whole.digest
    assert open_artifact(tmp_path / "killed" / "completions").manifest.rows == 6


def test_no_room_for_a_prompt_is_refused() -> None:
    assert check_room(GenerateConfig(max_tokens=100), context=128) == 28
    with pytest.raises(ConfigError, match=r"max_tokens is 128, but the model's context is 128 tokens"):
        check_room(GenerateConfig(max_tokens=128), context=128)


def test_a_part_is_written_while_the_next_is_sampled(tmp_path: Path, tiny_artifact: Artifact) -> None:
    first = tmp_path / ".completions.partial" / "part-00000.parquet"
    seen: list[bool] = []

    def wait(request: Request) -> list[int]:
        if request.prompt_token_ids == [5, 7]:  # the second prompt, a part of its own
            deadline = time.monotonic() + 300
            while not first.is_file() and time.monotonic() < deadline:
                time.sleep(0.005)
            seen.append(first.is_file())
        return answer(request)

    run(tmp_path, tiny_artifact, ScriptedEngine(wait), group_size=2, groups_per_part=1)
    assert seen == [True, True]


def test_a_part_that_cannot_be_written_is_told_and_the_others_are_kept(tmp_path: Path, tiny_artifact: Artifact) -> None:
    """The second prompt is answered with a token that no tokenizer has; its neighbours' parts stay."""

    def odd(request: Request) -> list[int]:
        return [-1] if request.prompt_token_ids == [5, 7] else answer(request)

    with pytest.raises(OverflowError):
        run(tmp_path, tiny_artifact, ScriptedEngine(odd), group_size=2, groups_per_part=1)
    hidden = tmp_path / ".completions.partial"
    assert sorted(path.name for path in hidden.glob("part-*")) == ["part-00000.parquet", "part-00002.parquet"]
    again = run(tmp_path, tiny_artifact, group_size=2, groups_per_part=1).main
    assert again.digest == run(tmp_path / "other", tiny_artifact, group_size=2, groups_per_part=1).main.digest
