"""`grpo rescore`: new rewards and advantages for stored completions."""

from shlex import quote
from typing import Annotated

import typer

from flows.commands.options import (
    Config,
    NewRun,
    Output,
    Overrides,
    Run,
    Trust,
    named_after,
    permit_named,
    start_working,
)
from flows.printing import Format, print_rows, say
from pipeline.runs import open_run, run_at

WRITES = True


def rescore(
    run: Run,
    config: Config,
    new: NewRun = None,
    iterations: Annotated[
        str | None, typer.Option("--iterations", "-i", help="Which, e.g. 0-9 or 3,5; default: all stored ones.")
    ] = None,
    overrides: Overrides = None,
    trust: Trust = False,
    format_: Output = Format.table,
) -> None:
    """Give stored completions new rewards and advantages, in a new run that refers to them. Generates nothing.

    CONFIG has the tables that replace those of RUN: [score], [normalize]. The same command continues.

    Example: grpo rescore runs/demo configs/terse.toml --iterations 0-9
    """
    from flows.progress import TerminalReporter
    from flows.rescoring import parse_iterations, rescore_run, summary
    from pipeline.config import load_toml

    own = load_toml(config)
    permit_named(own, overrides, is_trusted=trust)
    source = open_run(run)
    directory = new or named_after(run, config.stem)
    start_working()
    reporter = TerminalReporter()
    with reporter.shown():
        chosen = parse_iterations(iterations)
        done = rescore_run(source, own, run_at(directory), chosen, overrides or [], reporter)
    rows = summary(source, done)
    is_short = format_ is Format.table and not any(row["timed_out"] for row in rows)
    columns = ("reward_name", "completions", "mean", "std", "failed", "timed_out")
    print_rows(rows, format_, columns=columns[:-1] if is_short else columns)
    if format_ is Format.table:
        say(f"{done.num_completions:,} completions of {len(done.iterations)} iterations in {done.seconds:.1f} s")
        say(directory)
        names = [quote(str(name)) for name in (run, directory, config)]
        say("compare: grpo diff {0} {1} --rewards; train on it: grpo fork {0} {2} --at N".format(*names))
