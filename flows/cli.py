"""The command line. Verbs that write import what they need when they are called; verbs that look never import torch."""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flows import look
from pipeline.errors import GrpoError, UsageError
from pipeline.view import Format

app = typer.Typer(
    help="Train language models with GRPO, with every step of it a dataset.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file, for example configs/demo.toml.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, for example runs/demo.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: update.learning_rate=2e-6.")
]
Iteration = Annotated[int | None, typer.Option("--iteration", "-i", help="Which iteration; default: the last one.")]
Output = Annotated[Format, typer.Option("--format", "-f", help="How to print.")]
Limit = Annotated[int, typer.Option("--limit", "-n", min=0, help="Rows at most; 0 = all.")]


@app.command()
def run(
    config: Config,
    run: Annotated[
        Path | None, typer.Option("--run", help="Run directory; default: runs/<name of the config>.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Train. The same command again continues where the last one stopped.

    Example: grpo run configs/demo.toml --run runs/demo --set seed=1
    """
    from flows.environment import prepare

    prepare()
    from pipeline.run_dir import RunDir
    from stages.config import check_unchanged, load_config
    from stages.iteration import preflight

    directory = run or Path("runs") / config.stem
    settings = load_config(config, overrides)
    check_unchanged(RunDir(directory), settings)
    preflight(settings)
    _start_working()
    from flows.progress import TerminalReporter

    reporter = TerminalReporter()
    reporter.note(f"{config} -> {directory}")
    from flows.train import reporter_of_flow, train

    with reporter.shown():
        token = reporter_of_flow.set(reporter)
        try:
            policy = train(config=str(config.resolve()), run=str(directory.resolve()), overrides=overrides)
        finally:
            reporter_of_flow.reset(token)
    print(f"last policy: {os.path.relpath(policy)}\nlook at it: grpo metrics {directory}; grpo show {directory}")


@app.command()
def stage(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="prompts, generate, score, normalize, batch, update or evaluate.")
    ],
    run: Run,
    iteration: Annotated[int, typer.Option("--iteration", "-i", min=0, help="Which iteration.")],
) -> None:
    """Run one stage of one iteration with the run's own config; a finished one is found, not made again.

    Example: grpo stage score runs/demo --iteration 3
    """
    from flows.progress import TerminalReporter
    from flows.session import open_session
    from pipeline.run_dir import open_run
    from stages.config import recorded_config

    names = ("prompts", "generate", "score", "normalize", "batch", "update", "evaluate")
    if name not in names:
        raise UsageError(f"there is no stage {name!r}: choose one of {', '.join(names)}")
    run_dir = open_run(run)
    _start_working()
    reporter = TerminalReporter()
    with reporter.shown(), open_session(recorded_config(run_dir), run_dir, reporter) as session:
        path = getattr(session, name)(iteration + 1 if name == "evaluate" else iteration)
    print(os.path.relpath(path))


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
    _start_working()
    reporter = TerminalReporter()
    with reporter.shown():
        root = session.starters_root(RunDir(runs / "any"))
        result = session.starter(settings, root, reporter.stage("starter"))
    print(result.main.path)


@app.command()
def ls(
    path: Annotated[Path, typer.Argument(metavar="[PATH]", help="A run, or a directory of runs.")] = Path("runs"),
    format_: Output = Format.table,
) -> None:
    """List runs, or the artifacts of a run. Read-only.

    Example: grpo ls runs/demo
    """
    look.list_runs(path, format_)


@app.command()
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
    look.print_dataset(run, dataset, iteration, columns, where, limit, format_)


@app.command()
def show(
    run: Run,
    iteration: Iteration = None,
    group: Annotated[
        str | None, typer.Option("--group", "-g", help="group_id or its beginning; default: widest spread.")
    ] = None,
    format_: Output = Format.table,
) -> None:
    """Print one group: its prompt, and its members by advantage. Read-only.

    Example: grpo show runs/demo -i 0
    """
    look.show_group(run, iteration, group, format_)


@app.command()
def groups(
    run: Run,
    iteration: Iteration = None,
    sort: Annotated[str | None, typer.Option("--sort", "-s", help="Column; a leading - for descending.")] = None,
    limit: Limit = 20,
    format_: Output = Format.table,
) -> None:
    """Print one row per group of an iteration. Read-only.

    Example: grpo groups runs/demo -i 0 --sort mean
    """
    look.print_groups(run, iteration, sort, limit, format_)


@app.command()
def metrics(run: Run, format_: Output = Format.table) -> None:
    """Print one row per iteration; jsonl and csv have every column. Read-only.

    Example: grpo metrics runs/demo --format csv
    """
    look.print_metrics(run, format_)


@app.command()
def schema(
    dataset: Annotated[str | None, typer.Argument(metavar="[DATASET]", help="For example completions.")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="All datasets as the tables of docs/datasets.md.")
    ] = False,
    format_: Output = Format.table,
) -> None:
    """Print the datasets, or the columns of one with their meaning. Read-only.

    Example: grpo schema completions
    """
    if markdown:
        print(look.schema_markdown(), end="")
    else:
        look.print_schema(dataset, format_)


def main() -> None:
    """Run the command line. Exit codes: 0 fine, 1 the answer is no, 2 wrong usage or unusable data."""
    sys.path.insert(0, "")  # reward functions are found in the current directory
    try:
        app()
    except GrpoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)


def _start_working() -> None:
    """Set the environment, and let SIGTERM unwind like Ctrl-C, so that child processes end too.

    Under Prefect's own runner signals are left alone: it sees to them itself.
    """
    from flows.environment import is_started_by_prefect, set_defaults

    set_defaults()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if not is_started_by_prefect():
        signal.signal(signal.SIGTERM, interrupt)


if __name__ == "__main__":
    main()
