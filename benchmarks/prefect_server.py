"""A Prefect server of a benchmark's own: its port, and the wait until it answers."""

import socket
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

START_SECONDS = 180


def free_port() -> int:
    """Return a port that no process of this machine listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_for_server(server: "subprocess.Popen[Any]", port: int, log: Path) -> None:
    """Return when the server answers; end the program when it does not start."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5):
            return
        if server.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the Prefect server did not start: see {log}")
        time.sleep(0.3)
