"""`grpo reward try`: scores a few stored completions while a reward function is written."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.options import Iteration, Output, Run, last_iteration
from flows.printing import Format, print_rows, say
from pipeline.errors import UsageError
from pipeline.functions import permit
from pipeline.runs import open_run

if TYPE_CHECKING:
    import polars as pl

WRITES = False

reward = typer.Typer(help="Write and try reward functions.", no_args_is_help=True, rich_markup_mode=None)


@reward.command("try")
def try_(
    function: Annotated[str, typer.Argument(metavar="FUNCTION", help="module:function.")],
    run: Run,
    arguments: Annotated[
        list[str] | None, typer.Option("--arg", metavar="KEY=VALUE", help="Argument of the function, as TOML.")
    ] = None,
    iteration: Iteration = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Completions to score.")] = 8,
    group: Annotated[str | None, typer.Option("--group", "-g", help="Only this group: its id or beginning.")] = None,
    format_: Output = Format.table,
) -> None:
    """Score a handful of stored completions with a function and print what it says. Writes nothing.

    Example: grpo reward try my_rewards:is_short runs/demo --arg most=4
    """
    import json

    from pipeline.config import apply_overrides
    from stages.rewards.functions import RewardConfig, check_parameters, find_reward
    from stages.rewards.scorer import completion_columns, needs_prompts, open_scorer, prompt_facts

    permit(None)  # the user names the function
    run_dir = open_run(run)
    index = last_iteration(run_dir, "completions") if iteration is None else iteration
    tables = apply_overrides({}, arguments or [])
    tried = find_reward(RewardConfig(name="tried", function=function, arguments=tables))
    prompts = run_dir.open(index, "prompts").read()
    check_parameters(tried, json.loads(prompts["metadata"][0]) if len(prompts) else {})
    completions = _choose(run_dir.open(index, "completions").scan(), limit, group)
    shown = completions.select(completion_columns([tried]))
    with open_scorer(num_workers=1) as scorer:
        rewards = scorer.score(shown, prompts if needs_prompts([tried]) else None, [tried])
    rows = (
        completions.select("completion_id", "prompt_id", "completion")
        .hstack(rewards.select("reward", "error", "detail"))
        .join(prompt_facts(prompts).select("prompt_id", "prompt", "reference"), on="prompt_id", maintain_order="left")
        .select("completion_id", "prompt", "reference", "completion", "reward", "error", "detail")
    )
    if format_ is not Format.table:
        print_rows(rows.to_dicts(), format_, columns=rows.columns)
        return
    _print(rows.to_dicts())


def _choose(completions: "pl.LazyFrame", limit: int, group: str | None) -> "pl.DataFrame":
    """Return a few completions spread over the iteration; with ``group``, the first ones of that group."""
    import polars as pl

    if group is not None:
        found = completions.filter(pl.col("group_id").str.starts_with(group)).head(limit).collect()
        if not len(found):
            raise UsageError(f"no group's id begins with {group!r}: see `grpo groups`")
        return found
    count = int(completions.select(pl.len()).collect().item())
    # one completion of a group says little: take two neighbours
    step = max(count // max(-(-limit // 2), 1), 1)
    rows = sorted({min(first + more, count - 1) for first in range(0, count, step) for more in (0, 1)})[:limit]
    return completions.with_row_index("_row").filter(pl.col("_row").is_in(rows)).drop("_row").collect()


def _print(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        reward = "null" if row["reward"] is None else f"{row['reward']:.4g}"
        say(f"{reward:>8}  {row['completion_id']}", "bold")
        for label in ("prompt", "reference", "completion", "error", "detail"):
            if row[label] is not None:
                first, *more = str(row[label]).split("\n")
                say(f"          {label:<10} {first}")
                for line in more:
                    say(" " * 21 + line)
    scored = [row["reward"] for row in rows if row["reward"] is not None]
    failed = len(rows) - len(scored)
    mean = f"mean {sum(scored) / len(scored):.4g}, " if scored else ""
    say()
    say(f"{len(rows)} completions: {mean}{failed} without a reward")
