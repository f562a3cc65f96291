"""Symbolic mathematics: the time limit in every place where a reward function may run."""

import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from stages.rewards.answers.symbolic import math_match, math_match_identity
from stages.rewards.answers.time_limit import run_within

MONSTER = "$9^{9^{9^{9}}}$"
LATE = "no decision within 0.3 s of processor time"


def late() -> str:
    try:
        math_match(MONSTER, "5", seconds=0.3)
    except TimeoutError as error:
        return str(error)
    return "decided"


def burn(seconds: float) -> str:
    ends = time.process_time() + seconds
    while time.process_time() < ends:
        pass
    return "done"


class BurnsAtItsEnd:
    """Works for long in its finalizer, where exceptions are lost."""

    def __del__(self) -> None:
        burn(0.3)


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Return what was raised where nobody can catch it."""
    found: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", found.append)
    yield found
    found.clear()


def test_the_time_limit_holds_in_a_worker_process() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(late) == LATE


def test_after_a_timeout_the_next_answer_is_judged() -> None:
    assert late() == LATE
    assert math_match("$\\frac{2}{4}$", "0.5").reward == 1.0


def test_in_another_thread_mathematics_works_without_a_limit_of_its_own() -> None:
    rewards: list[Any] = []
    thread = threading.Thread(target=lambda: rewards.append(math_match("$\\frac{2}{4}$", "0.5").reward))
    thread.start()
    thread.join()
    assert rewards == [1.0]


def test_a_limit_that_is_lost_in_a_finalizer_comes_again(lost: list[Any]) -> None:
    def call() -> str:
        BurnsAtItsEnd()
        return burn(3600)

    with pytest.raises(TimeoutError, match=r"within 0\.1 s"):
        run_within(0.1, call)
    assert lost  # the first try


def test_a_limit_that_is_swallowed_comes_again_until_it_is_obeyed() -> None:
    def call() -> str:
        for _ in range(3):
            with suppress(BaseException):
                burn(3600)
        return burn(3600)

    with pytest.raises(TimeoutError):
        run_within(0.1, call)
    assert burn(0.2) == "done"  # and then no more


def test_waiting_and_the_time_of_others_use_up_no_limit() -> None:
    assert run_within(0.1, lambda: time.sleep(0.3)) is None


def test_a_timer_of_the_caller_goes_on_and_its_handler_comes_back() -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGPROF, lambda number, frame: calls.append(number))
    signal.setitimer(signal.ITIMER_PROF, 0.3)
    try:
        with pytest.raises(TimeoutError):
            run_within(0.1, lambda: burn(3600))
        assert calls == []
        burn(0.5)
        assert calls == [signal.SIGPROF]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def test_the_identity_names_the_versions_that_decide() -> None:
    identity = math_match_identity(digits=3)
    assert identity["digits"] == 3
    assert set(identity["packages"]) == {"math-verify", "latex2sympy2_extended", "sympy"}
