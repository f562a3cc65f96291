"""`grpo report`: one HTML file about a run."""

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.options import Run
from flows.printing import say
from pipeline.files import user_path

WRITES = True


def report(
    run: Run,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="HTML file; default: RUN/report.html.", parser=user_path, metavar="PATH"),
    ] = None,
    findings: Annotated[
        Path | None,
        typer.Option(
            "--findings",
            help="An audit's findings, as `grpo audit -f jsonl` prints them.",
            parser=user_path,
            metavar="PATH",
        ),
    ] = None,
    groups: Annotated[int, typer.Option("--groups", "-g", min=1, help="Groups of each iteration, at most.")] = 12,
    megabytes: Annotated[float, typer.Option("--megabytes", help="Room for the groups on the page.")] = 10.0,
    seed: Annotated[int, typer.Option("--seed", help="Picks the sampled groups.")] = 0,
) -> None:
    """Write one HTML file about a run that opens offline. The run itself is only read.

    Example: grpo report runs/demo
    """
    from flows.report.render import write_report

    place, made = write_report(run, output, findings=findings, groups=groups, megabytes=megabytes, seed=seed)
    shown, total = made.counts["shown_groups"], made.counts["groups"]
    say(f"{place}: {shown:,} of {total:,} groups, {place.stat().st_size:,} bytes")
