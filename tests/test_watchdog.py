"""The watcher of the temporary server: it acts when its parent is killed, and only then."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARENT = """
import subprocess, sys, time
from flows.prefect_server import temporary_server_watched
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
server = subprocess.Popen([*sleep, "prefect.server"], start_new_session=True)
other = subprocess.Popen([*sleep, "something else"], start_new_session=True)
with temporary_server_watched():
    print(server.pid, other.pid, flush=True)
    if sys.argv[1] == "stay":
        time.sleep(600)
print("left", flush=True)
time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.parametrize(("how", "survives"), [("stay", False), ("leave", True)])
def test_a_killed_process_takes_its_temporary_server_along_and_nothing_else(how: str, survives: bool) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, how], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    server, other = map(int, parent.stdout.readline().split())
    if how == "leave":
        assert parent.stdout.readline() == "left\n"
    parent.kill()
    parent.wait()
    parent.stdout.close()
    try:
        deadline = time.monotonic() + (1 if survives else 120)
        while is_alive(server) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert is_alive(server) is survives
        assert is_alive(other)
    finally:
        for pid in (server, other):
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
