"""What a tracker is, and what it is told of an iteration: figures, and groups of completions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.run_dir import RunDir
from stages.inspect.report_groups import View, choose_groups, group_views

Figures = Mapping[str, float]
DATASETS = ("prompts", "completions", "rewards", "advantages")
"""What is told of a completion comes from these."""
TOKENS = ("completion_token_ids", "sampling_logprobs")
"""Columns that trackers are not told of."""


@dataclass(frozen=True, slots=True)
class Tracked:
    """A run as a tracker knows it."""

    id: str
    """Eight hexadecimal digits, the same at every start of the run."""
    project: str
    name: str
    settings: dict[str, Any]
    """What decides the run's rows and differs from the defaults."""
    logs: Path
    """The run's folder for files of its own."""
    shared: Path
    """The folder that the run is in, with others."""
    first: int
    """The first iteration that the tracker does not have."""


class Tracker(Protocol):
    """One run in an experiment tracker. Its class takes a `Tracked`, and continues what an earlier start has begun."""

    where: str
    """How to look at it."""

    def log(self, iteration: int, figures: Figures, groups: Sequence[View]) -> None:
        """Log an iteration: it is the step."""
        ...

    def close(self, *, failed: bool) -> None:
        """Wait until everything is logged, and end the run there; ``failed``: an error or a signal has stopped it."""
        ...


def figures_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row of `metrics.parquet`: by column, ``rewards/<name>/mean``, ``seconds/<stage>``."""
    found = {name: value for name, value in row.items() if name not in ("iteration", "rewards", "seconds")}
    for part in row["rewards"]:
        found |= {f"rewards/{part['name']}/{figure}": value for figure, value in part.items() if figure != "name"}
    found |= {f"seconds/{entry['stage']}": entry["seconds"] for entry in row["seconds"]}
    return {name: value for name, value in found.items() if value is not None}


def groups_of(run: RunDir, iteration: int, count: int) -> list[View]:
    """Return groups of an iteration as `grpo report` chooses and shows them, without tokens. Read-only."""
    if not count:
        return []
    data = {name: run.open(iteration, name).scan() for name in DATASETS}
    data["completions"] = data["completions"].drop(TOKENS)
    chosen, _ = choose_groups(data, (), count, f"0:{iteration}")
    return list(group_views(data, iteration, chosen, None, ()))


def completion_rows(groups: Sequence[View]) -> list[dict[str, Any]]:
    """Return a row per completion, for trackers that show tables; all rows have the same keys."""
    rewards = dict.fromkeys(part["name"] for group in groups for member in group["members"] for part in member["parts"])
    return [
        {
            "group_id": group["group_id"],
            "chosen_for": group["reason"],
            "prompt": prompt_of(group),
            "reference": group.get("reference"),
            "completion": member.get("text"),
            "reward": member.get("reward"),
            "advantage": member.get("advantage"),
            **{f"reward {name}": _reward(member, name) for name in rewards},
            "finish": member.get("finish"),
            "policy": member.get("policy"),
        }
        for group in groups
        for member in group["members"]
    ]


def prompt_of(group: View) -> str:
    """Return the messages of a group's prompt as one text."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in group.get("messages", ()))


def _reward(member: View, name: str) -> float | None:
    return next((part["reward"] for part in member["parts"] if part["name"] == name), None)
