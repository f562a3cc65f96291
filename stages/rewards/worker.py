"""The process that runs a user's reward function, and the supervisor that starts it again when it dies.

    python -m stages.rewards.worker <control descriptor> <job descriptor>

The supervisor imports the function's module once, forks a worker, waits for its end, says on the control socket how it
ended, and forks the next one: a worker that crashed or was killed is replaced within milliseconds, however long its
imports took. Worker and pool (`stages.rewards.pool`) talk over a connection that is made anew for each worker, so that
a message cut off by a kill harms nobody, and share 16 bytes in which the worker notes what it is doing.
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

from pipeline.processes import die_with_parent, kill_group
from stages.rewards.results import Result, failed, no_reward_within, of_error, of_frame, of_value, result_frame

NOTE = struct.Struct("=qd")
"""Row that is being scored, and since when (time.monotonic, which processes of one machine share)."""
IDLE = -1
SEVERAL = -2
"""An async function has several rows under way: the note's time is then a heartbeat."""
HEARTBEAT_SECONDS = 0.1
FLUSH_SECONDS = 0.05


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
            socket.send_fds(control, [b"started"], [theirs.fileno(), note])
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
    connection.send("ready")
    with asyncio.Runner() as runner, suppress(EOFError):  # one loop for life: functions keep connections open
        while True:
            rows: Rows = connection.recv()
            if job.is_frame:
                take_note(note, SEVERAL, time.monotonic())
                connection.send(call_on_frame(call, job.arguments, rows.frame))
            elif job.is_async and len(rows.numbers) > 1:
                runner.run(_score_together(job, call, rows, note, _Outbox(connection)))
            else:
                _score_one_by_one(job, call, rows, note, _Outbox(connection), runner)
            take_note(note, IDLE, time.monotonic())


class _Outbox:
    """Sends a few results at a time, so that a crash loses little."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.numbers: list[int] = []
        self.results: list[tuple[Any, ...]] = []
        self.sent = time.monotonic()

    def add(self, number: int, result: Result, now: float) -> None:
        self.numbers.append(number)
        self.results.append(tuple(result))
        if now - self.sent > FLUSH_SECONDS:
            self.flush(now)

    def flush(self, now: float) -> None:
        if not self.numbers:
            return
        self.connection.send((self.numbers, self.results))
        self.numbers, self.results, self.sent = [], [], now


def _score_one_by_one(
    job: Job, call: Callable[..., Any], rows: Rows, note: mmap.mmap, outbox: _Outbox, runner: asyncio.Runner
) -> None:
    now = time.monotonic()
    for number, arguments in _arguments(job, rows):
        take_note(note, number, now)
        try:
            value = call(**arguments)
            result = of_value(runner.run(value) if job.is_async else value)
        except Exception as error:  # a user's function may raise anything; the error is data
            result = of_error(error)
        except SystemExit as error:
            result = failed(f"the function called sys.exit({error.code!r})")
        now = time.monotonic()
        outbox.add(number, result, now)
    outbox.flush(now)


async def _score_together(job: Job, call: Callable[..., Any], rows: Rows, note: mmap.mmap, outbox: _Outbox) -> None:
    async def heartbeat() -> None:
        while True:
            take_note(note, SEVERAL, time.monotonic())
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def one(number: int, arguments: dict[str, Any]) -> None:
        async with free:
            asked = asyncio.create_task(call(**arguments))
            # not wait_for: it would wait for a function that swallows its cancellation
            done, _ = await asyncio.wait({asked}, timeout=job.time_limit)
            if not done:
                asked.cancel()
                abandoned.append(asked)
                result = failed(no_reward_within(job.time_limit))
            else:
                error = asked.exception()
                result = of_value(asked.result()) if error is None else of_error(error)
        outbox.add(number, result, time.monotonic())

    abandoned: list[asyncio.Task[Any]] = []
    free = asyncio.Semaphore(job.concurrency)
    beating = asyncio.create_task(heartbeat())
    await asyncio.gather(*(one(number, arguments) for number, arguments in _arguments(job, rows)))
    beating.cancel()
    outbox.flush(time.monotonic())


def _arguments(job: Job, rows: Rows) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row's number and keyword arguments."""
    contexts = {prompt_id: _Fresh(_context(job, given)) for prompt_id, given in rows.contexts.items()}
    arguments, nothing = _Fresh(job.arguments), _Fresh({})
    names, columns = list(rows.facts), list(rows.facts.values())
    for number, prompt_id, *values in zip(rows.numbers, rows.prompt_ids, *columns, strict=True):
        given = contexts.get(prompt_id, nothing)
        yield number, {**given.copy(), **dict(zip(names, values, strict=True)), **arguments.copy()}


class _Fresh:
    """Gives a function lists and dictionaries of its own: one row must not see what another did with them."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.plain = {key: value for key, value in values.items() if not isinstance(value, list | dict)}
        mutable = {key: value for key, value in values.items() if isinstance(value, list | dict)}
        self.pickled = pickle.dumps(mutable, protocol=5) if mutable else None

    def copy(self) -> dict[str, Any]:
        return self.plain if self.pickled is None else {**self.plain, **pickle.loads(self.pickled)}


def _context(job: Job, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the signature asks of a prompt; ``metadata`` comes as JSON."""
    known = dict(given)
    if "metadata" in known:
        metadata = json.loads(known["metadata"])
        known = {**metadata, **known, "metadata": metadata}
    return known if job.takes_anything else {name: known[name] for name in job.parameters if name in known}


def call_on_frame(call: Callable[..., Any], arguments: Mapping[str, Any], completions: Any) -> Any:
    """Return reward, error and detail for every row: what the function says, or the error that took all rows."""
    try:
        return of_frame(call(completions=completions, **arguments), len(completions))
    except Exception as error:  # a user's function may raise anything; the error is data
        return result_frame([of_error(error)] * len(completions))


if __name__ == "__main__":
    supervise(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
