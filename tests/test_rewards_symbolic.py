"""Symbolic mathematics: the time limit in every place where a reward function may run."""

import gc
import multiprocessing
import signal
import threading
import time
from typing import Any

from stages.rewards.answers.symbolic import math_match, math_match_identity

MONSTER = "$9^{9^{9^{9}}}$"


def late() -> tuple[float | None, str]:
    gc.disable()  # what the limit raises inside a finalizer is lost
    try:
        score = math_match(MONSTER, "5", seconds=0.3)
    finally:
        gc.enable()
    return score.reward, score.detail["reason"]


def test_the_time_limit_holds_in_a_worker_process() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(late) == (None, "no decision within 0.3 seconds")


def test_after_a_timeout_the_next_answer_is_judged() -> None:
    assert late()[0] is None
    assert math_match("$\\frac{2}{4}$", "0.5").reward == 1.0


def test_in_another_thread_mathematics_works_without_a_limit_of_its_own() -> None:
    rewards: list[Any] = []
    thread = threading.Thread(target=lambda: rewards.append(math_match("$\\frac{2}{4}$", "0.5").reward))
    thread.start()
    thread.join()
    assert rewards == [1.0]


def test_a_timer_of_the_caller_goes_on_and_its_handler_comes_back() -> None:
    assert late()[0] is None  # the first call imports
    calls: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: calls.append(number))
    left, _ = signal.setitimer(signal.ITIMER_REAL, 3.0)
    try:
        assert late()[0] is None
        assert calls == []
        deadline = time.monotonic() + 60
        while not calls and time.monotonic() < deadline:
            time.sleep(0.05)
        assert calls == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)


def test_the_identity_names_the_versions_that_decide() -> None:
    identity = math_match_identity(digits=3)
    assert identity["digits"] == 3
    assert set(identity["packages"]) == {"math-verify", "latex2sympy2_extended", "sympy"}
