"""What a model writes is text: no reward evaluates, imports, unpickles or runs it, or works on it without end."""

import json
import subprocess
import sys
from pathlib import Path

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
