"""What a model writes is text: no reward evaluates, imports, unpickles or runs it, or works on it without end."""

import contextlib
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.functions import import_function
from stages.rewards.answers.extraction import mathematics_of, words_of
from stages.rewards.answers.latex import Unreadable, plain_latex
from stages.rewards.answers.units import quantity, without_unit
from tests.hostile_answers import MARK, NOT_RUN, SUM
from tests.rewards_doc import ROOT, reward_functions

WATCHED = f"""
import sys
from tests import hostile_answers
sys.addaudithook(hostile_answers.watch)
eval("[{SUM} + 1, '{MARK}']")
eval(compile(__import__("ast").parse("{SUM} + 1", mode="eval"), "<tree>", "eval"))
print(len(hostile_answers.seen))
"""


LENGTH = 5_000
PIECES = (
    " ", "\n", "\n \n", "{", "}", "(", "[", "[[", "$", "$1$ and ", "\\(", "\\boxed{", "\\text{", "\\frac{1}{",
    "\\sqrt[", "\\\\", "\\,", "**", "_", "`", "1", "1,", "1.", "1 ", "1/", "1 234 ", "1:", "10^", "1 feet ", "1 and ",
    "-", "a", "A", "A, ", "(A) ", "a.", ". ", "...", '"', "\u201c", "<think>", "</", "answer is ", "####", "option ",
    "- ", "\u5317", "\u0e01", "\u00b2", "\u00bd", "\u221a(", "\u0301", '{"a":', '"a",', "http://",
)  # fmt: skip
LONG = (
    "```\n" + " " * LENGTH,
    "```\nx" + " " * LENGTH + "y",
    "\\boxed{" + " " * LENGTH,
    "\\boxed{" + "{" * LENGTH,
    "5 " + "cm " * LENGTH,
    "The answer" + " " * LENGTH,
    '"' + "a " * LENGTH,
    "**" + "a" * LENGTH,
    *(piece * (LENGTH // len(piece)) for piece in PIECES),
)
"""Answers on which some pattern could go back and forth."""
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
    start = time.process_time()
    function(text)
    return time.process_time() - start


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_hostile_answer_reaches_no_interpreter_in_any_reward(tmp_path: Path) -> None:
    told = json.loads(python("-m", "tests.hostile_answers", str(tmp_path)).splitlines()[-1])
    assert told["functions"] == [name for name, _ in reward_functions() if name not in NOT_RUN]
    assert told["seen"] == []
    assert MARK not in told["files"]


def test_an_answer_that_is_evaluated_would_be_seen() -> None:
    assert int(python("-c", WATCHED)) >= 4


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
        for text in LONG:
            longer = seconds(function, text * 4)
            # four times the text is sixteen times the work where a pattern goes back and forth
            if longer > 0.3 and longer > 10 * seconds(function, text):
                slow.append((function, text[:20], longer))
    assert slow == []
