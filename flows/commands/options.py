"""What the commands share: types of their arguments, default places, signals, exit code 1."""

import signal
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.printing import Format
from pipeline.errors import ArtifactMissing
from pipeline.files import user_path
from pipeline.functions import permit, texts_in
from pipeline.run_dir import RunDir

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="TOML file, for example configs/demo.toml.", parser=user_path)
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Run directory or URL: runs/demo, s3://bucket/runs/demo.")]
NewRun = Annotated[
    str | None, typer.Option("--run", help="New run directory or URL; default: beside RUN, named after both.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: update.learning_rate=2e-6.")
]
Iteration = Annotated[int | None, typer.Option("--iteration", "-i", help="Which iteration; default: the last one.")]
Trust = Annotated[bool, typer.Option("--trust", help="Execute, and ask for, what only the run's own config names.")]
NoPrefect = Annotated[bool, typer.Option("--no-prefect", help="Do the same without Prefect.")]
Output = Annotated[Format, typer.Option("--format", "-f", help="How to print.")]
Limit = Annotated[int, typer.Option("--limit", "-n", min=0, help="Rows at most; 0 = all.")]


def last_iteration(run: RunDir, dataset: str) -> int:
    """Return the last iteration that has this dataset. Read-only.

    Raises:
        ArtifactMissing: when no iteration has it.
    """
    for iteration in reversed(run.iterations()):
        if run.has(iteration, dataset):
            return iteration
    raise ArtifactMissing(
        f"{run.name} has no finished {dataset} yet: run it, or look at another dataset with `grpo ls`"
    )


def start_working() -> None:
    """Set the environment, and let SIGTERM unwind like Ctrl-C, so that child processes end too.

    Under Prefect's own runner signals are left alone: Prefect handles them.
    """
    from flows.environment import is_started_by_prefect, set_defaults

    set_defaults()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if not is_started_by_prefect():
        signal.signal(signal.SIGTERM, interrupt)


def server_client() -> "AbstractContextManager[SyncPrefectClient]":
    """Return the context of a client of the Prefect server that schedules use; Prefect is imported here.

    Raises:
        UsageError: when no server is known, or it does not answer.
    """
    from flows.environment import set_defaults
    from flows.schedule.local import use_server

    set_defaults()
    use_server()
    from flows.schedule.client import connected

    return connected()


def named_after(run: str, suffix: object) -> str:
    """Return the place of a run that is made from another one: next to it."""
    return f"{run.rstrip('/')}-{suffix}"


def permit_named(tables: Mapping[str, Any], overrides: list[str] | None, *, is_trusted: bool) -> None:
    """Permit what a config of the user's names, beside a config that a run has recorded."""
    if is_trusted:
        permit(None)
    else:
        from pipeline.config import apply_overrides

        permit(texts_in([dict(tables), apply_overrides({}, overrides or [])]))


def answer(is_yes: bool) -> None:
    """End with exit code 1 when the answer is no."""
    if not is_yes:
        raise typer.Exit(1)
