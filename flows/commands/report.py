"""`grpo report`: one HTML file about a run, or the same page served while the run goes on."""

import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.commands.options import Run
from flows.printing import complain, say
from pipeline.errors import UsageError
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
    live: Annotated[
        bool, typer.Option("--live", help="Serve the page to this machine instead, and follow the run until Ctrl-C.")
    ] = False,
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="Of --live; default: 0, a free one.")
    ] = None,
) -> None:
    """Write one HTML file about a run that opens offline, or serve it while the run goes on. The run is only read.

    Example: grpo report runs/demo --live
    """
    if live and output is not None:
        raise UsageError(f"--output {output} names a file, and --live writes none: leave out one of the two")
    if port is not None and not live:
        raise UsageError(f"--port {port} is given without --live, which alone listens on one: give both, or neither")
    choices: dict[str, Any] = {"groups": groups, "megabytes": megabytes, "seed": seed}
    if live:
        _serve(run, port or 0, findings, choices)
        return
    from flows.report.render import write_report

    place, made = write_report(run, output, findings=findings, **choices)
    shown, total = made.counts["shown_groups"], made.counts["groups"]
    say(f"{place}: {shown:,} of {total:,} groups, {place.stat().st_size:,} bytes")


def _serve(run: str, port: int, findings: Path | None, choices: dict[str, Any]) -> None:
    """Serve the page until Ctrl-C or SIGTERM, which are its proper end."""
    from flows.report.live import LivePage, serving
    from flows.report.render import collector
    from pipeline.runs import open_run

    page = LivePage(run, collector(findings, **choices), complain)
    open_run(run)

    def end(*_: Any) -> None:
        page.is_ended = True  # should a library take the exception for one of its own
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    with suppress(KeyboardInterrupt):
        page.look()
        with serving(page, port) as url:
            say(f"{url} follows {run} until Ctrl-C")
            sys.stdout.flush()
            page.follow()
    say("the page is no longer served")
