"""The Prefect server of this machine: started in the background, found by other commands, ended.

It holds a lock as long as it lives: its process id is its own even after a crash, a restart or a reused number.
"""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows.environment import answers
from flows.schedule.record import state_home
from pipeline.errors import ServerError, UsageError
from pipeline.files import is_locked, locked, write_text
from pipeline.processes import kill_group, log_tail, start_python
from pipeline.reading import read_json
from pipeline.text import without_login

HOST = "127.0.0.1"
PORT = 4200
URL_VARIABLE = "PREFECT_API_URL"
DATABASE_VARIABLE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
LEASES_VARIABLE = "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"
LEASES = "prefect.server.concurrency.lease_storage.filesystem"
"""Who holds a device, in files of PREFECT_HOME. Prefect's default is memory: after a restart of the server nobody could
renew or release what its database counts as held, so that the device would be taken for ever."""
PROGRAM = "from flows.schedule.local import serve; serve({port})"
START_SECONDS = 300.0
"""A slow machine needs half a minute for a new database, a busy one a multiple of that."""
STOP_SECONDS = 10.0
POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Local:
    """The server of this machine."""

    pid: int
    port: int
    database: str
    """Its kind alone: an address may hold a password."""

    @property
    def ui(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def url(self) -> str:
        """Of its API: the value of PREFECT_API_URL."""
        return f"{self.ui}/api"


def log_path() -> Path:
    """Return the file with the server's log."""
    return state_home() / "server.log"


def running() -> Local | None:
    """Return the server that was started here and lives, None when there is none. Read-only."""
    if not is_locked(_lock()) or not _note().is_file():
        return None
    noted = read_json(_note(), "end the server by its process id, and start it again")
    return Local(pid=int(noted["pid"]), port=int(noted["port"]), database=str(noted["database"]))


def start(port: int, database_url: str | None) -> Local:
    """Start a server that outlives this command, and wait until it answers.

    Raises:
        UsageError: when one runs here, or the port is taken.
        ServerError: when it ended, or does not answer in time.
    """
    if (there := running()) is not None:
        raise UsageError(f"the server runs already, at {there.ui}: end it first (grpo server stop), or use it")
    state_home().mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_free(port)
    log = log_path()
    log.unlink(missing_ok=True)
    database = {DATABASE_VARIABLE: _with_driver(database_url)} if database_url else {}
    process = start_python(
        ["-P", "-c", PROGRAM.format(port=port)],
        pass_fds=(),
        environment={**os.environ, **environment(port), **database},
        log=log,
    )
    url = database.get(DATABASE_VARIABLE) or os.environ.get(DATABASE_VARIABLE) or "sqlite"
    local = Local(process.pid, port, url.partition(":")[0].partition("+")[0])
    deadline = time.monotonic() + START_SECONDS
    try:
        while not answers(local.url):
            if process.poll() is not None:
                raise ServerError(f"the server ended; its last words: {log_tail(log).splitlines()[-1]}; see {log}")
            if time.monotonic() > deadline:
                raise ServerError(f"the server did not answer within {START_SECONDS:.0f} s: see {log}")
            time.sleep(POLL_SECONDS)
        write_text(_note(), json.dumps(asdict(local)) + "\n")
    except BaseException:
        _end(process.pid, lambda: process.poll() is not None)
        raise
    return local


def environment(port: int) -> dict[str, str]:
    """Return the variables of the server. Without its API's address the page on another port than 4200 stays blank."""
    import sys

    return {
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "PREFECT_UI_ENABLED": "true",
        "PREFECT_UI_API_URL": f"http://{HOST}:{port}/api",
        "PREFECT_API_URL": f"http://{HOST}:{port}/api",
        "PREFECT__SERVER_FINAL": "1",
        LEASES_VARIABLE: os.environ.get(LEASES_VARIABLE, LEASES),
        "PREFECT_LOGGING_INTERNAL_LEVEL": "WARNING",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
    }


def serve(port: int) -> None:
    """Be the server, until SIGTERM."""
    import uvicorn

    wait_for_sqlite()
    with locked(_lock(), wait=False):
        config = uvicorn.Config(
            "prefect.server.api.server:create_app",
            factory=True,
            host=HOST,
            port=port,
            log_level="warning",
            lifespan="on",
            timeout_graceful_shutdown=3,  # a worker's open connection would hold it for ever
        )
        uvicorn.Server(config).run()


def wait_for_sqlite() -> None:
    """Let every transaction of an SQLite database wait for its turn to write.

    Prefect begins them deferred: one that has read fails at once ("database is locked") when another has written since,
    and the event that it was to evaluate is lost after four tries, and an alert with it.
    """
    from prefect.server.database.configurations import AioSqliteConfiguration

    begin = AioSqliteConfiguration.begin_transaction

    def begin_transaction(self: AioSqliteConfiguration, session: Any, with_for_update: bool = False) -> Any:
        return begin(self, session, with_for_update=True)

    AioSqliteConfiguration.begin_transaction = begin_transaction  # type: ignore[method-assign]


def stop() -> Local | None:
    """End the server of this machine; return what it was, None when there was none.

    Raises:
        ServerError: when it does not end.
    """
    there = running()
    if there is not None:
        _end(there.pid, lambda: not is_locked(_lock()))
        if is_locked(_lock()):
            raise ServerError(f"the server (process {there.pid}) does not end: end it with `kill -9 {there.pid}`")
    _note().unlink(missing_ok=True)
    return there


def _end(pid: int, has_ended: Callable[[], bool]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        kill_group(pid, number)
        deadline = time.monotonic() + STOP_SECONDS
        while not has_ended() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if has_ended():
            return


def use_server() -> str:
    """Return the URL of the server for this command: that of PREFECT_API_URL, else that of this machine.

    The environment names it afterwards. Call it before the first import of prefect.

    Raises:
        UsageError: when no server is known, or it does not answer.
    """
    url = os.environ.get(URL_VARIABLE)
    if not url and (there := running()) is not None:
        url = there.url
    if not url:
        raise UsageError(
            "no Prefect server runs here: start one with `grpo server start`, or name yours in PREFECT_API_URL"
        )
    if not answers(url):
        raise UsageError(
            f"no Prefect server answers at {without_login(url)}: start one with `grpo server start`, or correct "
            "PREFECT_API_URL"
        )
    os.environ[URL_VARIABLE] = url
    return url


def _check_free(port: int) -> None:
    import socket

    try:
        socket.create_server((HOST, port)).close()
    except OSError as error:
        raise UsageError(f"port {port} cannot be listened on ({error.strerror}): name another one (--port)") from error


def _with_driver(url: str) -> str:
    """Return a database's URL with the driver that Prefect needs."""
    scheme, mark, rest = url.partition("://")
    if not mark or scheme.partition("+")[0] not in ("postgresql", "postgres", "sqlite"):
        raise UsageError(
            f"the database's URL begins with {scheme[:20]!r}: expected postgresql://USER:PASSWORD@HOST/DATABASE, or "
            "sqlite:///PATH"
        )
    drivers = {"postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg", "sqlite": "sqlite+aiosqlite"}
    return f"{drivers.get(scheme, scheme)}://{rest}"


def _note() -> Path:
    return state_home() / "server.json"


def _lock() -> Path:
    return state_home() / "server.lock"
