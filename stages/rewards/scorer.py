"""Scoring completions with several reward functions: what each is shown, and where it runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from stages.rewards.base import FACTS
from stages.rewards.functions import RewardFunction, Shape, check_sources
from stages.rewards.pool import WorkerPool
from stages.rewards.results import of_error, of_frame, result_frame
from stages.rewards.worker import Job

PROMPT_FACTS = ("prompt", "reference", "messages", "metadata", "task")
TIME_LIMIT, FRAME_TIME_LIMIT = 60.0, 3600.0
MEMORY_LIMIT_GIB = 4.0


class Scorer:
    """Scores rows with the functions it is given; keeps their worker processes until `close`."""

    def __init__(self, num_workers: int = 2, log: Path | None = None) -> None:
        self.num_workers = num_workers
        self.log = log
        self._pools: dict[tuple[str, str], WorkerPool] = {}

    def start(self, rewards: Sequence[RewardFunction]) -> None:
        """Start the functions' processes, so that they import their modules while the caller goes on."""
        for reward in rewards:
            if reward.shape is Shape.completion:
                self._pool(reward).start()

    def close(self) -> None:
        """End all worker processes."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def score(
        self,
        completions: pl.DataFrame,
        prompts: pl.DataFrame | None,
        rewards: Sequence[RewardFunction],
        progress: Callable[[int], None] = lambda _: None,
    ) -> pl.DataFrame:
        """Return the rewards rows: one per completion and function, in the order of both.

        ``completions`` has completion_id, group_id, prompt_id and `completion_columns`; ``prompts`` the columns of that
        dataset, or is None when no function asks for `PROMPT_FACTS`. ``progress`` is told how many results there are.
        """
        for reward in rewards:
            check_sources(reward)
        # what a function over one completion asks of a prompt is sent once for each prompt, not joined to each row
        joined = {c for r in rewards for c in r.columns() if r.shape is not Shape.completion or c not in PROMPT_FACTS}
        if prompts is not None:
            prompts = prompts.join(completions.select("prompt_id"), on="prompt_id", how="semi", maintain_order="left")
        facts = facts_of(completions, prompts, joined)
        ids = facts.select("completion_id", "group_id")
        parts = []
        for index, reward in enumerate(rewards):
            done = index * len(facts)
            found = self._score(reward, facts, prompts, partial(_forward, progress, done))
            progress(done + len(facts))
            parts.append(
                ids.with_columns(
                    pl.lit(reward.name).alias("reward_name"), pl.lit(reward.recipe).alias("reward_recipe")
                ).hstack(found)
            )
        count, functions = len(facts), len(rewards)
        interleaved = pl.int_range(count * functions, eager=True)
        return pl.concat(parts)[(interleaved % functions) * count + interleaved // functions]

    def _score(
        self,
        reward: RewardFunction,
        facts: pl.DataFrame,
        prompts: pl.DataFrame | None,
        progress: Callable[[int], None],
    ) -> pl.DataFrame:
        if len(facts) == 0:
            return result_frame([])
        if reward.shape is Shape.frame:
            return self._pool(reward).score_frame(facts)
        if reward.shape is Shape.expression:
            return evaluate_expression(reward, facts)
        wanted = reward.columns()
        own = [name for name in wanted if name in facts.columns and name not in PROMPT_FACTS]
        contexts = _contexts(prompts, wanted) if prompts is not None else {}
        return self._pool(reward).score_rows(
            facts.select("prompt_id", *(n for n in own if n != "prompt_id")), contexts, progress
        )

    def _pool(self, reward: RewardFunction) -> WorkerPool:
        key = (reward.recipe, reward.config.model_dump_json())
        if key not in self._pools:
            config, is_frame = reward.config, reward.shape is Shape.frame
            memory = config.memory_limit_gib or (None if is_frame else MEMORY_LIMIT_GIB)
            job = Job(
                function=config.function,
                is_frame=is_frame,
                is_async=reward.is_async,
                parameters=reward.parameters,
                takes_anything=reward.takes_anything,
                arguments=reward.arguments,
                time_limit=config.time_limit or (FRAME_TIME_LIMIT if is_frame else TIME_LIMIT),
                memory_limit=None if memory is None else int(memory * 2**30),
                concurrency=config.concurrency,
                search_path=[],
            )
            self._pools[key] = WorkerPool(job, 1 if is_frame else self.num_workers, self.log)
        return self._pools[key]


def _forward(progress: Callable[[int], None], before: int, done: int) -> None:
    progress(before + done)


@contextmanager
def open_scorer(num_workers: int = 2, log: Path | None = None) -> Iterator[Scorer]:
    """Yield a scorer; whatever happens, leave no process behind."""
    scorer = Scorer(num_workers, log)
    try:
        yield scorer
    finally:
        scorer.close()


def completion_columns(rewards: Sequence[RewardFunction]) -> list[str]:
    """Return the columns of completions that the functions need."""
    wanted = {column for reward in rewards for column in reward.columns()} - set(PROMPT_FACTS)
    if "num_tokens" in wanted:
        wanted |= {"completion", "completion_token_ids"}
    return sorted({"completion_id", "group_id", "prompt_id", *wanted} - {"num_tokens"})


def needs_prompts(rewards: Sequence[RewardFunction]) -> bool:
    """Return whether any function asks for something that the prompts hold."""
    return any(column in PROMPT_FACTS for reward in rewards for column in reward.columns())


def facts_of(completions: pl.DataFrame, prompts: pl.DataFrame | None, wanted: set[str]) -> pl.DataFrame:
    """Return the facts that are wanted, one row per completion, in order."""
    frame = completions
    if "num_tokens" in wanted:
        length = pl.col("completion_token_ids").list.len().cast(pl.Int64)
        is_known = (length > 0) | (pl.col("completion") == "")  # else a text was imported without a tokenizer
        frame = frame.with_columns(num_tokens=pl.when(is_known).then(length))
    if prompts is not None and wanted.intersection(PROMPT_FACTS):
        frame = frame.join(
            prompt_facts(prompts).select("prompt_id", *sorted(wanted.intersection(PROMPT_FACTS))),
            on="prompt_id",
            how="left",
            maintain_order="left",
        )
    names = ["completion_id", "group_id", "prompt_id", *FACTS]
    return frame.select(list(dict.fromkeys(name for name in names if name in frame.columns)))


def prompt_facts(prompts: pl.DataFrame) -> pl.DataFrame:
    """Return prompt_id and `PROMPT_FACTS` of each prompt."""
    last = pl.col("messages").list.filter(pl.element().struct.field("role") == "user").list.last()
    return prompts.unique("prompt_id", maintain_order=True).select(
        "prompt_id",
        prompt=last.struct.field("content").fill_null(""),
        reference="reference_answer",
        messages="messages",
        metadata="metadata",
        task="task",
    )


def _contexts(prompts: pl.DataFrame, wanted: Sequence[str]) -> Mapping[str, dict[str, Any]]:
    names = [name for name in PROMPT_FACTS if name in wanted]
    if not names:
        return {}
    frame = prompt_facts(prompts)
    return dict(zip(frame["prompt_id"].to_list(), frame.select(names).to_dicts(), strict=True))


def evaluate_expression(reward: RewardFunction, facts: pl.DataFrame) -> pl.DataFrame:
    """Return reward, error and detail of every row, from a function that gives a polars expression."""
    try:
        return of_frame(facts.with_columns(reward.call(**reward.arguments).alias("reward"))["reward"], len(facts))
    except Exception as error:  # a user's expression may fail in any way; the error is data
        return result_frame([of_error(error)] * len(facts))
