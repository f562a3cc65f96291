"""What a schedule remembers of its last run that worked: the data it has seen. A file next to the run."""

import json
import os
from pathlib import Path
from typing import Any

from flows.schedule.spec import Job
from flows.schedule.triggers import Data
from pipeline.errors import ArtifactDamaged
from pipeline.files import write_text
from pipeline.object_store import local_path
from pipeline.reading import read_json

FOLDER = ".schedules"
"""Next to the runs."""


def state_home() -> Path:
    """Return the folder for what this user's machine remembers: $XDG_STATE_HOME/grpo, else ~/.local/state/grpo."""
    named = os.environ.get("XDG_STATE_HOME")
    return (Path(named) if named else Path.home() / ".local" / "state") / "grpo"


def folder_of(job: Job) -> Path:
    """Return the folder in which the relative paths of a schedule begin."""
    return Path(job.folder)


def place(job: Job) -> Path:
    """Return the folder of a schedule's record and log: next to the run, or on this machine for a run on a store."""
    run = local_path(job.run)
    return state_home() / FOLDER if run is None else (folder_of(job) / run).parent / FOLDER


def seen(job: Job) -> Data | None:
    """Return the data that the last run that worked has seen, None before the first one. Read-only.

    Raises:
        ArtifactDamaged: when the record cannot be read.
    """
    path = _path(job)
    if not path.is_file():
        return None
    remedy = "delete it, and the schedule runs once as if its data were new"
    noted = read_json(path, remedy).get("data")
    if not isinstance(noted, dict) or not all(isinstance(contents, dict) for contents in noted.values()):
        raise ArtifactDamaged(f"{path} holds no data of a schedule: {remedy}")
    return noted


def remember(job: Job, data: Data, facts: dict[str, Any]) -> None:
    """Write the data that a run has seen, when it has worked."""
    path = _path(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"data": data, **facts}, indent=2, ensure_ascii=False) + "\n")


def log_path(job: Job) -> Path:
    """Return the file that has the output of all commands of a schedule."""
    return place(job) / f"{job.name}.log"


def _path(job: Job) -> Path:
    return place(job) / f"{job.name}.json"
