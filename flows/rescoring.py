"""Re-scoring: new rewards and advantages for stored completions, in a new run that refers to them."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import ArtifactMissing, UsageError
from pipeline.run_dir import RunDir

if TYPE_CHECKING:
    from flows.reporter import Reporter
    from flows.training import Work
    from stages.config import RunConfig


@dataclass(frozen=True, slots=True)
class Rescored:
    """The result of a re-scoring."""

    run: RunDir
    iterations: Sequence[int]
    num_completions: int
    seconds: float


def rescore_run(
    source: RunDir,
    own: Mapping[str, Any],
    run: RunDir,
    iterations: Sequence[int] | None,
    overrides: list[str],
    reporter: "Reporter",
    work: "Work | None" = None,
) -> Rescored:
    """Score stored completions again, into a run that refers to them by path and digest. The same call continues.

    Where ``own``, the tables of the new run's config, says nothing about scores, the stored rewards are kept, and no
    function that the source's config names is imported. ``work`` says how the stages are executed, default: plainly.

    Raises:
        GrpoError: of the class that fits, where possible before anything is written.
    """
    import tomli_w

    from flows.session import open_session
    from flows.training import PlainWork, step_tasks
    from pipeline.config import apply_overrides, validate, without_nulls
    from pipeline.provenance import environment
    from stages.config import check_unchanged, config_class, derive_tables
    from stages.preflight import check_normalize

    chosen = choose_iterations(source, iterations)
    tables = derive_tables(source, own, overrides)
    settings = validate(config_class(), tables, "the new run's config")
    check_unchanged(run, settings)
    check_normalize(settings.normalize)
    if "logprobs" in settings.normalize.reads:
        raise UsageError(
            f"normalize.baseline {settings.normalize.baseline} weighs by the policy that trains, and none trains in a "
            "re-scored run: choose another baseline, or train with it (grpo fork)"
        )
    keeps_rewards = "score" not in apply_overrides(own, overrides) and all(source.has(i, "rewards") for i in chosen)
    if not keeps_rewards:
        _check_rewards(source, chosen[0], settings)
    started, count = time.monotonic(), 0
    work = work or PlainWork()
    with open_session(settings, run, reporter) as session, work.on(run):
        tasks = step_tasks(session, work)
        run.record_config(tomli_w.dumps(without_nulls(tables)), settings.model_dump(mode="json"))
        run.record_environment(environment())
        for iteration in chosen:
            for dataset in ("prompts", "completions", *(["rewards"] if keeps_rewards else [])):
                run.refer(iteration, dataset, source.open(iteration, dataset))
            count += run.open(iteration, "completions").manifest.rows or 0
            if not keeps_rewards:
                tasks["score"](iteration)
            tasks["normalize"](iteration)
    return Rescored(run, chosen, count, time.monotonic() - started)


def choose_iterations(source: RunDir, wanted: Sequence[int] | None) -> list[int]:
    """Return the wanted iterations of a run, or all that have completions.

    Raises:
        ArtifactMissing: when a wanted one has no completions, or none has.
    """
    stored = [index for index in source.iterations() if source.has(index, "completions")]
    if not stored:
        raise ArtifactMissing(f"{source.name} has no finished completions: run it, or name another run")
    missing = sorted(set(wanted or []) - set(stored))
    if missing:
        raise ArtifactMissing(
            f"{source.name} has no completions of the iterations {missing}, it has {stored[0]} to {stored[-1]}: choose "
            "among those"
        )
    return sorted(set(wanted)) if wanted else stored


def parse_iterations(text: str | None) -> list[int] | None:
    """Return the numbers of ``3``, ``0-9`` or ``0,4,8-10``; None for None.

    Raises:
        UsageError: when the text has another form.
    """
    if text is None:
        return None
    try:
        numbers: list[int] = []
        for part in text.split(","):
            first, dash, last = part.partition("-")
            numbers += range(int(first), int(last if dash else first) + 1)
    except ValueError:
        numbers = []
    if not numbers:
        raise UsageError(f"{text!r} names no iterations: give for example 3, 0-9 or 0,4,8-10")
    return numbers


def _check_rewards(source: RunDir, iteration: int, settings: "RunConfig") -> None:
    """Check the reward functions against the metadata of a stored prompt, before anything is written."""
    import json

    from stages.score import check_rewards

    first = source.open(iteration, "prompts").scan().select("metadata").head(1).collect()
    check_rewards(settings.score, json.loads(first["metadata"][0]) if len(first) else {})


def summary(source: RunDir, rescored: Rescored) -> list[dict[str, object]]:
    """Return a row per reward: completions, mean, failures; and the combined reward before and after. Read-only."""
    import polars as pl

    from stages.rewards.results import has_timed_out

    rewards = pl.concat([rescored.run.open(i, "rewards").scan() for i in rescored.iterations])
    rows = (
        rewards.group_by("reward_name", maintain_order=True)
        .agg(
            pl.len().alias("completions"),
            pl.col("reward").mean().alias("mean"),
            pl.col("reward").std().alias("std"),
            (pl.col("reward").is_null() & ~has_timed_out()).sum().alias("failed"),
            has_timed_out().sum().alias("timed_out"),
        )
        .collect()
        .to_dicts()
    )
    for label, run in (("combined, before", source), ("combined, now", rescored.run)):
        if all(run.has(i, "advantages") for i in rescored.iterations):
            reward = pl.concat([run.open(i, "advantages").scan().select("reward") for i in rescored.iterations])
            found = reward.select(
                pl.len().alias("completions"),
                pl.col("reward").mean().alias("mean"),
                pl.col("reward").std().alias("std"),
                pl.col("reward").is_null().sum().alias("failed"),
            ).collect()
            rows.append({"reward_name": label, **found.row(0, named=True), "timed_out": None})
    return rows
