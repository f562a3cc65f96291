"""Checks by an SQL condition over the rows of a dataset; true = the row fails."""

from typing import Literal

import polars as pl

from pipeline.conditions import parse_bounded
from pipeline.config import SHORT
from pipeline.schema import SCHEMAS
from stages.checks.outcome import Frames, Outcome, judged

Checkable = Literal["completions", "rewards", "advantages"]


def condition(where: str, dataset: Checkable) -> pl.Expr:
    """Return the condition as an expression, after trying it on no rows.

    Raises:
        ValueError: when it is no condition over the dataset, or could read or make anything but its rows.
    """
    try:
        expression = parse_bounded(where)
        empty = {name: pl.DataFrame(SCHEMAS[name].empty_table()).lazy() for name in ("prompts", *SCHEMAS)}
        kind = rows_of(dataset, empty).select(is_failed=expression).collect().schema["is_failed"]
    except ValueError as error:
        raise ValueError(f"{SHORT.repr(where)} {error}") from error
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"{SHORT.repr(where)} is not an SQL condition over {dataset}: {first}; correct it") from error
    if kind != pl.Boolean:
        raise ValueError(f"{where!r} gives {kind}, expected true or false: compare it with something")
    return expression


def rows_of(dataset: Checkable, frames: Frames) -> pl.LazyFrame:
    """Return the rows that a condition sees.

    Those of completions have num_tokens too, and the columns of advantages and prompts that they lack.
    """
    if dataset != "completions":
        return frames[dataset]
    asked = frames["prompts"].select("prompt_id", "messages", "reference_answer", "task", "metadata")
    return (
        frames["completions"]
        .with_columns(num_tokens=pl.col("completion_token_ids").list.len().cast(pl.Int64))
        .join(frames["advantages"].drop("group_id"), on="completion_id", how="left", maintain_order="left")
        .join(asked.unique("prompt_id", keep="first"), on="prompt_id", how="left", maintain_order="left")
    )


def check_condition(where: str, dataset: Checkable, max_share: float, frames: Frames) -> Outcome:
    """Return which rows meet the condition; a row of which it is unknown does not fail."""
    rows = rows_of(dataset, frames).select("completion_id", is_failed=condition(where, dataset)).collect()
    return judged(rows, max_share)
