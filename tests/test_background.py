"""Background tasks of the flow: what is waited for, when, and whose error is told. The tasks are stand-ins."""

from collections.abc import Callable
from concurrent.futures import wait
from contextvars import ContextVar
from threading import Event, enumerate, get_ident

import pytest

from flows.background import Background


class StandIn:
    """A task: it records its iteration, and raises for a negative one."""

    def __init__(self, name: str) -> None:
        self.name, self.ran = name, list[int]()
        self.before: Callable[[], object] = lambda: None

    def __call__(self, iteration: int) -> str:
        self.before()
        self.ran.append(iteration)
        if iteration < 0:
            raise ValueError(f"{self.name} of {iteration}")
        return self.name


@pytest.fixture
def task() -> StandIn:
    return StandIn("prompts")


def test_a_task_that_was_begun_is_not_run_again(task: StandIn) -> None:
    background = Background({task.name: task})
    background.begin("prompts", 3)
    assert background.is_begun("prompts", 3)
    assert not background.is_begun("prompts", 4)
    background.wait_for("prompts", 3)
    assert task.ran == [3]
    assert not background.is_begun("prompts", 3)


def test_a_task_that_was_not_begun_runs_when_it_is_waited_for(task: StandIn) -> None:
    Background({task.name: task}).wait_for("prompts", 5)
    assert task.ran == [5]


def test_an_error_is_told_where_the_task_is_waited_for(task: StandIn) -> None:
    background = Background({task.name: task})
    background.begin("prompts", -1)
    background.begin("prompts", 2)
    with pytest.raises(ValueError, match="prompts of -1"):
        background.wait_for_all()
    background.wait_for_all()
    assert task.ran == [-1, 2]


def test_a_stage_is_settled_and_others_go_on(task: StandIn) -> None:
    other = StandIn("metrics")
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


def test_a_failure_is_told_as_soon_as_it_is_known_and_nothing_is_waited_for(task: StandIn) -> None:
    goes_on = Event()
    slow = StandIn("slow")
    slow.before = goes_on.wait
    background = Background({"prompts": task, "slow": slow})
    background.begin("prompts", 7)
    background.begin("prompts", -7)
    background.begin("slow", 1)
    wait([background._begun["prompts", -7]])  # the one thread has run both
    try:
        with pytest.raises(ValueError, match="prompts of -7"):
            background.raise_failed()
        background.raise_failed()
        assert background.is_begun("prompts", 7)
    finally:
        goes_on.set()
    background.wait_for_all()


def test_an_interrupted_wait_leaves_the_task_to_the_end(task: StandIn) -> None:
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


def test_at_the_end_errors_are_not_told_but_nothing_runs_any_more(task: StandIn) -> None:
    background = Background({task.name: task})
    background.begin("prompts", 1)
    background.begin("prompts", -2)
    background.end()
    assert task.ran == [1, -2]
    background.wait_for_all()


def test_a_task_runs_in_the_context_of_the_one_who_begins_it_and_leaves_no_thread(task: StandIn) -> None:
    """Prefect knows by the context to which flow run a task belongs."""
    flow_run: ContextVar[str] = ContextVar("flow_run", default="none")
    seen: list[tuple[str, bool]] = []
    task.before = lambda: seen.append((flow_run.get(), get_ident() == here))
    here, before = get_ident(), enumerate()
    background = Background({task.name: task})
    for name in ("first", "second"):
        flow_run.set(name)
        background.begin("prompts", 1)
    background.end()
    assert seen == [("first", False), ("second", False)]
    assert enumerate() == before
