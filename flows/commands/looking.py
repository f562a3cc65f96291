"""Commands that only look: they never write, and never import torch."""

from typing import Annotated

import typer

from flows import look
from flows.commands.common import Iteration, Limit, Output, Run, app
from flows.printing import Format


@app.command()
def ls(
    path: Annotated[str, typer.Argument(metavar="[PATH]", help="A run, or a directory or URL of runs.")] = "runs",
    format_: Output = Format.table,
) -> None:
    """List runs, or the artifacts of a run. Read-only.

    Example: grpo ls runs/demo
    """
    look.list_runs(path, format_)


@app.command()
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
    look.print_dataset(run, dataset, iteration, columns, where, limit, format_)


@app.command()
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
    look.show_group(run, iteration, group, format_)


@app.command()
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
    look.print_groups(run, iteration, sort, limit, format_)


@app.command()
def metrics(run: Run, format_: Output = Format.table) -> None:
    """Print one row per iteration; jsonl and csv have every column. Read-only.

    Example: grpo metrics runs/demo --format csv
    """
    look.print_metrics(run, format_)


@app.command()
def schema(
    dataset: Annotated[str | None, typer.Argument(metavar="[DATASET]", help="For example completions.")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="All datasets as the tables of docs/datasets.md.")
    ] = False,
    format_: Output = Format.table,
) -> None:
    """Print the datasets, or the columns of one with their meaning. Read-only.

    Example: grpo schema completions
    """
    if markdown:
        print(look.schema_markdown(), end="")
    else:
        look.print_schema(dataset, format_)
