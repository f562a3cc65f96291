"""The process that runs a user's reward function, and the supervisor that starts it again when it dies.

    python -m stages.rewards.worker <control descriptor> <job descriptor>

The supervisor imports the function's module once, forks a worker, waits for its end, says on the control socket how it
ended, and forks the next one: a worker that crashed or was killed is replaced within milliseconds, however long its
imports took. Worker and pool (`stages.rewards.pool`) talk over a connection that is made anew for each worker, so that
a message cut off by a kill harms nobody, and share 16 bytes in which the worker notes what it is doing.

What the pool sends is pickled: it decides anyway what this process runs. What comes back is not, see `pipeline.wire`:
functions of strangers, and texts of models that they read, run here.
"""

import asyncio
import importlib
import json
import mmap
import multiprocessing
import os
import pickle
import resource
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from pipeline import wire
from pipeline.clock import is_done_within
from pipeline.processes import die_with_parent, kill_group
from stages.rewards.results import Result, failed, no_reward_within, of_error, of_frame, of_value, result_frame

NOTE = struct.Struct("=qd")
"""Row that is being scored, and since when (time.monotonic): another note is another call."""
IDLE = -1
SEVERAL = -2
"""An async function, or one over a frame, has several rows under way. Of an async one the time is a heartbeat."""
HEARTBEAT_SECONDS = 0.1
FLUSH_SECONDS = 0.05
FLUSH_CHARACTERS = 1 << 20
READY = "ready"


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker is for; the supervisor reads it from a file in memory."""

    function: str
    is_frame: bool
    is_async: bool
    parameters: tuple[str, ...]
    takes_anything: bool
    arguments: dict[str, Any]
    time_limit: float
    memory_limit: int | None
    concurrency: int
    """Calls of an async function under way at once."""
    search_path: list[str]
    """Where modules are looked for, as in the pool's process."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A chunk of completions to score."""

    numbers: list[int]
    prompt_ids: list[str]
    facts: dict[str, list[Any]]
    """Lists of equal length."""
    contexts: dict[str, dict[str, Any]]
    """What the prompts say, once for each."""
    frame: Any = None
    """The completions as a frame in place of all that, for a function over a frame."""


def take_note(note: mmap.mmap, row: int, since: float) -> None:
    """Say which row is being scored. Copied in one go: `pack_into` would first fill the place with zeros."""
    note[:] = NOTE.pack(row, since)


def supervise(control: socket.socket, job_descriptor: int) -> None:
    """Fork workers until the pool has gone."""
    with os.fdopen(job_descriptor, "rb") as file:
        job: Job = pickle.load(file)
    sys.path[:] = job.search_path
    if not job.is_frame:  # polars' threads, which a module might start, do not survive a fork
        importlib.import_module(job.function.partition(":")[0])
    while True:
        ours, theirs = multiprocessing.Pipe()
        note = os.memfd_create("note")
        os.ftruncate(note, NOTE.size)
        supervisor = os.getpid()
        pid = os.fork()
        if pid == 0:
            control.close()
            theirs.close()
            status = 1
            try:
                _become_worker(job, supervisor)
                work(job, ours, mmap.mmap(note, NOTE.size))
                status = 0
            finally:
                os._exit(status)
        ours.close()
        try:
            socket.send_fds(control, [f"started {pid}".encode()], [theirs.fileno(), note])
            theirs.close()
            os.close(note)
            ended = _wait(control, pid)
            if ended is None:
                return
            control.send(f"ended {ended}".encode())
        except OSError:  # the pool has gone
            return
        finally:
            kill_group(pid)  # what it left behind


def _wait(control: socket.socket, pid: int) -> int | None:
    """Return the exit code of the worker once it has ended; end it when the pool says so or has gone (None)."""
    descriptor = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.register(control, select.POLLIN)
    try:
        while True:
            ready = [found for found, _ in poll.poll()]
            if descriptor in ready:
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if not control.recv(16):
                return None
            kill_group(pid)
    finally:
        os.close(descriptor)


