"""`grpo rows`: rows of one dataset."""

from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.options import Iteration, Limit, Output, Run, last_iteration
from flows.printing import Format, print_rows
from pipeline.artifact import Artifact, open_artifact
from pipeline.chain import CHECKPOINTS, DATASETS, INITIAL
from pipeline.errors import UsageError
from pipeline.runs import open_run

if TYPE_CHECKING:
    import polars as pl

WRITES = False


def rows(
    run: Run,
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="For example completions; see grpo schema.")],
    iteration: Iteration = None,
    columns: Annotated[str | None, typer.Option("--columns", "-c", help="Comma-separated.")] = None,
    where: Annotated[
        str | None, typer.Option("--where", "-w", help="SQL condition, e.g. \"finish_reason = 'length'\".")
    ] = None,
    limit: Limit = 10,
    format_: Output = Format.table,
) -> None:
    """Print rows of a dataset of a run. Read-only.

    Example: grpo rows runs/demo completions -i 3 -c completion,finish_reason
    """
    frame = open_dataset(run, dataset, iteration).scan()
    names = list(dict.fromkeys(columns.split(","))) if columns else frame.collect_schema().names()
    unknown = [name for name in names if name not in frame.collect_schema()]
    if unknown:
        raise UsageError(f"{dataset} has no columns {unknown}: see `grpo schema {dataset}`")
    if where:
        found = _matching(frame, where, names, limit, dataset)
    else:
        found = (frame.head(limit) if limit > 0 else frame).select(names).collect()
    print_rows(found.to_dicts(), format_, columns=names)


def open_dataset(path: str, dataset: str, iteration: int | None) -> Artifact:
    """Return a dataset of a run: of the given iteration, else of the last one that has it. Read-only."""
    run = open_run(path)
    if dataset == "held_out_prompts":
        return open_artifact(run.held_out_prompts)
    if dataset == "evaluations" and iteration == INITIAL:
        return open_artifact(run.place(INITIAL, "evaluations"))
    known = [name for name in DATASETS if name not in CHECKPOINTS]
    if dataset not in known:
        raise UsageError(f"there is no dataset {dataset!r}: choose one of {', '.join([*known, 'held_out_prompts'])}")
    return run.open(last_iteration(run, dataset) if iteration is None else iteration, dataset)


def _matching(frame: "pl.LazyFrame", where: str, names: list[str], limit: int, dataset: str) -> "pl.DataFrame":
    """Return the rows that meet an SQL condition.

    Raises:
        UsageError: when it is none, or could read anything but the rows.
    """
    import polars as pl

    from pipeline.conditions import parse

    try:
        filtered = frame.filter(parse(where))
        return (filtered.head(limit) if limit > 0 else filtered).select(names).collect()
    except ValueError as error:
        raise UsageError(f"--where {where!r} {error}; give one, or read the Parquet files with a database") from error
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise UsageError(f"--where {where!r} is not an SQL condition over {dataset}: {error}") from error
