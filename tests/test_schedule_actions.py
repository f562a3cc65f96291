"""Which command a firing is, the process that runs it, and what killed ones leave behind."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta, timezone
from pathlib import Path
from uuid import uuid4

import pytest

from flows.environment import DEFAULTS
from flows.reporter import SilentReporter
from flows.rescoring import rescore_run
from flows.schedule import child, firings, local
from flows.schedule.actions import command
from pipeline.config import load_toml
from pipeline.errors import UsageError
from pipeline.run_dir import RunDir
from tests.processes import descendants, survivors
from tests.schedules import DUE, job
from tests.small_run import make_small_run


def test_a_run_is_continued_by_so_many_iterations(tmp_path: Path, tiny_policy: Path) -> None:
    run = RunDir(make_small_run(tmp_path, tiny_policy, iterations=2))
    more = job(tmp_path, run=str(run.root), iterations=3, overrides=["seed=1"])
    head = ["run", "config.toml", "--run", str(run.root), "--set", "seed=1"]
    assert command(more, DUE) == [*head, "--set", "iterations=5"]  # two are finished
    (run.place(1, "policy") / "manifest.json").unlink()
    assert command(more, DUE) == [*head, "--set", "iterations=4"]


def test_a_new_run_gets_the_iterations_of_its_config(
    tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small_run(tmp_path, tiny_policy, iterations=4)
    monkeypatch.chdir(tmp_path)
    assert command(job(tmp_path, run="runs/new"), DUE) == [
        *("run", "config.toml", "--run", "runs/new", "--set", "iterations=4")
    ]


def test_a_fresh_run_is_named_after_the_time_at_which_it_was_due(tmp_path: Path) -> None:
    fresh = job(tmp_path, action="fresh", run="runs/demo/", overrides=["seed=1"])
    berlin = DUE.astimezone(timezone(timedelta(hours=1)))
    assert command(fresh, berlin) == ["run", "config.toml", "--run", "runs/demo-20261128-030005", "--set", "seed=1"]


@pytest.mark.parametrize("action", ["audit", "verify"])
def test_an_audit_is_of_the_run(action: str, tmp_path: Path) -> None:
    assert command(job(tmp_path, action=action), DUE) == [action, "run"]


def test_only_what_todays_rewards_have_not_scored_is_rescored(
    tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(make_small_run(tmp_path, tiny_policy))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "terse.toml").write_text('[[score.rewards]]\nname = "r"\nfunction = "tests.rewards:share_of_digits"\n')
    scores = job(tmp_path, action="rescore", run="runs/small", config="terse.toml")
    arguments = command(scores, DUE)
    assert arguments is not None
    name = arguments[4]
    assert arguments == ["rescore", "runs/small", "terse.toml", "--run", name]
    assert name.startswith("runs/small-rescored-")
    assert command(scores.model_copy(update={"run": "runs/small/"}), DUE) == [
        *arguments[:1],
        "runs/small/",
        *arguments[2:],
    ]
    warned = '[[checks]]\ncheck = "judge_answered"\n[resources]\nreward_workers = 1\n'
    (tmp_path / "warned.toml").write_text((tmp_path / "terse.toml").read_text() + warned)
    nothing = {"config": "warned.toml", "overrides": ["evaluate.every=3", "iterations=9"]}
    same = command(scores.model_copy(update=nothing), DUE)
    assert same is not None
    assert same[4] == name, "what decides no reward makes no other run"
    rescore_run(run, load_toml(tmp_path / "terse.toml"), RunDir(Path(name)), None, [], SilentReporter())
    assert command(scores, DUE) is None
    shutil.copytree(run.iteration(0), run.iteration(1))
    assert command(scores, DUE) == arguments, "new completions go on in the same run"
    other = job(
        tmp_path, action="rescore", run="runs/small", config="terse.toml", overrides=["normalize.baseline=none"]
    )
    found = command(other, DUE)
    assert found is not None
    assert found[4] != name, "other settings make another run"
    assert found[5:] == ["--set", "normalize.baseline=none"]


def test_a_failed_command_says_its_last_words(tmp_path: Path) -> None:
    said: list[str] = []
    audit = job(tmp_path, action="audit")
    outcome = child.perform(audit, DUE, tmp_path / "a.log", child.environment("http://nowhere"), said.append, 600)
    assert outcome.exit_code == 2
    assert outcome.command == "grpo audit run"
    assert outcome.last_line.startswith("error: run is not a run directory")
    assert said == ["$ grpo audit run", outcome.last_line]
    assert (tmp_path / "a.log").read_text().splitlines() == said


WAITS = """
[policy]
model = "{policy}"
[prompts]
source = "rows.jsonl"
[[score.rewards]]
name = "r"
function = "waiting:reward"
"""
WAITING = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(f"waits {os.getpid()} {child.pid}", flush=True)
child.wait()
"""


