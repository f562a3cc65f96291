"""Comparing scorings: `grpo diff --rewards` and `grpo whatif`. Read-only."""

from pathlib import Path
from typing import Any

import polars as pl

from flows.printing import Format, console, print_rows
from pipeline.config import apply_overrides, validate
from pipeline.errors import ArtifactMissing, UsageError
from pipeline.run_dir import RunDir
from pipeline.runs import open_run
from stages.config import recorded_config
from stages.inspect.scoring_diff import Comparison, compare
from stages.normalize import NormalizeConfig, normalize_rows

MOST_GROUPS = 10


def diff_rewards(a: str | Path, b: str | Path, threshold: float, format_: Format) -> bool:
    """Print what separates two scorings of the same completions; return whether they agree. Read-only.

    They agree when no larger share of the completions than the threshold has an advantage of another sign in B than in
    A.

    Raises:
        ArtifactMissing: when the runs share no scored completions.
    """
    runs = open_run(a), open_run(b)
    shared = [i for i in runs[0].iterations() if all(r.has(i, d) for r in runs for d in ("rewards", "advantages"))]
    shared = [i for i in shared if runs[0].open(i, "completions").digest == runs[1].open(i, "completions").digest]
    if not shared:
        raise ArtifactMissing(
            f"{a} and {b} share no iteration with the same completions, both scored: name a run and one made of it by "
            "`grpo rescore`"
        )
    rewards, advantages = (tuple(_all(run, shared, dataset) for run in runs) for dataset in ("rewards", "advantages"))
    found = compare((rewards[0], rewards[1]), (advantages[0], advantages[1]))
    _print_comparison(found, runs[0], shared, format_)
    return found.sign_flip_share <= threshold


def what_if(path: str | Path, overrides: list[str], format_: Format) -> None:
    """Print what another normalization would have changed in every stored iteration. Read-only.

    Raises:
        UsageError: when the overrides are not of the table normalize.
    """
    run = open_run(path)
    config = recorded_config(run).normalize
    foreign = [o for o in overrides if not o.startswith("normalize.")]
    if foreign or not overrides:
        raise UsageError(
            f"--set {' '.join(foreign) or '(nothing)'}: give settings of [normalize], for example "
            "--set normalize.scale=none"
        )
    tables = apply_overrides({"normalize": config.model_dump(mode="json")}, overrides)
    wanted = validate(NormalizeConfig, tables["normalize"], "normalize")
    indices = [i for i in run.iterations() if run.has(i, "rewards") and run.has(i, "advantages")]
    if not indices:
        raise ArtifactMissing(f"{path} has no scored iteration yet: run it, or score it with `grpo rescore`")
    before, after, per_iteration = [], [], []
    for index in indices:
        stored = run.open(index, "advantages").read().with_columns(pl.lit(index).alias("iteration"))
        # advantages of an iteration are those of a batch: scale = batch_std must not see the others
        fresh = normalize_rows(run.open(index, "rewards").scan(), wanted)
        per_iteration.append({"iteration": index, **compare(None, (stored, fresh)).advantages})
        before.append(stored)
        after.append(fresh)
    if format_ is not Format.table:
        print_rows(per_iteration, format_)
        return
    found = compare(None, (pl.concat(before), pl.concat(after)))
    console().print(f"{config.model_dump()}\n-> {wanted.model_dump()}\n", markup=False)
    columns = ("iteration", "completions", "sign_changes", "groups", "gain_signal", "lose_signal", "mean_size_a",
               "mean_size_b", "rank_correlation")  # fmt: skip
    print_rows(_thinned(per_iteration), format_, columns=columns)
    _print_comparison(found, run, indices, format_)


def _thinned(rows: list[dict[str, Any]], most: int = 20) -> list[dict[str, Any]]:
    """Return some rows evenly spread, the last one among them."""
    step = max(-(-len(rows) // most), 1)
    return [row for i, row in enumerate(rows) if i % step == 0 or i == len(rows) - 1]


def _all(run: RunDir, iterations: list[int], dataset: str) -> pl.DataFrame:
    return pl.concat(
        [run.open(i, dataset).scan().with_columns(pl.lit(i).alias("iteration")) for i in iterations]
    ).collect()


def _print_comparison(found: Comparison, run: RunDir, iterations: list[int], format_: Format) -> None:
    completions = _with_texts(found.completions, run, iterations)
    if format_ is not Format.table:
        print_rows(completions.to_dicts(), format_, columns=completions.columns)
        return
    screen = console()
    print_rows(found.rewards.to_dicts(), format_, columns=found.rewards.columns)
    counts = found.advantages
    screen.print(
        f"{counts['completions']:,} completions: the advantage of {counts['sign_changes']:,} "
        f"({found.sign_flip_share:.2%}) has another sign, of {counts['opposite_signs']:,} the opposite one; rank "
        f"correlation {_number(counts['rank_correlation'])}\n{counts['groups']:,} groups: {counts['gain_signal']:,} "
        f"gain a signal, {counts['lose_signal']:,} lose it"
    )
    if len(found.groups):
        screen.print(f"\n{len(found.groups):,} groups differ, most signs first:")
        print_rows(found.groups.head(MOST_GROUPS).to_dicts(), format_, columns=found.groups.columns)
        screen.print("completions that moved most:")
        print_rows(completions.to_dicts(), format_, columns=completions.columns)


def _with_texts(moved: pl.DataFrame, run: RunDir, iterations: list[int]) -> pl.DataFrame:
    """Return the rows with prompt and completion as text."""
    ids = moved["completion_id"].to_list()
    wanted = set(moved["iteration"].to_list()) if "iteration" in moved.columns else set(iterations)
    texts = []
    for index in sorted(wanted):
        prompts = run.open(index, "prompts").scan()
        prompt = prompts.select("prompt_id", prompt=pl.col("messages").list.last().struct.field("content"))
        rows = run.open(index, "completions").scan().filter(pl.col("completion_id").is_in(ids))
        texts.append(
            rows.select("completion_id", "prompt_id", "completion").join(
                prompt.unique("prompt_id"), on="prompt_id", how="left"
            )
        )
    if not texts:
        return moved
    columns = ["completion_id", "prompt", "completion"]
    return moved.join(
        pl.concat(texts).select(columns).collect(), on="completion_id", how="left", maintain_order="left"
    ).drop("drop_reason_a", "drop_reason_b")


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"
