"""New rewards and advantages over completions that exist: `grpo rescore`, and the start of `grpo fork`."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import tomli_w

from flows.session import Reporter, open_session
from pipeline.artifact import open_artifact
from pipeline.config import apply_overrides, load_toml, validate
from pipeline.errors import ArtifactMissing, ConfigError, UsageError
from pipeline.manifest import is_finished
from pipeline.provenance import environment
from pipeline.run_dir import RunDir
from stages.config import OfflineConfig, RunConfig, check_unchanged, derive_tables
from stages.optimizer import state_beside
from stages.score import check_rewards


@dataclass(frozen=True, slots=True)
class Rescored:
    """What a re-scoring did."""

    run: RunDir
    iterations: Sequence[int]
    num_completions: int
    seconds: float


def rescore(
    source: RunDir,
    config: Path,
    run: RunDir,
    iterations: Sequence[int] | None,
    overrides: list[str],
    reporter: Reporter,
) -> Rescored:
    """Score stored completions anew, into a run that refers to them by path and digest. The same call continues.

    Raises:
        GrpoError: of the kind that fits, before anything is written when it can be known by then.
    """
    chosen = choose_iterations(source, iterations)
    tables = derive_tables(source, config, overrides)
    settings = validate(RunConfig, tables, str(config))
    check_unchanged(run, settings)
    _check_rewards(source, chosen[0], settings)
    started, count = time.monotonic(), 0
    with open_session(settings, run, reporter) as session:
        run.record_config(tomli_w.dumps(_without_nulls(tables)), settings.model_dump(mode="json"))
        run.record_environment(environment())
        for iteration in chosen:
            for dataset in ("prompts", "completions"):
                run.refer(iteration, dataset, source.open(iteration, dataset))
            count += run.open(iteration, "completions").manifest.rows or 0
            session.perform("score", iteration)
            session.perform("normalize", iteration)
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
        UsageError: when the text is nothing of that kind.
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


def fork_tables(
    source: RunDir, at: int, config: Path, offline: int | None, overrides: list[str], *, is_begun: bool = False
) -> dict[str, object]:
    """Return the tables of a run that starts from the policy after ``at`` updates of another one.

    It trains first on that run's stored completions from iteration ``at`` on (``offline`` of them, all by default),
    unless the config has [[offline]] of its own, and then generates.

    Raises:
        GrpoError: when the policy or the completions do not exist, or the config is wrong.
    """
    tables = derive_tables(source, config, overrides)
    wished = apply_overrides(load_toml(config), overrides)
    if "offline" not in wished:
        tables.pop("offline", None)  # what the other run was fed is its own affair
    policy = source.policy_before(at)
    if not is_finished(policy):
        raise ArtifactMissing(
            f"{source.name} has no policy after {at} updates ({policy} does not exist): choose --at among those of "
            f"`grpo ls {source.name}`"
        )
    if not is_begun:  # else the fork has its copy
        open_artifact(policy).check_sizes()  # a pruned one says so
    own = {key: value for key, value in wished.get("policy", {}).items() if key == "keep_optimizer"}
    tables["policy"] = {"model": source.shown(policy) if source.copy else str(policy.resolve()), **own}
    if at and own.get("keep_optimizer", True) and not is_begun:
        state_beside(open_artifact(policy)).check_sizes()
    tables.pop("starter", None)
    if not tables.get("offline"):
        stored = [index for index in source.iterations() if index >= at and source.has(index, "completions")]
        chosen = stored if offline is None else stored[:offline]
        if offline and len(chosen) < offline:
            raise ConfigError(
                f"--offline {offline} wants as many stored iterations of {source.name} from {at} on, there are "
                f"{len(stored)}: lower it, or list others under [[offline]] in {config}"
            )
        where = source.name if source.copy else str(source.root.resolve())
        tables["offline"] = [OfflineConfig(run=where, iterations=chosen).model_dump()] if chosen else []
    elif offline is not None:
        raise UsageError(f"{config} has [[offline]] and the command --offline {offline}: leave one of them out")
    return _without_nulls(tables)


def fork_toml(source: RunDir, at: int, tables: dict[str, object]) -> str:
    """Return the fork's config as TOML; `grpo run` with it continues the fork."""
    header = f"# {source.name} after {at} updates, with the tables of another config in place of its own\n"
    return header + tomli_w.dumps(tables)


def _check_rewards(source: RunDir, iteration: int, settings: RunConfig) -> None:
    """Check the reward functions against the metadata of a stored prompt, before anything is written."""
    first = source.open(iteration, "prompts").scan().select("metadata").head(1).collect()
    check_rewards(settings.score, json.loads(first["metadata"][0]) if len(first) else {})


def _without_nulls(tables: dict[str, object]) -> dict[str, object]:
    """Return the tables without nulls, which TOML cannot say: a key that is absent has its default."""

    def clean(value: object) -> object:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if item is not None}
        return [clean(item) for item in value] if isinstance(value, list) else value

    return {key: clean(value) for key, value in tables.items() if value is not None}


def summary(source: RunDir, rescored: Rescored) -> list[dict[str, object]]:
    """Return a row per reward: completions, mean, failures; and the combined reward before and after. Read-only."""
    rewards = pl.concat([rescored.run.open(i, "rewards").scan() for i in rescored.iterations])
    rows = (
        rewards.group_by("reward_name", maintain_order=True)
        .agg(
            pl.len().alias("completions"),
            pl.col("reward").mean().alias("mean"),
            pl.col("reward").std().alias("std"),
            pl.col("reward").is_null().sum().alias("failed"),
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
            rows.append({"reward_name": label, **found.row(0, named=True)})
    return rows
