"""`grpo starter`: the small model that a config describes."""

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.options import Config, Overrides, start_working
from flows.printing import say
from pipeline.errors import UsageError
from pipeline.files import user_path
from pipeline.functions import permit

WRITES = True


def starter(
    config: Config,
    runs: Annotated[
        Path,
        typer.Option("--runs", help="Directory of the runs that share the starter.", parser=user_path, metavar="PATH"),
    ] = Path("runs"),
    overrides: Overrides = None,
) -> None:
    """Make the small model that a config's [starter] table describes, unless it exists; print where it is.

    Example: grpo starter configs/demo.toml
    """
    from flows import session
    from flows.progress import TerminalReporter
    from pipeline.run_dir import RunDir
    from stages.config import load_config

    permit(None)  # the config is the user's
    settings = load_config(config, overrides)
    if settings.starter is None:
        raise UsageError(f"{config} has no [starter] table: add one, see configs/demo.toml")
    start_working()
    reporter = TerminalReporter()
    with reporter.shown():
        root = session.starters_root(RunDir(runs / "any"))
        result = session.starter(settings, root, reporter.stage("starter"))
    say(result.main.path)
