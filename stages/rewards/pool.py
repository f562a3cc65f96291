"""The pool of processes that run a reward function: hands out rows in chunks, and replaces workers that hang or die.

A row whose function takes too long, or takes its worker down, becomes a null reward with its error; the other rows of
the same chunk are given to the next worker. Nothing that a reward function does reaches this process but results.
"""

import mmap
import multiprocessing.connection
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import RewardError
from pipeline.processes import end, start_python, wait_for_exit
from stages.rewards.results import failed, no_reward_within, result_frame
from stages.rewards.worker import IDLE, NOTE, Job, Rows

if TYPE_CHECKING:
    import polars as pl

CHUNK_SECONDS = 0.1
"""What a chunk of rows should take a worker: long beside the way there and back, short beside a person's patience."""
MAX_CHUNK_ROWS = 1024
POLL_SECONDS = 0.05
START_SECONDS = 300.0
"""For importing the function's module."""
EXIT_SECONDS = 5.0
MAX_FAILED_STARTS = 3
ROOT = Path(__file__).parents[2]

Results = dict[int, tuple[Any, ...]]
"""Row number -> reward, error, detail."""


@dataclass(slots=True)
class Worker:
    """A process that scores, as the pool sees it."""

    connection: Connection | None
    """None = it has closed its end."""
    note: mmap.mmap
    since: float = field(default_factory=time.monotonic)
    """When it was started, or its chunk handed over."""
    is_ready: bool = False
    chunk: Rows | None = None
    waiting: set[int] = field(default_factory=set)
    """Numbers of the chunk's rows that have no result yet."""
    suspect: tuple[int, float] | None = None
    """The note, when it was found to be late at the last look."""
    has_timed_out: bool = False
    """Killed for taking too long."""


@dataclass(slots=True)
class Slot:
    """One supervisor process with its current worker."""

    control: socket.socket
    supervisor: "subprocess.Popen[bytes]"
    since: float = field(default_factory=time.monotonic)
    """When it began to start a worker."""
    worker: Worker | None = None


