"""ScriptedEngine: answers from a script, cut where a model would stop."""

from pathlib import Path

import pytest

from pipeline.errors import EngineError
from stages.engines.base import Generated, Request, Sampling
from stages.engines.scripted import ScriptedEngine
from tests.test_engine_process import SAMPLING


def scripted_rows(engine: ScriptedEngine, *prompts: list[int], sampling: Sampling = SAMPLING) -> list[Generated]:
    engine.load(Path("policy"))
    return engine.generate([Request(prompt, seed=i) for i, prompt in enumerate(prompts)], sampling, None)


def test_script_gives_the_answers_of_a_prompt_by_turns_and_starts_over_in_the_next_call() -> None:
    engine = ScriptedEngine({(5,): [[7, 1], [8, 1]], (6,): [[9, 1]]})
    for _ in range(2):
        rows = scripted_rows(engine, [5], [6], [5], [5])
        assert [row.token_ids for row in rows] == [[7, 1], [9, 1], [8, 1], [7, 1]]


def test_script_is_cut_where_a_model_would_stop() -> None:
    sampling = Sampling(temperature=1.0, max_tokens=3, stop_token_ids=(1, 2))
    rows = scripted_rows(ScriptedEngine({(5,): [[7, 2, 8], [7, 7, 7, 7], [7]]}), [5], [5], [5], sampling=sampling)
    assert [(row.token_ids, row.finish_reason, row.stop_reason) for row in rows] == [
        ([7, 2], "stop", "2"),
        ([7, 7, 7], "length", None),
        ([7, 1], "stop", "1"),
    ]


def test_script_without_an_answer_says_which_prompt() -> None:
    with pytest.raises(EngineError, match=r"no answer to the prompt \[6\]"):
        scripted_rows(ScriptedEngine({(5,): [[1]]}), [6])


def test_script_records_what_it_was_asked() -> None:
    engine = ScriptedEngine(lambda request: [1], logprob=-0.5)
    (row,) = scripted_rows(engine, [5], sampling=Sampling(1.0, max_tokens=4, stop_token_ids=(1,), top_p=0.9))
    assert (row.logprobs, row.kept_mass) == ([-0.5], [1.0])
    assert engine.policies == [Path("policy")]
    assert engine.requests == [Request([5], seed=0)]
