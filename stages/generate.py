"""generate: prompts and one or more policies -> groups of completions, committed in parts as they finish.

Each completion of a group is sampled from the policy that the config names for it, and its row has that policy's name,
digest and log probabilities. A part is always the same set of requests in the same order, so that a restart sends the
engine the same batches as an undisturbed run.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import Field, model_validator

from pipeline.clock import per_second
from pipeline.errors import ConfigError
from pipeline.files import identity
from pipeline.schema import SCHEMAS
from pipeline.stage import Stage, StageTask
from stages.checkpoints import stop_token_ids
from stages.engines.base import Engine, EngineConfig, EngineInfo, Generated, Sampling
from stages.members import CURRENT, Author, MemberConfig
from stages.rollout.base import make_requests, request_seed, texts_of
from stages.rollout.single_turn import ROLLOUT

DEFAULT_GROUP_SIZE = 8


class GenerateConfig(EngineConfig):
    """Config of the generate stage."""

    group_size: int | None = Field(None, ge=1)
    """Completions per prompt; null = the sum of the members' counts, or 8 without members."""
    members: list[MemberConfig] = Field(default_factory=list)
    """Which policies write the completions of a group; empty = the current policy writes all."""
    max_tokens: int = Field(256, ge=1)
    """Longest completion, in tokens."""
    temperature: float = Field(1.0, ge=0.01)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    """0 = off."""
    min_p: float = Field(0.0, ge=0, lt=1)
    groups_per_part: int = Field(256, ge=1)
    """Groups per committed part. A killed run loses at most the part being sampled and the one being written."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.members and self.group_size not in (None, sum(m.count for m in self.members)):
            raise ValueError(
                f"group_size is {self.group_size}, but the counts of generate.members add up to "
                f"{sum(m.count for m in self.members)}: leave group_size out, or make them equal"
            )
        if self.size < 2:
            raise ValueError(
                "group_size is 1: a single answer has nothing to be compared with, so its advantage is always 0; "
                "set generate.group_size to 2 or more"
            )
        names = [m.name for m in self.members]
        if len(set(names)) != len(names):
            raise ValueError(f"generate.members has the names {names}: give each its own")
        if self.is_truncated and self.engine == "vllm":
            raise ValueError(
                f"top_p={self.top_p}, top_k={self.top_k}, min_p={self.min_p} truncate sampling, and vLLM does not "
                "report the probability that was cut off, so importance ratios would be wrong: leave them at 1, 0 and "
                '0, or use generate.engine = "transformers", which records it'
            )
        return self

    @property
    def is_truncated(self) -> bool:
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def size(self) -> int:
        """Completions per group."""
        return sum(m.count for m in self.members) if self.members else self.group_size or DEFAULT_GROUP_SIZE

    def plan(self) -> list[MemberConfig]:
        """Return the members; one with the current policy when the config lists none."""
        return self.members or [MemberConfig(name=CURRENT, policy=CURRENT, count=self.size)]


def numbered_rows(
    prompts: pl.DataFrame, indices: Sequence[int], *, recipe: str, seed: int, iteration: int, kind: Sequence[str] = ()
) -> pl.DataFrame:
    """Return ``len(indices)`` consecutive rows for each prompt, with ids, completion_index and the request's seed.

    ``prompts`` has prompt_id, ``position``, the prompt's position in its iteration, and any columns that the rows keep.
    ``kind`` tells groups of the same recipe and prompt apart.
    """
    keys = prompts.select("position", "prompt_id").rows()
    groups = [identity(recipe, *kind, *key) for key in keys]
    numbered = [(group, index) for group in groups for index in indices]
    seeds = [request_seed(seed, iteration, position, index) for position, _ in keys for index in indices]
    return prompts.drop("position")[np.repeat(np.arange(len(prompts)), len(indices))].with_columns(
        pl.Series("completion_id", [f"{group}-{index:03d}" for group, index in numbered], dtype=pl.String),
        pl.Series("group_id", [group for group, _ in numbered], dtype=pl.String),
        pl.Series("completion_index", list(indices) * len(prompts), dtype=pl.Int32),
        pl.Series("seed", seeds, dtype=pl.Int64),
    )


def planned_rows(
    prompts: pl.DataFrame,
    config: GenerateConfig,
    author: Author,
    indices: Sequence[int],
    *,
    recipe: str,
    seed: int,
    iteration: int,
) -> pl.DataFrame:
    """Return the columns of completions that are known before sampling, in order; see `numbered_rows`.

    `grpo verify` compares them with those stored.
    """
    numbered = numbered_rows(prompts, indices, recipe=recipe, seed=seed, iteration=iteration)
    return numbered.with_columns(
        pl.lit(author.name).alias("policy_name"),
        pl.lit(author.digest).alias("policy_digest"),
        pl.lit(author.iteration, dtype=pl.Int32).alias("policy_iteration"),
        pl.lit(config.temperature, dtype=pl.Float32).alias("temperature"),
        pl.lit(config.top_p, dtype=pl.Float32).alias("top_p"),
        pl.lit(config.top_k, dtype=pl.Int32).alias("top_k"),
        pl.lit(config.min_p, dtype=pl.Float32).alias("min_p"),
    )


def completion_rows(
    planned: pl.DataFrame, generated: Sequence[Generated], texts: Sequence[str], info: EngineInfo
) -> pl.DataFrame:
    """Return the planned rows with the engine's completions."""
    frame = planned.with_columns(
        list_column("completion_token_ids", [g.token_ids for g in generated], pa.int32()),
        list_column("sampling_logprobs", [g.logprobs for g in generated], pa.float32()),
        pl.lit(None, dtype=pl.List(pl.Boolean)).alias("loss_mask"),
        pl.Series("completion", list(texts)),
        pl.Series("finish_reason", [g.finish_reason for g in generated]),
        pl.Series("stop_reason", [g.stop_reason for g in generated], dtype=pl.String),
        pl.lit(info.logprobs_mode).alias("logprobs_mode"),
        list_column("kept_mass", [g.kept_mass for g in generated], pa.float32()),
        pl.lit(info.name).alias("engine"),
        pl.lit(info.version).alias("engine_version"),
    )
    return frame.select(SCHEMAS["completions"].names)


