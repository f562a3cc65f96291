"""Printing a comparison of two scorings, for `grpo diff --rewards` and `grpo whatif`."""

import polars as pl

from flows.printing import Format, number, print_rows, say
from pipeline.run_dir import RunDir
from stages.inspect.scoring_diff import Comparison

MOST_GROUPS = 10


def print_comparison(found: Comparison, run: RunDir, iterations: list[int], format_: Format) -> None:
    """Print the tables and counts of a comparison; jsonl and csv only the completions that moved most. Read-only."""
    completions = _with_texts(found.completions, run, iterations)
    if format_ is not Format.table:
        print_rows(completions.to_dicts(), format_, columns=completions.columns)
        return
    print_rows(found.rewards.to_dicts(), format_, columns=found.rewards.columns)
    counts = found.advantages
    say(
        f"{counts['completions']:,} completions: the advantage of {counts['sign_changes']:,} "
        f"({found.sign_flip_share:.2%}) has another sign, of {counts['opposite_signs']:,} the opposite one; rank "
        f"correlation {number(counts['rank_correlation'], '.4f')}"
    )
    say(f"{counts['groups']:,} groups: {counts['gain_signal']:,} gain a signal, {counts['lose_signal']:,} lose it")
    if len(found.groups):
        say()
        say(f"{len(found.groups):,} groups differ, most signs first:")
        print_rows(found.groups.head(MOST_GROUPS).to_dicts(), format_, columns=found.groups.columns)
        say("completions that moved most:")
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
