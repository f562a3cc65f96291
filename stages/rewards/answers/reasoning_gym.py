"""The verifier that each reasoning-gym task brings along."""

import json
import warnings
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from stages.rewards.answers.answer_part import shown
from stages.rewards.base import Score


def import_reasoning_gym() -> Any:
    """Return the package. One of its dependencies has sloppy comparisons that Python warns of at the first import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym
    return reasoning_gym


def verify(completion: str, entry: dict[str, Any], options: dict[str, Any] | None = None) -> Score:
    """Return the task's own score of the answer, from 0 to 1.

    ``entry`` is the row that the task generated with the settings ``options``.

    Some tasks give a small score for an answer of the right form; see the task's source. The detail holds the task,
    the answer and the entry's own answer, which need not be the only right one.
    """
    task = entry["metadata"]["source_dataset"]
    answer = completion.strip()
    reward = float(_scorer(task, json.dumps(options or {}))(answer=answer, entry=entry))
    expected = entry.get("answer")
    return Score(
        reward,
        {"task": task, "answer": shown(answer), "expected": None if expected is None else shown(str(expected))},
    )


def verify_identity(options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what decides the reward beside the row: the options and the version of the package with the tasks."""
    return {"options": options, "reasoning-gym": version("reasoning-gym")}


@lru_cache(maxsize=64)
def _scorer(task: str, options: str) -> Any:
    dataset_class, config_class = import_reasoning_gym().factory.DATASETS[task]
    return dataset_class(config_class(**json.loads(options))).score_answer
