"""`grpo reward-model`: train a reward model from preferences, or refresh one."""

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.options import Config, Overrides, start_working
from flows.printing import say
from pipeline.files import user_path
from pipeline.functions import permit

WRITES = True


def reward_model(
    config: Config,
    runs: Annotated[
        Path,
        typer.Option(
            "--runs",
            help="Directory of the runs; the model lies in its reward_models/.",
            parser=user_path,
            metavar="PATH",
        ),
    ] = Path("runs"),
    overrides: Overrides = None,
) -> None:
    """Train the reward model that a config's [reward_model] table describes, unless it exists; print where it is.

    Example: grpo reward-model my_preferences.toml
    """
    from flows.progress import TerminalReporter
    from stages.reward_model.reward_model import load_reward_model_config, train_reward_model
    from stages.trainers.local import resolve_device

    permit(None)  # the config is the user's
    settings = load_reward_model_config(config, overrides)
    start_working()
    reporter = TerminalReporter()
    with reporter.shown():
        progress, device = reporter.stage("reward_model"), resolve_device("auto")
        result = train_reward_model(settings, runs / "reward_models", progress, device=device)
    say(result.main.path)
