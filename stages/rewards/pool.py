"""The pool of processes that run a reward function: hands out rows in chunks, and replaces workers that hang or die.

A row whose function takes too long, or takes its worker down, becomes a null reward with its error; the other rows of
the same chunk are given to the next worker. Nothing that a reward function does reaches this process but results.

How long a row takes is counted by its work, not by the clock on the wall, see `pipeline.clock`.
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

from pipeline.clock import LOOK_SECONDS, Meter
from pipeline.errors import RewardError
from pipeline.processes import end, start_python, wait_for_exit
from pipeline.wire import Inbox
from stages.rewards.results import Result, checked, failed, no_reward_within, result_frame
from stages.rewards.worker import IDLE, NOTE, READY, Job, Rows

if TYPE_CHECKING:
    import polars as pl

CHUNK_SECONDS = 0.1
"""What a chunk of rows should take a worker: long beside the way there and back, short beside a person's patience."""
MAX_CHUNK_ROWS = 1024
MAX_MESSAGE_BYTES = 32 << 20
START_SECONDS = 300.0
"""For importing the function's module."""
EXIT_SECONDS = 5.0
MAX_FAILED_STARTS = 3
ROOT = Path(__file__).parents[2]

Results = dict[int, Result]
"""By row number."""


@dataclass(slots=True)
class Worker:
    """A process that scores, as the pool sees it."""

    pid: int
    connection: Connection
    inbox: Inbox | None
    """None = it has closed its end, or nothing more is taken from it."""
    note: mmap.mmap
    since: float = field(default_factory=time.monotonic)
    """When its chunk was handed over."""
    is_ready: bool = False
    chunk: Rows | None = None
    waiting: set[int] = field(default_factory=set)
    """Numbers of the chunk's rows that have no result yet."""
    noted: tuple[int, float] = (IDLE, 0.0)
    """The note at the last look."""
    meter: Meter | None = None
    """Counts since that note was first seen."""
    has_timed_out: bool = False
    """Killed for taking too long."""
    nonsense: str = ""
    """What it sent that was no result: killed for it."""


