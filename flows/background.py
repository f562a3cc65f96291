"""Background tasks: they run in a thread while the run waits for the engine."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context


class Background:
    """The background tasks of a run, one by one in the order in which they were begun."""

    def __init__(self, tasks: Mapping[str, Callable[[int], str]]) -> None:
        """``tasks``: step name -> its task, which takes an iteration."""
        self._tasks = tasks
        self._begun: dict[tuple[str, int], Future[str]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="background")

    def begin(self, name: str, iteration: int) -> None:
        """Begin a step's task; it runs after those begun before, in the context of the caller."""
        self._begun[name, iteration] = self._thread.submit(copy_context().run, self._tasks[name], iteration)

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
        """Raise what a finished task raised, so that the run stops early; never waits."""
        for key in [key for key, future in self._begun.items() if future.done() and future.exception() is not None]:
            self._wait_for(key)

    def wait_for_all(self) -> None:
        """Wait for all background tasks, and raise what the first failed one raised."""
        while self._begun:
            self._wait_for(next(iter(self._begun)))

    def _wait_for(self, key: tuple[str, int]) -> None:
        future = self._begun[key]
        try:
            future.result()
        finally:
            if future.done():  # an interrupted wait leaves it to `end`
                del self._begun[key]

    def end(self) -> None:
        """Wait for all background tasks, and end their thread; never raises what they raised."""
        wait(self._begun.values())
        self._begun.clear()
        self._thread.shutdown()
