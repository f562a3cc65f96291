"""A folder with configs on a machine with a Prefect server and a worker of its own, and the commands of its user."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from tests.processes import until

ROOT = Path(__file__).parent.parent
PATIENCE = 600.0
"""Seconds after which a process hangs, on however busy a machine."""
TRIES = 10
"""How often a command that only looks is repeated when the server does not answer."""


class Machine:
    """A folder with a config, and the commands of its user."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = str(listener.getsockname()[1])
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | {
            "PYTHONPATH": str(ROOT),
            "XDG_STATE_HOME": str(folder / "state"),
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_WORKER_QUERY_SECONDS": "5",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "10",
        }

    @property
    def api(self) -> str:
        """The address of the server's API."""
        return f"http://127.0.0.1:{self.port}/api"

    def rows(self, what: str, **filters: Any) -> list[dict[str, Any]]:
        """Return the server's rows of a kind: artifacts, flow_runs."""
        found: list[dict[str, Any]] = httpx.post(f"{self.api}/{what}/filter", json=filters, timeout=60).json()
        return found

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def start_worker(self, device: str) -> "subprocess.Popen[bytes]":
        """Start a worker, whose output is appended to worker.log."""
        with (self.folder / "worker.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "flows.cli", "worker", "--device", device],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def grpo(self, *arguments: str, code: int = 0) -> str:
        """Run a command that ends with this exit code; return what it printed."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == code, (arguments, out, err)
        return out

    def schedule(self, *arguments: str, code: int = 0) -> str:
        return self.grpo("schedule", *arguments, code=code)

    def history(self, name: str) -> list[dict[str, Any]]:
        for _ in range(TRIES):  # a busy server with SQLite may be silent for a minute
            process = self.start("schedule", "history", name, "-n", "0", "-f", "jsonl")
            out, err = process.communicate(timeout=PATIENCE)
            if process.returncode == 0:
                return [json.loads(line) for line in out.splitlines()]
            assert "no Prefect server answers" in err, (out, err)
        raise AssertionError(err)

    def states(self, name: str) -> list[str]:
        """Return how the firings of a schedule stand, the first one first."""
        return [row["state"] for row in reversed(self.history(name))]

    def fire(self, name: str, *expected: str) -> str:
        """Let a schedule fire, wait until its firings ended like this, and return why the last one did."""
        self.schedule("run-now", name)
        assert until(lambda: self.states(name) == list(expected), PATIENCE), self.history(name)
        return str(self.history(name)[0]["why"])
