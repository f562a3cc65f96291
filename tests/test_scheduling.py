"""Schedules on a real server and worker: applied from a file, fired by hand, ended with all that they started."""

import json
import os
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipeline.run_dir import RunDir
from tests.judge_server import JudgeServer, Reply, serve
from tests.machine import PATIENCE, Machine
from tests.processes import descendants, survivors, until

pytestmark = pytest.mark.slow

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


WATCHED = """
[schedules.held]
config = "held.toml"
every = "1d"

[schedules.watched]
config = "config.toml"
run = "runs/watched"
every = "1d"

[schedules.verified]
config = "config.toml"
run = "runs/watched"
action = "verify"
every = "1d"

[alerts.ops]
webhook = "{url}/s3cr3t"
on = ["iteration.finished", "check.failed", "verify.failed", "flow.failed", "flow.crashed"]
"""
HELD = """
[[checks]]
name = "never"
where = "num_tokens > 0"
severity = "block"
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Iterator[Machine]:
    """Return a machine on which a server and a worker run; both end with the module, with all that they started."""
    folder = tmp_path_factory.mktemp("scheduling")
    (folder / "rows.jsonl").write_text("".join(f'{{"question": "{i} + 1 =", "answer": "{i + 1}"}}\n' for i in range(8)))
    (folder / "config.toml").write_text(CONFIG.format(policy=tiny_policy))
    (folder / "close.py").write_text(REWARD)
    (folder / "held.toml").write_text(CONFIG.format(policy=tiny_policy) + HELD)
    (folder / "schedules.toml").write_text(SCHEDULES)
    machine = Machine(folder)
    try:
        machine.grpo("server", "start", "--port", machine.port)
        worker = machine.start_worker("box")
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


def test_nothing_fires_that_is_due_after_its_schedule_was_paused(machine: Machine) -> None:
    """Not even what is due in a few seconds, which a worker may have taken already."""
    times = ("--every", "10s", "--on-overlap", "skip", "--iterations", "1")
    machine.schedule("add", "config.toml", "--name", "often", *times)
    assert until(lambda: "Completed" in machine.states("often"), PATIENCE)
    machine.schedule("pause", "often")
    paused = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%SZ}"
    assert not until(lambda: any(row["due"] > paused for row in machine.history("often")), 25.0)
    machine.schedule("cancel", "often")
    machine.schedule("remove", "often")


def test_a_firing_that_waits_for_its_device_is_cancelled_without_being_killed(machine: Machine) -> None:
    machine.schedule("add", "config.toml", "--name", "waits", "--every", "1d")
    device = {"names": ["grpo-device-box"], "slots": 1}

    def ask(what: str) -> bool:
        return httpx.post(f"{machine.api}/v2/concurrency_limits/{what}", json=device, timeout=60).is_success

    def log() -> str:
        return (machine.folder / "worker.log").read_text().rpartition("Flow run 'waits: continue")[2]

    assert until(lambda: ask("increment"), PATIENCE)
    try:
        machine.schedule("run-now", "waits")
        assert until(lambda: "waiting for the device" in log(), PATIENCE)
        assert "Cancelled" in machine.schedule("cancel", "waits")
        assert until(lambda: "Process for flow run" in log(), PATIENCE)
    finally:
        assert ask("decrement")
    assert "SIGKILL" not in log()
    machine.schedule("remove", "waits")


@pytest.fixture
def receiver() -> Iterator[JudgeServer]:
    """Return a server that remembers what a webhook was sent."""
    with serve(lambda number, body: Reply(body=b"ok")) as found:
        yield found


def sent(receiver: JudgeServer, event: str) -> list[dict[str, Any]]:
    """Return what the webhook was sent of an event. A busy server may send it twice."""
    return list({body["id"]: body for body in receiver.bodies if body["event"] == event}.values())


def test_a_webhook_is_called_when_somebody_is_needed(machine: Machine, receiver: JudgeServer) -> None:
    (machine.folder / "watched.toml").write_text(WATCHED.format(url=f"http://127.0.0.1:{receiver.port}"))
    said = machine.schedule("apply", "watched.toml", "--yes")
    assert "+ alert ops: http://127.0.0.1/... on iteration.finished, check.failed" in said
    assert "nothing to change" in machine.schedule("apply", "watched.toml")
    listed = machine.grpo("alert", "list", "-f", "jsonl")
    assert json.loads(listed)["webhook"] == "http://127.0.0.1/..."
    assert machine.grpo("alert", "test", "ops") == "ops: it answered 200\n"
    assert [body["text"] for body in sent(receiver, "grpo.alert.test")] == ["test: this is a test of the alert ops"]

    machine.fire("held", "Failed")
    assert until(lambda: len(sent(receiver, "prefect.flow-run.Failed")) == 2, PATIENCE)  # the run's, and the firing's
    (body,) = sent(receiver, "grpo.check.failed")
    (row,) = RunDir(machine.folder / "runs" / "held").open(0, "checks").read().to_dicts()
    assert (body["run"], body["iteration"]) == ("held", 0)
    assert body["details"]["condition"] == "num_tokens > 0"
    assert body["details"]["failed_ids"] == row["failed_ids"] != []

    machine.fire("watched", "Completed")
    assert until(lambda: sent(receiver, "grpo.iteration.finished"), PATIENCE)
    assert [body["iteration"] for body in sent(receiver, "grpo.iteration.finished")] == [0]
    assert until(lambda: any(row["key"] == "watched-metrics" for row in machine.rows("artifacts")), PATIENCE)

    assert machine.fire("verified", "Completed").startswith("grpo verify runs/watched")
    part = next((machine.folder / "runs" / "watched" / "iterations" / "000000" / "rewards").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-1])
    assert "ended with exit code 1" in machine.fire("verified", "Completed", "Failed")
    assert until(lambda: sent(receiver, "grpo.verify.failed"), PATIENCE)
    assert sent(receiver, "grpo.verify.failed")[0]["run"] == "watched"

    machine.grpo("alert", "remove", "ops")
    assert machine.grpo("alert", "list", "-f", "jsonl") == ""


def test_a_flow_run_whose_process_was_killed_is_marked_crashed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(machine.environment, "PREFECT_API_URL", machine.api)
    process = machine.start("run", "config.toml", "--run", "runs/killed", "--set", "iterations=5000")
    place = machine.folder / "runs" / "killed" / "iterations" / "000000" / "policy"
    assert until(lambda: place.exists() or process.poll() is not None, PATIENCE)
    process.kill()
    process.communicate()

    def states() -> list[str]:
        return [row["state_name"] for row in machine.rows("flow_runs") if row["name"] == "killed 0-4999"]

    assert states() == ["Running"]
    assert until(lambda: states() == ["Crashed"], PATIENCE)
