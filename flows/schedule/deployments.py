"""Schedules on a Prefect server: each is a deployment of the flow `scheduled` to one process work pool."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from flows.schedule.client import POOL, have_pool
from flows.schedule.spec import Job, Schedule, duration_of, seconds_of
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State

FLOW = "scheduled"
ENTRYPOINT = "flows.schedule.scheduled.scheduled"
"""A module and not a file: the worker finds it wherever this program is installed."""
TAG = "grpo"
FILE_TAG = "file:"
"""Beginning of the tag that names the schedules.toml of a schedule."""
ANCHOR = datetime(2020, 1, 1, tzinfo=UTC)
"""From which intervals count: the same schedule is due at the same times whenever it is put."""
STRATEGIES = {"queue": "ENQUEUE", "skip": "CANCEL_NEW"}
"""``on_overlap`` -> Prefect's collision strategy."""
MOST = 200
"""Deployments, or flow runs, that one request returns at most."""


@dataclass(frozen=True, slots=True)
class Deployed:
    """A schedule as the server has it."""

    id: UUID
    settings: Mapping[str, Any]
    """Those of `Schedule`, as JSON; whatever somebody made of them elsewhere."""
    is_paused: bool
    file: str | None
    """The schedules.toml that it came from."""

    @property
    def name(self) -> str:
        return str(self.settings["name"])


def read_all(client: "SyncPrefectClient") -> list[Deployed]:
    """Return the schedules of the server, by name. Read-only."""
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName

    found: list[Any] = []
    only = FlowFilter(name=FlowFilterName(any_=[FLOW]))
    while len(page := client.read_deployments(flow_filter=only, limit=MOST, offset=len(found))) == MOST:
        found += page
    return sorted(map(_deployed, [*found, *page]), key=lambda deployed: deployed.name)


def read(client: "SyncPrefectClient", name: str) -> Deployed:
    """Return a schedule. Read-only.

    Raises:
        UsageError: when there is none of that name.
    """
    from prefect.exceptions import ObjectNotFound

    try:
        return _deployed(client.read_deployment_by_name(f"{FLOW}/{name}"))
    except ObjectNotFound:
        names = ", ".join(deployed.name for deployed in read_all(client)) or "none"
        raise UsageError(
            f"there is no schedule {name!r} on this server, there are: {names}; see `grpo schedule list`"
        ) from None


def _deployed(deployment: Any) -> Deployed:
    """Return a deployment as a schedule; its times are null when somebody gave it none, or several."""
    own = set(Job.model_fields) - {"name"}
    settings = {name: deployment.parameters.get(name) for name in own} | {"name": deployment.name}
    cron = every = None
    timezone = "UTC"
    if len(deployment.schedules) == 1:
        times = deployment.schedules[0].schedule
        cron, timezone = getattr(times, "cron", None), getattr(times, "timezone", None) or "UTC"
        interval = getattr(times, "interval", None)
        every = None if interval is None else duration_of(int(interval.total_seconds()))
    options = deployment.concurrency_options
    skips = options is not None and options.collision_strategy.value == STRATEGIES["skip"]
    settings |= {"cron": cron, "every": every, "timezone": timezone, "on_overlap": "skip" if skips else "queue"}
    files = [tag.removeprefix(FILE_TAG) for tag in deployment.tags if tag.startswith(FILE_TAG)]
    is_paused = deployment.paused or not any(schedule.active for schedule in deployment.schedules)
    return Deployed(deployment.id, settings, is_paused, files[0] if files else None)


def put(
    client: "SyncPrefectClient", schedule: Schedule, *, file: str | None = None, replaced: Deployed | None = None
) -> None:
    """Create a schedule on the server, or give the one that it replaces other settings; a paused one stays paused.

    Raises:
        UsageError: when ``cron`` is none.
    """
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions
    from prefect.utilities.callables import parameter_schema

    from flows.schedule.scheduled import scheduled

    have_pool(client)
    is_paused = replaced is not None and replaced.is_paused
    strategy = ConcurrencyLimitStrategy(STRATEGIES[schedule.on_overlap])
    client.create_deployment(
        client.create_flow_from_name(FLOW),
        schedule.name,
        schedules=[DeploymentScheduleCreate(schedule=times_of(schedule), active=True)],
        concurrency_limit=1,
        concurrency_options=ConcurrencyOptions(collision_strategy=strategy),
        parameters=schedule.job,
        parameter_openapi_schema=parameter_schema(scheduled.fn).model_dump(),
        enforce_parameter_schema=True,
        description=schedule.summary,
        work_pool_name=POOL,
        tags=[TAG, *([f"{FILE_TAG}{file}"] if file else [])],
        entrypoint=ENTRYPOINT,
        paused=is_paused,
    )


def times_of(schedule: Schedule) -> Any:
    """Return the times as Prefect has them.

    Raises:
        UsageError: when ``cron`` is none.
    """
    from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule

    if schedule.every is not None:
        return IntervalSchedule(interval=timedelta(seconds=seconds_of(schedule.every)), anchor_date=ANCHOR)
    try:
        return CronSchedule(cron=schedule.cron, timezone=schedule.timezone)
    except ValueError:
        raise UsageError(
            f"schedule {schedule.name}: {schedule.cron!r} is no cron expression: expected minute, hour, day, month, "
            'weekday, as in "0 3 * * *" for every night at three'
        ) from None


def runs_of(client: "SyncPrefectClient", deployed: Deployed | None, most: int | None = None) -> list["FlowRun"]:
    """Return the flow runs that have begun or should have, the latest first. Read-only.

    Args:
        client: of the server.
        deployed: the schedule; None = all.
        most: how many; None = all.
    """
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterId,
        FlowFilter,
        FlowFilterName,
        FlowRunFilter,
        FlowRunFilterExpectedStartTime,
    )
    from prefect.client.schemas.sorting import FlowRunSort

    due = FlowRunFilterExpectedStartTime(before_=datetime.now(UTC))
    found: list[FlowRun] = []
    while most is None or len(found) < most:
        limit = MOST if most is None else min(most - len(found), MOST)
        page = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[FLOW])),
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployed.id])) if deployed else None,
            flow_run_filter=FlowRunFilter(expected_start_time=due),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=limit,
            offset=len(found),
        )
        found += page
        if len(page) < limit:
            break
    return found


def run_now(client: "SyncPrefectClient", deployed: Deployed) -> "FlowRun":
    """Let a schedule fire now, paused or not; return the flow run, which a worker takes."""
    return client.create_flow_run_from_deployment(deployed.id)


def is_over(run: "FlowRun") -> bool:
    """Return whether a flow run has ended."""
    return run.state is not None and run.state.is_final()


def cancel(client: "SyncPrefectClient", deployed: Deployed) -> list["FlowRun"]:
    """Ask that the flow runs of a schedule that run or wait be cancelled; return them. Later firings stay."""
    from prefect.states import Cancelled, Cancelling

    unfinished = [run for run in runs_of(client, deployed) if not is_over(run)]
    for run in unfinished:
        has_begun = run.state is not None and (run.state.is_running() or run.state.is_pending())
        state: State[Any] = Cancelling() if has_begun else Cancelled(message="cancelled before it began")
        client.set_flow_run_state(run.id, state)
    return unfinished
