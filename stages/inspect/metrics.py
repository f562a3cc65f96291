"""metrics: what one iteration's artifacts say, as one row. Read-only; the flow appends it to `metrics.parquet`."""

from itertools import pairwise
from typing import Any

import polars as pl

from pipeline.artifact import open_artifact
from pipeline.chain import CHAIN, WRITER, When
from pipeline.clock import per_second
from pipeline.conformance import conform
from pipeline.files import atomic_write
from pipeline.manifest import is_finished
from pipeline.run_dir import RunDir
from pipeline.schema import SCHEMAS
from stages.checks.outcome import quarantined
from stages.evaluate import summarize
from stages.rewards.results import has_timed_out

KL_RISES = 4
KL_FLOOR = 1e-3
STAGE_DATASETS = tuple(step.writes[-1] for step in CHAIN if step.when is not When.late)
"""The main dataset of each stage whose seconds count: late ones run in the background."""


def iteration_metrics(run: RunDir, iteration: int, pass_threshold: float) -> dict[str, Any]:
    """Return the row of a finished iteration."""
    advantages, records = (run.open(iteration, name).scan() for name in ("advantages", "training_records"))
    sampled, combined, zero_variance, parts, trained, steps = pl.collect_all(
        [
            run.open(iteration, "completions")
            .scan()
            .select(**completion_measures(), num_tokens=pl.col("completion_token_ids").list.len().sum()),
            advantages.select(**reward_measures(pass_threshold)),
            zero_variance_share(advantages),
            _parts(run.open(iteration, "rewards").scan()),
            records.select(
                num_trained=pl.col("completion_id").n_unique(),
                num_tokens=pl.col("num_tokens").sum(),
                **training_measures(),
            ),
            run.open(iteration, "optimizer_steps").scan().select(**step_measures()),
        ]
    )
    seconds = _seconds(run, iteration)
    training = {**trained.row(0, named=True), **steps.row(0, named=True)}
    if training["num_trained"] == 0:
        training |= dict.fromkeys(set(training) - {"num_trained", "num_tokens"})
    num_tokens = sampled.drop_in_place("num_tokens").item()
    row = {
        **dict.fromkeys(SCHEMAS["metrics"].names),
        "iteration": iteration,
        **sampled.row(0, named=True),
        **combined.row(0, named=True),
        **zero_variance.row(0, named=True),
        "rewards": parts.to_dicts(),
        **training,
        **_checked(run, iteration),
        "generate_tokens_per_second": per_second(num_tokens, seconds.get("completions", 0.0)),
        "seconds": [{"stage": WRITER[name].name, "seconds": value} for name, value in seconds.items()],
    }
    if "evaluations" in seconds:
        row |= summarize(run.open(iteration, "evaluations").read())
    return row


def recorded_metrics(run: RunDir, iteration: int) -> dict[str, Any] | None:
    """Return the iteration's row of `metrics.parquet`; None unless it was made from the artifacts stored now.

    The manifests suffice: a restart need not read (or download) the rows again. Read-only.
    """
    if not run.metrics.is_file():
        return None
    found = run.read_metrics().filter(pl.col("iteration") == iteration).to_dicts()
    wanted = [{"stage": WRITER[name].name, "seconds": value} for name, value in _seconds(run, iteration).items()]
    return found[0] if found and found[0]["seconds"] == wanted else None


def _seconds(run: RunDir, iteration: int) -> dict[str, float]:
    """Return the seconds of each stage that this run has computed, without what it took from another run."""
    return {
        name: open_artifact(place).manifest.seconds
        for name in STAGE_DATASETS
        if is_finished(place := run.place(iteration, name))
    }


def completion_measures() -> dict[str, pl.Expr]:
    """Return the measures of completions."""
    return {
        "completion_tokens_mean": pl.col("completion_token_ids").list.len().mean(),
        "truncated_share": (pl.col("finish_reason") == "length").mean(),
        "num_completions": pl.len(),
        "entropy": sampled_entropy(),
    }


def sampled_entropy() -> pl.Expr:
    """Return the entropy per token of the distributions that completions were sampled from; needs no forward.

    Its estimate is -log probability over all tokens. The exact entropies of training records are those of groups whose
    rewards differ, hence of prompts that the policy is unsure about.
    """
    return -pl.col("sampling_logprobs").explode().cast(pl.Float64).mean()


