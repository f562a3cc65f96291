"""Scoring: how a function is called, and what becomes of its failures."""

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.errors import RewardError
from pipeline.stage import StageCall, run_stage
from pipeline.writer import ArtifactWriter
from stages import score as stage
from stages.rewards.base import Score
from stages.rewards.functions import RewardConfig
from stages.rewards.scorer import Scorer, open_scorer
from stages.score import FailureCounter, ScoreConfig, check_rewards, find_rewards, score_rows, slices
from tests.builders import completion_rows, fill, new_writer, prompt_rows, seal, write_artifact


def length(completion: str) -> float:
    return float(len(completion))


def everything(completion: str, prompt: str, reference: str | None, city: str, scale: float = 1.0) -> Score:
    return Score(scale, {"seen": [completion, prompt, reference, city]})


def troublesome(completion: str) -> Any:
    if completion == "raise":
        raise ValueError("no number in it")
    if completion == "late":
        raise TimeoutError("no decision within 3 s")
    return {"nan": math.nan, "none": None, "text": "not a number", "infinite": math.inf}.get(completion, 1.0)


class Waits:
    """An object whose call is async."""

    async def __call__(self, completion: str) -> float:
        return float(len(completion))


waits, waits_partly = Waits(), partial(Waits())


def rewards(function: str, **arguments: Any) -> ScoreConfig:
    return ScoreConfig(rewards=[RewardConfig(name="r", function=function, arguments=arguments)])


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    """Return a scorer that keeps its processes from test to test."""
    with open_scorer(1) as scorer:
        yield scorer


def score(scorer: Scorer, config: ScoreConfig, *texts: str, **prompt: Any) -> pl.DataFrame:
    completions = completion_rows(*({"completion": text} for text in texts))
    return score_rows(completions, prompt_rows(prompt), config, scorer)


def test_a_function_gets_what_its_signature_names(scorer: Scorer) -> None:
    config = rewards("tests.test_score:everything", scale=2.0)
    row = score(scorer, config, "Rome!", reference_answer="Rome", metadata=json.dumps({"city": "R"})).row(0, named=True)
    assert row["reward"] == 2.0
    assert json.loads(row["detail"]) == {"seen": ["Rome!", "3 + 4", "Rome", "R"]}


@pytest.mark.parametrize("name", ["waits", "waits_partly"])
def test_an_object_whose_call_is_async_is_awaited(scorer: Scorer, name: str) -> None:
    assert score(scorer, rewards(f"tests.test_score:{name}"), "7", "seven")["reward"].to_list() == [1.0, 5.0]


def test_several_functions_give_a_row_each(scorer: Scorer) -> None:
    config = ScoreConfig(
        rewards=[
            RewardConfig(name="length", function="tests.test_score:length"),
            RewardConfig(name="exact", function="stages.rewards.answers.matching:exact_match"),
        ]
    )
    rows = score(scorer, config, "7", "seven", reference_answer="7").select("reward_name", "reward").rows()
    assert rows == [("length", 1.0), ("exact", 1.0), ("length", 5.0), ("exact", 0.0)]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("raise", "ValueError: no number in it (test_score.py:34)"),
        ("nan", "the function returned nan"),
        ("infinite", "the function returned inf"),
        ("none", "the function returned None"),
        ("text", "the function returned a str, expected a number, None or Score"),
    ],
)
def test_a_failure_is_a_null_reward_with_its_error_and_never_zero(scorer: Scorer, text: str, error: str) -> None:
    rows = score(scorer, rewards("tests.test_score:troublesome"), "fine", text)
    assert rows["reward"].to_list() == [1.0, None]
    assert rows["error"].to_list() == [None, error]


