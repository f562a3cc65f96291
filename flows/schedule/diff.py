"""What `grpo schedule apply` would change on the server: computed first, shown, then done."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from flows.schedule.alerts import Alert, shown
from flows.schedule.spec import Schedule
from pipeline.errors import UsageError

W = TypeVar("W", bound=Schedule | Alert)


class Deployed(Protocol):
    """What the server has."""

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...

    @property
    def file(self) -> str | None: ...


D = TypeVar("D", bound=Deployed)


@dataclass(frozen=True, slots=True)
class Change(Generic[W, D]):
    """One schedule, or alert, that is to be put or removed."""

    line: str
    """For the user; begins with ``+`` for a new one, ``~`` for a changed one, ``-`` for one that goes."""
    wanted: W | None
    """None = it goes."""
    there: D | None
    """None = it is new."""


def changes(wanted: Sequence[W], there: Collection[D], file: str, kind: str = "schedule") -> list[Change[W, D]]:
    """Return what makes the server's schedules, or alerts, of a file equal to the file; others stay as they are.

    Raises:
        UsageError: when one of that name was made elsewhere.
    """
    by_name = {deployed.name: deployed for deployed in there}
    taken = [w.name for w in wanted if w.name in by_name and by_name[w.name].file != file]
    if taken:
        where = by_name[taken[0]].file or f"`grpo {kind} add`"
        raise UsageError(
            f"the {kind} {taken[0]} is there already, made by {where}: rename it in {file}, or remove that one first "
            f"(grpo {kind} remove {taken[0]})"
        )
    found: list[Change[W, D]] = []
    prefix = "" if kind == "schedule" else f"{kind} "
    for each in wanted:
        deployed = by_name.get(each.name)
        differences = _differences(each, deployed)
        if deployed is None:
            found.append(Change(f"+ {prefix}{each.name}: {each.summary}", each, None))
        elif differences:
            found.append(Change(f"~ {prefix}{each.name}: {'; '.join(differences)}", each, deployed))
    names = {each.name for each in wanted}
    gone = [deployed for deployed in there if deployed.file == file and deployed.name not in names]
    return [*found, *(Change(f"- {prefix}{deployed.name}: no longer in the file", None, deployed) for deployed in gone)]


def _differences(wanted: Schedule | Alert, deployed: Deployed | None) -> list[str]:
    if deployed is None:
        return []
    now, before = wanted.model_dump(mode="json"), deployed.settings
    return [_difference(name, before.get(name), now[name]) for name in now if before.get(name) != now[name]]


def _difference(name: str, before: Any, now: Any) -> str:
    if name == "webhook":  # it may hold a secret
        return f"webhook will be another one: {shown(now)}"
    return f"{name} was {json.dumps(before)}, will be {json.dumps(now)}"
