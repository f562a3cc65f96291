"""`grpo run`: train."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.options import Config, Overrides, start_working
from flows.printing import say
from pipeline.run_dir import RunDir

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
    no_prefect: Annotated[bool, typer.Option("--no-prefect", help="Do the same without Prefect.")] = False,
) -> None:
    """Train. The same command again continues where the last one stopped.

    Example: grpo run configs/demo.toml --run runs/demo --set seed=1
    """
    from flows.environment import prepare_environment, set_defaults
    from pipeline.functions import permit

    set_defaults() if no_prefect else prepare_environment()
    permit(None)  # the config is the user's
    from flows.prepare import prepare

    prepared = prepare(config, run or f"runs/{config.stem}", overrides)
    prepared = replace(prepared, records_diff=record_diff)
    if no_prefect:
        train_alone(prepared, config)
    else:
        train_in_flow(prepared, config, overrides)


def train_in_flow(prepared: "Prepared", config: Path, overrides: list[str] | None) -> None:
    """Train as a flow run of Prefect, with progress on the terminal."""
    start_working()
    from flows.prefect_server import prefect_server

    with prefect_server() as wait_for_server:
        from flows.train import train_prepared

        with shown(prepared, config) as (told, reporter):
            reporter.stage("Prefect's server")
            wait_for_server()
            policy = train_prepared(told, config, overrides)
    say_where(prepared.run, policy)


def train_alone(prepared: "Prepared", config: Path) -> None:
    """Train without Prefect, with progress on the terminal."""
    start_working()
    from flows.training import PlainWork, train_run

    with shown(prepared, config) as (told, _):
        policy = train_run(told, PlainWork())
    say_where(prepared.run, policy)


@contextmanager
def shown(prepared: "Prepared", config: Path) -> "Iterator[tuple[Prepared, TerminalReporter]]":
    """Show the progress of a run on the terminal; yield the run with its reporter."""
    from flows.progress import TerminalReporter

    reporter = TerminalReporter()
    reporter.note(f"{config} -> {prepared.run.name}")
    with reporter.shown():
        yield replace(prepared, reporter=reporter), reporter


def say_where(run: RunDir, policy: str) -> None:
    """Print where the last policy is."""
    say(f"last policy: {run.shown(Path(policy))}")
    say(f"look at it: grpo metrics {quote(run.name)}; grpo show {quote(run.name)}")
