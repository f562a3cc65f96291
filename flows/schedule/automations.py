"""Automations on a Prefect server: what calls the webhooks of alerts, and what ends flow runs that have died."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

from flows import events
from flows.schedule.alerts import EVENTS, Alert
from flows.schedule.deployments import FILE_TAG, FLOW, MOST, TAG
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events import Automation, AutomationCore

ALERT = "grpo alert: "
"""Beginning of the name of an alert's automation."""
DIED = "grpo: flow runs that died"
"""Name of the automation that marks flow runs whose heartbeat stays away."""
SILENT_SECONDS = 100
"""After so long without a heartbeat a flow run has died; there are three in that time."""
FLOWS = ("train", "rescore", "audit", "evaluate", FLOW)
"""Names of this program's flows."""
TEST = "grpo alert test"
"""In the place of a flow's name in a test's event."""
PAYLOAD = """\
{%- set own = event.payload.message is defined -%}
{%- set name = event.resource['prefect.resource.name'] -%}
{%- set state = event.resource['prefect.state-name'] -%}
{%- set said = event.resource['prefect.state-message'] -%}
{%- set message = event.payload.message if own else ('flow run ' ~ name ~ ': ' ~ state ~ ': ' ~ said) -%}
{%- set run = event.payload.run if own else name -%}
{
  "text": {{ ((run ~ ': ' ~ message) if own else message) | tojson }},
  "id": {{ (event.id | string) | tojson }},
  "event": {{ event.event | tojson }},
  "run": {{ run | tojson }},
  "iteration": {{ (event.payload.iteration if event.payload.iteration is defined else none) | tojson }},
  "message": {{ message | tojson }},
  "occurred": {{ (event.occurred | string) | tojson }},
  "details": {{ (event.payload if own else {}) | tojson }}
}
"""
"""What a webhook is sent. Chats such as Slack and Mattermost show ``text``; a busy server may send one ``id`` twice."""


@dataclass(frozen=True, slots=True)
class DeployedAlert:
    """An alert as the server has it."""

    id: UUID
    block: UUID
    settings: dict[str, Any]
    """Those of `Alert`, as JSON; whatever somebody made of them elsewhere."""
    is_enabled: bool
    file: str | None
    """The schedules.toml that it came from."""

    @property
    def name(self) -> str:
        return str(self.settings["name"])


def alerting(alert: Alert, block: UUID, file: str | None = None) -> "AutomationCore":
    """Return the automation of an alert, whose webhook is a block of the server."""
    from prefect.events import AutomationCore, EventTrigger
    from prefect.events.actions import CallWebhook
    from prefect.events.schemas.automations import Posture

    return AutomationCore(
        name=f"{ALERT}{alert.name}",
        description=alert.summary,
        tags=[TAG, *([f"{FILE_TAG}{file}"] if file else [])],
        enabled=True,
        trigger=EventTrigger(
            expect={*(EVENTS[name] for name in alert.on), events.ALERT_TEST},
            match={"prefect.resource.id": ["grpo.run.*", "prefect.flow-run.*", f"grpo.alert.{alert.name}"]},
            match_related={"prefect.resource.role": "flow", "prefect.resource.name": [*FLOWS, TEST]},
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(0),
        ),
        actions=[CallWebhook(block_document_id=block, payload=PAYLOAD)],
    )


def ending_the_dead() -> "AutomationCore":
    """Return the automation that marks a flow run Crashed whose process says no more that it is alive."""
    from prefect.client.schemas.objects import StateType
    from prefect.events import AutomationCore, EventTrigger
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import Posture

    return AutomationCore(
        name=DIED,
        description=f"Marks a flow run as Crashed after {SILENT_SECONDS} s without its heartbeat.",
        tags=[TAG],
        enabled=True,
        trigger=EventTrigger(
            after={events.HEARTBEAT},
            expect={events.HEARTBEAT, events.ENDED},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=SILENT_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                name="Crashed",
                message=f"its process has given no sign of life for {SILENT_SECONDS} s",
            )
        ],
    )


def have_the_dead_ended(client: "SyncPrefectClient") -> None:
    """Create the automation that marks flow runs that died, or bring it up to date; switched off, it stays so.

    One that is up to date is left alone: the server forgets with each update which heartbeats it waits for.
    """
    wanted, there = ending_the_dead(), next(iter(client.read_automations_by_name(DIED)), None)
    if there is None:
        client.create_automation(wanted)
        return
    wanted = wanted.model_copy(update={"enabled": there.enabled})
    if there.model_dump(include=set(type(wanted).model_fields)) != wanted.model_dump():
        client.update_automation(there.id, wanted)