@dataclass(slots=True)
class Slot:
    """One supervisor process with its current worker."""

    control: socket.socket
    supervisor: "subprocess.Popen[bytes]"
    start: Meter
    """Counts since it began to start a worker."""
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
            self.slots.append(Slot(ours, supervisor, Meter(supervisor.pid)))

    def close(self) -> None:
        """End all processes."""
        for slot in self.slots:
            slot.control.close()  # the supervisor ends its worker, then itself
            if slot.worker:
                slot.worker.connection.close()
        for slot in self.slots:
            wait_for_exit(slot.supervisor, EXIT_SECONDS)
            end(slot.supervisor)
        self.slots = []

    def score_frame(self, completions: "pl.DataFrame") -> "pl.DataFrame":
        """Return reward, error and detail of every row, from a function over a frame."""
        numbers = range(len(completions))
        results, errors = self._run(deque([Rows(list(numbers), [], {}, {}, completions)]))
        # a worker that ends before it has said all leaves no row of which one could be sure
        return result_frame([next(iter(errors.values())) if errors else results[number] for number in numbers])

    def score_rows(
        self,
        facts: "pl.DataFrame",
        contexts: Mapping[str, dict[str, Any]],
        progress: Callable[[int], None] = lambda _: None,
    ) -> "pl.DataFrame":
        """Return reward, error and detail of every row, from a function over one completion.

        ``facts`` has prompt_id and the columns that the function asks for; ``contexts`` what it asks of the prompts.
        """
        results, errors = self._run(_Chunks(self, facts, contexts), progress)
        return result_frame([(errors.get(number) or results[number]) for number in range(len(facts))])

    def _run(
        self, chunks: "deque[Rows] | _Chunks", progress: Callable[[int], None] = lambda _: None
    ) -> tuple[Results, Results]:
        """Hand out chunks until every row has a result; return these, and those of rows that ended their worker."""
        self.start()
        results: Results = {}
        errors: Results = {}
        again: deque[Rows] = deque()
        try:
            while again or chunks or any(slot.worker and slot.worker.chunk for slot in self.slots):
                for worker in [slot.worker for slot in self.slots]:
                    if worker and worker.is_ready and worker.chunk is None and (again or chunks):
                        _hand_over(worker, (again or chunks).popleft())
                for slot in self._readable():
                    # a worker's last results come before its end
                    if slot.worker and slot.worker.inbox and slot.worker.connection.poll():
                        self._listen_to_worker(slot, slot.worker, slot.worker.inbox, results)
                        progress(len(results))
                    else:
                        self._listen_to_supervisor(slot, errors, again)
                for slot in self.slots:
                    self._check_time(slot)
        except BaseException:
            self.close()  # workers are in the middle of something: the next call gets new ones
            raise
        return results, errors

    def _readable(self) -> list[Slot]:
        """Wait until a worker or a supervisor has something to say, but not for long; return the slots of those."""
        sources: dict[Any, Slot] = {}
        for slot in self.slots:
            sources[slot.control] = slot
            if slot.worker and slot.worker.inbox:
                sources[slot.worker.connection] = slot
        limit = min(LOOK_SECONDS, self.job.time_limit / 4)
        ready = [sources[source] for source in multiprocessing.connection.wait(list(sources), limit)]
        return list({id(slot): slot for slot in ready}.values())

    def _listen_to_worker(self, slot: Slot, worker: Worker, inbox: Inbox, results: Results) -> None:
        """Take what a worker has sent; end it when that is no results of its rows."""
        try:
            for message in inbox.read():
                if worker.is_ready:
                    results.update(_results(message, worker.waiting))
                elif message == READY:
                    worker.is_ready, self.failed_starts = True, 0
                else:
                    raise ValueError(f"{str(message)[:80]!r} before it was ready")
        except EOFError:  # it has gone: its supervisor says so next
            worker.inbox = None
        except ValueError as error:
            worker.inbox, worker.nonsense = None, str(error)
            _kill(slot)
        if not worker.waiting and worker.chunk is not None:
            seconds = (time.monotonic() - worker.since) / len(worker.chunk.numbers)
            self.seconds_per_row = 0.5 * self.seconds_per_row + 0.5 * seconds
            worker.chunk = None

    def _listen_to_supervisor(self, slot: Slot, errors: Results, again: deque[Rows]) -> None:
        """Take one message of a supervisor: its worker has started, or has ended."""
        message, descriptors, _, _ = socket.recv_fds(slot.control, 64, 2)
        if message.startswith(b"started"):
            descriptor, note = descriptors
            connection, inbox = Connection(descriptor), Inbox(descriptor, MAX_MESSAGE_BYTES)
            slot.worker = Worker(int(message.split()[1]), connection, inbox, mmap.mmap(note, NOTE.size))
            os.close(note)
        elif message.startswith(b"ended") and slot.worker is not None:
            worker, slot.worker, slot.start = slot.worker, None, Meter(slot.supervisor.pid)
            self._reap(worker, int(message.split()[1]), errors, again)
        else:
            raise RewardError(
                f"the process that keeps the workers of {self.job.function} ended{self._see_log()}: does its module "
                "import without error, and is there memory left?"
            )

    def _check_time(self, slot: Slot) -> None:
        """End a worker that has been at the same row for too long."""
        worker = slot.worker
        if worker is None or not worker.is_ready:
            if slot.start.look() > START_SECONDS:
                raise RewardError(
                    f"the module of {self.job.function} was not imported within {START_SECONDS:.0f} s by a worker "
                    f"process{self._see_log()}: do long work inside the function, not when the module is imported"
                )
            return
        if worker.has_timed_out or worker.nonsense or worker.chunk is None:
            return
        noted = NOTE.unpack_from(worker.note, 0)
        if worker.meter is None or noted != worker.noted:
            worker.noted, worker.meter = noted, Meter(worker.pid)
        elif noted[0] != IDLE and worker.meter.look() > self.job.time_limit:
            worker.has_timed_out = True
            _kill(slot)

    def _reap(self, worker: Worker, status: int, errors: Results, again: deque[Rows]) -> None:
        """A worker has ended: find the row that did it, and give the others to the next worker."""
        reason = no_reward_within(self.job.time_limit) if worker.has_timed_out else _cause(status)
        if worker.nonsense:
            reason = f"the worker process sent {worker.nonsense} while it scored this completion, expected its results"
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
        # the note may have gone on before the end came
        row = worker.noted[0] if worker.has_timed_out else NOTE.unpack_from(worker.note, 0)[0]
        left = [number for number in chunk.numbers if number in waiting]
        if self.job.is_frame:
            errors.update(dict.fromkeys(left, failed(reason)))
            return
        if worker.has_timed_out and row >= 0 and row not in waiting:
            again.append(_part(chunk, left))  # the late row has given its result just before the end
            return
        culprit = row if row in waiting else left[0] if len(left) == 1 else None
        if culprit is None:  # several were under way: one by one the culprit shows
            again.extend(_part(chunk, [number]) for number in left)
            return
        errors[culprit] = failed(reason)
        left.remove(culprit)
        if left:
            again.append(_part(chunk, left))

    def _see_log(self) -> str:
        return f" (see {self.log})" if self.log else ""


def _hand_over(worker: Worker, chunk: Rows) -> None:
    worker.chunk, worker.waiting, worker.since = chunk, set(chunk.numbers), time.monotonic()
    with suppress(OSError):  # if it died just now, its supervisor says so next
        worker.connection.send(chunk)


def _kill(slot: Slot) -> None:
    with suppress(OSError):  # it may have ended just now
        slot.control.send(b"kill")


def _results(message: Any, waiting: set[int]) -> Results:
    """Return the results in a message, and take their rows from those that wait.

    Raises:
        ValueError: when it holds anything but results of those rows.
    """
    if not isinstance(message, list) or not all(isinstance(entry, list) and len(entry) == 2 for entry in message):
        raise ValueError(f"{str(message)[:80]!r}")
    found: Results = {}
    for number, values in message:
        if type(number) is not int or number not in waiting or number in found:
            raise ValueError(f"a result of row {str(number)[:80]}, which it was not to score")
        found[number] = checked(values)
    waiting.difference_update(found)
    return found


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
