"""`grpo groups`: the groups of an iteration, one row each."""

from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.options import Iteration, Limit, Output, Run, last_iteration
from flows.printing import Format, print_rows
from pipeline.errors import UsageError
from pipeline.run_dir import RunDir
from pipeline.runs import open_run

if TYPE_CHECKING:
    import polars as pl

WRITES = False


def groups(
    run: Run,
    iteration: Iteration = None,
    sort: Annotated[str | None, typer.Option("--sort", "-s", help="Column; a leading - for descending.")] = None,
    limit: Limit = 20,
    format_: Output = Format.table,
) -> None:
    """Print one row per group of an iteration. Read-only.

    Example: grpo groups runs/demo -i 0 --sort mean
    """
    run_dir = open_run(run)
    frame = group_table(run_dir, last_iteration(run_dir, "advantages") if iteration is None else iteration)
    if sort is not None:
        name = sort.removeprefix("-")
        if name not in frame.columns:
            raise UsageError(f"groups have no column {name!r} to sort by: choose one of {', '.join(frame.columns)}")
        frame = frame.sort(name, descending=sort.startswith("-"), nulls_last=True, maintain_order=True)
    print_rows((frame.head(limit) if limit > 0 else frame).to_dicts(), format_, columns=frame.columns)


def group_table(run: RunDir, iteration: int) -> "pl.DataFrame":
    """Return one row per group of an iteration, in the order of the prompts. Read-only."""
    import polars as pl

    prompts = (
        run.open(iteration, "prompts")
        .scan()
        .select(
            "prompt_id",
            prompt=pl.col("messages").list.last().struct.field("content"),
            reference_answer="reference_answer",
        )
    )
    completions = run.open(iteration, "completions").scan()
    advantages = run.open(iteration, "advantages").scan().drop("group_id")
    per_group = completions.join(advantages, on="completion_id", maintain_order="left").group_by(
        "group_id", maintain_order=True
    )
    groups = per_group.agg(
        pl.col("prompt_id").first(),
        pl.len().alias("members"),
        pl.col("reward").count().alias("scored"),
        pl.col("group_reward_mean").first().alias("mean"),
        pl.col("group_reward_std").first().alias("std"),
        pl.col("reward").max().alias("best"),
        pl.col("completion_token_ids").list.len().mean().alias("tokens"),
        pl.col("policy_name").unique(maintain_order=True).str.join("+").alias("policies"),
        pl.col("drop_reason").drop_nulls().first().alias("drop_reason"),
    )
    columns = (
        "group_id",
        "prompt",
        "reference_answer",
        "members",
        "scored",
        "mean",
        "std",
        "best",
        "tokens",
        "policies",
        "drop_reason",
    )
    return groups.join(prompts, on="prompt_id", maintain_order="left").select(columns).collect()
