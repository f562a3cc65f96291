"""`grpo prune`: drop the checkpoints of all but the last policies; rows and manifests stay."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Annotated

import typer

from flows.commands.options import Output, Run
from flows.printing import Format, digest_in, path_below, print_rows, say
from pipeline.manifest import is_finished
from pipeline.run_dir import RunDir
from pipeline.runs import lock, open_run

WRITES = True


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
    from pipeline.prune import Pruned, prunable
    from pipeline.prune import prune as drop

    run_dir = open_run(run)
    with nullcontext() if dry_run else lock(run_dir):
        # opened again: under the lock no other process adds a policy
        items = prunable(run_dir, keep_policies, _needed(open_run(run)), initial=initial)
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
    """Return the numbers of updates behind the policies that coming iterations have as group members."""
    from stages.config import recorded_config
    from stages.members import member_updates

    count = sum(is_finished(run.policy_before(index + 1)) for index in run.iterations())
    members = recorded_config(run).generate.plan()
    coming = range(count, 2 * count + 1)  # later iterations use no policy that exists now
    found = {member_updates(member, iteration) for member in members for iteration in coming}
    return {number for number in found if number is not None and number <= count}
