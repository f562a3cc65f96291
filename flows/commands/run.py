"""`grpo run`: train."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.options import Config, NoPrefect, Overrides, start_working
from flows.printing import say

if TYPE_CHECKING:
    from flows.prepare import Prepared
    from flows.progress import TerminalReporter

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
    no_prefect: NoPrefect = False,
) -> None:
    """Train. The same command again continues where the last one stopped.

    Example: grpo run configs/demo.toml --run runs/demo --set seed=1
    """
    from flows.environment import prepare_environment
    from pipeline.functions import permit

    prepare_environment(with_prefect=not no_prefect)
    permit(None)  # the config is the user's
    from flows.prepare import prepare

    prepared = prepare(config, run or f"runs/{config.stem}", overrides)
    prepared = replace(prepared, records_diff=record_diff)
    train(prepared, config, overrides, with_prefect=not no_prefect)


def train(prepared: "Prepared", config: Path, overrides: list[str] | None, *, with_prefect: bool) -> None:
    """Train with progress on the terminal: as a flow run of Prefect, or without it."""
    start_working()
    if with_prefect:
        policy = train_in_flow(prepared, config, overrides)
    else:
        from flows.training import PlainWork, train_run

        with shown(prepared, config) as (told, _):
            policy = train_run(told, PlainWork())
    say(f"last policy: {prepared.run.shown(Path(policy))}")
    say(f"look at it: grpo metrics {quote(prepared.run.name)}; grpo show {quote(prepared.run.name)}")


def train_in_flow(prepared: "Prepared", config: Path, overrides: list[str] | None) -> str:
    """Train as a flow run of Prefect; return the path of the last policy."""
    from flows.prefect_server import prefect_server

    with prefect_server() as wait_for_server:
        from flows.train import train_prepared

        with shown(prepared, config) as (told, reporter):
            reporter.stage("Prefect's server")
            wait_for_server()
            return train_prepared(told, config, overrides)


@contextmanager
def shown(prepared: "Prepared", config: Path) -> "Iterator[tuple[Prepared, TerminalReporter]]":
    """Show the progress of a run on the terminal; yield the run with its reporter."""
    from flows.progress import TerminalReporter

    reporter = TerminalReporter()
    reporter.note(f"{config} -> {prepared.run.name}")
    with reporter.shown():
        yield replace(prepared, reporter=reporter), reporter
