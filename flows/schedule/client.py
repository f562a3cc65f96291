"""A client of the Prefect server, and what schedules need there: a work pool, a worker, a limit for each device."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING

from pipeline.errors import ServerError, UsageError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

POOL = "grpo"


@contextmanager
def connected() -> Iterator["SyncPrefectClient"]:
    """Yield a client of the server.

    Raises:
        ServerError: when the server refuses a request or goes away.
    """
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        with get_client(sync_client=True) as client:
            yield client
    except PrefectHTTPStatusError as error:
        raise ServerError(
            f"the Prefect server answered {error.response.status_code} ({error.response.text[:200]}): see its log, and "
            "that it has Prefect 3.7"
        ) from error
    except httpx.HTTPError as error:
        raise ServerError(
            f"the Prefect server went away ({type(error).__name__}): see `grpo server status`, and repeat the command"
        ) from error


def have_pool(client: "SyncPrefectClient") -> None:
    """Create the work pool of all schedules, unless it exists."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
    from prefect.workers.process import ProcessWorker

    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        try:
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
        except ObjectAlreadyExists:
            return


def have_limit(device: str) -> str:
    """Return the name of the concurrency limit that lets one command at a time use a device; it exists afterwards.

    One that somebody has set to another number stays as it is.

    Raises:
        UsageError: when no limit may be named after the device.
    """
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
    from prefect.types.names import BANNED_CHARACTERS, WITHOUT_BANNED_CHARACTERS

    name = f"grpo-device-{device}"
    if not re.fullmatch(WITHOUT_BANNED_CHARACTERS, name):
        odd = " ".join(BANNED_CHARACTERS)
        raise UsageError(f"the device is called {device!r}: expected a name without {odd}; give another one (--device)")
    with connected() as client:
        try:
            client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            try:
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
            except ObjectAlreadyExists:
                return name
    return name


def has_worker(client: "SyncPrefectClient") -> bool:
    """Return whether a worker of the pool is alive. Read-only."""
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        workers = client.read_workers_for_work_pool(POOL)
    except PrefectHTTPStatusError as error:
        if error.response.status_code == HTTPStatus.NOT_FOUND:
            return False
        raise
    return any(worker.status.value == "ONLINE" for worker in workers)
