"""Commands around rewards: writing one, re-scoring stored completions, comparing two scorings."""

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.common import (
    Config,
    Iteration,
    NewRun,
    Output,
    Overrides,
    Run,
    answer,
    app,
    named_after,
    start_working,
)
from flows.printing import Format

reward_app = typer.Typer(help="Write and try reward functions.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(reward_app, name="reward")


@reward_app.command("try")
def try_(
    function: Annotated[str, typer.Argument(metavar="FUNCTION", help="module:function.")],
    run: Run,
    arguments: Annotated[
        list[str] | None, typer.Option("--arg", metavar="KEY=VALUE", help="Argument of the function, as TOML.")
    ] = None,
    iteration: Iteration = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Completions to score.")] = 8,
    group: Annotated[str | None, typer.Option("--group", "-g", help="Only this group: its id or beginning.")] = None,
    format_: Output = Format.table,
) -> None:
    """Score a handful of stored completions with a function and print what it says. Writes nothing.

    Example: grpo reward try my_rewards:is_short runs/demo --arg most=4
    """
    from flows.try_reward import try_reward

    try_reward(function, run, arguments or [], iteration, limit, group, format_)


@app.command()
def rescore(
    run: Run,
    config: Config,
    new: NewRun = None,
    iterations: Annotated[
        str | None, typer.Option("--iterations", "-i", help="Which, e.g. 0-9 or 3,5; default: all stored ones.")
    ] = None,
    overrides: Overrides = None,
    format_: Output = Format.table,
) -> None:
    """Give stored completions new rewards and advantages, in a new run that refers to them. Generates nothing.

    CONFIG has the tables that replace those of RUN: [score], [normalize]. The same command continues.

    Example: grpo rescore runs/demo configs/terse.toml --iterations 0-9
    """
    from flows.printing import print_rows
    from flows.progress import TerminalReporter
    from flows.rescore import parse_iterations, summary
    from flows.rescore import rescore as rescore_run
    from pipeline.runs import open_run, run_at

    source = open_run(run)
    directory = new or named_after(run, config.stem)
    start_working()
    reporter = TerminalReporter()
    with reporter.shown():
        chosen = parse_iterations(iterations)
        done = rescore_run(source, config, run_at(directory), chosen, overrides or [], reporter)
    print_rows(summary(source, done), format_, columns=("reward_name", "completions", "mean", "std", "failed"))
    if format_ is Format.table:
        print(f"{done.num_completions:,} completions of {len(done.iterations)} iterations in {done.seconds:.1f} s")
        print(
            f"{directory}\ncompare: grpo diff {run} {directory} --rewards; train on it: grpo fork {run} {config} --at N"
        )


@app.command("import")
def import_(
    config: Config,
    completions: Annotated[
        Path, typer.Argument(metavar="COMPLETIONS", help=".jsonl, .csv or .parquet: question or prompt_id, completion.")
    ],
    new: Annotated[
        str | None, typer.Option("--run", help="New run directory or URL; default: runs/<name of the config>.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Directory of a tokenizer, for token ids and lengths.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Take completions that were written elsewhere into a new run, and score them. They cannot train.

    Their questions are those of the config's [prompts]. Other rewards afterwards: grpo rescore.

    Example: grpo import configs/travel.toml configs/travel/completions.jsonl
    """
    from flows.progress import TerminalReporter
    from flows.session import open_session
    from pipeline.runs import run_at
    from stages.config import check_unchanged, load_config
    from stages.importing import import_completions
    from stages.score import check_rewards
    from stages.sources import first_row

    settings = load_config(config, overrides)
    check_rewards(settings.score, first_row(settings.prompts).metadata)
    run = run_at(new or f"runs/{config.stem}")
    check_unchanged(run, settings)
    start_working()
    reporter = TerminalReporter()
    with reporter.shown(), open_session(settings, run, reporter) as session:
        progress = reporter.stage("import")
        import_completions(settings.prompts, completions, run, tokenizer=tokenizer, progress=progress)
        run.record_config(config.read_text(encoding="utf-8"), settings.model_dump(mode="json"))
        session.perform("score", 0)
        session.perform("normalize", 0)
    print(f"{run.name}\nlook at it: grpo groups {run.name}; grpo show {run.name}")


@app.command("reward-model")
def reward_model(
    config: Config,
    runs: Annotated[
        Path, typer.Option("--runs", help="Directory of the runs; the model lies in its reward_models/.")
    ] = Path("runs"),
    overrides: Overrides = None,
) -> None:
    """Train the reward model that a config's [reward_model] table describes, unless it exists; print where it is.

    Example: grpo reward-model my_preferences.toml
    """
    from flows.progress import TerminalReporter
    from stages.reward_model.reward_model import load_reward_model_config, train_reward_model
    from stages.trainers.local import resolve_device

    settings = load_reward_model_config(config, overrides)
    start_working()
    reporter = TerminalReporter()
    with reporter.shown():
        progress, device = reporter.stage("reward_model"), resolve_device("auto")
        result = train_reward_model(settings, runs / "reward_models", progress, device=device)
    print(result.main.path)


@app.command()
def whatif(
    run: Run,
    overrides: Overrides = None,
    format_: Output = Format.table,
) -> None:
    """Recompute the advantages of every stored iteration under another normalization; print what changes. Read-only.

    Example: grpo whatif runs/demo --set normalize.scale=none --set normalize.baseline=leave_one_out
    """
    from flows.reward_diff import what_if

    what_if(run, overrides or [], format_)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Run directory or URL.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    rewards: Annotated[bool, typer.Option("--rewards", help="Compare two scorings of the same completions.")] = False,
    threshold: Annotated[
        float,
        typer.Option("--threshold", min=0, max=1, help="Exit code 1 above this share of changed advantage signs."),
    ] = 0.0,
    format_: Output = Format.table,
) -> None:
    """Print where two runs part: settings, first recipe, first row. Exit code 1 when they do. Read-only.

    With --rewards: what separates two scorings of the same completions; exit code 1 above the threshold.

    Example: grpo diff runs/demo runs/demo-terse --rewards --threshold 0.05
    """
    if rewards:
        from flows.reward_diff import diff_rewards

        answer(diff_rewards(a, b, threshold, format_))
    else:
        from flows.verification import print_diff

        answer(print_diff(a, b, format_))
