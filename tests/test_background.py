"""Background tasks of the flow: what is waited for, when, and whose error is told. The tasks are stand-ins."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest

from flows.background import Background


class State:
    """What Prefect's thread returns: here the value or the error itself."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def is_completed(self) -> bool:
        return self.error is None


class StandInFuture:
    """What `Background` uses of a future."""

    def __init__(self, wrapped: "Future[State]") -> None:
        self.wrapped_future = wrapped

    def wait(self) -> None:
        self.wrapped_future.result()

    def result(self) -> None:
        state = self.wrapped_future.result()
        if state.error is not None:
            raise state.error


class StandIn:
    """What `Background` uses of a task."""

    def __init__(self, name: str, threads: ThreadPoolExecutor) -> None:
        self.name, self.threads, self.ran = name, threads, list[int]()
        self.before: Callable[[], object] = lambda: None

    def __call__(self, iteration: int) -> str:
        self.before()
        self.ran.append(iteration)
        if iteration < 0:
            raise ValueError(f"{self.name} of {iteration}")
        return self.name

    def submit(self, iteration: int) -> StandInFuture:
        return StandInFuture(self.threads.submit(self._state, iteration))

    def _state(self, iteration: int) -> State:
        try:
            self(iteration)
        except ValueError as error:
            return State(error)
        return State(None)


@pytest.fixture
def task() -> Any:
    with ThreadPoolExecutor(1) as threads:
        yield StandIn("prompts", threads)


def test_a_task_that_was_begun_is_not_run_again(task: Any) -> None:
    background = Background({task.name: task})
    background.begin("prompts", 3)
    assert background.is_begun("prompts", 3)
    assert not background.is_begun("prompts", 4)
    background.wait_for("prompts", 3)
    assert task.ran == [3]
    assert not background.is_begun("prompts", 3)


def test_a_task_that_was_not_begun_runs_when_it_is_waited_for(task: Any) -> None:
    Background({task.name: task}).wait_for("prompts", 5)
    assert task.ran == [5]


def test_an_error_is_told_where_the_task_is_waited_for(task: Any) -> None:
    background = Background({task.name: task})
    background.begin("prompts", -1)
    background.begin("prompts", 2)
    with pytest.raises(ValueError, match="prompts of -1"):
        background.wait_for_all()
    background.wait_for_all()
    assert task.ran == [-1, 2]


def test_a_stage_is_settled_and_others_go_on(task: Any) -> None:
    other: Any = StandIn("metrics", task.threads)
    background = Background({"prompts": task, "metrics": other})
    for stage, iteration in (("metrics", 1), ("metrics", 2), ("prompts", 3)):
        background.begin(stage, iteration)
    background.settle("metrics")
    assert other.ran == [1, 2]
    assert not background.is_begun("metrics", 1)
    assert background.is_begun("prompts", 3)
    background.begin("metrics", -3)
    with pytest.raises(ValueError, match="metrics of -3"):
        background.settle("metrics")


def test_a_failure_is_told_as_soon_as_it_is_known_and_nothing_is_waited_for(task: Any) -> None:
    goes_on = Event()
    slow: Any = StandIn("slow", task.threads)
    slow.before = goes_on.wait
    background = Background({"prompts": task, "slow": slow})
    background.begin("prompts", 7)
    background.begin("prompts", -7)
    background.begin("slow", 1)
    waited: Any = background._begun["prompts", -7]
    waited.wait()  # the one thread has run both
    try:
        with pytest.raises(ValueError, match="prompts of -7"):
            background.raise_failed()
        background.raise_failed()
        assert background.is_begun("prompts", 7)
    finally:
        goes_on.set()
    background.wait_for_all()


def test_an_interrupted_wait_leaves_the_task_to_the_end(task: Any) -> None:
    goes_on = Event()
    task.before = goes_on.wait
    background = Background({task.name: task})
    background.begin("prompts", 1)
    future = background._begun["prompts", 1]
    future.result = interrupted  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        background.wait_for("prompts", 1)
    assert background.is_begun("prompts", 1)
    goes_on.set()
    background.end()
    assert task.ran == [1]


def interrupted() -> str:
    raise KeyboardInterrupt


def test_at_the_end_errors_are_not_told_but_nothing_runs_any_more(task: Any) -> None:
    background = Background({task.name: task})
    background.begin("prompts", 1)
    background.begin("prompts", -2)
    background.end()
    assert task.ran == [1, -2]
    background.wait_for_all()
