"""What `grpo schedule apply` would change on the server: computed first, shown, then done."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from flows.schedule.deployments import Deployed
from flows.schedule.spec import Schedule
from pipeline.errors import UsageError


@dataclass(frozen=True, slots=True)
class Change:
    """One schedule that is to be put or removed."""

    line: str
    """For the user; begins with ``+`` for a new one, ``~`` for a changed one, ``-`` for one that goes."""
    wanted: Schedule | None
    """None = it goes."""
    there: Deployed | None
    """None = it is new."""


def changes(wanted: Sequence[Schedule], there: Collection[Deployed], file: str) -> list[Change]:
    """Return what makes the server's schedules of a file equal to the file; others stay as they are.

    Raises:
        UsageError: when a schedule of that name was made elsewhere.
    """
    by_name = {deployed.name: deployed for deployed in there}
    taken = [s.name for s in wanted if s.name in by_name and by_name[s.name].file != file]
    if taken:
        where = by_name[taken[0]].file or "`grpo schedule add`"
        raise UsageError(
            f"the schedule {taken[0]} is there already, made by {where}: rename it in {file}, or remove that one first "
            f"(grpo schedule remove {taken[0]})"
        )
    found = []
    for schedule in wanted:
        deployed = by_name.get(schedule.name)
        differences = _differences(schedule, deployed)
        if deployed is None:
            text = f"+ {schedule.name}: {schedule.action} {schedule.run} with {schedule.config}, {schedule.times}"
            found.append(Change(text, schedule, None))
        elif differences:
            found.append(Change(f"~ {schedule.name}: {'; '.join(differences)}", schedule, deployed))
    names = {schedule.name for schedule in wanted}
    gone = [deployed for deployed in there if deployed.file == file and deployed.name not in names]
    return [*found, *(Change(f"- {deployed.name}: no longer in the file", None, deployed) for deployed in gone)]


def _differences(schedule: Schedule, deployed: Deployed | None) -> list[str]:
    if deployed is None:
        return []
    now, before = schedule.model_dump(mode="json"), deployed.settings
    return [
        f"{name} was {json.dumps(before.get(name))}, will be {json.dumps(now[name])}"
        for name in now
        if before.get(name) != now[name]
    ]
