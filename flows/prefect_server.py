"""A small process that ends Prefect's temporary server if this process is killed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SERVER = b"prefect.server"

WATCH = """
import os, signal, sys
farewell = sys.stdin.read()  # returns when the writer closes the pipe, or is gone
if not farewell:
    for pid in map(int, sys.argv[1:]):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
"""


@contextmanager
def temporary_server_watched() -> Iterator[None]:
    """End the temporary server even after kill -9 of this process; do nothing if there is no such server."""
    pids = _temporary_servers()
    if not pids:
        yield
        return
    watcher = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", WATCH, *map(str, pids)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for us
    )
    assert watcher.stdin is not None
    try:
        yield
    finally:
        with suppress(BrokenPipeError):
            watcher.stdin.write(b"done")
            watcher.stdin.close()
        watcher.wait()


def _temporary_servers() -> list[int]:
    """Return the process ids of the Prefect servers that this process has started; none outside Linux."""
    found = []
    for children in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for pid in children.read_text().split():
            with suppress(OSError):
                if SERVER in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(int(pid))
    return found
