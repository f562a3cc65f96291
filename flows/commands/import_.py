"""`grpo import`: completions written elsewhere become a run, and are scored."""

import json
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from flows.commands.options import Config, Overrides, start_working
from flows.printing import say
from pipeline.files import user_path

WRITES = True


def import_(
    config: Config,
    completions: Annotated[
        Path,
        typer.Argument(
            metavar="COMPLETIONS", help=".jsonl, .csv or .parquet: question or prompt_id, completion.", parser=user_path
        ),
    ],
    new: Annotated[
        str | None, typer.Option("--run", help="New run directory or URL; default: runs/<name of the config>.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer", help="Directory of a tokenizer, for token ids and lengths.", parser=user_path, metavar="PATH"
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Take completions that were written elsewhere into a new run, and score them. They cannot train.

    Their questions are those of the config's [prompts]. Other rewards afterwards: grpo rescore.

    Example: grpo import configs/travel.toml configs/travel/completions.jsonl
    """
    from flows.progress import TerminalReporter
    from flows.session import open_session
    from pipeline.config import read_toml
    from pipeline.functions import permit
    from pipeline.runs import run_at
    from stages.checkpoints import load_tokenizer
    from stages.config import check_unchanged, parse_config
    from stages.importing import import_completions
    from stages.preflight import check_conversation, check_source
    from stages.score import check_rewards

    permit(None)  # the config is the user's
    toml = read_toml(config)
    settings = parse_config(toml, str(config), overrides)
    first = check_source(settings.prompts)
    check_rewards(settings.score, json.loads(first.metadata))
    if tokenizer is not None and tokenizer.is_dir():
        check_conversation(load_tokenizer(tokenizer), settings.prompts.chat_template_kwargs, first.messages)
    run = run_at(new or f"runs/{config.stem}")
    check_unchanged(run, settings)
    start_working()
    reporter = TerminalReporter()
    with reporter.shown(), open_session(settings, run, reporter) as session:
        progress = reporter.stage("import")
        import_completions(settings.prompts, completions, run, tokenizer=tokenizer, progress=progress)
        run.record_config(toml, settings.model_dump(mode="json"))
        session.perform("score", 0)
        session.perform("normalize", 0)
    say(run.name)
    say(f"look at it: grpo groups {quote(run.name)}; grpo show {quote(run.name)}")