class WorkerPool:
    """Processes for one reward function; started when first needed, kept until `close`."""

    def __init__(self, job: Job, num_workers: int, log: Path | None = None) -> None:
        self.job = replace(job, search_path=list(sys.path))
        self.num_workers = num_workers
        self.log = log
        self.slots: list[Slot] = []
        self.failed_starts = 0
        self.seconds_per_row = 0.002

    def start(self) -> None:
        """Start the processes; they import the function's module while the caller goes on."""
        given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        # no module of the current directory may replace one that a worker begins with; the job brings the search path
        path = [str(ROOT), *(e for e in given if e and (Path(e).is_absolute() or Path(e).resolve() != Path.cwd()))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
        while len(self.slots) < self.num_workers:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs, os.fdopen(os.memfd_create("job"), "wb+") as job:
                pickle.dump(self.job, job)
                job.flush()
                job.seek(0)
                descriptors = [theirs.fileno(), job.fileno()]
                arguments = ["-P", "-m", "stages.rewards.worker", *map(str, descriptors)]
                supervisor = start_python(arguments, pass_fds=descriptors, environment=environment, log=self.log)
            self.slots.append(Slot(ours, supervisor))

    def close(self) -> None:
        """End all processes."""
        for slot in self.slots:
            slot.control.close()  # the supervisor ends its worker, then itself
            if slot.worker and slot.worker.connection:
                slot.worker.connection.close()
        for slot in self.slots:
            wait_for_exit(slot.supervisor, EXIT_SECONDS)
            end(slot.supervisor)
        self.slots = []

    def score_frame(self, completions: "pl.DataFrame") -> "pl.DataFrame":
        """Return reward, error and detail of every row, from a function over a frame."""
        found: list[pl.DataFrame] = []
        rows = Rows(list(range(len(completions))), [], {}, {}, completions)

        def receive(worker: Worker, frame: "pl.DataFrame") -> None:
            found.append(frame)
            worker.waiting.clear()

        errors = self._run(deque([rows]), receive)
        return found[0] if found else result_frame([errors[number] for number in rows.numbers])

    def score_rows(
        self,
        facts: "pl.DataFrame",
        contexts: Mapping[str, dict[str, Any]],
        progress: Callable[[int], None] = lambda _: None,
    ) -> "pl.DataFrame":
        """Return reward, error and detail of every row, from a function over one completion.

        ``facts`` has prompt_id and the columns that the function asks for; ``contexts`` what it asks of the prompts.
        """
        results: Results = {}

        def receive(worker: Worker, message: tuple[list[int], list[tuple[Any, ...]]]) -> None:
            numbers, values = message
            results.update(zip(numbers, values, strict=True))
            worker.waiting.difference_update(numbers)
            progress(len(results))

        results |= self._run(_Chunks(self, facts, contexts), receive)
        return result_frame([results[number] for number in range(len(facts))])

    def _run(self, chunks: "deque[Rows] | _Chunks", receive: Callable[[Worker, Any], None]) -> Results:
        """Hand out chunks until every row has a result; return the results of rows that took their worker down."""
        self.start()
        errors: Results = {}
        again: deque[Rows] = deque()
        try:
            while again or chunks or any(slot.worker and slot.worker.chunk for slot in self.slots):
                for worker in [slot.worker for slot in self.slots]:
                    if worker and worker.is_ready and worker.chunk is None and (again or chunks):
                        _hand_over(worker, (again or chunks).popleft())
                for slot in self._readable():
                    # a worker's last results come before its end
                    if slot.worker and slot.worker.connection and slot.worker.connection.poll():
                        self._listen_to_worker(slot.worker, slot.worker.connection, receive)
                    else:
                        self._listen_to_supervisor(slot, errors, again)
                for slot in self.slots:
                    self._check_time(slot)
        except BaseException:
            self.close()  # workers are in the middle of something: the next call gets new ones
            raise
        return errors

    def _readable(self) -> list[Slot]:
        """Wait until a worker or a supervisor has something to say, but not for long; return the slots of those."""
        sources: dict[Any, Slot] = {}
        for slot in self.slots:
            sources[slot.control] = slot
            if slot.worker and slot.worker.connection:
                sources[slot.worker.connection] = slot
        limit = min(POLL_SECONDS, self.job.time_limit / 4)
        ready = [sources[source] for source in multiprocessing.connection.wait(list(sources), limit)]
        return list({id(slot): slot for slot in ready}.values())

    def _listen_to_worker(self, worker: Worker, connection: Connection, receive: Callable[[Worker, Any], None]) -> None:
        """Take one message of a worker."""
        try:
            message = connection.recv()
        except (EOFError, OSError):  # it has gone, or died in the middle of a message: its supervisor says so next
            connection.close()
            worker.connection = None
            return
        if not worker.is_ready:
            worker.is_ready, self.failed_starts = True, 0
            return
        receive(worker, message)
        if not worker.waiting and worker.chunk is not None:
            seconds = (time.monotonic() - worker.since) / len(worker.chunk.numbers)
            self.seconds_per_row = 0.5 * self.seconds_per_row + 0.5 * seconds
            worker.chunk = None

    def _listen_to_supervisor(self, slot: Slot, errors: Results, again: deque[Rows]) -> None:
        """Take one message of a supervisor: its worker has started, or has ended."""
        message, descriptors, _, _ = socket.recv_fds(slot.control, 64, 2)
        if message == b"started":
            connection, note = descriptors
            slot.worker = Worker(Connection(connection), mmap.mmap(note, NOTE.size))
            os.close(note)
        elif message.startswith(b"ended") and slot.worker is not None:
            worker, slot.worker, slot.since = slot.worker, None, time.monotonic()
            self._reap(worker, int(message.split()[1]), errors, again)
        else:
            raise RewardError(
                f"the process that keeps the workers of {self.job.function} ended{self._see_log()}: does its module "
                "import without error, and is there memory left?"
            )

    def _check_time(self, slot: Slot) -> None:
        """End a worker that has been at the same row for too long."""
        now, worker = time.monotonic(), slot.worker
        if worker is None or not worker.is_ready:
            if now - (worker or slot).since > START_SECONDS:
                raise RewardError(
                    f"the module of {self.job.function} was not imported within {START_SECONDS:.0f} s by a worker "
                    f"process{self._see_log()}: do long work inside the function, not when the module is imported"
                )
            return
        if worker.has_timed_out or worker.chunk is None:
            return
        row, since = noted = NOTE.unpack_from(worker.note, 0)
        is_late = row != IDLE and now - since > self.job.time_limit
        if is_late and noted == worker.suspect:
            worker.has_timed_out = True
            with suppress(OSError):  # it may have ended just now
                slot.control.send(b"kill")
            return
        # the worker may have been writing just now: the same note must be found late twice
        worker.suspect = noted if is_late else None

    def _reap(self, worker: Worker, status: int, errors: Results, again: deque[Rows]) -> None:
        """A worker has ended: find the row that did it, and give the others to the next worker."""
        reason = no_reward_within(self.job.time_limit) if worker.has_timed_out else _cause(status)
        if worker.connection is not None:
            worker.connection.close()
        if not worker.is_ready:
            self.failed_starts += 1
            if self.failed_starts >= MAX_FAILED_STARTS:
                raise RewardError(
                    f"a worker process for {self.job.function} ended before it was ready, {MAX_FAILED_STARTS} times "
                    f"({reason}){self._see_log()}: is its memory_limit_gib enough to import its module?"
                )
        chunk, waiting = worker.chunk, worker.waiting
        if chunk is None or not waiting:
            return
        row = NOTE.unpack_from(worker.note, 0)[0]
        if worker.has_timed_out and worker.suspect is not None:
            row = worker.suspect[0]  # the note may have gone on before the end came
        left = [number for number in chunk.numbers if number in waiting]
        if self.job.is_frame:
            errors.update(dict.fromkeys(left, tuple(failed(reason))))
            return
        if worker.has_timed_out and row >= 0 and row not in waiting:
            again.append(_part(chunk, left))  # the late row has given its result just before the end
            return
        culprit = row if row in waiting else left[0] if len(left) == 1 else None
        if culprit is None:  # several were under way: one by one the culprit shows
            again.extend(_part(chunk, [number]) for number in left)
            return
        errors[culprit] = tuple(failed(reason))
        left.remove(culprit)
        if left:
            again.append(_part(chunk, left))

    def _see_log(self) -> str:
        return f" (see {self.log})" if self.log else ""


def _hand_over(worker: Worker, chunk: Rows) -> None:
    worker.chunk, worker.waiting, worker.since = chunk, set(chunk.numbers), time.monotonic()
    with suppress(OSError):  # if it died just now, its supervisor says so next
        if worker.connection is not None:
            worker.connection.send(chunk)


class _Chunks:
    """Cuts rows into chunks of a size that fits how long a row has taken so far."""

    def __init__(self, pool: WorkerPool, facts: "pl.DataFrame", contexts: Mapping[str, dict[str, Any]]) -> None:
        self.pool, self.facts, self.contexts = pool, facts, contexts
        self.position = 0

    def __bool__(self) -> bool:
        return self.position < len(self.facts)

    def popleft(self) -> Rows:
        job, left = self.pool.job, len(self.facts) - self.position
        fair = -(-left // (self.pool.num_workers if job.is_async else 2 * self.pool.num_workers))
        # those of an async function wait beside each other
        wanted = max(int(CHUNK_SECONDS / self.pool.seconds_per_row), 4 * job.concurrency if job.is_async else 1)
        part = self.facts.slice(self.position, min(fair, MAX_CHUNK_ROWS, wanted))
        numbers = list(range(self.position, self.position + len(part)))
        self.position += len(part)
        prompt_ids = part["prompt_id"].to_list()
        columns = {name: part[name].to_list() for name in part.columns if name != "prompt_id"}
        if "prompt_id" in job.parameters:
            columns["prompt_id"] = prompt_ids
        contexts = {p: self.contexts[p] for p in dict.fromkeys(prompt_ids)} if self.contexts else {}
        return Rows(numbers, prompt_ids, columns, contexts)


def _part(rows: Rows, numbers: Sequence[int]) -> Rows:
    """Return some rows of a chunk."""
    wanted = set(numbers)
    kept = [i for i, number in enumerate(rows.numbers) if number in wanted]
    prompt_ids = [rows.prompt_ids[i] for i in kept]
    return Rows(
        [rows.numbers[i] for i in kept],
        prompt_ids,
        {name: [values[i] for i in kept] for name, values in rows.facts.items()},
        {p: rows.contexts[p] for p in prompt_ids if p in rows.contexts},
    )


def _cause(status: int) -> str:
    """Say how a worker ended."""
    if status < 0:
        name = signal.Signals(-status).name
        return f"the worker process was killed by {name} while it scored this completion"
    return f"the worker process ended with exit status {status} while it scored this completion"
