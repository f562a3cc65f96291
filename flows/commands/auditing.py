"""Commands for the auditor: is a run whole, where does it come from, can it be computed again, what stands out."""

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.common import Iteration, Output, Run, answer, app, start_working
from flows.printing import Format
from pipeline.errors import UsageError


@app.command()
def verify(
    run: Run,
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="Wrong rows named of each check.")] = 20,
    deep: Annotated[bool, typer.Option("--deep", help="Compute the sampler's logprobs with the trainer's model.")] = (
        False
    ),
    deep_rows: Annotated[int, typer.Option("--deep-rows", min=0, help="Rows of each iteration; 0 = all.")] = 64,
    deep_threshold: Annotated[
        float, typer.Option("--deep-threshold", min=0, help="Largest |trainer - sampler| of a token, nats.")
    ] = 0.1,
    deep_seed: Annotated[int, typer.Option("--deep-seed", help="Chooses the rows.")] = 0,
    format_: Output = Format.table,
) -> None:
    """Audit a run: files, chain and meaning; exit code 1 when something is wrong. Read-only.

    Example: grpo verify runs/demo --deep
    """
    from flows import verification

    settings = None
    if deep:
        from stages.inspect.verify.logprobs import DeepSettings

        settings = DeepSettings(deep_rows, deep_seed, deep_threshold)
    answer(verification.print_verification(run, limit, format_, deep=settings))


@app.command()
def lineage(
    path: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="An artifact; with --completion, a run.")],
    completion: Annotated[
        str | None, typer.Option("--completion", "-c", help="completion_id or its beginning: follow it.")
    ] = None,
    depth: Annotated[int | None, typer.Option("--depth", min=0, help="Of the tree; default: all.")] = None,
    format_: Output = Format.table,
) -> None:
    """Print what an artifact was made from, or what a completion was used for. Read-only.

    Example: grpo lineage runs/demo/iterations/000003/policy
    """
    from flows import verification

    verification.print_lineage(path, completion, depth, format_)


@app.command()
def tokens(
    run: Run,
    completion: Annotated[str, typer.Option("--completion", "-c", help="completion_id or its beginning.")],
    iteration: Annotated[int | None, typer.Option("--iteration", "-i", help="The completion's; default: all.")] = None,
    format_: Output = Format.table,
) -> None:
    """Print what the update made of each token of a completion (update.record_tokens). Read-only.

    Example: grpo tokens runs/demo -i 3 -c 71a6b5940d428f02-000
    """
    from flows.tokens import print_tokens

    print_tokens(run, iteration, completion, format_)


@app.command()
def prune(
    run: Run,
    keep_policies: Annotated[int, typer.Option("--keep-policies", help="How many of the last policies stay.")],
    initial: Annotated[
        bool, typer.Option("--initial", help="Drop the initial policy too: the run can then not be continued.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would go.")] = False,
    format_: Output = Format.table,
) -> None:
    """Drop the weights of older policies and their optimizers' states; rows and manifests stay.

    Example: grpo prune runs/demo --keep-policies 2 --dry-run
    """
    from flows import verification

    verification.prune_run(run, keep_policies, initial=initial, dry_run=dry_run, format_=format_)


@app.command()
def replay(
    run: Run,
    iteration: Iteration = None,
    stage: Annotated[str | None, typer.Option("--stage", help="One stage; default: all that are stored.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every iteration.")] = False,
    scratch: Annotated[Path | None, typer.Option("--scratch", help="Keep what is computed in this folder.")] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, help="Of floats, relative to the largest in their tensor or column.")
    ] = 1e-5,
    format_: Output = Format.table,
) -> None:
    """Compute stored artifacts again: equal to the bit, close, or different (exit code 1)? The run is only read.

    Example: grpo replay runs/demo --iteration 3
    """
    from flows.look import last_iteration
    from flows.replay import DATASET_OF, print_replay
    from pipeline.runs import open_run

    if all_ and iteration is not None:
        raise UsageError("--all and --iteration exclude each other: give one")
    last = last_iteration(open_run(run), DATASET_OF.get(stage or "", "completions")) if iteration is None else iteration
    start_working()
    answer(print_replay(run, None if all_ else [last], stage, format_, scratch=scratch, tolerance=tolerance))


@app.command()
def audit(
    run: Run,
    config: Annotated[Path | None, typer.Option("--config", help="Thresholds; default: configs/audit.toml's.")] = None,
    format_: Output = Format.table,
) -> None:
    """Look for reward hacking, leaks and broken training; exit code 1 when there is a warning. Read-only.

    Example: grpo audit runs/demo
    """
    from flows.audit_findings import audit_run

    raise typer.Exit(audit_run(run, config, format_))


@app.command()
def report(
    run: Run,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="HTML file; default: RUN/report.html.")] = None,
    findings: Annotated[
        Path | None, typer.Option("--findings", help="An audit's findings, as `grpo audit -f jsonl` prints them.")
    ] = None,
    groups: Annotated[int, typer.Option("--groups", "-g", min=1, help="Groups of each iteration, at most.")] = 12,
    megabytes: Annotated[float, typer.Option("--megabytes", help="Room for the groups on the page.")] = 10.0,
    seed: Annotated[int, typer.Option("--seed", help="Picks the sampled groups.")] = 0,
) -> None:
    """Write one HTML file about a run that opens offline. The run itself is only read.

    Example: grpo report runs/demo
    """
    from flows.report.render import write_report

    place, made = write_report(run, output, findings=findings, groups=groups, megabytes=megabytes, seed=seed)
    shown, total = made.counts["shown_groups"], made.counts["groups"]
    print(f"{place}: {shown:,} of {total:,} groups, {place.stat().st_size:,} bytes")
