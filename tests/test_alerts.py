"""Alerts without a server: what they may say, what is shown of a secret, which automations they are."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.events import Automation, AutomationCore
from prefect.server.events.schemas.automations import Automation as Stored

from flows import events
from flows.schedule.alerts import Alert, load_alerts, named_after_host, parse_alerts, shown
from flows.schedule.automations import (
    PAYLOAD,
    DeployedAlert,
    alerting,
    ending_the_dead,
    have_the_dead_ended,
    send_test,
)
from flows.schedule.diff import changes
from flows.watching import HEARTBEAT_SECONDS
from pipeline.config import validate
from pipeline.errors import ConfigError, UsageError

SECRET = "T0123/B456/s3cr3t"
URL = f"https://me:pass@hooks.example:8443/services/{SECRET}?key=s3cr3t"
FILE = "/project/schedules.toml"


def alert(**settings: object) -> Alert:
    return validate(Alert, {"name": "ops", "webhook": URL, **settings}, "the alert")


def deployed(wanted: Alert, file: str | None = FILE, **settings: object) -> DeployedAlert:
    return DeployedAlert(uuid4(), uuid4(), {**wanted.model_dump(mode="json"), **settings}, is_enabled=True, file=file)


def test_an_alert_is_of_all_that_needs_somebody_unless_it_says_what() -> None:
    assert alert().on == ["check.failed", "reward.collapsed", "verify.failed", "flow.failed", "flow.crashed"]
    assert alert(on=["flow.crashed", "iteration.finished", "flow.crashed"]).on == ["iteration.finished", "flow.crashed"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"webhook": "s3cr3t"}, "webhook: it is no address: expected https://HOST/PATH"),
        ({"webhook": "ftp://hooks.example/s3cr3t"}, "webhook: it is no address"),
        ({"webhook": "https:///s3cr3t"}, "webhook: it is no address"),
        ({"webhook": "https://[s3cr3t"}, "webhook: it is no address"),
        ({"webhook": "https://hooks.example:port/s3cr3t"}, "webhook: it is no address"),
        ({"webhook": "https://hooks.example:99999/s3cr3t"}, "webhook: it is no address"),
        ({"webhook": "https://hooks.example/s3cr3t\n"}, "webhook: it is no address"),
        ({"webhook": " https://hooks.example/s3cr3t"}, "webhook: it is no address"),
        ({"on": ["check.fails"]}, "on.0: Input should be 'iteration.finished', 'check.failed'"),
        ({"on": []}, "on: List should have at least 1 item"),
        ({"name": "Ops"}, "name: "),
        ({"when": "always"}, "when: unknown key"),
    ],
)
def test_a_wrong_alert_is_refused_without_its_secret(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        alert(**settings)
    assert message in str(error.value)
    assert "s3cr3t" not in str(error.value)


def test_of_an_address_the_host_is_shown() -> None:
    assert shown(URL) == "https://hooks.example/..."
    assert shown("https://me:s3cr3t@[::1]:80/s3cr3t") == "https://[::1]/..."
    assert shown("https://[s3cr3t") == "no address"
    assert alert(on=["check.failed"]).summary == "https://hooks.example/... on check.failed"
    assert "s3cr3t" not in repr(alert())
    assert alerting(alert(), uuid4()).description == alert().summary


@pytest.mark.parametrize(
    ("url", "name"),
    [(URL, "hooks-example"), ("http://127.0.0.1:8/x", "127-0-0-1"), ("https://[x", "alert"), ("hooks", "alert")],
)
def test_an_alert_is_named_after_the_host(url: str, name: str) -> None:
    assert named_after_host(url) == name


def test_a_file_of_schedules_has_alerts_too(tmp_path: Path) -> None:
    (tmp_path / "schedules.toml").write_text(f'[alerts.ops]\nwebhook = "{URL}"\non = ["check.failed"]\n')
    assert load_alerts(tmp_path / "schedules.toml") == [alert(on=["check.failed"])]
    assert parse_alerts({"schedules": {}}, "schedules.toml") == []
    with pytest.raises(ConfigError, match=r"expected tables \[alerts.NAME\]"):
        parse_alerts({"alerts": {"webhook": URL}}, "schedules.toml")


def test_only_what_differs_from_the_file_is_changed_and_no_secret_is_shown() -> None:
    same, new = alert(name="same"), alert(name="new", on=["check.failed"])
    moved, less = alert(name="moved"), alert(name="less", on=["check.failed"])
    there = [
        deployed(same),
        deployed(moved, webhook=f"https://hooks.example/old-{SECRET}"),
        deployed(less, on=["flow.failed"]),
        deployed(alert(name="gone")),
        deployed(alert(name="by-hand"), file=None),
    ]
    assert [change.line for change in changes([less, moved, new, same], there, FILE, "alert")] == [
        '~ alert less: on was ["flow.failed"], will be ["check.failed"]',
        "~ alert moved: webhook will be another one: https://hooks.example/...",
        "+ alert new: https://hooks.example/... on check.failed",
        "- alert gone: no longer in the file",
    ]


def test_an_alert_that_was_made_elsewhere_is_not_taken_over() -> None:
    with pytest.raises(UsageError, match="the alert ops is there already, made by `grpo alert add`: rename it"):
        changes([alert()], [deployed(alert(), file=None)], FILE, "alert")


def test_an_alert_is_an_automation_that_calls_its_webhook_at_each_event() -> None:
    block = uuid4()
    automation = alerting(alert(on=["check.failed", "flow.crashed"]), block, FILE).model_dump(mode="json")
    trigger, (action,) = automation["trigger"], automation["actions"]
    assert (automation["name"], automation["tags"]) == ("grpo alert: ops", ["grpo", f"file:{FILE}"])
    assert sorted(trigger["expect"]) == ["grpo.alert.test", "grpo.check.failed", "prefect.flow-run.Crashed"]
    assert (trigger["posture"], trigger["threshold"], trigger["within"]) == ("Reactive", 1, 0.0)
    assert trigger["match"] == {"prefect.resource.id": ["grpo.run.*", "prefect.flow-run.*", "grpo.alert.ops"]}
    assert {"train", "scheduled"} <= set(trigger["match_related"]["prefect.resource.name"])
    assert (action["type"], action["block_document_id"]) == ("call-webhook", str(block))


def test_a_flow_run_has_died_when_three_heartbeats_in_a_row_are_missing() -> None:
    automation = ending_the_dead()
    trigger: Any = automation.trigger
    assert trigger.after == {events.HEARTBEAT}
    assert trigger.expect == {events.HEARTBEAT, events.ENDED}
    assert (trigger.posture.value, trigger.for_each) == ("Proactive", {"prefect.resource.id"})
    assert timedelta(seconds=3 * HEARTBEAT_SECONDS) < trigger.within <= timedelta(seconds=120)
    (action,) = automation.model_dump(mode="json")["actions"]
    assert (action["type"], action["state"], action["force"]) == ("change-flow-run-state", "CRASHED", False)


class Server:
    """Keeps automations as Prefect's server does: each time that one is put, its trigger begins anew."""

    def __init__(self) -> None:
        self.kept: list[Automation] = []
        self.triggers: list[UUID] = []

    def read_automations_by_name(self, name: str) -> list[Automation]:
        return [automation for automation in self.kept if automation.name == name]

    def create_automation(self, automation: AutomationCore) -> None:
        put = Stored.model_validate({**automation.model_dump(mode="json"), "id": str(uuid4())})
        self.triggers.append(put.trigger.id)
        self.kept = [Automation.model_validate(put.model_dump(mode="json"))]

    def update_automation(self, _: UUID, automation: AutomationCore) -> None:
        self.create_automation(automation)


