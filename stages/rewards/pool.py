"""The supervisor of the processes that run reward functions: it hands out rows, and sees to those that hang or die.

A row whose function takes too long, or takes its worker down, becomes a null reward with its error; the other rows of
the same parcel are given to the next worker. Nothing that a reward function does reaches this process but results.
"""

import mmap
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline.errors import RewardError
from stages.rewards.results import failed, no_reward_within, result_frame
from stages.rewards.worker import IDLE, NOTE, Job, Rows, frame_bytes, read_frame, read_message, write_message

if TYPE_CHECKING:
    import polars as pl

PARCEL_SECONDS = 0.1
"""What a parcel of rows should take a worker: long beside the way there and back, short beside a person's patience."""
MAX_PARCEL = 1024
POLL_SECONDS = 0.05
START_SECONDS = 300.0
"""For importing the function's module."""
MAX_FAILED_STARTS = 3
ROOT = Path(__file__).parents[2]

Results = dict[int, tuple[Any, ...]]
"""Row number -> reward, error, detail."""


@dataclass(slots=True)
class Slot:
    """One keeper process with its current worker."""

    job: Job
    control: socket.socket
    keeper: subprocess.Popen[bytes]
    connection: socket.socket | None = None
    note: mmap.mmap | None = None
    is_ready: bool = False
    since: float = field(default_factory=time.monotonic)
    """When the worker was started, or the parcel handed over."""
    parcel: Rows | None = None
    waiting: set[int] = field(default_factory=set)
    """Numbers of the parcel's rows that have no result yet."""
    suspect: tuple[int, float] | None = None
    """The note, when it was found to be late at the last look."""
    is_condemned: bool = False
    """Killed for taking too long."""

    @property
    def is_idle(self) -> bool:
        return self.is_ready and self.parcel is None


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
        while len(self.slots) < self.num_workers:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            output: IO[bytes] | None = self.log.open("ab") if self.log else None
            with theirs, os.fdopen(os.memfd_create("job"), "wb+") as job:
                pickle.dump(self.job, job)
                job.flush()
                job.seek(0)
                keeper = subprocess.Popen(
                    [sys.executable, "-m", "stages.rewards.worker", str(theirs.fileno()), str(job.fileno())],
                    pass_fds=[theirs.fileno(), job.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
                )
            if output:
                output.close()
            self.slots.append(Slot(self.job, ours, keeper))

    def close(self) -> None:
        """End all processes."""
        for slot in self.slots:
            slot.control.close()  # the keeper ends its worker, then itself
            if slot.connection:
                slot.connection.close()
        for slot in self.slots:
            try:
                slot.keeper.wait(5)
            except subprocess.TimeoutExpired:
                slot.keeper.kill()
                slot.keeper.wait()
        self.slots = []

    def score_frame(self, completions: "pl.DataFrame") -> "pl.DataFrame":
        """Return reward, error and detail of every row, from a function over a frame."""
        found: list[pl.DataFrame] = []
        rows = Rows(list(range(len(completions))), [], {}, {})

        def receive(slot: Slot, data: bytes) -> None:
            found.append(read_frame(data))
            slot.waiting.clear()

        errors = self._run(deque([(rows, frame_bytes(completions))]), receive)
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

        def receive(slot: Slot, data: bytes) -> None:
            numbers, values = pickle.loads(data)
            results.update(zip(numbers, values, strict=True))
            slot.waiting.difference_update(numbers)
            progress(len(results))

        results |= self._run(_Parcels(self, facts, contexts), receive)
        return result_frame([results[number] for number in range(len(facts))])

    def _run(self, parcels: "deque[tuple[Rows, bytes]] | _Parcels", receive: Callable[[Slot, bytes], None]) -> Results:
        """Hand out parcels until every row has a result; return the results of rows that took their worker down."""
        self.start()
        errors: Results = {}
        again: deque[tuple[Rows, bytes]] = deque()
        try:
            while again or parcels or any(slot.parcel for slot in self.slots):
                for slot in self.slots:
                    if slot.is_idle and (again or parcels):
                        self._hand_over(slot, *(again or parcels).popleft())
                for slot in self._readable():
                    self._listen(slot, receive, errors, again)
                for slot in self.slots:
                    self._check_time(slot)
        except BaseException:
            self.close()  # workers are in the middle of something: the next call gets new ones
            raise
        return errors

    def _readable(self) -> list[Slot]:
        poll = select.poll()
        owners = {}
        for slot in self.slots:
            for source in filter(None, (slot.connection, slot.control)):
                poll.register(source, select.POLLIN)
                owners[source.fileno()] = slot
        limit = min(POLL_SECONDS, self.job.time_limit / 4)
        return list({id(s): s for s in (owners[fd] for fd, _ in poll.poll(1000 * limit))}.values())

    def _hand_over(self, slot: Slot, rows: Rows, data: bytes) -> None:
        assert slot.connection is not None
        slot.parcel, slot.waiting, slot.since = rows, set(rows.numbers), time.monotonic()
        with suppress(OSError):  # if it died just now, its keeper says so next
            write_message(slot.connection, data)

    def _listen(
        self, slot: Slot, receive: Callable[[Slot, bytes], None], errors: Results, again: deque[tuple[Rows, bytes]]
    ) -> None:
        """Take one message of a worker or its keeper."""
        if slot.connection is not None and _has_data(slot.connection):
            data = _read(slot.connection)
            if data is None:
                slot.connection.close()
                slot.connection = None
            elif not slot.is_ready:
                slot.is_ready, self.failed_starts = True, 0
            else:
                receive(slot, data)
                if not slot.waiting:
                    self._learn(slot)
                    slot.parcel = None
        elif _has_data(slot.control):
            message, descriptors, _, _ = socket.recv_fds(slot.control, 64, 2)
            if message == b"started":
                connection, note = descriptors
                slot.connection, slot.note = socket.socket(fileno=connection), mmap.mmap(note, NOTE.size)
                os.close(note)
                slot.since = time.monotonic()
            else:
                self._bury(slot, message.decode(), errors, again)

    def _learn(self, slot: Slot) -> None:
        assert slot.parcel is not None
        seconds = (time.monotonic() - slot.since) / len(slot.parcel.numbers)
        self.seconds_per_row = 0.5 * self.seconds_per_row + 0.5 * seconds

    def _check_time(self, slot: Slot) -> None:
        """End a worker that has been at the same row for too long."""
        now = time.monotonic()
        if not slot.is_ready:
            if now - slot.since > START_SECONDS:
                raise RewardError(
                    f"the module of {self.job.function} was not imported within {START_SECONDS:.0f} s by a worker "
                    f"process{self._see_log()}: do long work inside the function, not when the module is imported"
                )
            return
        if slot.is_condemned or slot.note is None or slot.parcel is None:
            return
        row, since = noted = NOTE.unpack_from(slot.note, 0)
        is_late = row != IDLE and now - since > self.job.time_limit
        if is_late and noted == slot.suspect:
            slot.is_condemned = True
            with suppress(OSError):  # it may have ended just now
                slot.control.send(b"kill")
            return
        # the worker may have been writing just now: the same note must be found late twice
        slot.suspect = noted if is_late else None

    def _bury(self, slot: Slot, message: str, errors: Results, again: deque[tuple[Rows, bytes]]) -> None:
        """A worker has ended: find the row that did it, and give the others to the next worker."""
        if not message.startswith("ended"):
            raise RewardError(
                f"the process that keeps the workers of {self.job.function} ended{self._see_log()}: does its module "
                "import without error, and is there memory left?"
            )
        reason = no_reward_within(self.job.time_limit) if slot.is_condemned else _cause(int(message.split()[1]))
        if not slot.is_ready:
            self.failed_starts += 1
            if self.failed_starts >= MAX_FAILED_STARTS:
                raise RewardError(
                    f"a worker process for {self.job.function} ended before it was ready, {MAX_FAILED_STARTS} times "
                    f"({reason}){self._see_log()}: is its memory_limit_gib enough to import its module?"
                )
        row = NOTE.unpack_from(slot.note, 0)[0] if slot.note is not None else IDLE
        if slot.is_condemned and slot.suspect is not None:
            row = slot.suspect[0]  # the note may have gone on before the end came
        parcel, waiting, was_late = slot.parcel, slot.waiting, slot.is_condemned
        if slot.connection is not None:
            slot.connection.close()
        slot.connection, slot.note, slot.parcel, slot.waiting = None, None, None, set()
        slot.is_ready = slot.is_condemned = False
        slot.suspect = None
        slot.since = time.monotonic()
        if parcel is None or not waiting:
            return
        left = [number for number in parcel.numbers if number in waiting]
        if self.job.is_frame:
            errors.update(dict.fromkeys(left, tuple(failed(reason))))
            return
        if was_late and row >= 0 and row not in waiting:
            again.append(_parcel(_part(parcel, left)))  # the late row has given its result just before the end
            return
        culprit = row if row in waiting else left[0] if len(left) == 1 else None
        if culprit is None:  # several were under way: one by one the culprit shows
            again.extend(_parcel(_part(parcel, [number])) for number in left)
            return
        errors[culprit] = tuple(failed(reason))
        left.remove(culprit)
        if left:
            again.append(_parcel(_part(parcel, left)))

    def _see_log(self) -> str:
        return f" (see {self.log})" if self.log else ""


class _Parcels:
    """Cuts rows into parcels of a size that fits how long a row has taken so far."""

    def __init__(self, pool: WorkerPool, facts: "pl.DataFrame", contexts: Mapping[str, dict[str, Any]]) -> None:
        self.pool, self.facts, self.contexts = pool, facts, contexts
        self.position = 0

    def __bool__(self) -> bool:
        return self.position < len(self.facts)

    def popleft(self) -> tuple[Rows, bytes]:
        job, left = self.pool.job, len(self.facts) - self.position
        fair = -(-left // (self.pool.num_workers if job.is_async else 2 * self.pool.num_workers))
        # those of an async function wait beside each other
        wanted = max(int(PARCEL_SECONDS / self.pool.seconds_per_row), 4 * job.concurrency if job.is_async else 1)
        size = min(fair, MAX_PARCEL, wanted)
        part = self.facts.slice(self.position, size)
        numbers = list(range(self.position, self.position + len(part)))
        self.position += size
        prompt_ids = part["prompt_id"].to_list()
        columns = {name: part[name].to_list() for name in part.columns if name != "prompt_id"}
        if "prompt_id" in self.pool.job.parameters:
            columns["prompt_id"] = prompt_ids
        contexts = {p: self.contexts[p] for p in dict.fromkeys(prompt_ids)} if self.contexts else {}
        return _parcel(Rows(numbers, prompt_ids, columns, contexts))


def _parcel(rows: Rows) -> tuple[Rows, bytes]:
    return rows, pickle.dumps(rows, protocol=5)


def _part(rows: Rows, numbers: Sequence[int]) -> Rows:
    """Return some rows of a parcel."""
    wanted = set(numbers)
    kept = [i for i, number in enumerate(rows.numbers) if number in wanted]
    prompt_ids = [rows.prompt_ids[i] for i in kept]
    return Rows(
        [rows.numbers[i] for i in kept],
        prompt_ids,
        {name: [values[i] for i in kept] for name, values in rows.facts.items()},
        {p: rows.contexts[p] for p in prompt_ids if p in rows.contexts},
    )


def _has_data(source: socket.socket) -> bool:
    return bool(select.select([source], [], [], 0)[0])


def _read(connection: socket.socket) -> bytes | None:
    """Return the next message, None when the worker has gone or died in the middle of it."""
    try:
        return read_message(connection)
    except OSError:
        return None


def _cause(status: int) -> str:
    """Say how a worker ended."""
    if status < 0:
        name = signal.Signals(-status).name
        return f"the worker process was killed by {name} while it scored this completion"
    return f"the worker process ended with exit status {status} while it scored this completion"
