"""What a model writes is text: no reward evaluates, imports, unpickles or runs it, or works on it without end."""

import ast
import contextlib
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.functions import import_function
from stages.rewards.answers.extraction import mathematics_of, words_of
from stages.rewards.answers.latex import Unreadable, plain_latex
from stages.rewards.answers.units import quantity, without_unit
from tests.hostile_answers import CALL, DRESSES, MARK, NOT_RUN, PAYLOADS, SUM, watching
from tests.judge_server import serve
from tests.rewards_doc import read_cases, reward_functions
from tests.test_reward_cases import SERVER, outcomes, scripted

LENGTH = 2_000
NOTICED = 0.03
"""Seconds; whatever takes less over four times the length is no danger."""
PIECES = (
    " ", "\n", "\n \n", "{", "}", "(", "[", "[[", "$", "$1$ and ", "\\(", "\\boxed{", "\\text{", "\\frac{1}{",
    "\\sqrt[", "\\\\", "\\,", "**", "_", "`", "1", "1,", "1.", "1 ", "1/", "1 234 ", "1:", "10^", "1 feet ", "1 and ",
    "-", "a", "A", "A, ", "(A) ", "a.", ". ", "...", '"', "\u201c", "<think>", "</", "answer is ", "####", "option ",
    "- ", "\u5317", "\u0e01", "\u00b2", "\u00bd", "\u221a(", "\u0301", '{"a":', '"a",', "http://",
)  # fmt: skip


def long_answers(length: int) -> list[str]:
    """Return answers on which some pattern could go back and forth."""
    return [
        "```\n" + " " * length,
        "```\nx" + " " * length + "y",
        "\\boxed{" + " " * length,
        "\\boxed{" + "{" * length,
        "5 " + "cm " * length,
        "The answer" + " " * length,
        '"' + "a " * length,
        "**" + "a" * length,
        *(piece * (length // len(piece)) for piece in PIECES),
    ]


ARGUMENTS: dict[str, Any] = {
    "reference": "72",
    "prompt": "What is 72?",
    "messages": [{"role": "user", "content": "What is 72?"}],
    "context": "The context has 72 words.",
    "facts": ["Paris"],
    "choices": ["72", "a b"],
    "pattern": "[0-9]",
    "language": "en",
    "num_tokens": 9,
    "max_tokens": 100,
    "verifier": "stages.rewards.answers.matching:exact_match",
    "finish_reason": "stop",
}
LIMITED = ("symbolic", ".models.", ".judge.", ".code.", "ratings", "reasoning_gym", "soft_overlong")
"""math_match ends by its own limit, its steps are tried one by one; the others read frames, models, the sandbox."""


def readable(text: str) -> None:
    with contextlib.suppress(Unreadable):
        plain_latex(text)


STEPS: list[Callable[[str], Any]] = [mathematics_of, words_of, without_unit, quantity, readable]


def seconds(function: Callable[[str], Any], text: str) -> float:
    """Return the least of three measurements: a collection of garbage must not count."""
    found = []
    for _ in range(3):
        start = time.process_time()
        function(text)
        found.append(time.process_time() - start)
        if found[0] < NOTICED:
            break
    return min(found)


def test_a_hostile_answer_reaches_no_interpreter_in_any_reward(
    case_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)  # where a payload that is executed leaves a file
    known = {f"{{{name}}}": path for name, path in case_models.items()}
    decided_first = sorted(read_cases(), key=lambda case: case["reward"] is None)
    for name in [name for name, _ in reward_functions() if name not in NOT_RUN]:
        case = next(case for case in decided_first if case["function"] == name)
        with serve(scripted(["Score: 7"] * 10_000)) as server:
            places = {**known, SERVER: server.base_url}
            given = (case.get("arguments") or {}).items()
            arguments = {key: places.get(value, value) if isinstance(value, str) else value for key, value in given}
            outcomes(case, arguments)  # what it imports, it imports before anything is watched
            row = case["row"] if "row" in case else case["rows"][0]
            rows = [row | {"completion": dress.format(*[text] * 3)} for text in PAYLOADS for dress in DRESSES]
            rows.append({key: CALL if isinstance(value, str) else value for key, value in rows[0].items()})
            with watching() as seen:
                outcomes({"function": name, "rows": rows}, arguments)
        assert (name, seen) == (name, [])
    assert not (tmp_path / MARK).exists()


def test_an_answer_that_is_evaluated_would_be_seen() -> None:
    with watching() as seen:
        eval(f"[{SUM} + 1, {MARK!r}]")
        eval(compile(ast.parse(f"{SUM} + 1", mode="eval"), "<tree>", "eval"))
    assert [act.split()[0] for act in seen] == ["compile", "exec", "compile", "compile"]


def rewards() -> list[Callable[[str], Any]]:
    """Return each reward over one completion as a function of the answer."""
    found: list[Callable[[str], Any]] = []
    for name, _ in reward_functions():
        function, _ = import_function(name)
        names = list(inspect.signature(function).parameters)
        if not any(word in name for word in LIMITED):
            given = {key: value for key, value in ARGUMENTS.items() if key in names}
            found.append(lambda text, call=function, given=given: call(completion=text, **given))
    return found


def test_no_answer_takes_more_than_its_length_in_time() -> None:
    slow = []
    for function in [*STEPS, *rewards()]:
        function("The answer is 72.")  # what it loads, it loads now
        for text, longer in zip(long_answers(LENGTH), long_answers(4 * LENGTH), strict=True):
            took = seconds(function, longer)
            # four times the text is sixteen times the work where a pattern goes back and forth
            if took > NOTICED and took > 10 * seconds(function, text):
                slow.append((function, text[:20], took))
    assert slow == []
