"""`grpo run`: train."""

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.options import Config, Overrides, start_working

WRITES = True


def run(
    config: Config,
    run: Annotated[
        str | None, typer.Option("--run", help="Run directory or URL; default: runs/<name of the config>.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Train. The same command again continues where the last one stopped.

    Example: grpo run configs/demo.toml --run runs/demo --set seed=1
    """
    train_run(config, run or f"runs/{config.stem}", overrides)


def train_run(config: Path, place: str, overrides: list[str] | None) -> None:
    """Train a config's policy in a run, shown on the terminal."""
    from flows.environment import prepare

    prepare()
    from pipeline.runs import run_at
    from stages.config import check_unchanged, load_config
    from stages.preflight import preflight

    settings = load_config(config, overrides)
    run = run_at(place)
    check_unchanged(run, settings)
    preflight(settings, run)
    start_working()
    from flows.progress import TerminalReporter

    reporter = TerminalReporter()
    reporter.note(f"{config} -> {run.name}")
    from flows.train import reporter_of_flow, train

    with reporter.shown():
        token = reporter_of_flow.set(reporter)
        try:
            where = run.name if run.copy else str(run.root.resolve())
            policy = train(config=str(config.resolve()), run=where, overrides=overrides)
        finally:
            reporter_of_flow.reset(token)
    print(f"last policy: {run.shown(Path(policy))}\nlook at it: grpo metrics {run.name}; grpo show {run.name}")
