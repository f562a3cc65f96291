"""The verifier that each reasoning-gym task brings along."""

import atexit
import json
from functools import lru_cache
from importlib.metadata import version
from threading import Lock
from typing import Any

from pipeline.errors import RewardError
from stages.rewards.answers.answer_part import shown
from stages.rewards.answers.reasoning_gym_tasks import READ_TASKS, READ_VERSION, import_reasoning_gym, score
from stages.rewards.base import Score
from stages.rewards.code.sandbox import Isolation, Limits, Sandbox

PACKAGE = "reasoning-gym"
SCORER = "stages.rewards.answers.reasoning_gym_tasks"
LIMITS = Limits(seconds=30.0, memory_mb=4096, processes=4, output_bytes=1 << 16)
"""Of one answer in the sandbox."""
_ONE_AT_A_TIME = Lock()
"""A sandbox answers one thread."""


def verify(
    completion: str, entry: dict[str, Any], options: dict[str, Any] | None = None, isolation: Isolation = "full"
) -> Score:
    """Return the task's own score of the answer, from 0 to 1.

    ``entry`` is the row that the task generated with the settings ``options``.

    Some tasks give a small score for an answer of the right form; see the task's source. The detail holds the task,
    the answer and the entry's own answer, which need not be the only right one.

    Tasks whose verifiers evaluate the answer or the row as Python are scored in the sandbox, as is every task of a
    version of the package that nobody has read; ``isolation`` is that of `code`.

    Raises:
        RewardError: when the package has no such task, gives no score, or the sandbox is not to be had.
    """
    task, answer = entry["metadata"]["source_dataset"], completion.strip()
    given = json.dumps(options or {})
    if task in READ_TASKS and _version() == READ_VERSION:
        reward = score(task, given, answer, entry)
    elif task not in import_reasoning_gym().factory.DATASETS:
        raise RewardError(f"{PACKAGE} {_version()} has no task {task!r}: install the version that made the prompts")
    else:
        reward = _score_in_sandbox({"task": task, "options": given, "answer": answer, "entry": entry}, isolation)
    expected = entry.get("answer")
    return Score(
        reward,
        {"task": task, "answer": shown(answer), "expected": None if expected is None else shown(str(expected))},
    )


verify.only_from_config = ("isolation",)  # type: ignore[attr-defined]


def verify_identity(options: dict[str, Any] | None = None, isolation: Isolation = "full") -> dict[str, Any]:
    """Return what decides the reward beside the row: the options and the version of the package with the tasks."""
    return {"options": options, PACKAGE: _version()}


@lru_cache(maxsize=1)
def _version() -> str:
    return version(PACKAGE)


def _score_in_sandbox(request: dict[str, Any], isolation: Isolation) -> float:
    """Return the score that the sandbox's copy of the package gives; nothing but a number is taken from there."""
    try:
        with _ONE_AT_A_TIME:
            run = _sandbox(isolation).run([], stdin=json.dumps(request))
    except RewardError:
        _sandbox.cache_clear()  # it has ended: the next row gets a new one
        raise
    task = request["task"]
    if run.ended == "timeout":
        raise TimeoutError(f"no score by the verifier of {task} within {LIMITS.seconds:g} s of work")
    if run.ended != "exit" or run.exit_code != 0:
        how = f"exit status {run.exit_code}" if run.ended == "exit" else f"limit: {run.ended}"
        raise RewardError(f"the verifier of {task} gave no score for this answer ({how}): {run.stderr.strip()[-500:]}")
    try:
        found = json.loads(run.stdout.splitlines()[-1])
        reward = found.get("score")
    except (ValueError, IndexError, AttributeError, RecursionError) as error:
        raise RewardError(f"the verifier of {task} wrote {run.stdout[-200:]!r}, expected a score") from error
    if not isinstance(reward, float) or not 0 <= reward <= 1:
        raise RewardError(f"the verifier of {task} gave no score from 0 to 1: {str(found)[:500]}")
    return reward


@lru_cache(maxsize=2)
def _sandbox(isolation: Isolation) -> Sandbox:
    """Return the sandbox of this process, which has the package imported and gives each answer a fresh copy."""
    sandbox = Sandbox(LIMITS, isolation, prepared=SCORER).__enter__()
    atexit.register(sandbox.close)
    return sandbox
