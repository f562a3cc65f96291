"""Prefect's server: it ends with the command, and its death ends the command with one line."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flows.prefect_server import INTERRUPTING, temporary_server
from tests.processes import survivors

ROOT = Path(__file__).parent.parent
PATIENCE = 120
"""Seconds after which a process hangs, on however busy a machine."""
STAND_IN = """
import http.server, os, socket
from functools import partial
from pipeline.processes import kill_group, when_parent_ends
when_parent_ends({parent}, partial(kill_group, os.getpgrp()))
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", 0), Healthy, bind_and_activate=False)
server.socket = socket.socket(fileno={descriptor})
server.serve_forever()
"""
"""A server that begins to answer sooner than Prefect's."""
COMMAND = """
import os, sys, time
from flows.crash import fail
from flows.prefect_server import PROGRAM, temporary_server
def work():
    program, does = sys.argv[1:3]
    with temporary_server(program) as (url, wait):
        pid = open(f"/proc/self/task/{os.getpid()}/children").read().strip()
        print(pid, os.getsid(int(pid)), flush=True)
        if does == "wait":
            wait()
        if does == "unwind":
            wait()
            print("ready", flush=True)
            time.sleep(600)
    print("done", flush=True)
try:
    work()
except BaseException as error:
    fail(error)
"""


def start(program: str, does: str) -> tuple["subprocess.Popen[str]", int]:
    """Start a command that has a server; return it and the server's process id."""
    command = subprocess.Popen(
        [sys.executable, "-c", COMMAND, program, does],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert command.stdout is not None
    pid, session = map(int, command.stdout.readline().split())
    assert pid == session
    return command, pid


@pytest.mark.parametrize("program", [STAND_IN, "from flows.prefect_server import serve; serve({descriptor}, {parent})"])
def test_a_command_that_is_killed_while_its_server_starts_leaves_none(program: str) -> None:
    command, server = start(program, "unwind" if program == STAND_IN else "wait")
    command.kill()
    command.communicate()
    assert survivors(server) == []


@pytest.mark.parametrize("does", ["wait", "unwind"])
def test_the_death_of_the_server_ends_the_command_with_one_line(does: str) -> None:
    # one that never answers dies while the command waits for it, the other one in the middle of the work
    command, server = start(STAND_IN if does == "unwind" else "import time; time.sleep(600)", does)
    assert command.stdout is not None
    if does == "unwind":
        assert command.stdout.readline() == "ready\n"
    os.kill(server, signal.SIGKILL)
    output, errors = command.communicate(timeout=PATIENCE)
    assert (command.returncode, output) == (2, "")
    assert errors.startswith("error: Prefect's temporary server ended")
    assert errors.count("\n") == 1
    assert "the same command goes on where this one stopped" in errors


def test_the_server_ends_with_the_command() -> None:
    command, server = start(STAND_IN, "wait")
    output, errors = command.communicate(timeout=PATIENCE)
    assert (command.returncode, output, errors) == (0, "done\n", "")
    assert survivors(server) == []


def test_nothing_that_could_still_interrupt_is_left_behind() -> None:
    before = signal.getsignal(INTERRUPTING), threading.enumerate()
    with temporary_server("import time; time.sleep(600)"):
        pass
    assert (signal.getsignal(INTERRUPTING), threading.enumerate()) == before


NAMED = """
import sys, threading, time
from flows.crash import fail
from flows import prefect_server
from pipeline.errors import CheckFailed
prefect_server.FAREWELL_SECONDS = 0.5
try:
    with prefect_server._named("http://127.0.0.1:9/api"):
        if sys.argv[1] == "raises":
            raise ConnectionError("all connection attempts failed")
        if sys.argv[1] == "holds":
            try:
                raise CheckFailed("a check holds the run")
            finally:
                raise ConnectionError("as Prefect does, which tells the server")
        prefect_server.computed.set()
        time.sleep(600)  # as Prefect does, which repeats its requests
except BaseException as error:
    fail(error)
"""


@pytest.mark.parametrize("how", ["raises", "waits"])
def test_a_named_server_that_is_gone_does_not_keep_the_command(how: str) -> None:
    command = [sys.executable, "-c", NAMED, how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the Prefect server at http://127.0.0.1:9/api does not answer any more")
    assert done.stderr.count("\n") == 1


def test_an_error_of_the_run_is_told_though_the_server_is_silent() -> None:
    """A busy one may be late just then, and the error says what is to be done."""
    command = [sys.executable, "-c", NAMED, "holds"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: a check holds the run\n")