def _become_worker(job: Job, supervisor: int) -> None:
    os.setpgid(0, 0)
    die_with_parent(supervisor)
    if job.memory_limit is not None:
        # private memory: an address space limit would count what libraries merely reserve
        resource.setrlimit(resource.RLIMIT_DATA, (job.memory_limit, job.memory_limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def work(job: Job, connection: Connection, note: mmap.mmap) -> None:
    """Score what arrives until the pool closes the connection."""
    module, _, name = job.function.partition(":")
    call = getattr(importlib.import_module(module), name)
    take_note(note, IDLE, time.monotonic())
    outbox = _Outbox(connection.fileno())
    wire.write(connection.fileno(), READY)
    with asyncio.Runner() as runner, suppress(EOFError):  # one loop for life: functions keep connections open
        while True:
            rows: Rows = connection.recv()
            if job.is_frame:
                take_note(note, SEVERAL, time.monotonic())
                for number, values in zip(rows.numbers, _call_on_frame(call, job, rows.frame), strict=True):
                    outbox.add(number, Result(*values))
            elif job.is_async:
                runner.run(_score_together(job, call, rows, note, outbox))
            else:
                _score_one_by_one(job, call, rows, note, outbox)
            outbox.flush()
            take_note(note, IDLE, time.monotonic())


class _Outbox:
    """Sends a few results at a time, so that a crash loses little."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.process = os.getpid()
        self.results: list[tuple[int, Result]] = []
        self.characters = 0
        self.sent = time.monotonic()

    def add(self, number: int, result: Result) -> None:
        if os.getpid() != self.process:  # a function has forked, and its child has returned
            os._exit(0)
        self.results.append((number, result))
        self.characters += len(result.error or "") + len(result.detail or "")
        if self.characters > FLUSH_CHARACTERS or time.monotonic() - self.sent > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self.results:
            wire.write(self.descriptor, self.results)
        self.results, self.characters, self.sent = [], 0, time.monotonic()


def _score_one_by_one(job: Job, call: Callable[..., Any], rows: Rows, note: mmap.mmap, outbox: _Outbox) -> None:
    for number, arguments in _arguments(job, rows):
        take_note(note, number, time.monotonic())
        try:
            result = of_value(call(**arguments))
        except Exception as error:  # a user's function may raise anything; the error is data
            result = of_error(error)
        except SystemExit as error:
            result = _of_exit(error)
        outbox.add(number, result)


async def _score_together(job: Job, call: Callable[..., Any], rows: Rows, note: mmap.mmap, outbox: _Outbox) -> None:
    async def heartbeat() -> None:
        while True:
            take_note(note, SEVERAL, time.monotonic())
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def ask(arguments: dict[str, Any]) -> Result:
        try:
            return of_value(await call(**arguments))
        except Exception as error:  # a user's function may raise anything; the error is data
            return of_error(error)
        except SystemExit as error:
            return _of_exit(error)

    async def one(number: int, arguments: dict[str, Any]) -> None:
        async with free:
            asked = asyncio.create_task(ask(arguments))
            if await is_done_within(asked, job.time_limit):
                result = asked.result()
            else:
                asked.cancel()  # not waited for: the function may swallow it
                abandoned.append(asked)
                result = failed(no_reward_within(job.time_limit))
        outbox.add(number, result)

    abandoned: list[asyncio.Task[Result]] = []
    free = asyncio.Semaphore(job.concurrency)
    beating = asyncio.create_task(heartbeat())
    await asyncio.gather(*(one(number, arguments) for number, arguments in _arguments(job, rows)))
    beating.cancel()


def _of_exit(error: SystemExit) -> Result:
    return failed(f"the function called sys.exit({error.code!r})")


def _arguments(job: Job, rows: Rows) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row's number and keyword arguments."""
    contexts = {prompt_id: _context(job, given) for prompt_id, given in rows.contexts.items()}
    names, columns = list(rows.facts), list(rows.facts.values())
    for number, prompt_id, *values in zip(rows.numbers, rows.prompt_ids, *columns, strict=True):
        given = contexts.get(prompt_id, {})
        yield number, {**_fresh(given), **dict(zip(names, values, strict=True)), **_fresh(job.arguments)}


def _fresh(value: Any) -> Any:
    """Return lists and dictionaries of its own: one call must not see what another did with them."""
    if isinstance(value, dict):
        return {key: _fresh(inner) for key, inner in value.items()}
    return [_fresh(inner) for inner in value] if isinstance(value, list) else value


def _context(job: Job, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the signature asks of a prompt; ``metadata`` comes as JSON."""
    known = dict(given)
    if "metadata" in known:
        metadata = json.loads(known["metadata"])
        known = {**metadata, **known, "metadata": metadata}
    return known if job.takes_anything else {name: known[name] for name in job.parameters if name in known}


def _call_on_frame(call: Callable[..., Any], job: Job, completions: Any) -> list[tuple[Any, ...]]:
    """Return reward, error and detail for every row: what the function says, or the error that took all rows."""
    try:
        frame = of_frame(call(completions=completions, **job.arguments), len(completions))
    except Exception as error:  # a user's function may raise anything; the error is data
        frame = result_frame([of_error(error)] * len(completions))
    return frame.rows()


if __name__ == "__main__":
    supervise(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
