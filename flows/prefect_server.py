"""Prefect's server during a command: a temporary one, or the one that PREFECT_API_URL names.

The temporary server is a process of ours in a session of its own: Ctrl-C does not reach it, it ends with this process,
however that ends, and its death ends the command. The artifacts need no server: nothing is lost with one. What Prefect
still wants to tell a server that is gone must not keep the command from ending.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from flows.crash import leave, server_is_lost
from flows.environment import answers
from flows.printing import complain
from pipeline.errors import GrpoError, ServerError
from pipeline.processes import end, has_exited, kill_group, log_tail, start_python, when_parent_ends
from pipeline.text import without_login

START_SECONDS = 300.0
"""A slow machine needs 17 to 36 seconds, a busy one a multiple of that."""
POLL_SECONDS = 0.1
FAREWELL_SECONDS = 10.0
"""For what is still to be told to a server, and for unwinding after its death."""
CONTINUE = "what is finished is kept, and the same command goes on where this one stopped"

INTERRUPTING = signal.SIGUSR2
"""Interrupts the main thread when the server has died; SIGINT is ignored in a shell's background jobs."""

is_temporary = threading.Event()
"""Set while the server is a temporary one: nobody will ask it for artifacts, events or logs."""
computed = threading.Event()
"""Set when a flow has nothing more to compute, and only Prefect has still to tell its server so."""


@contextmanager
def prefect_server() -> Iterator[Callable[[], None]]:
    """Have a server for the flows of this context; yield a function that waits until it answers.

    A temporary one starts while the caller goes on.

    Raises:
        ServerError: when it died, whatever the flow made of that.
    """
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    with _named(url) if url else _temporary() as wait:
        yield wait


@contextmanager
def _named(url: str) -> Iterator[Callable[[], None]]:
    """Let Prefect tell its last events to the server at this URL, but not for long to one that does not answer."""
    logging.raiseExceptions = False  # else the log says over the progress that it has not arrived
    computed.clear()
    is_over = threading.Event()
    threading.Thread(target=_watch_farewell, args=(url, is_over), daemon=True).start()
    try:
        try:
            yield lambda: None
        finally:
            has_told = _farewell()
    except Exception as error:
        if (own := _error_of_run(error)) is not None:
            raise own from None
        if answers(url):
            raise
        raise ServerError(_silent(url)) from error
    finally:
        is_over.set()
    if not has_told and not answers(url):
        raise ServerError(_silent(url))


def _error_of_run(error: BaseException | None) -> GrpoError | None:
    """Return the run's own error, which Prefect's may have followed when a silent server was to be told of it."""
    while error is not None and not isinstance(error, GrpoError):
        error = error.__context__
    return error


def _watch_farewell(url: str, is_over: threading.Event) -> None:
    """End this process when everything is computed and the server does not answer: Prefect would go on asking it."""
    computed.wait()
    silent_since = None
    while not is_over.wait(1.0):
        if answers(url, FAREWELL_SECONDS):  # a busy one takes its time; where none listens is known at once
            silent_since = None
        elif silent_since is None:
            silent_since = time.monotonic()
        elif time.monotonic() - silent_since > FAREWELL_SECONDS:
            _give_up(_silent(url))


def _silent(url: str) -> str:
    return (
        f"the Prefect server at {without_login(url)} does not answer any more: {CONTINUE} once a server answers there"
    )


def _farewell() -> bool:
    """Return whether Prefect could tell its events in time."""
    from prefect.events.worker import EventsWorker

    found = EventsWorker.drain_all(timeout=FAREWELL_SECONDS)
    assert isinstance(found, tuple), "called outside of an event loop"
    if found[1]:
        server_is_lost.set()
    return not found[1]