def read_all(client: "SyncPrefectClient") -> list[DeployedAlert]:
    """Return the alerts of the server, by name. Read-only."""
    found: list[Automation] = []
    while len(page := client.read_automations(limit=MOST, offset=len(found))) == MOST:
        found += page
    alerts = [_deployed(client, automation) for automation in [*found, *page] if automation.name.startswith(ALERT)]
    return sorted(alerts, key=lambda alert: alert.name)


def read(client: "SyncPrefectClient", name: str) -> DeployedAlert:
    """Return an alert. Read-only.

    Raises:
        UsageError: when there is none of that name.
    """
    there = read_all(client)
    for alert in there:
        if alert.name == name:
            return alert
    names = ", ".join(alert.name for alert in there) or "none"
    raise UsageError(f"there is no alert {name!r} on this server, there are: {names}; see `grpo alert list`")


def _deployed(client: "SyncPrefectClient", automation: "Automation") -> DeployedAlert:
    from prefect.exceptions import ObjectNotFound

    block = getattr(automation.actions[0], "block_document_id", UUID(int=0))
    try:
        url = client.read_block_document(block, include_secrets=True).data.get("url")
    except ObjectNotFound:  # somebody has deleted it
        url = None
    names = {prefects: ours for ours, prefects in EVENTS.items()}
    expected: set[str] = getattr(automation.trigger, "expect", set())
    settings = {
        "name": automation.name.removeprefix(ALERT),
        "webhook": url,
        "on": [ours for prefects, ours in names.items() if prefects in expected],
    }
    files = [tag.removeprefix(FILE_TAG) for tag in automation.tags if tag.startswith(FILE_TAG)]
    return DeployedAlert(automation.id, block, settings, automation.enabled, files[0] if files else None)


def put(
    client: "SyncPrefectClient", alert: Alert, *, file: str | None = None, replaced: DeployedAlert | None = None
) -> None:
    """Create an alert on the server, or give the one that it replaces other settings; one switched off stays so."""
    from prefect.blocks.webhook import Webhook
    from prefect.types import SecretDict

    webhook = Webhook(url=alert.webhook, headers=SecretDict({"Content-Type": "application/json"}))
    block = cast(UUID, webhook.save(f"grpo-alert-{alert.name}", overwrite=True))
    wanted = alerting(alert, block, file)
    if replaced is None:
        client.create_automation(wanted)
    else:
        client.update_automation(replaced.id, wanted.model_copy(update={"enabled": replaced.is_enabled}))


def remove(client: "SyncPrefectClient", alert: DeployedAlert) -> None:
    """Remove an alert and its webhook."""
    from prefect.exceptions import ObjectNotFound

    client.delete_automation(alert.id)
    try:
        client.delete_block_document(alert.block)
    except ObjectNotFound:
        return


def send_test(client: "SyncPrefectClient", alert: DeployedAlert) -> datetime:
    """Send the event that this alert alone is tested with; return when.

    Raises:
        UsageError: when the alert is switched off.
    """
    from prefect.events import Event, RelatedResource, Resource

    if not alert.is_enabled:
        raise UsageError(
            f"the alert {alert.name} is switched off, so the server calls no webhook for it: switch it on under "
            "Automations on Prefect's page"
        )
    event = Event(
        occurred=datetime.now(UTC),
        event=events.ALERT_TEST,
        resource=Resource({"prefect.resource.id": f"grpo.alert.{alert.name}", "prefect.resource.name": alert.name}),
        related=[
            RelatedResource(
                {"prefect.resource.id": ALERT, "prefect.resource.role": "flow", "prefect.resource.name": TEST}
            )
        ],
        payload={"run": "test", "message": f"this is a test of the alert {alert.name}"},
    )
    client.request("POST", "/events", json=[event.model_dump(mode="json")])
    return event.occurred


def answer_since(client: "SyncPrefectClient", alert: DeployedAlert, since: datetime) -> tuple[bool, str] | None:
    """Return whether the webhook has taken what it was sent, and what it said; None before it was called. Read-only."""
    from prefect.events.filters import EventFilter, EventNameFilter, EventOccurredFilter, EventResourceFilter

    wanted = EventFilter(
        occurred=EventOccurredFilter(since=since),
        event=EventNameFilter(prefix=["prefect.automation.action.executed", "prefect.automation.action.failed"]),
        resource=EventResourceFilter(id=[f"prefect.automation.{alert.id}"]),
    )
    found = client.read_events(wanted, limit=1).events
    if not found:
        return None
    code = found[0].payload.get("status_code")
    if code is None:
        return False, str(found[0].payload.get("reason"))
    return 200 <= int(code) < 300, f"it answered {code}"
