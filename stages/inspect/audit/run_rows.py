"""The rows of a run that the checks read: its completions with their rewards, a sample of texts, windows. Read-only.

Numbers come from all completions; texts come from a fixed sample of whole groups per iteration (the first by group_id,
which is a hash), so that memory is bounded and a second audit sees the same rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from grpo.groups import differ
from pipeline.artifact import open_artifact
from pipeline.chain import INITIAL
from pipeline.errors import ArtifactMissing
from pipeline.manifest import is_finished
from pipeline.run_dir import RunDir
from stages.inspect.audit.thresholds import AuditConfig
from stages.inspect.metrics import sampled_entropy, token_mean
from stages.ngrams import names_reference
from stages.rewards.results import has_timed_out

TEXT_COLUMNS = ("completion", "prompt", "reference")


@dataclass(frozen=True, slots=True)
class RunRows:
    """The rows of a run as the checks need them."""

    iterations: list[int]
    """Those that have completions."""
    early: list[int]
    late: list[int]
    """The first and the last iterations, scored ones where any is; empty where the run is too short for a trend."""
    completions: pl.DataFrame
    """One row per completion, without its text."""
    texts: pl.DataFrame
    """The sampled groups' completions, with completion, prompt and reference."""
    parts: pl.DataFrame
    """iteration, completion_id, group_id, reward_name, reward, has_timed_out: long format."""
    prompts: pl.DataFrame
    """iteration, prompt_id, prompt (all its messages), reference: one row per prompt and iteration."""
    training: pl.DataFrame
    """iteration, entropy (of what was sampled), kl (null until the iteration has trained)."""
    evaluations: pl.DataFrame
    """iteration (updates behind the policy), prompt_id, group_id, completion_id, decoding, is_correct."""
    held_out: pl.DataFrame
    """prompt_id, prompt, reference of the evaluation questions."""
    pass_threshold: float
    weights: dict[str, float]
    """Reward name -> weight; a name that is missing has weight 1."""
    is_normalized_each: bool

    @property
    def scored(self) -> pl.DataFrame:
        """The completions with a reward."""
        return self.completions.filter(pl.col("reward").is_not_null())

    @property
    def informative(self) -> pl.DataFrame:
        """The scored completions of groups whose rewards differ."""
        return self.scored.filter(differ(pl.col("reward")).over("group_id"))

    def window(self, frame: pl.DataFrame, window: list[int]) -> pl.DataFrame:
        """Return the rows of a window's iterations."""
        return frame.filter(pl.col("iteration").is_in(window))


def load_run_rows(run: RunDir, config: AuditConfig) -> RunRows:
    """Return the rows of a run, finished or not, scored or not.

    Raises:
        ArtifactMissing: when no iteration has completions.
    """
    iterations = [k for k in run.iterations() if run.has(k, "completions") and run.has(k, "prompts")]
    if not iterations:
        raise ArtifactMissing(f"{run.root} has no finished completions with their prompts yet: run it first")
    completions, texts, parts, prompts = [], [], [], []
    for iteration in iterations:
        asked = _prompts(run.open(iteration, "prompts").scan(), config).with_columns(_at(iteration))
        scored = run.open(iteration, "advantages").scan() if run.has(iteration, "advantages") else None
        rows = _completions(run.open(iteration, "completions").scan(), scored, iteration, asked, config)
        texts.append(_sample(rows, config))
        completions.append(rows.drop(TEXT_COLUMNS))
        prompts.append(asked)
        if run.has(iteration, "rewards"):
            parts.append(_parts(run.open(iteration, "rewards").scan(), iteration))
    settings = run.settings()
    normalize, evaluate = settings.get("normalize") or {}, settings.get("evaluate") or {}
    # a run that is still going has completions that are not scored yet: trends end before them
    ended = [k for k in iterations if run.has(k, "advantages")] or iterations
    width = max(1, min(int(len(ended) * config.data.window_share), config.data.window_most))
    has_trend = len(ended) >= config.data.min_iterations
    return RunRows(
        iterations=iterations,
        early=ended[:width] if has_trend else [],
        late=ended[-width:] if has_trend else [],
        completions=pl.concat(completions),
        texts=pl.concat(texts),
        parts=pl.concat(parts) if parts else pl.DataFrame(schema=PART_SCHEMA),
        prompts=pl.concat(prompts),
        training=_training(run, iterations),
        evaluations=_evaluations(run),
        held_out=_held_out(run, config),
        pass_threshold=float(evaluate.get("pass_threshold", 1.0)),
        weights=dict(normalize.get("weights") or {}),
        is_normalized_each=normalize.get("combine") == "normalize_each",
    )


def iteration_rows(
    frames: Mapping[str, pl.LazyFrame], iteration: int, config: AuditConfig, facts: Mapping[str, Any]
) -> RunRows:
    """Return the rows of one scored iteration alone, as the checks read them: without trends and evaluations.

    Args:
        frames: its prompts, completions, rewards and advantages.
        iteration: its index.
        config: the thresholds.
        facts: pass_threshold, weights and combine of the run's config.
    """
    asked = _prompts(frames["prompts"], config).with_columns(_at(iteration))
    rows = _completions(frames["completions"], frames["advantages"], iteration, asked, config)
    entropy = frames["completions"].select(_at(iteration), entropy=sampled_entropy(), kl=pl.lit(None, pl.Float64))
    return RunRows(
        iterations=[iteration],
        early=[],
        late=[],
        completions=rows.drop(TEXT_COLUMNS),
        texts=_sample(rows, config),
        parts=_parts(frames["rewards"], iteration),
        prompts=asked,
        training=entropy.collect(),
        evaluations=pl.DataFrame(schema=EVALUATION_SCHEMA),
        held_out=pl.DataFrame(schema=PROMPT_SCHEMA),
        pass_threshold=float(facts["pass_threshold"]),
        weights=dict(facts["weights"]),
        is_normalized_each=facts["combine"] == "normalize_each",
    )


