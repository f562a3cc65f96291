"""The firings of this machine: of a killed process the server would think that it runs for ever.

Each flow's process holds a lock under the flow run's id. A lock that nobody holds is what a killed one has left.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from flows.schedule.record import state_home
from pipeline.files import is_locked, locked

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient


def folder() -> Path:
    """Return the folder of the locks."""
    return state_home() / "firings"


@contextmanager
def marked(flow_run: str) -> Iterator[None]:
    """Mark a flow run as alive, as long as this process and this context are.

    The mark of an interrupted one stays: whether its last state reached the server is seen later, by `end_lost`.
    """
    folder().mkdir(parents=True, exist_ok=True)
    path = folder() / flow_run
    with locked(path):
        yield
        path.unlink(missing_ok=True)


def lost() -> list[str]:
    """Return the flow runs of this machine whose process was killed or interrupted. Read-only."""
    if not folder().is_dir():
        return []
    return sorted(path.name for path in folder().iterdir() if not is_locked(path))


def end_lost(client: "SyncPrefectClient") -> list[str]:
    """Tell the server that the lost flow runs have crashed, so that their schedules fire again; return their names.

    Those that this server does not know stay, for the one that does.
    """
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Crashed

    names = []
    for flow_run in lost():
        try:
            run = client.read_flow_run(UUID(flow_run))
        except ObjectNotFound:
            continue
        if run.state is None or not run.state.is_final():
            client.set_flow_run_state(run.id, Crashed(message="its process was killed"))
            names.append(run.name)
        (folder() / flow_run).unlink(missing_ok=True)
    return names
