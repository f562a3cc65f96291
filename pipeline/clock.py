"""Time that counts: limits that a suspended, stopped or busy machine does not use up, and figures per second.

A limit on wall time lets the machine decide results: a right answer becomes "too late" because a laptop was closed, a
container frozen, or another program wanted the processor. So limits count work. Standard library only, and little of
it: the sandbox's server starts in milliseconds.
"""

import os
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

LOOK_SECONDS = 0.05
"""How often whoever keeps a `Meter` should look at it."""
PATIENCE = 5.0
"""Waiting, for a server for instance, may take so many times as long as work."""
MOST_PROCESSES = 4096
"""Looked at for a sum: a process that forks without end must not keep whoever counts."""
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
NANOSECONDS = 1e9


def work_in(passed: float, processor: float, queued: float = 0.0) -> float:
    """Return the seconds that count of those that have passed between two looks: a second of the processor one, a
    second of pure waiting the `PATIENCE`-th of one, a second in the queue for the processor nothing.

    Several processors at once count as one. Who looks late was stopped or waited himself: no more than two looks'
    waiting counts.
    """
    waiting = max(passed - max(queued, 0.0), 0.0)
    return max(min(passed, processor), min(waiting, 2 * LOOK_SECONDS) / PATIENCE)


class Meter:
    """Counts the seconds of work of a process and its descendants since this object was made, see `work_in`."""

    def __init__(self, pid: int, proc: str = "/proc") -> None:
        self.pid, self.proc = pid, proc
        self._seconds = 0.0
        self._last = time.monotonic(), *seconds_of(pid, proc)

    def look(self) -> float:
        """Return the seconds so far."""
        now = time.monotonic(), *seconds_of(self.pid, self.proc)
        passed, processor, queued = (is_now - was for is_now, was in zip(now, self._last, strict=True))
        seconds = self._seconds + work_in(passed, processor, queued)
        if passed >= LOOK_SECONDS:  # the kernel counts in steps of 0.01 s
            self._seconds, self._last = seconds, now
        return seconds


def seconds_of(pid: int, proc: str = "/proc") -> tuple[float, float]:
    """Return the processor time of a process and its descendants, and their threads' time in the queue for it; Linux.

    The first counts the ended processes that they have waited for, too; the second only who lives, and is 0 where the
    kernel does not tell. 0 for a process that has gone. ``proc`` is where the kernel's /proc is to be found.
    """
    ticks, queued, waiting = 0, 0, [str(pid)]
    for _ in range(MOST_PROCESSES):
        if not waiting:
            break
        process = f"{proc}/{waiting.pop()}"
        try:
            with open(f"{process}/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
                ticks += sum(int(field) for field in file.read().rpartition(")")[2].split()[11:15])
            for thread in os.listdir(f"{process}/task"):  # noqa: PTH208
                with open(f"{process}/task/{thread}/children", encoding="ascii") as file:  # noqa: PTH123
                    waiting += file.read().split()
                queued += _queued(f"{process}/task/{thread}")
        except OSError:  # it has ended
            continue
    return ticks / TICKS_PER_SECOND, queued / NANOSECONDS


def _queued(thread: str) -> int:
    """Return the nanoseconds in which a thread could have run, but had no processor; see the kernel's sched-stats."""
    try:
        with open(f"{thread}/schedstat", encoding="ascii") as file:  # noqa: PTH123
            return int(file.read().split()[1])
    except FileNotFoundError:  # a kernel without these figures
        return 0


async def is_done_within(task: "asyncio.Future[Any]", seconds: float) -> bool:
    """Wait until the task is done or for so many seconds of this process's being awake; return whether it is done.

    The task goes on.
    """
    import asyncio

    steps = max(4, round(seconds / 0.5))
    for _ in range(steps):  # a pause, however long, costs one step
        done, _ = await asyncio.wait({task}, timeout=seconds / steps)
        if done:
            return True
    return False


def per_second(count: float, seconds: float) -> float | None:
    """Return the figure per second; None where no time that a clock can tell has passed."""
    return count / seconds if seconds >= 0.001 else None