def test_too_many_failures_stop_the_stage_with_an_example(scorer: Scorer) -> None:
    config = rewards("tests.test_score:troublesome")
    rows = score(scorer, config, "fine", "raise")
    FailureCounter(find_rewards(config), num_completions=2, max_failed_share=0.5).add(rows)
    with pytest.raises(RewardError, match=r"'r' could not score 1 of 2 .* first error: ValueError: no number in it"):
        FailureCounter(find_rewards(config), num_completions=2, max_failed_share=0.49).add(rows)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no.such.module:f", "cannot be imported .*No module named 'no'"),
        ("tests.test_score:absent", "tests.test_score has no function absent"),
        ("length", "not of the form module:function"),
    ],
)
def test_a_function_that_cannot_be_imported_is_named(function: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        find_rewards(rewards(function))


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(RewardError, match=r"has no parameters \['wide'\]"):
        find_rewards(rewards("tests.test_score:length", wide=1))


def test_the_identity_of_a_reward_depends_on_its_arguments() -> None:
    one, two = (find_rewards(rewards("tests.test_score:everything", scale=s))[0].recipe for s in (1.0, 2.0))
    assert one != two


def test_reasoning_gym_verifies_with_the_tasks_own_rule(scorer: Scorer) -> None:
    entry = {"question": "7 + 5 =", "answer": "12", "metadata": {"source_dataset": "chain_sum"}}
    config = rewards("stages.rewards.answers.reasoning_gym:verify")
    rows = score(scorer, config, "12", " 12\n", "13", metadata=json.dumps({"entry": entry}))
    right, padded, wrong = rows["reward"].to_list()
    assert (right, padded) == (1.0, 1.0)
    assert wrong < 0.1


def test_exact_match_without_a_reference_is_unknown(scorer: Scorer) -> None:
    assert score(scorer, rewards("stages.rewards.answers.matching:exact_match"), "7")["reward"].to_list() == [None]


def anything(completion: str, **rest: Any) -> float:
    return float(rest.get("scale", 1.0))


def test_arguments_reach_a_function_that_takes_anything(scorer: Scorer) -> None:
    assert score(scorer, rewards("tests.test_score:anything", scale=5.0), "x")["reward"].to_list() == [5.0]


def misspelt(completion: str, refernce: str) -> float:
    return 1.0


def test_a_parameter_that_nothing_fills_is_named_before_anything_is_scored() -> None:
    with pytest.raises(RewardError, match=r"wants \['refernce'\], but there is only .*'reference'"):
        check_rewards(rewards("tests.test_score:misspelt"), {})
    check_rewards(rewards("tests.test_score:misspelt"), {"refernce": "x"})


def test_failures_add_up_over_the_parts_of_a_dataset(scorer: Scorer) -> None:
    config = rewards("tests.test_score:troublesome")
    rows = score(scorer, config, "fine", "raise")
    counter = FailureCounter(find_rewards(config), num_completions=4, max_failed_share=0.25)
    counter.add(rows)
    assert str(counter) == ", r: 1 failed"
    with pytest.raises(RewardError, match="'r' could not score 2 of 4 completions"):
        counter.add(rows)


def test_calls_that_ran_out_of_time_are_counted_apart_and_stop_the_stage_as_well(scorer: Scorer) -> None:
    config = rewards("tests.test_score:troublesome")
    rows = score(scorer, config, "fine", "raise", "late", "late")
    counter = FailureCounter(find_rewards(config), num_completions=4, max_failed_share=0.75)
    counter.add(rows)
    assert str(counter) == ", r: 1 failed, 2 timed out"
    with pytest.raises(RewardError, match=r"'r' could not score 3 of 4 completions \(1 failed, 2 timed out\), "):
        FailureCounter(find_rewards(config), num_completions=4, max_failed_share=0.7).add(rows)


def test_slices_go_over_the_borders_of_files_and_lose_no_row(tmp_path: Path) -> None:
    rows = completion_rows(*({"completion": str(i)} for i in range(5)))
    writer = new_writer(tmp_path / "completions", "completions")
    writer.write_part(0, rows[:3])
    writer.write_part(1, rows[3:])
    found = [part["completion"].to_list() for part in slices(seal(writer), ["completion"], 2)]
    assert found == [["0", "1"], ["2", "3"], ["4"]]


def stopped_call(folder: Path, monkeypatch: pytest.MonkeyPatch, kept: list[float | None]) -> StageCall[Any, Any]:
    """Return the scoring of three texts in parts of two rows, of which a killed process has left the first one.

    No function of this config gives the rewards that stand in it, so that they show whether it was kept.
    """
    monkeypatch.setattr(stage, "ROWS_PER_PART", 2)
    texts = completion_rows({"completion": "a"}, {"completion": "bb"}, {"completion": "ccc"})
    config = rewards("tests.test_score:length")
    inputs = {"completions": write_artifact(folder / "completions", "completions", texts)}
    call = StageCall(stage.STAGE, config, inputs, {"rewards": folder / "rewards"})
    writer = ArtifactWriter(folder / "rewards", "rewards", call.recipe())
    writer.open()
    left = [
        {"completion_id": f"c{i}", "reward": reward, "error": "too long" if reward is None else None}
        for i, reward in enumerate(kept)
    ]
    writer.write_part(0, fill("rewards", left, group_id="g", reward_name="r", reward_recipe="r"))
    return call


def test_parts_that_a_killed_process_has_scored_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = stopped_call(tmp_path, monkeypatch, [8.0, 9.0])
    with open_scorer() as scorer:
        assert run_stage(call, scorer).main.read()["reward"].to_list() == [8.0, 9.0, 3.0]


def test_failures_in_parts_that_were_kept_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = stopped_call(tmp_path, monkeypatch, [8.0, None])
    with (
        open_scorer() as scorer,
        pytest.raises(RewardError, match=r"could not score 1 of 3 completions.* first error: too long"),
    ):
        run_stage(call, scorer)


def no_answer(completion: str) -> Score:
    return Score(None, {"reason": "no reference answer"})


def test_a_stopped_stage_says_why_the_function_could_not_tell(scorer: Scorer) -> None:
    config = rewards("tests.test_score:no_answer")
    rows = score(scorer, config, "x")
    with pytest.raises(RewardError, match="first error: no reference answer"):
        FailureCounter(find_rewards(config), num_completions=1, max_failed_share=0.1).add(rows)
