"""`grpo ls`: the runs in a folder, or the artifacts of a run."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.commands.options import Output
from flows.printing import Format, print_rows
from pipeline.artifact import Artifact, open_artifact
from pipeline.manifest import is_finished
from pipeline.run_dir import RunDir
from pipeline.runs import is_run, open_run, runs_in

WRITES = False
RUN_COLUMNS = ("run", "iterations", "finished", "digest")
ARTIFACT_COLUMNS = ("artifact", "stage", "rows", "dropped", "bytes", "seconds", "digest")


def ls(
    path: Annotated[str, typer.Argument(metavar="[PATH]", help="A run, or a directory or URL of runs.")] = "runs",
    format_: Output = Format.table,
) -> None:
    """List runs, or the artifacts of a run. Read-only.

    Example: grpo ls runs/demo
    """
    if is_run(path):
        run = open_run(path)
        print_rows([_artifact_row(run.root, a) for a in run.artifacts()], format_, columns=ARTIFACT_COLUMNS)
        return
    print_rows([_run_row(run) for run in runs_in(path)], format_, columns=RUN_COLUMNS)


def _run_row(run: RunDir) -> dict[str, Any]:
    finished = [k for k in run.iterations() if is_finished(run.place(k, "policy"))]
    last = run.policy_before(len(finished))
    return {
        "run": run.name,
        "iterations": len(run.iterations()),
        "finished": len(finished),
        "digest": open_artifact(last).digest[:16] if is_finished(last) else None,
    }


def _artifact_row(root: Path, artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "artifact": Path(os.path.relpath(artifact.path, root)).as_posix(),
        "stage": manifest.stage,
        "rows": manifest.rows,
        "dropped": " ".join(f"{reason}:{count}" for reason, count in manifest.drops.items()) or None,
        "bytes": sum(facts["bytes"] for facts in manifest.files.values()),
        "seconds": manifest.seconds,
        "digest": artifact.digest[:16],
    }