PART_SCHEMA = {
    "iteration": pl.Int32,
    "completion_id": pl.String,
    "group_id": pl.String,
    "reward_name": pl.String,
    "reward": pl.Float64,
    "has_timed_out": pl.Boolean,
}
PROMPT_SCHEMA = {"prompt_id": pl.String, "prompt": pl.String, "reference": pl.String}
EVALUATION_SCHEMA = {
    "iteration": pl.Int32,
    "prompt_id": pl.String,
    "group_id": pl.String,
    "completion_id": pl.String,
    "decoding": pl.String,
    "is_correct": pl.Boolean,
}


def mean(frame: pl.DataFrame, column: str) -> float:
    """Return the mean of numbers, or the share of what is true; 0 where nothing is known."""
    value = frame[column].cast(pl.Float64).mean()
    return 0.0 if value is None else float(value)  # type: ignore[arg-type]


def _at(iteration: int) -> pl.Expr:
    return pl.lit(iteration, pl.Int32).alias("iteration")


def _prompts(frame: pl.LazyFrame, config: AuditConfig) -> pl.DataFrame:
    contents = pl.col("messages").list.eval(pl.element().struct.field("content")).list.join("\n", ignore_nulls=True)
    return (
        frame.select("prompt_id", prompt=contents.str.head(config.data.characters), reference="reference_answer")
        .unique("prompt_id", keep="first", maintain_order=True)
        .collect()
    )


def _parts(rewards: pl.LazyFrame, iteration: int) -> pl.DataFrame:
    names = ("completion_id", "group_id", "reward_name", "reward")
    return rewards.select(_at(iteration), *names, has_timed_out=has_timed_out()).collect()


def _sample(rows: pl.DataFrame, config: AuditConfig) -> pl.DataFrame:
    """Return the completions of the groups whose texts are read closely."""
    sample = rows["group_id"].unique().sort().head(config.data.groups_per_iteration)
    return rows.filter(pl.col("group_id").is_in(sample.implode()))


def _completions(
    completions: pl.LazyFrame,
    advantages: pl.LazyFrame | None,
    iteration: int,
    prompts: pl.DataFrame,
    config: AuditConfig,
) -> pl.DataFrame:
    frame = completions.select(
        _at(iteration),
        "completion_id",
        "group_id",
        "prompt_id",
        "policy_name",
        "finish_reason",
        "completion",
        num_tokens=pl.col("completion_token_ids").list.len().cast(pl.Int64),
        num_characters=pl.col("completion").str.len_chars().cast(pl.Int64),
    )
    if advantages is not None:
        scored = advantages.select("completion_id", "reward", "advantage")
        frame = frame.join(scored, on="completion_id", how="left", maintain_order="left")
    else:
        frame = frame.with_columns(
            pl.lit(None, pl.Float64).alias("reward"),
            pl.lit(None, pl.Float64).alias("advantage"),
        )
    return (
        frame.join(prompts.lazy().drop("iteration"), on="prompt_id", how="left", maintain_order="left")
        .with_columns(agrees=names_reference(pl.col("completion"), pl.col("reference")))
        .with_columns(pl.col("completion").str.head(config.data.characters))
        .collect()
    )


def _training(run: RunDir, iterations: list[int]) -> pl.DataFrame:
    rows = []
    for iteration in iterations:
        entropy = run.open(iteration, "completions").scan().select(_at(iteration), entropy=sampled_entropy())
        kl = pl.lit(None, pl.Float64)
        if run.has(iteration, "training_records"):
            records = run.open(iteration, "training_records").scan()
            kl = pl.lit(records.select(token_mean("kl_to_sampler", "known_tokens")).collect().item(), pl.Float64)
        rows.append(entropy.with_columns(kl=kl).collect())
    return pl.concat(rows)


def _evaluations(run: RunDir) -> pl.DataFrame:
    found: list[tuple[int, Any]] = []
    if is_finished(run.place(INITIAL, "evaluations")):
        found.append((0, open_artifact(run.place(INITIAL, "evaluations"))))
    found += [(k + 1, run.open(k, "evaluations")) for k in run.iterations() if run.has(k, "evaluations")]
    names = [name for name in EVALUATION_SCHEMA if name != "iteration"]
    frames = [artifact.scan().select(_at(updates), *names).collect() for updates, artifact in found]
    return pl.concat(frames) if frames else pl.DataFrame(schema=EVALUATION_SCHEMA)


def _held_out(run: RunDir, config: AuditConfig) -> pl.DataFrame:
    if not is_finished(run.held_out_prompts):
        return pl.DataFrame(schema=PROMPT_SCHEMA)
    return _prompts(open_artifact(run.held_out_prompts).scan(), config)
