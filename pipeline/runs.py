"""Runs by path or URL."""

from pathlib import Path

from pipeline.errors import ArtifactMissing, UsageError
from pipeline.object_store import local_path, open_store
from pipeline.run_dir import RESOLVED_CONFIG, RunDir, is_record


def run_at(where: str | Path) -> RunDir:
    """Return the run at a path or URL, whether it exists or not; of one on a store the manifests are brought here."""
    path = local_path(where)
    if path is not None:
        return RunDir(path)
    from pipeline.working_copy import WorkingCopy

    copy = WorkingCopy(open_store(str(where)), is_record)
    copy.sync()
    return RunDir(copy.root, copy)


def is_run(where: str | Path) -> bool:
    """Return whether there is a run at a path or URL. Read-only."""
    path = local_path(where)
    if path is None:
        return open_store(str(where)).find(RESOLVED_CONFIG) is not None
    return RunDir(path).resolved_config.is_file()


def runs_in(where: str | Path) -> list[RunDir]:
    """Return the runs in a directory or below a URL, by name. Read-only.

    Raises:
        UsageError: when there is no such directory.
    """
    path = local_path(where)
    if path is None:
        store = open_store(str(where))
        places: list[str] = [f"{store.url}/{name}" for name in store.folders()]
    elif path.is_dir():
        places = [str(place) for place in sorted(path.iterdir())]
    else:
        raise UsageError(f"{path} does not exist: name a run, or the directory that holds runs (default: runs)")
    return [run_at(place) for place in places if is_run(place)]


def open_run(where: str | Path) -> RunDir:
    """Return the run at a path or URL. Read-only.

    Raises:
        ArtifactMissing: when there is no run.
    """
    if not is_run(where):
        raise ArtifactMissing(f"{where} is not a run directory (no {RESOLVED_CONFIG}): see `grpo ls`")
    return run_at(where)
