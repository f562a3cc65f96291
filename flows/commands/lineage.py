"""`grpo lineage`: what an artifact was made from; for a policy also the rows of every update behind it.

With `--completion`, the history of one completion: from its prompt to every policy that it helped to train.
"""

import os
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from flows.commands.options import Output
from flows.printing import Format, digest_in, path_below, print_rows, say
from pipeline.artifact import Artifact, open_artifact, pruned_files
from pipeline.errors import UsageError
from pipeline.files import user_path
from pipeline.manifest import MANIFEST, is_finished
from pipeline.run_dir import RunDir
from pipeline.runs import open_run

WRITES = False
DROPPED = "its weights were dropped"


def lineage(
    path: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="An artifact; with --completion, a run.", parser=user_path)
    ],
    completion: Annotated[
        str | None, typer.Option("--completion", "-c", help="completion_id or its beginning: follow it.")
    ] = None,
    depth: Annotated[int | None, typer.Option("--depth", min=0, help="Of the tree; default: all.")] = None,
    format_: Output = Format.table,
) -> None:
    """Print what an artifact was made from, or what a completion was used for. Read-only.

    Example: grpo lineage runs/demo/iterations/000003/policy
    """
    from pipeline.lineage import ancestry, trace, updates_of

    if completion is not None:
        run = open_run(path)
        steps = trace(run, completion)
        rows = [
            {
                "what": s.what,
                "artifact": path_below(s.artifact, run.root),
                "digest": digest_in(s.artifact, format_),
                "says": s.says + (f"; {DROPPED}" if _is_dropped(s.artifact) else ""),
            }
            for s in steps
        ]
        print_rows(rows, format_, columns=("what", "artifact", "digest", "says"))
        return
    if not is_finished(path):
        raise UsageError(
            f"{path} is no finished artifact (no {MANIFEST}): name one, for example "
            "runs/demo/iterations/000003/policy, or a run with --completion"
        )
    artifact = open_artifact(path)
    root = _root(path)
    tree: list[dict[str, Any]] = [
        {
            "artifact": ("  " * node.depth if format_ is Format.table else "") + path_below(node.artifact, root),
            "depth": node.depth,
            "input": node.name,
            "stage": node.artifact.manifest.stage,
            "rows": node.artifact.manifest.rows,
            "digest": digest_in(node.artifact, format_),
            "above": node.is_repeated,
            "dropped": _is_dropped(node.artifact),
        }
        for node in ancestry(artifact, depth)
    ]
    if format_ is not Format.table:
        print_rows(tree, format_, columns=("depth", "input", "artifact", "stage", "rows", "digest", "above", "dropped"))
        return
    dropped = [node for node in tree if node["dropped"]]
    shown = ("artifact", "input", "stage", "rows", "digest", "above", *(("dropped",) if dropped else ()))
    print_rows(tree, format_, columns=shown)
    if dropped:
        say(
            f"dropped: the weights are gone on purpose; `grpo replay {quote(os.path.relpath(root))} --iteration N "
            "--stage update --scratch FOLDER` makes those of iteration N again"
        )
    updates = [
        {
            "policy": path_below(update.policy, root),
            "digest": digest_in(update.policy, format_),
            "made of": path_below(update.batches, root),
            "rows": update.num_rows,
            "dropped": update.num_dropped,
            "updated from": digest_in(update.parent, format_),
        }
        for update in updates_of(artifact)
    ]
    if updates:
        print_rows(updates, format_)


def _is_dropped(artifact: Artifact) -> bool:
    from pipeline.prune import has_weights

    return bool(pruned_files(artifact)) and not has_weights(artifact)


def _root(path: Path) -> Path:
    """Return the run that the artifact is in, else the folder around it."""
    return next((p for p in path.resolve().parents if RunDir(p).resolved_config.is_file()), path.parent)
