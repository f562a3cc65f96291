"""Tasks beside the flow: what is waited for, when, and whose error is told. The tasks are stand-ins for Prefect's."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from flows.beside import Beside


class StandIn:
    """What `Beside` uses of a task and of its future."""

    def __init__(self, name: str, threads: ThreadPoolExecutor) -> None:
        self.name, self.threads, self.ran = name, threads, list[int]()

    def __call__(self, iteration: int) -> str:
        self.ran.append(iteration)
        if iteration < 0:
            raise ValueError(f"{self.name} of {iteration}")
        return self.name

    def submit(self, iteration: int) -> "Future[str]":
        future = self.threads.submit(self, iteration)
        future.wait = future.exception  # type: ignore[attr-defined]
        return future


@pytest.fixture
def task() -> Any:
    with ThreadPoolExecutor(1) as threads:
        yield StandIn("prompts", threads)


def test_a_task_that_was_begun_is_not_run_again(task: Any) -> None:
    beside = Beside()
    beside.begin(task, 3)
    assert beside.is_begun(task, 3)
    assert not beside.is_begun(task, 4)
    beside.wait_for(task, 3)
    assert task.ran == [3]
    assert not beside.is_begun(task, 3)


def test_a_task_that_was_not_begun_runs_when_it_is_waited_for(task: Any) -> None:
    Beside().wait_for(task, 5)
    assert task.ran == [5]


def test_an_error_is_told_where_the_task_is_waited_for(task: Any) -> None:
    beside = Beside()
    beside.begin(task, -1)
    beside.begin(task, 2)
    with pytest.raises(ValueError, match="prompts of -1"):
        beside.wait_for_all()
    beside.wait_for_all()
    assert task.ran == [-1, 2]


def test_a_stage_is_settled_and_others_go_on(task: Any) -> None:
    other = StandIn("metrics", task.threads)
    beside = Beside()
    for stage, iteration in ((other, 1), (other, 2), (task, 3)):
        beside.begin(stage, iteration)  # type: ignore[arg-type]
    beside.settle(other)
    assert other.ran == [1, 2]
    assert not beside.is_begun(other, 1)
    assert beside.is_begun(task, 3)
    beside.begin(other, -3)
    with pytest.raises(ValueError, match="metrics of -3"):
        beside.settle(other)


def test_at_the_end_errors_are_not_told_but_nothing_runs_any_more(task: Any) -> None:
    beside = Beside()
    beside.begin(task, 1)
    beside.begin(task, -2)
    beside.end()
    assert task.ran == [1, -2]
    beside.wait_for_all()
