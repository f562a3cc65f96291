"""`grpo rows`: rows of one dataset."""

import re
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
QUERY_WORDS = frozenset({"select", "from", "with", "values", "table"})
DISTINCT_FROM = re.compile(r"\bdistinct\s+from\b", re.IGNORECASE)
QUOTED = re.compile(r"""(?<![\w&$'"])(?:'(?:[^']|'')*'|"(?:[^"]|"")*")""")
"""Text and quoted names; before E'...' and the like a letter stands, and the quotation mark is left."""
CONDITION = re.compile(r"[\w\s.,()\[\]<>=!+*/%|~^:-]*")


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

    _check_condition(where)
    try:
        filtered = frame.filter(pl.sql_expr(where))
        return (filtered.head(limit) if limit > 0 else filtered).select(names).collect()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise UsageError(f"--where {where!r} is not an SQL condition over {dataset}: {error}") from error


def _check_condition(where: str) -> None:
    """Raise UsageError for a condition with a query in it: polars would open the files and URLs that it names.

    A query begins with one of QUERY_WORDS. Outside of plain quotes only characters are let through that cannot begin a
    comment or another kind of quotes, so that polars's parser takes the same parts for text as this one.
    """
    bare = QUOTED.sub(" ", where)
    words = set(re.findall(r"\w+", DISTINCT_FROM.sub(" ", bare).lower()))
    if words & QUERY_WORDS or not CONDITION.fullmatch(bare) or "--" in bare or "/*" in bare:
        raise UsageError(
            f"--where {where!r} is more than a condition over the columns (it holds a query, a comment or an open or "
            "unusual quotation mark): expected for example \"finish_reason = 'length'\"; give one, or read the Parquet "
            "files with a database"
        )
