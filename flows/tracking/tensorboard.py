"""TensorBoard: figures as scalars, groups of completions as texts, in event files of the run."""

from collections.abc import Sequence
from shlex import quote
from textwrap import indent

import tomli_w
from torch.utils.tensorboard import SummaryWriter

from flows.tracking.base import Figures, Tracked, prompt_of
from pipeline.config import without_nulls
from pipeline.reading import inside
from stages.inspect.report_groups import View


class TensorBoardTracker:
    """The event files of a run; each start adds one."""

    def __init__(self, tracked: Tracked) -> None:
        folder = inside(tracked.logs, "tensorboard")
        self.where = f"tensorboard --logdir {quote(str(tracked.shared))}"
        self.writer = SummaryWriter(str(folder), purge_step=tracked.first)
        if tracked.first == 0:
            self.writer.add_text("config", _code(tomli_w.dumps(without_nulls(tracked.settings))), 0)

    def log(self, iteration: int, figures: Figures, groups: Sequence[View]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, iteration, new_style=True, double_precision=True)
        for place, group in enumerate(groups):
            self.writer.add_text(f"completions/{place}", _text(group), iteration)
        self.writer.flush()

    def close(self, *, failed: bool) -> None:
        self.writer.close()


def _text(group: View) -> str:
    """Return a group as Markdown in which texts of a model are code, and so stay as they are."""
    parts = [f"group {group['group_id']}, {group['reason']}", _code(prompt_of(group))]
    for member in group["members"]:
        numbers = f"reward {member.get('reward')}, advantage {member.get('advantage')}"
        parts += [numbers, _code(member.get("text") or "")]
    return "\n\n".join(parts)


def _code(text: str) -> str:
    return indent(text, "    ", lambda _: True)
