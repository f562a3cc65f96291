"""Schedules without a server: what they may say, what applying a file changes, and their page."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from flows.app import build_app
from flows.cli import main
from flows.schedule.alerts import EVENTS, load_alerts, parse_alerts
from flows.schedule.client import have_limit
from flows.schedule.deployments import runs_of
from flows.schedule.diff import changes
from flows.schedule.export import prefect_yaml
from flows.schedule.spec import duration_of, load_schedules, parse_schedules, seconds_of
from pipeline.errors import ConfigError, UsageError
from tests.pages import commands_of, parse
from tests.schedules import FILE, deployed, schedule


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("15m", 900), ("6h", 21600), ("1d", 86400)])
def test_a_duration_is_a_number_with_its_unit(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds
    assert duration_of(seconds) == text


def test_equal_intervals_are_equal_settings() -> None:
    assert schedule(cron=None, every="120m") == schedule(cron=None, every="2h")
    assert schedule(cron=None, every="5s").times == "every 5s"


def test_a_fresh_run_may_have_iterations_of_its_own() -> None:
    assert schedule(action="fresh", overrides=["iterations=9"]).overrides == ["iterations=9"]


@pytest.mark.parametrize("name", ["gpu/1", "a&b", "50%"])
def test_a_device_after_which_no_limit_may_be_named_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="expected a name without / % & > <; give another one"):
        have_limit(name)


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
        ({"action": "audit", "overrides": ["seed=1"]}, "'audit' looks at what the run has recorded: leave it out"),
        ({"cron": None, "every": "1d", "timezone": "Europe/Berlin"}, "but an interval has none: leave it out"),
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


@pytest.mark.parametrize("key", ["name", "folder"])
@pytest.mark.parametrize("above", ["schedules", "alerts"])
def test_a_table_of_the_file_does_not_say_its_name_or_folder(above: str, key: str) -> None:
    parse = parse_alerts if above == "alerts" else lambda *given: parse_schedules(given[0], Path("/project"), given[1])
    with pytest.raises(ConfigError, match=rf"x.toml: {above}.a has '{key}': .*; leave it out"):
        parse({above: {"a": {key: "b"}}}, "x.toml")


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


class Pages:
    """Stands for a client of a server with so many firings, which returns at most 200 at a time."""

    def __init__(self, count: int) -> None:
        self.count = count

    def read_flow_runs(self, *, limit: int, offset: int, **_: object) -> list[int]:
        assert limit <= 200
        return list(range(self.count))[offset : offset + limit]


@pytest.mark.parametrize(("most", "expected"), [(None, 450), (20, 20), (300, 300), (1000, 450)])
def test_all_firings_of_a_schedule_are_seen_however_many_there_are(most: int | None, expected: int) -> None:
    client: Any = Pages(450)
    assert runs_of(client, None, most) == list(range(expected))


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


@pytest.mark.parametrize(
    "arguments",
    [("schedule", "list"), ("worker",), ("alert", "list"), ("alert", "add", "https://hooks.example/s3cr3t")],
)
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


PAGE = (Path(__file__).parent.parent / "docs" / "scheduling.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("line", commands_of("scheduling.md"))
def test_the_commands_of_the_page_can_be_called_like_that(line: str) -> None:
    parse(line)


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
