"""Runs: opened by path or URL, locked for writing, and published if they are on an object store."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.artifact import Artifact, open_artifact
from pipeline.chain import DATASETS
from pipeline.errors import ArtifactMissing, UsageError
from pipeline.files import WRITER_LOCK, is_locked, locked
from pipeline.manifest import is_finished
from pipeline.object_store import local_path, open_store
from pipeline.owner import noted, writer_of
from pipeline.run_dir import RESOLVED_CONFIG, RunDir, is_record, state_of
from pipeline.text import one_line


def run_at(where: str | Path) -> RunDir:
    """Return the run at a path or URL, whether it exists or not; download the manifests of one on a store."""
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


@contextmanager
def lock(run: RunDir) -> Iterator[None]:
    """Lock the run for writing; the system releases the lock when the process ends, even when it is killed.

    Raises:
        UsageError: when another process is writing this run, which is named; when the run's name is not shown as it is,
            or its folders are links.
    """
    if one_line(run.name) != run.name:
        raise UsageError(
            f"{run.name!r} has invisible characters: expected a path that is shown as it is; rename the run"
        )
    with ExitStack() as held:
        try:
            run.root.mkdir(parents=True, exist_ok=True)
            _refuse_links(run)
            held.enter_context(locked(run.root / WRITER_LOCK, wait=False))
        except BlockingIOError:
            raise _is_written(run) from None
        except OSError as error:
            raise UsageError(f"{run.root} cannot be written ({error}): name a directory that can (--run)") from error
        held.enter_context(noted(run.root))
        if run.copy is not None:
            held.enter_context(run.copy.writing())
            publish(run)  # what a killed process finished but did not publish
        yield
        publish(run)


def check_unlocked(run: RunDir) -> None:
    """Check that no process of this machine is writing a run; `lock` alone makes sure of it. Read-only.

    Raises:
        UsageError: naming the process.
    """
    if is_locked(run.root / WRITER_LOCK):
        raise _is_written(run)


def _is_written(run: RunDir) -> UsageError:
    return UsageError(
        f"another process is writing {run.name}{writer_of(run.root)}: wait for it, or give this run another directory"
    )


def _refuse_links(run: RunDir) -> None:
    """Refuse to write where a link leads: the run may be a stranger's."""
    for folder in run.folders():
        if folder.is_symlink():
            raise UsageError(
                f"{folder} is a link to {folder.readlink()}, and nothing is written through a link: expected a folder "
                "of the run; move the files there, or link the whole run instead"
            )


def publish(run: RunDir) -> None:
    """Upload what is finished here to the store; a local run needs nothing."""
    if run.copy is not None:
        places = [run.place(index, dataset) for index in run.iterations() for dataset in DATASETS]
        places = [place for place in places if place.name != "optimizer" or _is_of_its_policy(place)]
        run.copy.publish([*run.outside_iterations(), *places], run.records())


def _is_of_its_policy(state: Path) -> bool:
    policy = state.with_name("policy")
    return is_finished(policy) and state_of(open_artifact(policy)) is not None


def beside(run: RunDir, name: str) -> Path:
    """Return a folder next to the runs that they share, such as that of the starters."""
    folder = run.root.parent / name
    if run.copy is not None:
        from pipeline.working_copy import WorkingCopy

        WorkingCopy(open_store(run.shown(folder)), is_record).sync()
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def share(run: RunDir, artifact: Artifact) -> Artifact:
    """Return an artifact from `beside` as all machines see it: publish it unless the store has one."""
    return artifact if run.copy is None else run.copy.share(artifact)
