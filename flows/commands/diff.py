"""`grpo diff`: where two runs differ; with `--rewards`, how two scorings of the same completions differ."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.options import Output, answer
from flows.printing import Format, print_rows, say
from pipeline.errors import ArtifactMissing
from pipeline.run_dir import RunDir
from pipeline.runs import open_run

if TYPE_CHECKING:
    import polars as pl

WRITES = False


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Run directory or URL.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    rewards: Annotated[bool, typer.Option("--rewards", help="Compare two scorings of the same completions.")] = False,
    threshold: Annotated[
        float,
        typer.Option("--threshold", min=0, max=1, help="Exit code 1 above this share of changed advantage signs."),
    ] = 0.0,
    format_: Output = Format.table,
) -> None:
    """Print where two runs part: settings, first recipe, first row. Exit code 1 when they do. Read-only.

    With --rewards: what separates two scorings of the same completions; exit code 1 above the threshold.

    Example: grpo diff runs/demo runs/demo-terse --rewards --threshold 0.05
    """
    answer(diff_rewards(a, b, threshold, format_) if rewards else print_diff(a, b, format_))


def print_diff(a: str | Path, b: str | Path, format_: Format) -> bool:
    """Print how two runs differ: settings, first recipe, first row; return whether they are equal. Read-only."""
    from stages.inspect.run_diff import compare_runs

    differences = compare_runs(open_run(a), open_run(b))
    rows = [{"kind": d.kind, "where": d.where, "what": d.what, "a": d.a, "b": d.b} for d in differences]
    if format_ is Format.table and not rows:
        say(f"{a} and {b} are equal")
    else:
        print_rows(rows, format_, columns=("kind", "where", "what", "a", "b"))
    return not rows


def diff_rewards(a: str | Path, b: str | Path, threshold: float, format_: Format) -> bool:
    """Print how two scorings of the same completions differ; return whether they agree. Read-only.

    They agree when the share of completions whose advantage has another sign in B than in A is at most ``threshold``.

    Raises:
        ArtifactMissing: when the runs share no scored completions.
    """
    from flows.comparison import print_comparison
    from stages.inspect.scoring_diff import compare

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
    print_comparison(found, runs[0], shared, format_)
    return found.sign_flip_share <= threshold


def _all(run: RunDir, iterations: list[int], dataset: str) -> "pl.DataFrame":
    import polars as pl

    return pl.concat(
        [run.open(i, dataset).scan().with_columns(pl.lit(i).alias("iteration")) for i in iterations]
    ).collect()
