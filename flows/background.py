"""Background tasks: they run in a thread while the flow waits for the engine."""

from collections.abc import Mapping
from concurrent.futures import wait
from typing import Any

from prefect import Task
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

ONE_BY_ONE: TaskRunner[PrefectFuture[Any]] = ThreadPoolTaskRunner(max_workers=1)  # type: ignore[assignment]
"""The flow's task runner: background tasks run one by one, in the order in which they were begun."""


class Background:
    """The background tasks of a flow, one by one in the order in which they were begun."""

    def __init__(self, tasks: Mapping[str, Task[[int], str]]) -> None:
        """``tasks``: step name -> its task, which takes an iteration."""
        self._tasks = tasks
        self._begun: dict[tuple[str, int], PrefectFuture[str]] = {}

    def begin(self, name: str, iteration: int) -> None:
        """Begin a step's task; it runs after those begun before."""
        self._begun[name, iteration] = self._tasks[name].submit(iteration)

    def is_begun(self, name: str, iteration: int) -> bool:
        """Return whether the task was begun and not yet waited for."""
        return (name, iteration) in self._begun

    def wait_for(self, name: str, iteration: int) -> None:
        """Wait until the task is done, and raise what it raised; run it now if it was not begun."""
        if self.is_begun(name, iteration):
            self._wait_for((name, iteration))
        else:
            self._tasks[name](iteration)

    def settle(self, name: str) -> None:
        """Wait for the step's background tasks, and raise what the first failed one raised."""
        for key in [key for key in self._begun if key[0] == name]:
            self._wait_for(key)

    def raise_failed(self) -> None:
        """Raise what a finished task raised, so that the flow stops early; never waits."""
        for key in [key for key, future in self._begun.items() if _has_failed(future)]:
            self._wait_for(key)

    def wait_for_all(self) -> None:
        """Wait for all background tasks, and raise what the first failed one raised."""
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
        """Wait for all background tasks; never raises."""
        futures: list[Any] = list(self._begun.values())
        wait([future.wrapped_future for future in futures])
        self._begun.clear()


def _has_failed(future: Any) -> bool:
    """Return whether a background task has failed; `future.state` would ask the server."""
    thread = future.wrapped_future
    if not thread.done():
        return False
    return thread.cancelled() or thread.exception() is not None or not thread.result().is_completed()