@contextmanager
def _temporary() -> Iterator[Callable[[], None]]:
    from prefect.events.clients import NullEventsClient
    from prefect.events.worker import EventsWorker
    from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

    with temporary_server(PROGRAM) as (url, wait):
        is_temporary.set()
        EventsWorker.set_client_override(NullEventsClient)
        try:
            with temporary_settings({PREFECT_API_URL: url, PREFECT_LOGGING_TO_API_ENABLED: False}):
                yield wait
        finally:
            EventsWorker.set_client_override(None)
            is_temporary.clear()


PROGRAM = "from flows.prefect_server import serve; serve({descriptor}, {parent})"


@contextmanager
def temporary_server(program: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Start a server; yield its API's URL, and a function that waits until it answers. End it afterwards.

    Args:
        program: Python that listens on the socket ``{descriptor}`` and ends with the process ``{parent}``, as `serve`.

    Raises:
        ServerError: when it died or did not answer in time. If the context does not end by itself after its death, this
            process ends with exit code 2.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:  # ours until the server has it: no other can take the port
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        descriptor, path = tempfile.mkstemp(prefix="grpo-prefect-", suffix=".log")
        os.close(descriptor)
        log = Path(path)
        process = start_python(
            ["-P", "-c", program.format(descriptor=listener.fileno(), parent=os.getpid())],
            pass_fds=[listener.fileno()],
            environment={**os.environ, **_environment()},
            log=log,
        )
    is_over = threading.Event()
    before = signal.signal(INTERRUPTING, _interrupt)
    watcher = threading.Thread(target=_watch, args=(process, log, is_over), daemon=True)
    watcher.start()
    try:
        yield url, partial(_wait, url, process, log)
    except BaseException as error:
        if has_exited(process):
            raise ServerError(_died(log)) from error
        raise
    finally:
        signal.signal(INTERRUPTING, signal.SIG_IGN)  # the server may just have died, and the watcher be about to say so
        is_over.set()
        end(process)
        watcher.join()
        signal.signal(INTERRUPTING, before)
        log.unlink(missing_ok=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _environment() -> dict[str, str]:
    """Return the variables of the server: as Prefect starts its temporary one, and where our modules are."""
    return {
        "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path),
        "PREFECT_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
    }


def serve(descriptor: int, parent: int) -> None:
    """Be Prefect's server on a listening socket until the parent ends."""
    when_parent_ends(parent, partial(kill_group, os.getpgrp()))
    import uvicorn

    config = uvicorn.Config("prefect.server.api.server:create_app", factory=True, log_level="error", lifespan="on")
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=descriptor)])


def _wait(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until the server answers.

    Raises:
        ServerError: when it died, or does not answer in time.
    """
    deadline = time.monotonic() + START_SECONDS
    while not answers(url, POLL_SECONDS * 20):
        if has_exited(process):
            raise ServerError(_died(log))
        if time.monotonic() > deadline:
            raise ServerError(
                f"Prefect's temporary server did not answer within {START_SECONDS:.0f} s: expected at most a minute; "
                "start one with `prefect server start` and name it in PREFECT_API_URL"
            )
        time.sleep(POLL_SECONDS)


def _watch(process: "subprocess.Popen[bytes]", log: Path, is_over: threading.Event) -> None:
    """Interrupt the main thread when the server dies; end this process if that does not help."""
    with suppress(ChildProcessError):  # ended and reaped by us
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    if is_over.is_set():
        return
    message = _died(log)
    server_is_lost.set()
    signal.pthread_kill(threading.main_thread().ident or 0, INTERRUPTING)
    if not is_over.wait(FAREWELL_SECONDS):  # Prefect repeats its requests for minutes
        log.unlink(missing_ok=True)
        _give_up(message)


def _give_up(message: str) -> None:
    """End this process from any thread. Its children end with it, and artifacts are whole at any time."""
    server_is_lost.set()
    with suppress(OSError, ValueError):
        complain(f"error: {message}")
    leave(2)


def _died(log: Path) -> str:
    words = ""
    with suppress(OSError):
        words = log_tail(log).splitlines()[-1]
    return f"Prefect's temporary server ended; its last words: {words}. Nothing is lost: {CONTINUE}"