def list_column(name: str, values: Sequence[Any], of: pa.DataType) -> pl.Series:
    """Return a column of lists; Arrow reads nested Python lists twenty times as fast as polars."""
    return pl.Series(name, pa.array(values, pa.large_list(of)))


def used_context(config: EngineConfig, context: int) -> int:
    """Return how many tokens of the model's context an engine uses.

    Raises:
        ConfigError: when the config wants more than there are.
    """
    wanted = config.max_model_len
    if wanted is not None and wanted > context:
        raise ConfigError(
            f"generate.max_model_len is {wanted}, but the model's context is {context} tokens: set it to {context} or "
            "less, or leave it out"
        )
    return wanted or context


def check_room(config: GenerateConfig, context: int) -> int:
    """Return the longest prompt that leaves room for the longest completion in the context that is used.

    Raises:
        ConfigError: when there is no room for any prompt.
    """
    context = used_context(config, context)
    room = context - config.max_tokens
    if room < 1:
        raise ConfigError(
            f"generate.max_tokens is {config.max_tokens}, but the model's context is {context} tokens for prompt and "
            f"answer together: set it below {context}"
        )
    return room


def authors(task: StageTask[GenerateConfig, Engine]) -> Mapping[str, Author]:
    """Return the policies that write completions, by member name, from the task's inputs and parameters."""
    iterations = task.parameters["policy_iterations"]
    return {
        member.name: Author(
            member.name,
            task.inputs[f"policy:{member.name}"].path,
            task.inputs[f"policy:{member.name}"].digest,
            iterations[member.name],
        )
        for member in task.config.plan()
    }


def compute(task: StageTask[GenerateConfig, Engine]) -> None:
    """Generate the missing parts; one is written while the next is sampled."""
    config = task.config
    prompts = task.inputs["prompts"].read().filter(pl.col("drop_reason").is_null()).with_row_index("position")
    by_name = authors(task)
    meter = _Meter(task, total=len(prompts) * config.size)
    part = first_index = 0
    with ThreadPoolExecutor(max_workers=1) as background:
        last: Future[None] | None = None
        for member in config.plan():
            indices = range(first_index, first_index + member.count)
            first_index += member.count
            for rows in prompts.iter_slices(config.groups_per_part):
                if not task.writer.has_part(part):
                    make_rows = _sample(task, by_name[member.name], rows, indices, meter)
                    before, last = last, background.submit(_write_part, task, part, make_rows)
                    if before is not None:
                        before.result()
                meter.finish_part(len(rows) * member.count)
                part += 1
        if last is not None:
            last.result()


def _write_part(task: StageTask[GenerateConfig, Engine], part: int, make_rows: Callable[[], pl.DataFrame]) -> None:
    task.writer.write_part(part, make_rows())


def _sample(
    task: StageTask[GenerateConfig, Engine], author: Author, prompts: pl.DataFrame, indices: range, meter: "_Meter"
) -> Callable[[], pl.DataFrame]:
    """Sample the completions; return a function that makes their rows while the engine goes on."""
    config, engine = task.config, task.resources
    sampling = Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        max_tokens=config.max_tokens,
        stop_token_ids=tuple(stop_token_ids(author.path)),
    )
    planned = planned_rows(
        prompts.select("position", "prompt_id", "prompt_token_ids"),
        config,
        author,
        indices,
        recipe=task.recipe,
        seed=task.parameters["seed"],
        iteration=task.parameters["iteration"],
    )
    generated = ROLLOUT(engine, author.path, make_requests(planned), sampling, meter.update)
    info = engine.info

    def make_rows() -> pl.DataFrame:
        return completion_rows(planned, generated, texts_of(author.path, generated), info)

    return make_rows


class _Meter:
    """Adds up finished requests and tokens over the parts, for the progress bar."""

    def __init__(self, task: StageTask[GenerateConfig, Engine], total: int) -> None:
        self.task, self.total = task, total
        self.done = self.tokens = self.part_tokens = 0
        self.started = time.monotonic()

    def update(self, finished: int, tokens: int) -> None:
        self.part_tokens = tokens
        rate = per_second(self.tokens + tokens, time.monotonic() - self.started) or 0.0
        self.task.progress(self.done + finished, self.total, f"{rate:,.0f} tokens/s")

    def finish_part(self, requests: int) -> None:
        self.done += requests
        self.tokens += self.part_tokens
        self.part_tokens = 0


STAGE = Stage("generate", version=1, config=GenerateConfig, compute=compute, wants=("seed", "iteration"))
