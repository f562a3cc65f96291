"""The flow of every schedule: look whether its data changed, wait for the device, run the command, remember."""

import os
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed, Failed

from flows import events
from flows.environment import is_started_by_prefect
from flows.schedule import child, firings, record, triggers
from flows.schedule.client import have_limit
from flows.schedule.spec import Job, seconds_of
from flows.watching import alive
from pipeline.config import validate
from pipeline.errors import GrpoError
from pipeline.processes import when_parent_ends

DEVICE = "GRPO_DEVICE"
"""Environment variable of a worker: the name of its device."""
WORKER = "GRPO_WORKER"
"""Environment variable of a worker: its process id, which the parent's no longer is when it dies early."""
LEASE_SECONDS = 60
"""After so long the device of a killed flow run is free again."""
TRY_SECONDS = 2.0
"""Between two tries to get the device."""
TAKEN = 423
"""HTTP status of the server's answer while another one holds the device."""
UNLIMITED = float("inf")
ANSWER_NO = 1
"""Exit code of a command that has worked and answers no; a failure has another one."""


@flow(name="scheduled", flow_run_name="{name}: {action} {run}", persist_result=False)
def scheduled(
    name: str,
    folder: str,
    config: str,
    run: str,
    action: str = "continue",
    iterations: int | None = None,
    overrides: list[str] | None = None,
    when: dict[str, Any] | None = None,
    time_limit: str | None = None,
) -> State[Any]:
    """Run a schedule's command, if its data changed; return the state that says why it ran, or why not.

    Args:
        name: of the schedule.
        folder: where relative paths begin; absolute.
        config: path of the TOML file.
        run: directory or URL of the run.
        action: continue, fresh, rescore, audit or verify.
        iterations: how many more, for ``continue``.
        overrides: ``key=value`` settings that take precedence over the file.
        when: ``changed`` or ``new_rows`` with their patterns.
        time_limit: a duration such as 8h.
    """
    if is_started_by_prefect():  # a killed worker would leave this process; an interrupt makes its state Crashed
        when_parent_ends(int(os.environ.get(WORKER, os.getppid())), partial(os.kill, os.getpid(), signal.SIGINT))
    tables = {
        "name": name,
        "folder": folder,
        "config": config,
        "run": run,
        "action": action,
        "iterations": iterations,
        "overrides": overrides or [],
        "when": when,
        "time_limit": time_limit,
    }
    try:
        with firings.marked(str(flow_run.get_id() or os.getpid())), alive():
            return _fire(validate(Job, tables, f"schedule {name}"))
    except GrpoError as error:
        return Failed(message=str(error))


def _fire(job: Job) -> State[Any]:
    log = get_run_logger()
    data = triggers.look(job.when, record.folder_of(job)) if job.when else {}
    is_due, why = triggers.reason(job, data, record.seen(job))
    log.info(why)
    if not is_due:
        return Completed(name="Skipped", message=why)
    device = os.environ.get(DEVICE) or platform.node()
    limit = have_limit(device)
    log.info("waiting for the device %s", device)
    with _hold(limit):
        outcome = child.perform(
            job,
            flow_run.get_scheduled_start_time() or datetime.now(UTC),
            record.log_path(job),
            child.environment(str(PREFECT_API_URL.value())),
            log.info,
            seconds_of(job.time_limit) if job.time_limit else UNLIMITED,
        )
    return _state(job, outcome, why, data)


@contextmanager
def _hold(limit: str) -> Iterator[None]:
    """Hold a device in this context, once it is free.

    Prefect's own wait outlives an interrupt: the process of a cancelled firing would wait on, until it is killed.
    """
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(concurrency(limit, strict=True, lease_duration=LEASE_SECONDS, max_retries=0))
                break
            except ConcurrencySlotAcquisitionError as error:
                answer = getattr(error.__cause__, "response", None)
                if answer is None or answer.status_code != TAKEN:
                    raise
            time.sleep(TRY_SECONDS)
        yield


def _state(job: Job, outcome: child.Outcome, why: str, data: triggers.Data) -> State[Any]:
    """Return the state of a command's end; remember the data if it has worked."""
    said = f"{outcome.command or job.action} ({why})"
    if outcome.is_too_long:
        return Failed(message=f"ended after its time limit of {job.time_limit}: {said}")
    if outcome.exit_code not in (0, child.NOTHING_NEW):
        how = f"signal {-outcome.exit_code}" if outcome.exit_code < 0 else f"exit code {outcome.exit_code}"
        if job.action == "verify" and outcome.exit_code == ANSWER_NO:
            payload = {"schedule": job.name, "message": f"`{outcome.command}` has found: {outcome.last_line}"}
            events.emit(events.VERIFY_FAILED, PurePosixPath(job.run).name, job.run, payload)
        return Failed(message=f"{said} ended with {how}: {outcome.last_line}")
    record.remember(job, data, {"finished_at": datetime.now(UTC).isoformat(timespec="seconds"), "why": why})
    if outcome.exit_code == child.NOTHING_NEW:
        return Completed(name="Skipped", message=outcome.last_line)
    return Completed(message=said)
