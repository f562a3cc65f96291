"""What a schedule is: which config, when, and what a firing does. Read from the command line or from schedules.toml."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pipeline.config import Place, StrictModel, load_toml, validate
from pipeline.errors import ConfigError

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
"""Unit of a duration -> seconds."""
SHORTEST_SECONDS = 5
"""Prefect's scheduler looks for due runs every few seconds."""
TABLE = "schedules"
"""Of schedules.toml: one table below it for each schedule, under its name."""
ALERTS = "alerts"
"""Of schedules.toml: one table below it for each alert, see `flows.schedule.alerts`."""


def seconds_of(duration: str) -> int:
    """Return the seconds of a duration such as 30s, 15m, 6h or 1d.

    Raises:
        ValueError: when it is none.
    """
    if not (found := re.fullmatch(r"([1-9]\d{0,8})([smhd])", duration)):
        raise ValueError(f"{duration!r} is no duration: expected a number with its unit, as in 30s, 15m, 6h, 1d")
    return int(found[1]) * UNITS[found[2]]


def duration_of(seconds: int) -> str:
    """Return seconds in the largest unit that holds a whole number of them."""
    unit = next(name for name, size in reversed(UNITS.items()) if seconds % size == 0)
    return f"{seconds // UNITS[unit]}{unit}"


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Patterns = Annotated[list[Place], BeforeValidator(_listed)]
"""Paths or URLs; ``*`` stands for any part of a file's name, ``**`` for any folders of a local path."""


class When(StrictModel):
    """Data that must have changed since the last run that worked; one of the two is enough."""

    changed: Patterns = Field(default_factory=list)
    """Files whose content decides: any other content, a new or a missing one."""
    new_rows: Patterns = Field(default_factory=list)
    """Files of rows: one with a content that was not there before, and at least one row."""

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if not self.changed and not self.new_rows:
            raise ValueError('it names no data: expected changed = "FILE" or new_rows = "FILES"; add one of them')
        return self


Action = Literal["continue", "fresh", "rescore", "audit", "verify"]


class Job(StrictModel):
    """What a firing does; the parameters of the flow `scheduled`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Letters, digits, dots, dashes and underscores."""
    folder: Place
    """Where relative paths of the schedule and its config begin; absolute."""
    config: Place
    """The TOML file of the run."""
    run: Place
    """Directory or URL of the run. A fresh run's name begins with it."""
    action: Action = "continue"
    iterations: int | None = Field(None, ge=1)
    """How many more iterations a firing runs; null = those of the config. Of ``continue`` only."""
    overrides: list[str] = Field(default_factory=list)
    """``key=value`` settings that take precedence over the config."""
    when: When | None = None
    """Data that must have changed; null = every firing runs."""
    time_limit: str | None = None
    """A command that takes longer is ended, and the same command continues at the next firing; null = no limit."""

    @field_validator("time_limit")
    @classmethod
    def _is_duration(cls, text: str | None) -> str | None:
        return None if text is None else duration_of(seconds_of(text))

    @model_validator(mode="before")
    @classmethod
    def _named_after_config(cls, tables: Any) -> Any:
        """Let the run be named after the config, as `grpo run` does."""
        if isinstance(tables, dict) and isinstance(tables.get("config"), str) and tables.get("run") is None:
            return {**tables, "run": f"runs/{Path(tables['config']).stem}"}
        return tables

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if not Path(self.folder).is_absolute():
            raise ValueError(f"folder is {self.folder!r}: expected an absolute path")
        if self.iterations is not None and self.action != "continue":
            raise ValueError(
                f'iterations belong to the action "continue", found "{self.action}": leave them out, or override the '
                "setting of the config (iterations=N)"
            )
        if self.overrides and self.action in ("audit", "verify"):
            raise ValueError(
                f"overrides has {self.overrides[0]!r}, but {self.action!r} looks at what the run has recorded: leave "
                "it out"
            )
        own = [text for text in self.overrides if text.partition("=")[0].strip() == "iterations"]
        if own and self.action == "continue":
            raise ValueError(f'overrides has {own[0]!r}, but "continue" counts on from what is there: use iterations')
        return self


class Schedule(Job):
    """A job with its times."""

    cron: str | None = None
    """Minute, hour, day, month, weekday: ``0 3 * * *`` is every night at three."""
    every: str | None = None
    """An interval: 30s, 15m, 6h, 1d."""
    timezone: str = "UTC"
    """Of ``cron``: a name such as Europe/Berlin."""
    on_overlap: Literal["queue", "skip"] = "queue"
    """What becomes of a firing while the last one still runs."""

    @field_validator("every")
    @classmethod
    def _is_interval(cls, text: str | None) -> str | None:
        if text is not None and seconds_of(text) < SHORTEST_SECONDS:
            raise ValueError(f"{text!r} is too often: expected at least {SHORTEST_SECONDS}s")
        return None if text is None else duration_of(seconds_of(text))

    @field_validator("timezone")
    @classmethod
    def _is_known(cls, name: str) -> str:
        from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f"{name!r} is no time zone: expected a name such as Europe/Berlin or UTC") from None
        return name

    @model_validator(mode="after")
    def _has_one_time(self) -> Self:
        if (self.cron is None) == (self.every is None):
            found = "neither" if self.cron is None else "both"
            raise ValueError(f"expected cron or every, found {found}: give one of them")
        if self.every is not None and self.timezone != "UTC":
            raise ValueError(f"timezone is {self.timezone!r}, but an interval has none: leave it out, or give cron")
        return self

    @property
    def job(self) -> dict[str, Any]:
        """The parameters of the flow."""
        return self.model_dump(mode="json", include=set(Job.model_fields))

    @property
    def times(self) -> str:
        """When it fires, for people."""
        return f"every {self.every}" if self.every else f"{self.cron} {self.timezone}"

    @property
    def summary(self) -> str:
        """What it does, for people."""
        return f"{self.action} {self.run} with {self.config}, {self.times}"


def parse_schedules(tables: Mapping[str, Any], folder: Path, source: str) -> list[Schedule]:
    """Return the schedules of the tables of a schedules.toml, by name; ``folder`` is where its relative paths begin.

    Raises:
        ConfigError: naming the schedule, the key and what to do.
    """
    odd = sorted(set(tables) - {TABLE, ALERTS})
    found = tables.get(TABLE, {})
    if odd or not isinstance(found, dict) or not all(isinstance(table, dict) for table in found.values()):
        raise ConfigError(
            f"{source} has {odd or TABLE}, expected tables [{TABLE}.NAME] and [{ALERTS}.NAME] alone: correct the names"
        )
    check_named_by_table(found, TABLE, source)
    return [
        validate(Schedule, {"name": name, "folder": str(folder), **found[name]}, f"{source}: {TABLE}.{name}")
        for name in sorted(found)
    ]


def check_named_by_table(found: Mapping[str, Mapping[str, Any]], above: str, source: str) -> None:
    """Check that no table says its name or folder itself.

    Raises:
        ConfigError: when one does.
    """
    for table, key in ((table, key) for table in sorted(found) for key in ("name", "folder") if key in found[table]):
        said = "its name is that of the table" if key == "name" else "relative paths begin where the file is"
        raise ConfigError(f"{source}: {above}.{table} has {key!r}: {said}; leave it out")


def load_schedules(path: Path) -> list[Schedule]:
    """Return the schedules of a file, by name; relative paths begin where the file is. Read-only.

    Raises:
        ConfigError: when the file or a schedule of it is wrong.
    """
    return parse_schedules(load_toml(path), Path.cwd() / path.parent, str(path))
