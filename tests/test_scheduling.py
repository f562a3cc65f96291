"""Schedules on a real server and worker: applied from a file, fired by hand, ended with all that they started."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.run_dir import RunDir
from tests.processes import descendants, survivors, until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PATIENCE = 600.0
"""Seconds after which a process hangs, on however busy a machine."""
CONFIG = """
seed = 3
iterations = 1
[policy]
model = "{policy}"
[prompts]
source = "rows.jsonl"
prompts_per_iteration = 2
[generate]
engine = "transformers"
group_size = 2
max_tokens = 6
num_threads = 1
[[score.rewards]]
name = "digits"
function = "close:reward"
[update]
num_threads = 1
[evaluate]
every = 0
held_out_share = 0.0
"""
REWARD = """
def reward(completion: str) -> float:
    return sum(map(str.isdigit, completion)) / max(len(completion), 1)
"""
SCHEDULES = """
[schedules.more]
config = "config.toml"
run = "runs/more"
every = "1d"
on_overlap = "skip"

[schedules.watch]
config = "config.toml"
run = "runs/watch"
action = "fresh"
cron = "0 3 * * *"
timezone = "Europe/Berlin"
when = {changed = "close.py"}
"""


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
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
        }

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

    def grpo(self, *arguments: str, code: int = 0) -> str:
        """Run a command that ends with this exit code; return what it printed."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == code, (arguments, out, err)
        return out

    def schedule(self, *arguments: str, code: int = 0) -> str:
        return self.grpo("schedule", *arguments, code=code)

    def history(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.schedule("history", name, "-n", "0", "-f", "jsonl").splitlines()]

    def states(self, name: str) -> list[str]:
        """Return how the firings of a schedule stand, the first one first."""
        return [row["state"] for row in reversed(self.history(name))]

    def fire(self, name: str, *expected: str) -> str:
        """Let a schedule fire, wait until its firings ended like this, and return why the last one did."""
        self.schedule("run-now", name)
        assert until(lambda: self.states(name) == list(expected), PATIENCE), self.history(name)
        return str(self.history(name)[0]["why"])


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Iterator[Machine]:
    """Return a machine on which a server and a worker run; both end with the module, with all that they started."""
    folder = tmp_path_factory.mktemp("scheduling")
    (folder / "rows.jsonl").write_text("".join(f'{{"question": "{i} + 1 =", "answer": "{i + 1}"}}\n' for i in range(8)))
    (folder / "config.toml").write_text(CONFIG.format(policy=tiny_policy))
    (folder / "close.py").write_text(REWARD)
    (folder / "schedules.toml").write_text(SCHEDULES)
    machine = Machine(folder)
    try:
        machine.grpo("server", "start", "--port", machine.port)
        with (folder / "worker.log").open("w") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "flows.cli", "worker", "--device", "box"],
                cwd=folder,
                env=machine.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield machine
        finally:
            below = descendants(worker.pid)
            worker.send_signal(signal.SIGKILL)
            worker.wait()
            assert survivors(*below) == [], "a killed worker leaves nothing behind"
    finally:
        machine.grpo("server", "stop")
        assert "no server runs here" in machine.grpo("server", "status", code=1)


def test_a_file_of_schedules_is_applied_once_and_fires_by_hand(machine: Machine) -> None:
    assert "nothing was changed: --yes changes it" in machine.schedule("apply", "schedules.toml", code=1)
    said = machine.schedule("apply", "schedules.toml", "--yes")
    assert "+ more: continue runs/more with config.toml, every 1d" in said
    assert "nothing to change" in machine.schedule("apply", "schedules.toml")

    assert machine.fire("more", "Completed") == (
        "grpo run config.toml --run runs/more --set iterations=1 (each firing runs)"
    )
    run = RunDir(machine.folder / "runs" / "more")
    assert run.has(0, "policy")
    assert not run.has(1, "prompts")

    assert "(first run: no earlier one has worked)" in machine.fire("watch", "Completed")
    os.utime(machine.folder / "close.py")
    assert machine.fire("watch", "Completed", "Skipped") == (
        "nothing changed since the last run that worked: changed close.py"
    )
    assert len(list((machine.folder / "runs").glob("watch-*"))) == 1

    machine.schedule("remove", "watch")
    assert "+ watch" in machine.schedule("apply", "schedules.toml", "--yes")
