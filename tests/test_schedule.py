"""Schedules without a server: what they may say, when their data counts as changed, which command a firing is."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from uuid import uuid4

import polars as pl
import pytest
import typer
import yaml

from flows.app import COMMANDS, build_app
from flows.cli import main
from flows.environment import DEFAULTS
from flows.reporter import SilentReporter
from flows.rescoring import rescore_run
from flows.schedule import child, firings, local, record
from flows.schedule.actions import command
from flows.schedule.alerts import EVENTS, load_alerts
from flows.schedule.deployments import Deployed
from flows.schedule.diff import changes
from flows.schedule.export import prefect_yaml
from flows.schedule.spec import Job, Schedule, duration_of, load_schedules, parse_schedules, seconds_of
from flows.schedule.triggers import look, reason
from pipeline.config import load_toml, validate
from pipeline.errors import ArtifactDamaged, ConfigError, SourceError, UsageError
from pipeline.object_store import open_store
from pipeline.run_dir import RunDir
from tests.processes import descendants, survivors
from tests.small_run import make_small_run
from tests.stores import new_machine

DUE = datetime(2026, 11, 28, 3, 0, 5, tzinfo=UTC)
FILE = "/project/schedules.toml"


def schedule(**settings: object) -> Schedule:
    tables = {"name": "nightly", "folder": "/project", "config": "configs/demo.toml", "cron": "0 3 * * *"}
    return validate(Schedule, {**tables, **settings}, "the schedule")


def job(folder: Path, **settings: object) -> Job:
    return validate(Job, {"name": "a", "folder": str(folder), "config": "config.toml", "run": "run", **settings}, "a")


def deployed(wanted: Schedule, file: str | None = FILE, **settings: object) -> Deployed:
    return Deployed(uuid4(), {**wanted.model_dump(mode="json"), **settings}, is_paused=False, file=file)


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("15m", 900), ("6h", 21600), ("1d", 86400)])
def test_a_duration_is_a_number_with_its_unit(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds
    assert duration_of(seconds) == text


def test_equal_intervals_are_equal_settings() -> None:
    assert schedule(cron=None, every="120m") == schedule(cron=None, every="2h")
    assert schedule(cron=None, every="5s").times == "every 5s"


def test_a_fresh_run_may_have_iterations_of_its_own() -> None:
    assert schedule(action="fresh", overrides=["iterations=9"]).overrides == ["iterations=9"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cron": None}, "expected cron or every, found neither"),
        ({"every": "1h"}, "expected cron or every, found both"),
        ({"cron": None, "every": "1 h"}, "'1 h' is no duration: expected a number with its unit"),
        ({"cron": None, "every": "1s"}, "'1s' is too often: expected at least 5s"),
        ({"timezone": "Berlin"}, "'Berlin' is no time zone"),
        ({"name": "../nightly"}, "name: "),
        ({"action": "train"}, "action: "),
        ({"action": "audit", "iterations": 3}, 'iterations belong to the action "continue", found "audit"'),
        ({"overrides": ["iterations=9"]}, "use iterations"),
        ({"when": {}}, "it names no data"),
        ({"when": {"change": "a.py"}}, "did you mean changed?"),
        ({"on_overlap": "wait"}, "on_overlap: "),
        ({"iteration": 3}, "did you mean iterations?"),
        ({"folder": "project"}, "expected an absolute path"),
        ({"time_limit": "8"}, "'8' is no duration"),
    ],
)
def test_a_wrong_schedule_is_refused_with_what_to_do(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        schedule(**settings)
    assert message in str(error.value)


def test_a_file_of_schedules_says_all_that_the_command_can(tmp_path: Path) -> None:
    (tmp_path / "schedules.toml").write_text("""
[schedules.nightly]
config = "configs/demo.toml"
cron = "0 3 * * *"
timezone = "Europe/Berlin"
iterations = 5
overrides = ["update.learning_rate=2e-6"]
when = {new_rows = "data/*.parquet"}
on_overlap = "skip"

