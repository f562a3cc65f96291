"""Tasks that run in a thread next to their flow, while it waits for the engine."""

from collections.abc import Mapping
from concurrent.futures import wait
from typing import Any

from prefect import Task
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

ONE_BY_ONE: TaskRunner[PrefectFuture[Any]] = ThreadPoolTaskRunner(max_workers=1)  # type: ignore[assignment]
"""For the flow: background tasks run in the order in which they were begun."""


class Background:
    """Tasks that run in the background of the flow, one after another in the order in which they were begun."""

    def __init__(self, tasks: Mapping[str, Task[[int], str]]) -> None:
        """``tasks`` are those of the steps by name; each takes an iteration."""
        self._tasks = tasks
        self._begun: dict[tuple[str, int], PrefectFuture[str]] = {}

    def begin(self, name: str, iteration: int) -> None:
        """Run a step's task after those begun before."""
        self._begun[name, iteration] = self._tasks[name].submit(iteration)

    def is_begun(self, name: str, iteration: int) -> bool:
        """Return whether the task was begun and not yet waited for."""
        return (name, iteration) in self._begun

    def wait_for(self, name: str, iteration: int) -> None:
        """Wait until the task is done, and raise what it raised; one that was not begun runs now."""
        if self.is_begun(name, iteration):
            self._wait_for((name, iteration))
        else:
            self._tasks[name](iteration)

    def settle(self, name: str) -> None:
        """Wait for every iteration of the step that was begun, and raise what the first of them raised."""
        for key in [key for key in self._begun if key[0] == name]:
            self._wait_for(key)

    def raise_failed(self) -> None:
        """Raise what a task has raised already, lest the flow works on for long; wait for nothing."""
        for key in [key for key, future in self._begun.items() if _has_failed(future)]:
            self._wait_for(key)

    def wait_for_all(self) -> None:
        """Wait for every task that was begun, and raise what the first of them raised."""
        while self._begun:
            self._wait_for(next(iter(self._begun)))

    def _wait_for(self, key: tuple[str, int]) -> None:
        future: Any = self._begun[key]
        try:
            future.result()
        finally:
            if future.wrapped_future.done():  # an interrupted wait leaves it to `end`
                del self._begun[key]

    def end(self) -> None:
        """Wait for all background tasks; never raises: the flow ends for a reason of its own."""
        threads: list[Any] = list(self._begun.values())
        wait([future.wrapped_future for future in threads])
        self._begun.clear()


def _has_failed(future: Any) -> bool:
    """Return whether a task of a thread is over and has failed; `future.state` would ask the server."""
    thread = future.wrapped_future
    if not thread.done():
        return False
    return thread.cancelled() or thread.exception() is not None or not thread.result().is_completed()
