"""Trackio: figures, and a trace for each completion, in its database on this machine, in a Space, or on a server."""

from collections.abc import Sequence
from contextvars import copy_context
from typing import Any

import trackio

from flows.tracking.base import Figures, Tracked
from stages.inspect.report_groups import View


class TrackioTracker:
    """A run of Trackio. Its name ends with the id: Trackio finds a run again by its name alone."""

    def __init__(self, tracked: Tracked) -> None:
        self.where = f"trackio show --project {tracked.project}"

        def begin() -> Any:
            return trackio.init(
                project=tracked.project,
                name=f"{tracked.name}-{tracked.id}",
                resume="allow",
                config=tracked.settings,
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

        self.run = copy_context().run(begin)  # else Trackio ends it a second time when the process ends

    def log(self, iteration: int, figures: Figures, groups: Sequence[View]) -> None:
        traces = [_trace(group, member) for group in groups for member in group["members"]]
        self.run.log({**figures, **({"completions": traces} if traces else {})}, step=iteration)

    def close(self, *, failed: bool) -> None:
        self.run.finish()


def _trace(group: View, member: View) -> trackio.Trace:
    known = {"group_id": group["group_id"], "chosen_for": group["reason"], "reference": group.get("reference")}
    names = ("completion_id", "reward", "advantage", "parts", "dropped", "finish", "policy", "num_tokens")
    completion = {"role": "assistant", "content": member.get("text") or ""}
    return trackio.Trace(
        messages=[*group.get("messages", ()), completion],
        metadata={**known, **{name: member[name] for name in names if name in member}},
    )