def test_heartbeats_that_are_waited_for_are_not_forgotten_when_a_worker_starts() -> None:
    server: Any = Server()
    have_the_dead_ended(server)
    have_the_dead_ended(server)
    assert len(server.triggers) == 1
    changed = server.kept[0].model_copy(update={"enabled": False, "description": "of an earlier version"})
    server.kept = [changed]
    have_the_dead_ended(server)
    assert len(server.triggers) == 2
    assert (server.kept[0].enabled, server.kept[0].description) == (False, ending_the_dead().description)


def test_an_alert_that_is_switched_off_is_not_tried() -> None:
    there = replace(deployed(alert()), is_enabled=False)
    with httpx.Client() as client, pytest.raises(UsageError, match="the alert ops is switched off"):
        send_test(client, there)  # type: ignore[arg-type]  # it asks nobody


def rendered(event: dict[str, Any]) -> dict[str, Any]:
    """Return what a webhook is sent for an event, as Prefect's server renders it."""
    from prefect.server.utilities.user_templates import render_user_template_sync, validate_user_template

    validate_user_template(PAYLOAD)
    found: dict[str, Any] = json.loads(render_user_template_sync(PAYLOAD, {"event": event}))
    return found


def test_a_webhook_is_sent_the_run_the_iteration_and_a_text_whatever_they_hold() -> None:
    message = "check 'a' has failed: {{ 1 }} \"quoted\"\n</script>"
    payload = {"run": "demo", "iteration": 0, "message": message, "failed_ids": ["c1"]}
    resource = {"prefect.resource.id": "grpo.run.demo", "prefect.resource.name": "demo"}
    occurred = datetime(2026, 11, 28, tzinfo=UTC)
    event = {"id": "e", "event": events.CHECK_FAILED, "resource": resource, "payload": payload, "occurred": occurred}
    assert rendered(event) == {
        "text": f"demo: {message}",
        "id": "e",
        "event": "grpo.check.failed",
        "run": "demo",
        "iteration": 0,
        "message": message,
        "occurred": "2026-11-28 00:00:00+00:00",
        "details": payload,
    }


def test_a_webhook_is_sent_how_a_flow_run_ended() -> None:
    resource = {
        "prefect.resource.id": "prefect.flow-run.1",
        "prefect.resource.name": "demo 0-9",
        "prefect.state-name": "Crashed",
        "prefect.state-message": "killed",
    }
    sent = rendered({"event": "prefect.flow-run.Crashed", "resource": resource, "payload": {"validated_state": {}}})
    assert (sent["text"], sent["run"]) == ("flow run demo 0-9: Crashed: killed", "demo 0-9")
    assert (sent["iteration"], sent["details"]) == (None, {})
