"""What Prefect is told of a run: its tasks, its title, its lines; and which of its flow runs have died."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, ParamSpec
from uuid import UUID

from prefect import Task, get_run_logger, runtime
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from flows import notes
from flows.prepare import Prepared
from flows.progress import LogReporter
from flows.training import Retries
from pipeline.chain import INITIAL
from pipeline.errors import MAY_PASS
from pipeline.manifest import is_finished
from pipeline.run_dir import RunDir

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

P = ParamSpec("P")
RECORD = "flow_runs.json"
"""In the run's logs: the ids of the flow runs that have begun to work on it and did not end by themselves."""
MOST_RECORDED = 20
LONGEST_SECONDS = 3600.0
"""Before a retry."""
REMEDY = re.compile(r": (?:expected|check) ")
"""Where a message begins to say what a user can do."""
GOING_ON = (StateType.RUNNING, StateType.CANCELLING)
DIED = "its process has ended without a word; the run was started again"


class PrefectWork:
    """Executes tasks as Prefect's, named after step and iteration: ``generate 3``."""

    @contextmanager
    def on(self, run: RunDir) -> Iterator[None]:
        """Mark this run's flow runs that have died as Crashed, and record this one until it stops in order.

        One that a signal stops stays on record: Prefect's runner, which is to say so, may have been stopped too.
        """
        own = UUID(runtime.flow_run.id)
        others = mark_dead([one for one in recorded(run) if one != own])
        record(run, [*others, own])
        try:
            yield
        except Exception:
            record(run, others)
            raise
        record(run, others)

    def task(self, name: str, work: Callable[P, str], retries: Retries | None = None) -> Callable[P, str]:
        def task_run_name(parameters: dict[str, Any]) -> str:
            return " ".join([name, *("initial" if value == INITIAL else str(value) for value in parameters.values())])

        named: Any = task_run_name  # Prefect's type of it is a protocol that no function has
        return Task(
            work,
            name=name,
            task_run_name=named,
            cache_policy=NO_CACHE,
            persist_result=False,
            **(retry_options(retries) if retries else {}),
        )


def retry_options(retries: Retries) -> dict[str, Any]:
    """Return the options of a Prefect task that is tried again after what may pass, and tells of it."""

    def may_pass(task: Any, task_run: Any, state: State[Any]) -> bool:
        error = state.data
        if not isinstance(error, MAY_PASS):
            return False
        seconds = delays[min(task_run.run_count, retries.most) - 1]
        what = REMEDY.split(str(error).splitlines()[0])[0]
        retries.note(f"warning: {task_run.name} is tried again in {seconds:g} s: {what}")
        return True

    delays = [min(retries.seconds * 2**attempt, LONGEST_SECONDS) for attempt in range(retries.most)]
    return {"retries": retries.most, "retry_delay_seconds": delays, "retry_condition_fn": may_pass}


def title(prepared: Prepared) -> str:
    """Return what a person recognizes a flow run by: the run, and the iterations that are missing. Read-only."""
    run, count = prepared.run, prepared.settings.iterations
    name = PurePosixPath(run.name).name
    first = next((i for i in range(count) if not is_finished(run.place(i, "policy"))), count)
    if first == count:
        return f"{name} finished"
    return f"{name} {first}-{count - 1}" if first < count - 1 else f"{name} {first}"


def logged(prepared: Prepared) -> Prepared:
    """Return a prepared run whose lines go to the flow run's log, too."""
    return replace(prepared, reporter=LogReporter(prepared.reporter, get_run_logger().info))


def recorded(run: RunDir) -> list[UUID]:
    """Return the ids of the flow runs that have begun to work on this run and did not end by themselves. Read-only.

    In a copy of a run they are those of the original, which may go on: then there are none.
    """
    try:
        return [UUID(text) for text in notes.read(run, RECORD)["flow_runs"]][-MOST_RECORDED:]
    except (ValueError, LookupError, TypeError, AttributeError):  # none, or no record of ours
        return []


def record(run: RunDir, ids: list[UUID]) -> None:
    """Write the ids of the flow runs that work on a run, or have died and are unknown to the server."""
    notes.write(run, RECORD, {"flow_runs": [str(one) for one in ids]})


def mark_dead(ids: list[UUID]) -> list[UUID]:
    """Mark those flow runs that still count as running as Crashed, with their tasks; return those that are unknown.

    The caller holds the lock of the run on which they worked, so none of them works any more.
    """
    unknown: list[UUID] = []
    if not ids:
        return unknown
    with get_client(sync_client=True) as client:
        for one in ids:
            try:
                found = client.read_flow_run(one)
            except ObjectNotFound:
                unknown.append(one)
                continue
            if found.state_type in GOING_ON:
                client.set_flow_run_state(one, Crashed(message=DIED), force=True)
            for task_run in _unfinished_tasks(client, one):
                client.set_task_run_state(task_run, Crashed(message=DIED), force=True)
    return unknown


def _unfinished_tasks(client: "SyncPrefectClient", flow_run: UUID) -> list[UUID]:
    """Return the task runs of a flow run that still count as begun; one that awaits a retry is scheduled. Read-only."""
    begun = TaskRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.SCHEDULED])
    found = client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run])),
        task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=begun, name=None)),
    )
    return [task_run.id for task_run in found]