def test_an_interrupted_command_ends_with_its_whole_group(tmp_path: Path, tiny_policy: Path) -> None:
    """Its config names a function whose import starts a process and waits for it."""
    (tmp_path / "config.toml").write_text(WAITS.format(policy=tiny_policy))
    (tmp_path / "waiting.py").write_text(WAITING)
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    pids: list[int] = []

    def tell(line: str) -> None:
        if line.startswith("waits"):
            pids.extend(map(int, line.split()[1:]))
            raise KeyboardInterrupt

    fresh = job(tmp_path, action="fresh")
    with pytest.raises(KeyboardInterrupt):
        child.perform(fresh, DUE, tmp_path / "a.log", child.environment(""), tell, 600)
    assert len(pids) == 2
    assert survivors(*pids) == []


def test_a_command_ends_at_its_time_limit(tmp_path: Path) -> None:
    before = descendants(os.getpid())
    audit = job(tmp_path, action="audit")
    outcome = child.perform(audit, DUE, tmp_path / "a.log", child.environment("http://nowhere"), print, 0)
    assert outcome.is_too_long
    assert set(descendants(os.getpid())) <= set(before)


def test_the_child_takes_nothing_of_the_flow_run_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "1")
    monkeypatch.setenv("PREFECT_INTERNAL_LOGGING_LEVEL", "DEBUG")
    found = child.environment("http://127.0.0.1:9/api")
    assert found["PREFECT_API_URL"] == "http://127.0.0.1:9/api"
    assert {"PREFECT__FLOW_RUN_ID", "PREFECT_INTERNAL_LOGGING_LEVEL"} & set(found) == set()
    assert found.items() >= {name: value for name, value in DEFAULTS.items() if "LOGGING" in name}.items()


def test_a_flow_run_is_lost_when_its_process_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert firings.lost() == []
    killed, alive = str(uuid4()), str(uuid4())
    code = f"import os; from flows.schedule.firings import marked\nwith marked({killed!r}): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    with firings.marked(alive):
        assert firings.lost() == [killed]
    assert firings.lost() == [killed]
    with pytest.raises(KeyboardInterrupt), firings.marked(alive):
        raise KeyboardInterrupt
    assert firings.lost() == sorted([killed, alive])


def test_what_a_killed_server_has_left_is_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo" / "server.json").write_text(f'{{"pid": {os.getpid()}, "port": 4200, "database": "sqlite"}}')
    (tmp_path / "grpo" / "server.lock").touch()
    assert local.running() is None
    assert local.stop() is None
    assert not (tmp_path / "grpo" / "server.json").exists()


def test_a_taken_port_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} cannot be listened on"):
            local.start(port, None)


@pytest.mark.parametrize("url", ["mysql://host/x", "host", "sqlite"])
def test_a_database_of_another_kind_is_refused(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="expected postgresql://USER:PASSWORD@HOST/DATABASE"):
        local.start(4299, url)


LEASES = """
import asyncio, sys
from datetime import timedelta
from uuid import UUID, uuid4
from prefect.server.concurrency.lease_storage import get_concurrency_lease_storage
leases = get_concurrency_lease_storage()
if len(sys.argv) == 1:
    print(asyncio.run(leases.create_lease([uuid4()], timedelta(hours=1))).id)
else:
    print(asyncio.run(leases.read_lease(UUID(sys.argv[1]))).id)
"""


def test_who_holds_a_device_is_known_to_a_server_that_is_started_again(tmp_path: Path) -> None:
    def serve(*arguments: str) -> str:
        environment = {**os.environ, **local.environment(4200), "PREFECT_HOME": str(tmp_path)}
        command = [sys.executable, "-c", LEASES, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    lease = serve()
    assert serve(lease) == lease


def test_every_transaction_of_the_servers_sqlite_waits_for_its_turn_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.server.database.configurations import SQLITE_BEGIN_MODE, AioSqliteConfiguration

    class Session:
        @asynccontextmanager
        async def begin(self) -> AsyncIterator[str | None]:
            yield SQLITE_BEGIN_MODE.get()

    async def mode(**options: bool) -> str | None:
        config = AioSqliteConfiguration(connection_url="sqlite+aiosqlite:///:memory:")
        async with config.begin_transaction(Session(), **options) as begun:  # type: ignore[arg-type]
            return str(begun)

    monkeypatch.setattr(AioSqliteConfiguration, "begin_transaction", AioSqliteConfiguration.begin_transaction)
    assert asyncio.run(mode()) == "DEFERRED"
    local.wait_for_sqlite()
    assert asyncio.run(mode()) == asyncio.run(mode(with_for_update=False)) == "IMMEDIATE"
