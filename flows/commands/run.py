"""`grpo run`: train."""

from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.options import Config, Overrides, start_working
from flows.printing import say

if TYPE_CHECKING:
    from flows.prepare import Prepared

WRITES = True


def run(
    config: Config,
    run: Annotated[
        str | None, typer.Option("--run", help="Run directory or URL; default: runs/<name of the config>.")
    ] = None,
    overrides: Overrides = None,
    record_diff: Annotated[
        bool, typer.Option("--record-diff", help="Keep this program's uncommitted changes in environment.json.")
    ] = False,
) -> None:
    """Train. The same command again continues where the last one stopped.

    Example: grpo run configs/demo.toml --run runs/demo --set seed=1
    """
    from flows.environment import prepare_environment
    from pipeline.functions import permit

    prepare_environment()
    permit(None)  # the config is the user's
    from flows.prepare import prepare

    prepared = prepare(config, run or f"runs/{config.stem}", overrides)
    train_run(replace(prepared, records_diff=record_diff), config, overrides)


def train_run(prepared: "Prepared", config: Path, overrides: list[str] | None) -> None:
    """Train, with progress on the terminal."""
    start_working()
    from flows.prefect_server import prefect_server

    with prefect_server() as wait_for_server:
        from flows.progress import TerminalReporter
        from flows.train import train_prepared

        run, reporter = prepared.run, TerminalReporter()
        reporter.note(f"{config} -> {run.name}")
        with reporter.shown():
            reporter.stage("Prefect's server")
            wait_for_server()
            policy = train_prepared(replace(prepared, reporter=reporter), config, overrides)
    say(f"last policy: {run.shown(Path(policy))}")
    say(f"look at it: grpo metrics {quote(run.name)}; grpo show {quote(run.name)}")