[schedules.audit]
config = "configs/demo.toml"
run = "runs/other"
every = "6h"
action = "audit"
""")
    audit, nightly = load_schedules(tmp_path / "schedules.toml")
    assert (audit.name, audit.run, audit.times) == ("audit", "runs/other", "every 6h")
    assert nightly.times == "0 3 * * * Europe/Berlin"
    assert nightly.job == {
        "name": "nightly",
        "folder": str(tmp_path),
        "config": "configs/demo.toml",
        "run": "runs/demo",
        "action": "continue",
        "iterations": 5,
        "overrides": ["update.learning_rate=2e-6"],
        "when": {"changed": [], "new_rows": ["data/*.parquet"]},
        "time_limit": None,
    }


def test_a_file_with_another_table_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"has \['schedule'\], expected tables \[schedules.NAME\] and \[alerts.NAME\] "
    ):
        parse_schedules({"schedule": {}}, Path("/project"), "schedules.toml")


def test_only_what_differs_from_the_file_is_changed() -> None:
    same, new = schedule(name="same"), schedule(name="new", cron=None, every="6h")
    changed = schedule(name="changed", cron="0 4 * * *", iterations=5)
    there = [
        deployed(same),
        deployed(changed, cron="0 3 * * *", iterations=None),
        deployed(schedule(name="gone")),
        deployed(schedule(name="by-hand"), file=None),
        deployed(schedule(name="of-another-file"), file="/other/schedules.toml"),
    ]
    found = changes([changed, new, same], there, FILE)
    assert [(change.wanted, change.there) for change in found] == [(changed, there[1]), (new, None), (None, there[2])]
    assert [change.line for change in found] == [
        '~ changed: iterations was null, will be 5; cron was "0 3 * * *", will be "0 4 * * *"',
        "+ new: continue runs/demo with configs/demo.toml, every 6h",
        "- gone: no longer in the file",
    ]


def test_a_schedule_that_was_made_elsewhere_is_not_taken_over() -> None:
    with pytest.raises(UsageError, match="the schedule nightly is there already, made by `grpo schedule add`"):
        changes([schedule()], [deployed(schedule(), file=None)], FILE)


def test_a_firing_without_a_condition_runs(tmp_path: Path) -> None:
    assert reason(job(tmp_path), {}, {}) == (True, "each firing runs")


def due(now: Job) -> tuple[bool, str]:
    """Return whether a job with a condition runs, as the flow finds out."""
    assert now.when is not None
    return reason(now, look(now.when, Path(now.folder)), record.seen(now))


def works(now: Job) -> None:
    """Do what the flow does after a command that has worked."""
    assert now.when is not None
    record.remember(now, look(now.when, Path(now.folder)), {})


def test_a_changed_file_fires_once_and_a_touched_one_never(tmp_path: Path) -> None:
    reward = tmp_path / "close.py"
    reward.write_text("one")
    fires = job(tmp_path, when={"changed": "close.py"})
    assert due(fires) == (True, "first run: no earlier one has worked")
    works(fires)
    os.utime(reward, (0, 0))
    assert due(fires) == (False, "nothing changed since the last run that worked: changed close.py")
    before = reward.stat()
    reward.write_text("two")
    os.utime(reward, ns=(before.st_atime_ns, before.st_mtime_ns))  # the times and the size say nothing
    assert due(fires) == (True, "close.py changed")
    assert due(fires) == (True, "close.py changed"), "until a run has worked"
    works(fires)
    assert due(fires)[0] is False


def test_a_new_and_a_missing_file_are_changes_too(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a")
    fires = job(tmp_path, when={"changed": "*.py"})
    works(fires)
    (tmp_path / "b.py").write_text("b")
    assert due(fires) == (True, "b.py changed")
    works(fires)
    (tmp_path / "a.py").unlink()
    assert due(fires) == (True, "a.py changed")
    (tmp_path / "b.py").unlink()
    with pytest.raises(SourceError, match=r"when.changed names \*.py, and .* has no such file"):
        due(fires)


def test_rows_are_new_by_their_content_and_not_by_their_file_name(tmp_path: Path) -> None:
    fires = job(tmp_path, when={"new_rows": "data/*.parquet"})
    data = tmp_path / "data"
    data.mkdir()
    works(fires)
    assert due(fires) == (False, "nothing changed since the last run that worked: new_rows data/*.parquet")
    pl.DataFrame({"question": ["a"]}).write_parquet(data / "one.parquet")
    pl.DataFrame({"question": pl.Series([], dtype=pl.String)}).write_parquet(data / "empty.parquet")
    assert due(fires) == (True, "new rows in data/one.parquet")
    works(fires)
    (data / "one.parquet").rename(data / "renamed.parquet")
    assert due(fires)[0] is False
    (data / "renamed.parquet").unlink()
    assert due(fires)[0] is False, "rows that go are not new"
    pl.DataFrame({"question": ["b"]}).write_parquet(data / "two.parquet")
    assert due(fires) == (True, "new rows in data/two.parquet")


def test_files_of_all_folders_and_of_the_home_are_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    files = [tmp_path / "code" / "very" / "deep" / f"{name}.py" for name in "abcd"] + [tmp_path / "home" / "mine.py"]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("one")
    fires = job(tmp_path, when={"changed": ["code/**/*.py", "~/mine.py"]})
    works(fires)
    for file in files:
        file.write_text("two")
    four = "code/very/deep/a.py, code/very/deep/b.py, code/very/deep/c.py and 1 more changed"
    assert due(fires) == (True, f"{four}; {files[-1]} changed")


def test_one_of_several_conditions_is_enough_and_a_new_condition_counts(tmp_path: Path) -> None:
    (tmp_path / "close.py").write_text("one")
    works(job(tmp_path, when={"changed": "close.py"}))
    both = job(tmp_path, when={"changed": "close.py", "new_rows": "*.jsonl"})
    assert due(both) == (True, "new condition: new_rows *.jsonl")
    works(both)
    (tmp_path / "empty.jsonl").touch()
    assert due(both)[0] is False
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert due(both) == (True, "new rows in rows.jsonl")


def test_rows_on_a_store_are_watched_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_machine(tmp_path / "work", monkeypatch)
    url = f"memory://bucket/{tmp_path.name}"
    fires = job(tmp_path, when={"new_rows": f"{url}/*.jsonl"})
    open_store(url).write("one.jsonl", b"{}\n")
    works(fires)
    open_store(url).write("other.txt", b"x")
    open_store(f"{url}/deep").write("two.jsonl", b"{}\n{}\n{}\n")
    assert due(fires)[0] is False
    open_store(url).write("two.jsonl", b"{}\n{}\n")
    assert due(fires) == (True, f"new rows in {url}/two.jsonl")
    with pytest.raises(SourceError, match="has a wildcard in a folder's name"):
        due(job(tmp_path, when={"new_rows": "memory://bucket/*/rows.jsonl"}))


def test_the_record_is_next_to_the_run_and_a_damaged_one_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "close.py").write_text("one")
    fires = job(tmp_path, run="runs/demo", when={"changed": "close.py"})
    works(fires)
    path = tmp_path / "runs" / ".schedules" / "a.json"
    assert path.is_file()
    for text in ('{"data": 1}', '{"data": {"changed close.py": 1}}'):
        path.write_text(text)
        with pytest.raises(ArtifactDamaged, match="delete it, and the schedule runs once as if its data were new"):
            due(fires)


def test_the_record_of_a_run_on_a_store_is_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    log = record.log_path(job(tmp_path, run="s3://bucket/runs/demo"))
    assert log == tmp_path / "state" / "grpo" / ".schedules" / "a.log"


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


def test_a_prefect_yaml_has_each_schedule_as_a_deployment() -> None:
    text = prefect_yaml([schedule(on_overlap="skip", timezone="Europe/Berlin"), schedule(cron=None, every="6h")])
    first, second = yaml.safe_load(text)["deployments"]
    assert first["entrypoint"] == "flows.schedule.scheduled:scheduled"
    assert first["pull"] == [{"prefect.deployments.steps.set_working_directory": {"directory": "/project"}}]
    assert first["schedules"] == [{"cron": "0 3 * * *", "timezone": "Europe/Berlin"}]
    assert first["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
    assert first["parameters"]["config"] == "configs/demo.toml"
    assert "time_limit" not in first["parameters"]
    assert first["work_pool"] == {"name": "grpo"}
    assert second["schedules"] == [{"interval": 21600, "anchor_date": "2020-01-01T00:00:00+00:00"}]
    assert second["concurrency_limit"]["collision_strategy"] == "ENQUEUE"


@pytest.mark.parametrize("arguments", [("schedule", "list"), ("worker",)])
def test_without_a_server_a_command_says_how_to_start_one(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(sys, "argv", ["grpo", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "error: no Prefect server runs here: start one with `grpo server start`, or name yours in PREFECT_API_URL\n"
    )


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


PAGE = (Path(__file__).parent.parent / "docs" / "scheduling.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("line", re.findall(r"^    \$ grpo (.*)$", PAGE, re.MULTILINE))
def test_the_commands_of_the_page_can_be_called_like_that(line: str) -> None:
    words = shlex.split(line)
    command: Any = typer.main.get_command(build_app(COMMANDS))
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context(line, words)


def test_the_file_of_the_page_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "schedules.toml").write_text(re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)[0])
    assert [each.name for each in load_schedules(tmp_path / "schedules.toml")] == ["fed", "nightly", "rewards"]
    assert [(each.name, each.on) for each in load_alerts(tmp_path / "schedules.toml")] == [
        ("ops", ["check.failed", "flow.crashed"])
    ]


@pytest.mark.parametrize("group", ["schedule", "alert"])
def test_the_page_names_every_command_of_schedules_and_alerts(group: str) -> None:
    found: Any = typer.main.get_command(build_app([group]))
    assert [name for name in found.commands[group].commands if f"$ grpo {group} {name}" not in PAGE] == []


def test_the_page_names_every_event_of_alerts() -> None:
    assert [name for name in EVENTS if f"| `{name}` |" not in PAGE] == []
