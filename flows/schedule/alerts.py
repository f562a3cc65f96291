"""What an alert is: which webhook is called, and of which events. From the command line or from schedules.toml."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from flows import events
from flows.schedule.spec import ALERTS, TABLE, check_named_by_table
from pipeline.config import StrictModel, load_toml, validate
from pipeline.errors import ConfigError

Event = Literal[
    "iteration.finished", "check.failed", "reward.collapsed", "verify.failed", "flow.failed", "flow.crashed"
]
EVENTS: dict[str, str] = {
    "iteration.finished": events.ITERATION_FINISHED,
    "check.failed": events.CHECK_FAILED,
    "reward.collapsed": events.REWARD_COLLAPSED,
    "verify.failed": events.VERIFY_FAILED,
    "flow.failed": "prefect.flow-run.Failed",
    "flow.crashed": "prefect.flow-run.Crashed",
}
"""Event, as a user names it -> as Prefect does."""
USUAL: tuple[Event, ...] = ("check.failed", "reward.collapsed", "verify.failed", "flow.failed", "flow.crashed")


class Alert(StrictModel):
    """A webhook that Prefect's server calls when something happens."""

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,48}[a-z0-9])?$")
    """Lowercase letters, digits and dashes."""
    webhook: str = Field(repr=False)
    """URL that is sent JSON; it may hold a secret."""
    on: list[Event] = Field(default_factory=lambda: list(USUAL), min_length=1)
    """What it is called for; ``flow.failed`` and ``flow.crashed`` are of this program's flows alone."""

    @field_validator("webhook")
    @classmethod
    def _is_url(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0  # port may raise
            is_url = is_url and url.isprintable() and " " not in url
        except ValueError:
            is_url = False
        if not is_url:
            raise ValueError("it is no address: expected https://HOST/PATH, as the receiver gave it to you")
        return url

    @field_validator("on")
    @classmethod
    def _is_sorted(cls, names: list[Event]) -> list[Event]:
        return [name for name in get_args(Event) if name in names]

    @property
    def summary(self) -> str:
        """What it does, for people."""
        return f"{shown(self.webhook)} on {', '.join(self.on)}"


def shown(url: str) -> str:
    """Return a webhook's URL for people: without what may be secret, user, port, path and query."""
    try:
        parts = urlsplit(url)
    except ValueError:  # somebody has changed it elsewhere
        return "no address"
    host = parts.hostname or ""
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}/..."


def named_after_host(url: str) -> str:
    """Return the usual name of an alert: the host of its webhook, or "alert" for what is no URL."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        host = ""
    return re.sub("[^a-z0-9]+", "-", host.lower()).strip("-")[:50].strip("-") or "alert"


def load_alerts(path: Path) -> list[Alert]:
    """Return the alerts of a schedules.toml, by name. Read-only.

    Raises:
        ConfigError: when the file or an alert of it is wrong.
    """
    return parse_alerts(load_toml(path), str(path))


def parse_alerts(tables: Mapping[str, Any], source: str) -> list[Alert]:
    """Return the alerts of the tables of a schedules.toml, by name.

    Raises:
        ConfigError: naming the alert, the key and what to do.
    """
    found = tables.get(ALERTS, {})
    if not isinstance(found, dict) or not all(isinstance(table, dict) for table in found.values()):
        raise ConfigError(f"{source} has {ALERTS}, expected tables [{ALERTS}.NAME] beside [{TABLE}.NAME]: correct it")
    check_named_by_table(found, ALERTS, source)
    return [validate(Alert, {"name": name, **found[name]}, f"{source}: {ALERTS}.{name}") for name in sorted(found)]
