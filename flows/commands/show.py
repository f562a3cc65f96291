"""`grpo show`: one group: its prompt and its completions."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.options import Iteration, Output, Run, last_iteration
from flows.printing import Format, number, print_rows, say, say_text
from pipeline.errors import UsageError
from pipeline.run_dir import RunDir
from pipeline.runs import open_run
from pipeline.text import one_line

if TYPE_CHECKING:
    import polars as pl

WRITES = False
LONG_ANSWER = 60
"""A completion with at least this many characters gets its own lines instead of a table cell."""


def show(
    run: Run,
    iteration: Iteration = None,
    group: Annotated[
        str | None, typer.Option("--group", "-g", help="group_id or its beginning; default: widest spread.")
    ] = None,
    format_: Output = Format.table,
) -> None:
    """Print one group: its prompt, and its members by advantage. Read-only.

    Example: grpo show runs/demo -i 0
    """
    import polars as pl

    run_dir = open_run(run)
    index = last_iteration(run_dir, "advantages") if iteration is None else iteration
    members = _members(run_dir, index, group)
    if format_ is not Format.table:
        print_rows(members.to_dicts(), format_, columns=members.columns)
        return
    first = members.row(0, named=True)
    prompt = (
        run_dir.open(index, "prompts")
        .scan()
        .filter(pl.col("prompt_id") == first["prompt_id"])
        .collect()
        .row(0, named=True)
    )
    say(f"iteration {index}, group {first['group_id']}, prompt {first['prompt_id']}, task {prompt['task']}")
    for message in prompt["messages"]:
        say_text(f"{one_line(message['role'])}: {message['content']}", indent=2)
    say_text(f"reference answer: {prompt['reference_answer']}", indent=2)
    say(f"  rewards: mean {number(first['group_reward_mean'])}, std {number(first['group_reward_std'])}")
    say()
    rows = members.to_dicts()
    if max(len(row["completion"]) for row in rows) > LONG_ANSWER:
        for row in rows:
            _print_member(row)
        return
    print_rows([_member_row(row) for row in rows], Format.table)


def _member_row(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "advantage": row["advantage"],
        "reward": row["reward"],
        **{
            part["reward_name"]: part["reward"] if part["error"] is None else part["error"]
            for part in row["parts"] or []
        },
        "completion": row["completion"],
        "finish": row["finish_reason"],
        "tokens": len(row["completion_token_ids"]),
        "logprob": sum(x for x in row["sampling_logprobs"] if x is not None),
        "policy": f"{row['policy_name']} {row['policy_digest'][:8]}",
        "dropped": row["drop_reason"],
    }


def _print_member(row: dict[str, Any]) -> None:
    """Print a completion that needs its own lines."""
    facts = _member_row(row)
    facts.pop("completion")
    line = "  ".join(
        f"{name} {number(value) if isinstance(value, float) else value}"
        for name, value in facts.items()
        if value is not None
    )
    say(line, "bold")
    say_text(row["completion"], indent=4)
    for part in row["parts"] or []:
        if part["detail"] is not None:
            say_text(f"{one_line(part['reward_name'])}: {part['detail']}", indent=4, style="dim")
    say()


def _members(run: RunDir, iteration: int, group: str | None) -> "pl.DataFrame":
    import polars as pl

    advantages = run.open(iteration, "advantages").scan()
    if group is None:
        spread = advantages.group_by("group_id", maintain_order=True).agg(pl.col("group_reward_std").first())
        chosen = (
            spread.sort("group_reward_std", descending=True, nulls_last=True, maintain_order=True).first().collect()
        )
    else:
        chosen = advantages.select("group_id").unique().filter(pl.col("group_id").str.starts_with(group)).collect()
    if len(chosen) != 1:
        raise UsageError(
            f"iteration {iteration} of {run.name} has {len(chosen)} groups whose id begins with {group!r}, expected "
            "one: see `grpo groups`"
        )
    group_id = chosen["group_id"].item()
    parts = (
        run.open(iteration, "rewards")
        .scan()
        .filter(pl.col("group_id") == group_id)
        .group_by("completion_id")
        .agg(pl.struct("reward_name", "reward", "error", "detail").alias("parts"))
    )
    return (
        run.open(iteration, "completions")
        .scan()
        .filter(pl.col("group_id") == group_id)
        .join(advantages.drop("group_id"), on="completion_id")
        .join(parts, on="completion_id", how="left")
        .sort("advantage", "completion_index", descending=[True, False])
        .collect()
    )
