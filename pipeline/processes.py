"""Child processes: started in their own session, watched, and ended with their descendants.

The process that starts a child ends it. A child that must not outlive a killed parent calls `die_with_parent` if the
parent's main thread started it, else `when_parent_ends`.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

from pipeline.reading import open_regular

TERM_SECONDS = 2.0
"""Time between SIGTERM and SIGKILL."""

WATCH_SECONDS = 0.25
"""Interval at which a child checks whether its parent is alive."""

LOG_TAIL_LINES = 20
LOG_TAIL_BYTES = 1 << 16
PR_SET_PDEATHSIG = 1


def start_python(
    arguments: Sequence[str], *, pass_fds: Collection[int], environment: Mapping[str, str], log: Path | None
) -> "subprocess.Popen[bytes]":
    """Start Python as the leader of its own session, which Ctrl-C does not reach.

    Its output is appended to the log, through no link; without a log it goes where ours goes.
    """
    with _append(log) if log else nullcontext() as output:
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            pass_fds=pass_fds,
            start_new_session=True,
        )


def _append(log: Path) -> BinaryIO:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.fdopen(os.open(log, flags, 0o666), "ab")


def log_tail(log: Path, offset: int = 0) -> str:
    """Return the last lines of a log after the byte ``offset``. Read-only."""
    with open_regular(log) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(offset, size - LOG_TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-LOG_TAIL_LINES:]) or "(it wrote nothing)"


def end(process: "subprocess.Popen[bytes]") -> int:
    """End a session's leader and its group, reap it, and return its exit status, negative for a signal."""
    kill_group(process.pid, signal.SIGTERM)
    wait_for_exit(process)
    kill_group(process.pid)
    return process.wait()


def kill_group(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to a process group, if it exists and is ours."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def wait_for_exit(process: "subprocess.Popen[bytes]", seconds: float = TERM_SECONDS) -> None:
    """Wait until a child exits, for at most ``seconds``; do not reap it."""
    deadline = time.monotonic() + seconds
    while not has_exited(process) and time.monotonic() < deadline:
        time.sleep(0.01)


def has_exited(process: "subprocess.Popen[bytes]") -> bool:
    """Return whether the child has exited, without reaping it: until it is reaped, its group's id is not reused."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the call above
        os._exit(1)


def when_parent_ends(parent: int, act: Callable[[], None]) -> None:
    """Call ``act`` from a thread of this process when its parent process is gone, whichever thread started us."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        act()

    threading.Thread(target=watch, daemon=True).start()
