"""A time limit inside of a reward function, for what may compute without end: of processor time, until it is obeyed."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

REPEAT_SECONDS = 0.05
"""Between two tries to end a call: what is raised inside a finalizer or a callback is lost."""

Value = TypeVar("Value")


class _OutOfTime(BaseException):
    """Passes through handlers of `Exception`."""


def run_within(seconds: float, call: Callable[[], Value]) -> Value:
    """Return what the call returns; end it when it has used so many seconds of the processor.

    In another than the main thread there is no limit, as no signal can end the call there; and while one operation of
    an extension runs, such as a long multiplication, it waits for that one. The limit of the worker process holds.

    Raises:
        TimeoutError: when the call was ended.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    is_over = False

    def stop(number: int, frame: FrameType | None) -> None:
        if not is_over:
            raise _OutOfTime

    handler = signal.signal(signal.SIGPROF, stop)
    timer = signal.setitimer(signal.ITIMER_PROF, seconds, REPEAT_SECONDS)
    try:
        return call()
    except _OutOfTime:
        is_over = True  # before anything else: the next try may come in the midst of it
        raise TimeoutError(f"no decision within {seconds:g} s of processor time") from None
    finally:
        is_over = True
        signal.setitimer(signal.ITIMER_PROF, *timer)
        # one more may be on its way, and by default that would be the end of the process
        signal.signal(signal.SIGPROF, handler if callable(handler) else _ignore)


def _ignore(number: int, frame: FrameType | None) -> None:
    pass