def reward_measures(pass_threshold: float) -> dict[str, pl.Expr]:
    """Return the measures of advantages."""
    reward = pl.col("reward")
    return {
        "reward_mean": reward.mean(),
        "reward_std": reward.std(),
        "pass_rate": (reward >= pass_threshold).mean(),
    }


def zero_variance_share(advantages: pl.LazyFrame) -> pl.LazyFrame:
    """Return the share of the groups whose completions all have the same reward."""
    is_dropped = (pl.col("drop_reason") == "zero_variance").any()
    return advantages.group_by("group_id").agg(is_dropped).select(zero_variance_share=pl.col("drop_reason").mean())


def _parts(rewards: pl.LazyFrame) -> pl.LazyFrame:
    return rewards.group_by(name="reward_name", maintain_order=True).agg(
        pl.col("reward").mean().alias("mean"),
        pl.col("reward").is_null().sum().alias("null_count"),
        has_timed_out().sum().alias("timed_out_count"),
    )


def _checked(run: RunDir, iteration: int) -> dict[str, int]:
    """Return what the iteration's checks say; nothing where it has none."""
    if not run.has(iteration, "checks"):
        return {}
    checks = run.open(iteration, "checks").read()
    return {"num_failed_checks": int((~checks["passed"]).sum()), "num_quarantined": len(quarantined(checks))}


def training_measures() -> dict[str, pl.Expr]:
    """Return the measures of training records: means over tokens, and shares of them."""
    tokens = pl.col("num_tokens")
    return {
        "entropy_trained": token_mean("entropy_mean"),
        "kl_to_sampler": token_mean("kl_to_sampler", "known_tokens"),
        "kl_to_reference": token_mean("kl_to_reference"),
        "clip_low_share": pl.col("clipped_low_tokens").sum() / tokens.sum(),
        "clip_high_share": pl.col("clipped_high_tokens").sum() / tokens.sum(),
        "bounded_share": pl.col("bounded_tokens").sum() / tokens.sum(),
    }


def token_mean(column: str, counted: str = "num_tokens") -> pl.Expr:
    """Return the mean over all tokens of a column of means over the ``counted`` tokens of a row, without null rows."""
    tokens = pl.col(counted)
    mean = (pl.col(column) * tokens).sum() / tokens.filter(pl.col(column).is_not_null()).sum()
    return mean.fill_nan(None)


def step_measures() -> dict[str, pl.Expr]:
    """Return the measures of optimizer steps."""
    return {
        "loss": pl.col("loss").mean(),
        "grad_norm": pl.col("grad_norm").mean(),
        "learning_rate": pl.col("learning_rate").last(),
    }


def rising_kl(table: pl.DataFrame, iteration: int) -> list[float] | None:
    """Return kl_to_sampler of the last iterations, if it has just risen ``KL_RISES`` times in a row; else None.

    A threshold of its own could not tell: a KL that ruins a policy on rows that are used again and again is harmless on
    distinct ones. Values under ``KL_FLOOR`` are noise. The next warning needs a fall first.
    """
    recent = table.filter(pl.col("iteration") <= iteration).sort("iteration").tail(KL_RISES + 2)
    values = [0.0 if kl is None or kl < KL_FLOOR else kl for kl in recent["kl_to_sampler"]]
    rises = [before < after for before, after in pairwise(values)]
    has_just_risen = rises[-KL_RISES:] == [True] * KL_RISES and rises[:-KL_RISES] != [True]
    return values[-KL_RISES - 1 :] if has_just_risen else None


def append_metrics(run: RunDir, row: dict[str, Any]) -> pl.DataFrame:
    """Write the row into `metrics.parquet` in place of the one of the same iteration; return the table in order."""
    import pyarrow.parquet as pq

    schema = pl.DataFrame(SCHEMAS["metrics"].empty_table()).schema
    frame = pl.DataFrame([row], schema=schema)
    if run.metrics.is_file():
        earlier = run.read_metrics().filter(pl.col("iteration") != row["iteration"])
        # an earlier version of the program may have known fewer columns
        frame = pl.concat([frame, earlier], how="diagonal").sort("iteration")
    with atomic_write(run.metrics) as temporary:
        pq.write_table(conform(frame, "metrics"), temporary, compression="zstd")
    return frame
