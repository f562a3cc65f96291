"""score: completions -> rewards, in long format: one row per completion and reward function.

`stages.rewards.base` defines what a reward function is, `stages.rewards.scorer` runs it. Rows are read in parts of
fixed size, each committed when it is scored: a killed process loses one part, and memory does not grow with
the number of completions.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import polars as pl
from pydantic import Field, model_validator

from pipeline.artifact import Artifact
from pipeline.clock import per_second
from pipeline.config import StrictModel
from pipeline.errors import RewardError
from pipeline.stage import Stage, StageTask
from stages.rewards.functions import RewardConfig, RewardFunction, check_parameters, find_reward
from stages.rewards.results import has_timed_out
from stages.rewards.scorer import Scorer, completion_columns, needs_prompts, open_scorer

ROWS_PER_PART = 50_000
COMBINED = "combined"
"""Name of the rewards' weighted sum in printed tables."""


class ScoreConfig(StrictModel):
    """Config of the score stage."""

    DECIDES_NOTHING: ClassVar = frozenset({"max_failed_share"})

    rewards: list[RewardConfig] = Field(min_length=1)
    """The reward functions, each called for every completion."""
    max_failed_share: float = Field(0.1, ge=0, le=1)
    """The stage stops when more than this share of the completions cannot be scored by some function."""

    @model_validator(mode="after")
    def _distinct_names(self) -> "ScoreConfig":
        names = [reward.name for reward in self.rewards]
        if len(set(names)) != len(names):
            raise ValueError(f"score.rewards has the names {names}: give each its own")
        if COMBINED in names:
            raise ValueError(f"score.rewards has the name {COMBINED!r}, which stands for their sum: choose another one")
        return self


def find_rewards(config: ScoreConfig) -> list[RewardFunction]:
    """Return the functions that the config names, imported.

    Raises:
        RewardError: when one cannot be imported, or has no parameter for one of its arguments.
    """
    return [find_reward(reward) for reward in config.rewards]


def check_rewards(config: ScoreConfig, metadata: Mapping[str, Any]) -> None:
    """Check that the functions exist and that rows with this metadata have their arguments.

    Raises:
        RewardError: naming the function and what is wrong.
    """
    for reward in find_rewards(config):
        check_parameters(reward, metadata)


class FailureCounter:
    """Counts the completions that each function could not score, and stops the stage above the limit.

    Both count against the limit, calls that failed and calls that ran out of time: unscored completions leave the means
    and the training without a sound, whatever the reason.
    """

    def __init__(self, rewards: Sequence[RewardFunction], num_completions: int, max_failed_share: float) -> None:
        self.num_completions = num_completions
        self.max_failed_share = max_failed_share
        self.failed = dict.fromkeys((reward.name for reward in rewards), 0)
        self.timed_out = dict(self.failed)
        self.examples: dict[str, str] = {}

    def add(self, rewards: pl.DataFrame) -> None:
        """Count rows of the rewards dataset.

        Raises:
            RewardError: when a function has failed for more than the allowed share of all completions.
        """
        unscored = rewards.filter(pl.col("reward").is_null()).group_by("reward_name", maintain_order=True)
        said = pl.col("detail").str.json_path_match("$.reason")  # by the function that returned None
        counts = unscored.agg(pl.len(), has_timed_out().sum().alias("timed_out"), pl.coalesce(said, "error").first())
        for name, count, timed_out, example in counts.iter_rows():
            self.timed_out[name] += timed_out
            self.failed[name] += count - timed_out
            self.examples.setdefault(name, example)
            if self.failed[name] + self.timed_out[name] > self.max_failed_share * self.num_completions:
                raise RewardError(
                    f"the reward {name!r} could not score {self.failed[name] + self.timed_out[name]:,} of "
                    f"{self.num_completions:,} completions ({self._counts(name)}), score.max_failed_share allows "
                    f"{self.max_failed_share:.0%}; first error: {self.examples[name]}. Correct the function, its "
                    "time_limit, or its rows; or raise the limit, which is part of the config, in a new run, which "
                    "[[offline]] can feed what was generated"
                )

    def __str__(self) -> str:
        """Return how many failed, and how many ran out of time; empty when none has."""
        return "".join(f", {name}: {counts}" for name in self.failed if (counts := self._counts(name)))

    def _counts(self, name: str) -> str:
        counts = {"failed": self.failed[name], "timed out": self.timed_out[name]}
        return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


def slices(completions: Artifact, columns: Sequence[str], num_rows: int) -> Iterator[pl.DataFrame]:
    """Yield all rows in order, ``num_rows`` at a time, reading little more than that at once."""
    import pyarrow.parquet as pq

    waiting: list[pl.DataFrame] = []
    count = 0
    for path in completions.files():
        for batch in pq.ParquetFile(path).iter_batches(batch_size=num_rows, columns=list(columns)):
            waiting.append(pl.DataFrame(batch))
            count += batch.num_rows
            while count >= num_rows:
                rows = pl.concat(waiting)
                yield rows.head(num_rows)
                waiting, count = [rows.slice(num_rows)], count - num_rows
    if count:
        yield pl.concat(waiting)


def score_rows(
    completions: pl.DataFrame, prompts: pl.DataFrame, config: ScoreConfig, scorer: Scorer | None = None
) -> pl.DataFrame:
    """Return one row per completion and reward function, in the order of the completions.

    ``completions`` has completion_id, group_id, prompt_id and what the functions ask for; ``prompts`` the columns of
    that dataset.
    """
    rewards = find_rewards(config)
    if scorer is not None:
        return scorer.score(completions, prompts, rewards)
    with open_scorer() as own:
        return own.score(completions, prompts, rewards)


def compute(task: StageTask[ScoreConfig, Scorer]) -> None:
    """Score the missing parts."""
    config, scorer = task.config, task.resources
    rewards = find_rewards(config)
    completions = task.inputs["completions"]
    completions.verify()
    prompts = task.inputs["prompts"].read() if needs_prompts(rewards) else None
    num_completions = completions.manifest.rows or 0
    failures = FailureCounter(rewards, num_completions, config.max_failed_share)
    started, done, reused = time.monotonic(), 0, 0

    def report(more: int) -> None:
        rate = per_second(done + more - reused, time.monotonic() - started) or 0.0
        task.progress(done + more, num_completions * len(rewards), f"{rate:,.0f} rows/s{failures}")

    for part, rows in enumerate(slices(completions, completion_columns(rewards), ROWS_PER_PART)):
        if task.writer.has_part(part):
            scored = pl.read_parquet(
                task.writer.part_path(part), columns=["reward_name", "reward", "error", "detail"], glob=False
            )
            reused += len(scored)
        else:
            scored = scorer.score(rows, prompts, rewards, report)
            task.writer.write_part(part, scored)
        failures.add(scored)
        done += len(scored)
        report(0)


STAGE = Stage("score", version=3, config=ScoreConfig, compute=compute)
