"""The verifier that each reasoning-gym task brings along."""

import json
import warnings
from functools import lru_cache
from typing import Any


def import_reasoning_gym() -> Any:
    """Return the package. One of its dependencies has sloppy comparisons that Python warns of at the first import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym
    return reasoning_gym


def verify(completion: str, entry: dict[str, Any], options: dict[str, Any] | None = None) -> float:
    """Return the task's own score of the answer, from 0 to 1.

    ``entry`` is the row that the task generated with the settings ``options``.

    Some tasks give a small score for an answer of the right form; see the task's source.
    """
    return float(
        _scorer(entry["metadata"]["source_dataset"], json.dumps(options or {}))(answer=completion.strip(), entry=entry)
    )


@lru_cache(maxsize=64)
def _scorer(task: str, options: str) -> Any:
    dataset_class, config_class = import_reasoning_gym().factory.DATASETS[task]
    return dataset_class(config_class(**json.loads(options))).score_answer
