"""`grpo prune`: drop the checkpoints of policies that no rule keeps; rows and manifests stay."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Annotated

import typer

from flows.commands.options import Output, Run
from flows.printing import Format, digest_in, path_below, print_rows, say
from pipeline.run_dir import RunDir
from pipeline.runs import lock, open_run

WRITES = True


def prune(
    run: Run,
    keep_last: Annotated[int, typer.Option("--keep-last", min=1, help="How many of the last policies stay.")],
    keep_every: Annotated[
        int, typer.Option("--keep-every", min=0, help="Those after so many updates, twice as many ... stay; 0 = none.")
    ] = 0,
    keep_best: Annotated[
        int, typer.Option("--keep-best", min=0, help="So many of the evaluated policies, the best ones, stay.")
    ] = 0,
    best_by: Annotated[
        str, typer.Option("--best-by", help="eval_pass_at_1, eval_pass_rate or eval_pass_at_k of the metrics.")
    ] = "eval_pass_at_1",
    states: Annotated[
        str, typer.Option("--states", help="States that stay: of every policy that is kept, or of the last ones.")
    ] = "kept",
    initial: Annotated[
        bool, typer.Option("--initial", help="Drop the initial policy too: the run can then not be continued.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would go.")] = False,
    format_: Output = Format.table,
) -> None:
    """Drop the weights of older policies and their optimizers' states; rows and manifests stay.

    The rules are those of the config's table [retention], which drops while a run goes on.

    Example: grpo prune runs/demo --keep-last 2 --keep-every 10 --dry-run
    """
    from pipeline.config import validate
    from pipeline.prune import Pruned, prunable
    from pipeline.prune import prune as drop
    from pipeline.retention import RetentionConfig

    given = {"keep_last": keep_last, "keep_every": keep_every, "keep_best": keep_best, "best_by": best_by}
    rules = validate(RetentionConfig, {**given, "states": states}, "grpo prune")
    run_dir = open_run(run)
    with nullcontext() if dry_run else lock(run_dir):
        # opened again: under the lock no other process adds a policy
        items = prunable(run_dir, rules, _needed(open_run(run)), initial=initial)
        done: Sequence[Pruned] = items if dry_run else list(drop(items))
    rows = [
        {
            "checkpoint": path_below(item.artifact, run_dir.root),
            "updates": item.num_updates,
            "files": len(item.files),
            "bytes": item.num_bytes,
            "digest": digest_in(item.artifact, format_),
        }
        for item in done
    ]
    print_rows(rows, format_, columns=("checkpoint", "updates", "files", "bytes", "digest"))
    if format_ is Format.table:
        verb = "would be dropped" if dry_run else "dropped"
        say(f"{sum(item.num_bytes for item in done):,} bytes of {len(done)} checkpoints {verb}")


def _needed(run: RunDir) -> set[int]:
    """Return the numbers of updates behind the policies that coming iterations need."""
    from pipeline.prune import num_finished
    from stages.config import recorded_config

    return recorded_config(run).needed_policies(num_finished(run))
