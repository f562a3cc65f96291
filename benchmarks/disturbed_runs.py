"""What `kill.py` and `pause.py` share: the command under test, its reference run, and the processes that it starts.

Linux only.
"""

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from prefect_server import free_port, wait_for_server
from remains import finished_artifacts

from pipeline.manifest import Manifest
from tests.processes import descendants, is_alive

PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Command:
    """The command under test, the same for every run."""

    config: Path
    overrides: list[str]
    environment: dict[str, str]
    timeout: float

    def start(self, directory: Path, log: Path) -> "subprocess.Popen[bytes]":
        """Start ``grpo run`` into ``directory/run``; starters lie beside it, so no two directories share one."""
        settings = [argument for override in self.overrides for argument in ("--set", override)]
        program = [sys.executable, "-m", "flows.cli", "run", str(self.config), "--run", str(directory / "run")]
        with log.open("ab") as output:
            return subprocess.Popen(
                [*program, *settings], stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environment
            )


def make_reference(command: Command, reference: Path, log: Path) -> dict[str, Manifest]:
    """Run the command undisturbed, and return what it made."""
    print(f"reference run: {os.path.relpath(reference)}", flush=True)
    began = time.monotonic()
    if command.start(reference, log).wait(command.timeout):
        raise SystemExit(f"the reference run failed: see {log}")
    manifests = finished_artifacts(reference)
    print(f"{len(manifests)} artifacts in {time.monotonic() - began:.0f} s", flush=True)
    return manifests


def conduct(
    parser: argparse.ArgumentParser, run: Callable[[Command, Path, argparse.Namespace, int | None], int]
) -> int:
    """Read the options, start what is wanted of Prefect, and call ``run`` with the command, a scratch directory, the
    options and the server that is to be spared; whatever happens, leave no process behind.
    """
    parser.add_argument("config", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--runs", type=Path, default=Path("runs/disturbed"), help="scratch directory; must not exist")
    parser.add_argument("--prefect", choices=("shared", "temporary"), default="shared", help="which Prefect server")
    parser.add_argument("--timeout", type=float, default=600, help="seconds after which a run counts as hanging")
    arguments = parser.parse_args()
    root = arguments.runs.resolve()
    if root.exists():
        parser.error(f"{arguments.runs} exists: name a directory that does not, or delete it")
    (root / "logs").mkdir(parents=True)
    home = root / "prefect"
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"}
    environment |= {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
    command = Command(arguments.config.resolve(), arguments.overrides, environment, arguments.timeout)
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what we started ends with us
    try:
        if arguments.prefect == "temporary":
            return run(command, root, arguments, None)
        with shared_server(home, environment) as server:
            return run(command, root, arguments, server)
    finally:
        end_all(None)
        shutil.rmtree(home, ignore_errors=True)


def adopt_orphans() -> None:
    """Make this process the parent of whatever a killed descendant leaves, so that nothing can hide from us."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def started(spared: int | None = None) -> dict[int, str]:
    """Return the living processes below this one with their command lines, less ``spared`` and all below it."""
    return {pid: _command_line(pid) for pid in descendants(os.getpid(), spared) if is_alive(pid)}


def _command_line(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def end_all(spared: int | None) -> None:
    """Kill everything that this process started, until nothing is left."""
    while pids := started(spared):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        reap(spared)
        time.sleep(0.002)


def reap(spared: int | None) -> None:
    """Collect dead children, those that we inherited too."""
    with suppress(ChildProcessError):
        while (dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and dead.si_pid != spared:
            os.waitpid(dead.si_pid, 0)


@contextmanager
def shared_server(home: Path, environment: dict[str, str]) -> Iterator[int]:
    """Run a Prefect server on a free port, whose address goes into ``environment``; yield its process id."""
    port = free_port()
    server_command = f"-m prefect server start --host 127.0.0.1 --port {port} --no-ui".split()
    with (home / "server.log").open("ab") as log:
        server = subprocess.Popen(
            [sys.executable, *server_command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
    try:
        wait_for_server(server, port, home / "server.log")
        environment["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
        yield server.pid
    finally:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(10)
        end_all(None)
