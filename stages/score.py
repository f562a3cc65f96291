"""score: completions -> rewards, in long format: one row per completion and reward function.

A reward function is any function ``module:function``. It is called once per completion with the arguments that its
signature names:

    completion   the answer as text             prompt      the last user message
    reference    the reference answer or None   messages    the whole conversation
    metadata     the rest of the source row     task        the source of the prompt

and with the arguments of the config; a parameter that none of those names is looked up in the metadata. It returns a
number, None (it cannot say), or a `Score` with a detail for the auditor. What it raises becomes a null reward with the
error beside it, never a 0.
"""

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl
from pydantic import Field, model_validator

from pipeline.artifact import canonical_json
from pipeline.config import StrictModel
from pipeline.errors import RewardError
from pipeline.stage import Stage, StageTask, import_function
from pipeline.storage import sha256_text

GIVEN = ("completion", "prompt", "reference", "messages", "metadata", "task")
ROWS_PER_PART = 50_000


class RewardConfig(StrictModel):
    """One reward function."""

    name: str = Field(min_length=1)
    """Value of the column reward_name; normalize.weights refers to it."""
    function: str
    """``module:function``."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments."""


class ScoreConfig(StrictModel):
    """Config of the score stage."""

    rewards: list[RewardConfig] = Field(min_length=1)
    """The reward functions, each called for every completion."""
    max_failed_share: float = Field(0.1, ge=0, le=1)
    """The stage stops when more than this share of the completions cannot be scored by some function."""

    @model_validator(mode="after")
    def _distinct_names(self) -> "ScoreConfig":
        names = [reward.name for reward in self.rewards]
        if len(set(names)) != len(names):
            raise ValueError(f"score.rewards has the names {names}: give each its own")
        return self


@dataclass(frozen=True, slots=True)
class Score:
    """A reward with what the function saw, for the auditor; the detail must be JSON."""

    reward: float | None
    detail: Any = None


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A reward function, found and checked."""

    name: str
    call: Callable[..., Any]
    parameters: tuple[str, ...]
    arguments: Mapping[str, Any]
    recipe: str


def find_rewards(config: ScoreConfig) -> list[RewardFunction]:
    """Return the functions that the config names, imported.

    Raises:
        RewardError: when one cannot be imported, or has no parameter for one of its arguments.
    """
    return [_find(reward) for reward in config.rewards]


def _find(config: RewardConfig) -> RewardFunction:
    try:
        function, source = import_function(config.function)
    except Exception as error:  # importing a user's module may raise anything
        raise RewardError(
            f"the reward {config.name!r} names {config.function!r}, which cannot be imported "
            f"({type(error).__name__}: {error}): give module:function, importable from the current directory"
        ) from error
    signature = inspect.signature(function).parameters
    unknown = sorted(set(config.arguments) - set(signature))
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in signature.values()):
        raise RewardError(
            f"the reward {config.name!r} ({config.function}) has no parameters {unknown}; it has {list(signature)}: "
            "correct score.rewards.arguments"
        )
    recipe = sha256_text(canonical_json([config.function, dict(config.arguments), source]))
    return RewardFunction(config.name, function, tuple(signature), config.arguments, recipe)


def check_parameters(rewards: list[RewardFunction], metadata: Mapping[str, Any]) -> None:
    """Check that every parameter without default has something to be filled with, for rows with this metadata.

    Raises:
        RewardError: naming the parameter, most likely misspelt, and what there is.
    """
    for reward in rewards:
        needed = [
            name
            for name, parameter in inspect.signature(reward.call).parameters.items()
            if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        given = [*GIVEN, *reward.arguments, *metadata]
        missing = [name for name in needed if name not in given]
        if missing:
            raise RewardError(
                f"the reward {reward.name!r} wants {missing}, but there is only {sorted(set(given))}: correct the "
                "parameter, or give it in score.rewards.arguments"
            )


def score_rows(completions: pl.DataFrame, prompts: pl.DataFrame, rewards: list[RewardFunction]) -> pl.DataFrame:
    """Return one row per completion and reward function, in the order of the completions.

    ``completions`` has completion_id, group_id, prompt_id and completion; ``prompts`` the columns of that dataset.
    """
    context = {row["prompt_id"]: _context(row) for row in prompts.iter_rows(named=True)}
    needed = completions.select("completion_id", "group_id", "prompt_id", "completion")
    rows = [
        (completion_id, group_id, reward.name, reward.recipe, *_score(reward, context[prompt_id], text))
        for completion_id, group_id, prompt_id, text in needed.iter_rows()
        for reward in rewards
    ]
    return pl.DataFrame(
        rows,
        schema={
            "completion_id": pl.String,
            "group_id": pl.String,
            "reward_name": pl.String,
            "reward_recipe": pl.String,
            "reward": pl.Float64,
            "error": pl.String,
            "detail": pl.String,
        },
        orient="row",
    )


def _context(prompt: Mapping[str, Any]) -> dict[str, Any]:
    metadata = json.loads(prompt["metadata"])
    users = [m["content"] for m in prompt["messages"] if m["role"] == "user"]
    return {
        **metadata,
        "prompt": users[-1] if users else "",
        "reference": prompt["reference_answer"],
        "messages": prompt["messages"],
        "metadata": metadata,
        "task": prompt["task"],
    }


def _score(
    reward: RewardFunction, context: Mapping[str, Any], text: str
) -> tuple[float | None, str | None, str | None]:
    """Return reward, error and detail; exactly one of reward and error is null unless the function returned None."""
    known = {**context, **reward.arguments, "completion": text}
    arguments = {name: known[name] for name in reward.parameters if name in known} | dict(reward.arguments)
    try:
        result = reward.call(**arguments)
        score = result if isinstance(result, Score) else Score(result)
        if score.reward is None:
            return None, "the function returned None", _detail(score)
        value = float(score.reward)
        if not math.isfinite(value):
            return None, f"the function returned {value}", _detail(score)
        return value, None, _detail(score)
    except Exception as error:  # a user's function may raise anything; the error is data
        return None, f"{type(error).__name__}: {error}", None


def _detail(score: Score) -> str | None:
    return None if score.detail is None else json.dumps(score.detail, sort_keys=True)


def check_failures(rewards: pl.DataFrame, max_failed_share: float) -> None:
    """Raise RewardError when a function failed for more than the allowed share of the completions."""
    counts = rewards.group_by("reward_name", maintain_order=True).agg(
        pl.col("reward").is_null().mean().alias("share"), pl.col("error").drop_nulls().first().alias("example")
    )
    for name, share, example in counts.filter(pl.col("share") > max_failed_share).iter_rows():
        raise RewardError(
            f"the reward {name!r} could not score {share:.0%} of the completions, score.max_failed_share allows "
            f"{max_failed_share:.0%}; first error: {example}. Correct the function, or raise the limit"
        )


def compute(task: StageTask) -> None:
    """Score the missing parts."""
    config: ScoreConfig = task.config
    rewards = find_rewards(config)
    prompts = task.inputs["prompts"].read()
    completions = task.inputs["completions"].read()
    for part, rows in enumerate(completions.iter_slices(ROWS_PER_PART)):
        if not task.writer.has_part(part):
            task.writer.write_part(part, score_rows(rows, prompts, rewards))
        scored = pl.scan_parquet([task.writer.part_path(i) for i in range(part + 1)])
        check_failures(scored.select("reward_name", "reward", "error").collect(), config.max_failed_share)
        task.progress(min((part + 1) * ROWS_PER_PART, len(completions)), len(completions))


STAGE = Stage("score", version=1, outputs=("rewards",), compute=compute)
