"""evaluate: held-out prompts and a policy -> completions with rewards, for pass@1 (greedy) and pass@k (sampled)."""

import polars as pl
import pyarrow as pa
from pydantic import Field

from pipeline.config import StrictModel
from pipeline.stage import Stage, StageTask
from stages.checkpoints import stop_token_ids
from stages.engines.base import Engine, EngineConfig, Generated, Sampling
from stages.generate import list_column, numbered_rows
from stages.members import CURRENT
from stages.normalize import NormalizeConfig, combined_rewards
from stages.rewards.scorer import Scorer
from stages.rollout.base import make_requests, texts_of
from stages.rollout.single_turn import ROLLOUT
from stages.score import ScoreConfig, score_rows
from stages.sources import SourceConfig


class EvaluateConfig(StrictModel):
    """Config of the evaluate stage."""

    every: int = Field(10, ge=0)
    """Iterations between evaluations; the initial and the last policy are evaluated too. 0 = never."""
    num_prompts: int = Field(256, ge=1)
    """Held-out prompts."""
    num_samples: int = Field(8, ge=1)
    """Sampled completions of each prompt, the k of pass@k; one greedy completion is added."""
    held_out_share: float = Field(0.1, ge=0, lt=1)
    """Share of the source's questions, chosen by their hash, that training and warm-up never see."""
    pass_threshold: float = 1.0
    """Combined reward from which a completion counts as correct."""
    source: SourceConfig | None = None
    """Another source of the prompts; null = the held-out share of [prompts]."""


GREEDY = "greedy"
"""Decoding of one completion of each prompt; the others are sampled."""


class EvaluateTaskConfig(EngineConfig):
    """What decides an evaluation, beyond its prompts and its policy."""

    num_samples: int
    pass_threshold: float
    max_tokens: int
    temperature: float
    score: ScoreConfig
    normalize: NormalizeConfig


EvaluateTask = StageTask[EvaluateTaskConfig, tuple[Engine, Scorer]]


def planned_rows(
    prompts: pl.DataFrame,
    per_prompt: int,
    *,
    recipe: str,
    decoding: str,
    seed: int,
    temperature: float,
    policy_digest: str,
    policy_iteration: int | None,
) -> pl.DataFrame:
    """Return the columns of completions known before sampling; `grpo verify` compares them with stored ones."""
    # minus one marks evaluation: no training request has that iteration
    rows = numbered_rows(prompts, range(per_prompt), recipe=recipe, seed=seed, iteration=-1, kind=[decoding])
    return rows.with_columns(
        pl.lit(decoding).alias("decoding"),
        pl.lit(policy_digest).alias("policy_digest"),
        pl.lit(policy_iteration, dtype=pl.Int32).alias("policy_iteration"),
        pl.lit(0.0 if decoding == GREEDY else temperature, dtype=pl.Float32).alias("temperature"),
    )


def answered_rows(planned: pl.DataFrame, generated: list[Generated], texts: list[str]) -> pl.DataFrame:
    """Return the planned rows with their completions, not yet scored."""
    return planned.with_columns(
        pl.Series("completion", texts),
        list_column("completion_token_ids", [g.token_ids for g in generated], pa.int32()),
        list_column("sampling_logprobs", [g.logprobs for g in generated], pa.float32()),
        pl.Series("finish_reason", [g.finish_reason for g in generated]),
    )


def summarize(evaluations: pl.DataFrame) -> dict[str, float | None]:
    """Return pass@1 (greedy), the share of correct sampled completions, and pass@k with k = all samples. Read-only.

    Unscored completions are left out.
    """
    greedy = evaluations.filter(pl.col("decoding") == "greedy")["is_correct"]
    sampled = evaluations.filter(pl.col("decoding") == "sampled")
    groups = sampled.drop_nulls("is_correct").group_by("group_id").agg(pl.col("is_correct").any())
    return {
        "eval_pass_at_1": _mean(greedy),
        "eval_pass_rate": _mean(sampled["is_correct"]),
        "eval_pass_at_k": _mean(groups["is_correct"]),
    }


def _mean(values: pl.Series) -> float | None:
    mean = values.cast(pl.Float64).mean()
    return None if mean is None else float(mean)  # type: ignore[arg-type]


def compute(task: EvaluateTask) -> None:
    """Sample completions of the held-out prompts, and score them."""
    config, (_, scorer) = task.config, task.resources
    prompts = task.inputs["prompts"].read().filter(pl.col("drop_reason").is_null()).with_row_index("position")
    total = len(prompts) * (1 + config.num_samples)
    done = 0
    for part, (decoding, per_prompt) in enumerate({"greedy": 1, "sampled": config.num_samples}.items()):
        if not task.writer.has_part(part):
            rows = _sample(task, prompts, decoding, per_prompt)
            # a reward function may ask who wrote the completion
            named = rows.with_columns(pl.lit(CURRENT).alias("policy_name"))
            scored = score_rows(named, prompts, config.score, scorer)
            task.writer.write_part(part, _with_rewards(rows, scored, config))
        done += len(prompts) * per_prompt
        task.progress(done, total)


def _sample(task: EvaluateTask, prompts: pl.DataFrame, decoding: str, per_prompt: int) -> pl.DataFrame:
    config, (engine, _) = task.config, task.resources
    policy = task.inputs["policy"]
    planned = planned_rows(
        prompts.select("position", "prompt_id", "prompt_token_ids", "messages", "reference_answer"),
        per_prompt,
        recipe=task.recipe,
        decoding=decoding,
        seed=task.parameters["seed"],
        temperature=config.temperature,
        policy_digest=policy.digest,
        policy_iteration=task.parameters["policy_iteration"],
    )
    sampling = Sampling(
        temperature=0.0 if decoding == GREEDY else config.temperature,
        max_tokens=config.max_tokens,
        stop_token_ids=tuple(stop_token_ids(policy.path)),
    )
    generated = ROLLOUT(engine, policy.path, make_requests(planned), sampling)
    return answered_rows(planned.drop("prompt_token_ids"), generated, texts_of(policy.path, generated))


def _with_rewards(rows: pl.DataFrame, scored: pl.DataFrame, config: EvaluateTaskConfig) -> pl.DataFrame:
    combined = combined_rewards(scored.lazy(), config.normalize).select("completion_id", "reward")
    errors = scored.group_by("completion_id").agg(pl.col("error").drop_nulls().first())
    return (
        rows.join(combined, on="completion_id", how="left", maintain_order="left")
        .join(errors, on="completion_id", how="left", maintain_order="left")
        .with_columns(is_correct=pl.col("reward") >= config.pass_threshold)
    )


STAGE = Stage("evaluate", version=1, config=EvaluateTaskConfig, compute=compute, wants=("seed",))
