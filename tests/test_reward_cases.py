"""The hand-worked cases of every reward function, called as the score stage calls them."""

import asyncio
import inspect
import json
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.functions import import_function
from stages.rewards.base import FACTS, Score
from tests.judge_server import Reply, be_calm, fails, says, serve
from tests.rewards_doc import MARK, PLACEHOLDERS, TARGET, read_cases, reward_functions, reward_table

KEYS = {"function", "case", "why", "row", "rows", "arguments", "judge_says", "reward", "detail", "error"}
SERVER = "{judge_server}"
TOLERANCE, MODEL_TOLERANCE = 1e-6, 1e-4
"""Models calculate in float32, and their normalisations add an epsilon that the worked values leave out."""
UNSAID = {
    "completion": "",
    "prompt": "",
    "reference": None,
    "messages": [],
    "metadata": {},
    "task": "cases",
    "group_id": "g",
    "prompt_id": "p",
    "num_tokens": None,
    "finish_reason": "stop",
    "policy_name": "current",
}
"""What the row of a case holds where it does not say."""
MESSAGES = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))
COLUMNS = dict.fromkeys(FACTS, pl.String) | {"messages": MESSAGES, "num_tokens": pl.Int64}

Outcome = tuple[Any, Any, str | None]
"""Reward, detail, error."""


def facts(row: Mapping[str, Any], index: int = 0) -> dict[str, Any]:
    metadata = {**row.get("metadata", {}), **{key: row[key] for key in row if key not in FACTS}}
    known = {key: row[key] for key in row if key in FACTS}
    return {"completion_id": f"c{index}", **UNSAID, **known, "metadata": metadata}


def placeholders(case: Mapping[str, Any]) -> set[str]:
    return {x for x in (case.get("arguments") or {}).values() if isinstance(x, str) and x[1:-1] in PLACEHOLDERS}


def scripted(answers: list[Any]) -> Callable[[int, dict[str, Any]], Reply]:
    """Return a judge that gives the answers in turn: words, or an object with ``text`` or ``status``."""

    def reply(number: int, body: dict[str, Any]) -> Reply:
        answer = answers[number] if number < len(answers) else {"status": 400, "message": "the case has no answer left"}
        if isinstance(answer, str):
            return says(answer)
        return fails(**answer) if "status" in answer else says(**answer)

    return reply


def outcomes(case: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[Outcome]:
    """Return what the function gives for each row of the case."""
    function, _ = import_function(case["function"])
    signature = inspect.signature(function)
    rows = [facts(row, index) for index, row in enumerate(case.get("rows") or [case["row"]])]
    try:
        if signature.return_annotation is pl.Expr:
            return unpacked(frame(rows).select(reward=function(**arguments))["reward"])
        if "completions" in signature.parameters:
            result = function(completions=frame(rows), **arguments)
            return unpacked(result.to_struct() if isinstance(result, pl.DataFrame) else result)
    except Exception as error:
        return [(None, None, f"{type(error).__name__}: {error}")] * len(rows)
    return [outcome(function, list(signature.parameters), row, arguments) for row in rows]


def frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    texts = [row | {"metadata": json.dumps(row["metadata"])} for row in rows]
    return pl.DataFrame(texts, schema=COLUMNS)


def unpacked(series: pl.Series) -> list[Outcome]:
    rows = [value if isinstance(value, dict) else {"reward": value} for value in series.to_list()]
    return [
        (row["reward"], json.loads(d) if isinstance(d := row.get("detail"), str) else d, row.get("error"))
        for row in rows
    ]


def outcome(
    function: Callable[..., Any], names: list[str], row: dict[str, Any], arguments: Mapping[str, Any]
) -> Outcome:
    known = {**row["metadata"], **row, **arguments}
    try:
        result = function(**{name: known[name] for name in names if name in known})
        if inspect.isawaitable(result):
            result = asyncio.run(awaited(result))
        score = result if isinstance(result, Score) else Score(result)
    except Exception as error:
        return None, None, f"{type(error).__name__}: {error}"
    if score.reward is None:
        return None, score.detail, "the function returned None"
    if not math.isfinite(score.reward):
        return None, score.detail, f"the function returned {score.reward}"
    return score.reward, score.detail, None


async def awaited(result: Any) -> Any:
    return await result


def is_same(value: Any, expected: Any, tolerance: float) -> bool:
    """Return whether two JSON values are equal, numbers to the tolerance."""
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(is_same(value[key], expected[key], tolerance) for key in value)
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(
            is_same(a, b, tolerance) for a, b in zip(value, expected, strict=True)
        )
    if isinstance(value, float) or isinstance(expected, float):
        numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (value, expected))
        return numbers and math.isclose(value, expected, rel_tol=tolerance, abs_tol=tolerance)
    return type(value) is type(expected) and bool(value == expected)


@pytest.mark.parametrize(
    "case", read_cases(), ids=lambda case: f"{case['function'].rpartition('.')[2]}: {case['case']}"
)
def test_a_reward_function_gives_what_was_worked_out_by_hand(
    case: dict[str, Any], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert set(case) <= KEYS, "a key is misspelt"
    named = placeholders(case)
    models: dict[str, str] = request.getfixturevalue("case_models") if named - {SERVER} else {}
    known = {f"{{{name}}}": path for name, path in models.items()}
    with ExitStack() as stack:
        if SERVER in named:
            be_calm(monkeypatch, tmp_path)
            server = stack.enter_context(serve(scripted(case["judge_says"])))
            known = {**known, SERVER: server.base_url}
        given = (case.get("arguments") or {}).items()
        arguments = {key: known.get(value, value) if isinstance(value, str) else value for key, value in given}
        found = outcomes(case, arguments)
        assert SERVER not in named or len(server.bodies) == len(case["judge_says"]), "asked too often, or too little"
    check(case, found, MODEL_TOLERANCE if known else TOLERANCE)


def check(case: Mapping[str, Any], found: list[Outcome], tolerance: float) -> None:
    several = "rows" in case
    rewards, errors = ((case[key] if several else [case[key]]) for key in ("reward", "error"))
    assert len(found) == len(rewards)
    for (reward, _, error), expected, text in zip(found, rewards, errors, strict=True):
        assert is_same(reward, expected if expected is None else float(expected), tolerance), (found, expected)
        assert (text is None) == (error is None)
        assert text is None or text in error
        assert (expected is None) == (text is not None), "a case has either a reward or an error"
    if "detail" in case:
        details = json.loads(json.dumps([detail for _, detail, _ in found]))
        expected = case["detail"] if several and case["detail"] else [case["detail"]] * len(details)
        assert is_same(details, expected, tolerance), (details, expected)


def test_every_placeholder_is_explained_and_used() -> None:
    arguments = [case.get("arguments") or {} for case in read_cases()]
    named = {given[key] for given in arguments for key in ("model", "base_url") if given.get(key, "")[:1] == "{"}
    assert named == {f"{{{name}}}" for name in PLACEHOLDERS}


def test_every_reward_function_of_the_library_has_worked_cases() -> None:
    worked = {case["function"] for case in read_cases()}
    assert [name for name, _ in reward_functions() if name not in worked] == []


def test_no_two_cases_of_a_function_have_the_same_name() -> None:
    names = [(case["function"], case["case"]) for case in read_cases()]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


def test_the_table_of_rewards_is_up_to_date() -> None:
    text = TARGET.read_text(encoding="utf-8")
    assert text.partition(MARK)[2] == f"\n\n{reward_table()}", "run `make rewards-doc`"
