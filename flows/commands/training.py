"""Commands that train. They import what they need when they are called."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.common import Config, NewRun, Overrides, Run, app, named_after, start_working
from pipeline.chain import STEPS
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from flows.prepare import Prepared


@app.command()
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
    _train(config, run or f"runs/{config.stem}", overrides)


def _train(config: Path, place: str, overrides: list[str] | None) -> None:
    from flows.environment import prepare_environment

    prepare_environment()
    from flows.prepare import prepare

    _train_prepared(prepare(config, place, overrides), config, overrides)


def _train_prepared(prepared: "Prepared", config: Path, overrides: list[str] | None) -> None:
    start_working()
    from flows.progress import TerminalReporter
    from flows.train import train_prepared

    run, reporter = prepared.run, TerminalReporter()
    reporter.note(f"{config} -> {run.name}")
    with reporter.shown():
        policy = train_prepared(replace(prepared, reporter=reporter), config, overrides)
    print(f"last policy: {run.shown(Path(policy))}\nlook at it: grpo metrics {run.name}; grpo show {run.name}")


@app.command()
def fork(
    run: Run,
    config: Config,
    at: Annotated[int, typer.Option("--at", min=0, help="Start from the policy after so many updates.")],
    new: NewRun = None,
    offline: Annotated[
        int | None,
        typer.Option("--offline", min=0, help="Stored iterations to train on first; default: all from --at on."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Start a new run from a policy of another one: first on its stored completions, then generating.

    CONFIG has the tables that replace those of RUN, for example new rewards. The same command continues.

    Example: grpo fork runs/demo configs/terse.toml --at 20 --offline 5
    """
    from flows.environment import prepare_environment

    prepare_environment()
    from flows.prepare import check
    from flows.rescore import fork_tables, fork_toml
    from pipeline.config import validate
    from pipeline.files import write_text
    from pipeline.manifest import is_finished
    from pipeline.runs import open_run, run_at
    from stages.config import config_class

    source, place = open_run(run), run_at(new or named_after(run, f"{config.stem}-{at}"))
    is_begun = is_finished(place.initial_policy)
    tables = fork_tables(source, at, config, offline, overrides or [], is_begun=is_begun)
    toml = fork_toml(source, at, tables)
    prepared = check(validate(config_class(), tables, str(config)), place, toml)
    place.root.mkdir(parents=True, exist_ok=True)
    write_text(place.root / "fork.toml", toml)
    _train_prepared(prepared, place.root / "fork.toml", None)


@app.command()
def stage(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help=f"{', '.join(list(STEPS)[:-1])} or {list(STEPS)[-1]}."),
    ],
    run: Run,
    iteration: Annotated[int, typer.Option("--iteration", "-i", min=0, help="Which iteration.")],
) -> None:
    """Run one stage of one iteration with the run's own config; a finished one is found, not made again.

    Example: grpo stage score runs/demo --iteration 3
    """
    from flows.progress import TerminalReporter
    from flows.session import open_session
    from pipeline.manifest import is_finished
    from pipeline.runs import open_run
    from stages.config import recorded_config

    if name not in STEPS:
        raise UsageError(f"there is no stage {name!r}: choose one of {', '.join(STEPS)}")
    run_dir = open_run(run)
    start_working()
    reporter = TerminalReporter()
    with reporter.shown(), open_session(recorded_config(run_dir), run_dir, reporter) as session:
        is_new = name == "update" and not is_finished(run_dir.place(iteration, "policy"))
        made = session.perform(name, iteration)
        if is_new:
            session.perform("optimizer", iteration)  # else the next update would have to train on these rows once more
    print(run_dir.shown(made.path))


@app.command()
def starter(
    config: Config,
    runs: Annotated[Path, typer.Option("--runs", help="Directory of the runs that share the starter.")] = Path("runs"),
    overrides: Overrides = None,
) -> None:
    """Make the small model that a config's [starter] table describes, unless it exists; print where it is.

    Example: grpo starter configs/demo.toml
    """
    from flows import session
    from flows.progress import TerminalReporter
    from pipeline.run_dir import RunDir
    from stages.config import load_config

    settings = load_config(config, overrides)
    if settings.starter is None:
        raise UsageError(f"{config} has no [starter] table: add one, see configs/demo.toml")
    start_working()
    reporter = TerminalReporter()
    with reporter.shown():
        root = session.starters_root(RunDir(runs / "any"))
        result = session.starter(settings, root, reporter.stage("starter"))
    print(result.main.path)
