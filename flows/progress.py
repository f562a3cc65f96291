"""What a user sees during a run: a bar for the current stage, one line per iteration."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from flows.reporter import ForwardingReporter
from pipeline import stage
from pipeline.stage import StageResult
from pipeline.text import one_line

COLUMNS = (
    # heading, key of the metrics row, width, format
    ("iter", "iteration", 4, "d"),
    ("reward", "reward_mean", 7, ".3f"),
    ("pass", "pass_rate", 6, ".3f"),
    ("held-out", "eval_pass_at_1", 8, ".3f"),
    ("tokens", "completion_tokens_mean", 7, ".1f"),
    ("entropy", "entropy", 7, ".3f"),
    ("kl", "kl_to_sampler", 8, ".1e"),
    ("clip-", "clip_low_share", 6, ".3f"),
    ("clip+", "clip_high_share", 6, ".3f"),
    ("trained", "num_trained", 7, "d"),
    ("tok/s", "generate_tokens_per_second", 7, ",.0f"),
)
HEADER_EVERY = 20
SECONDS_SHOWN = ("generate", "score", "update", "evaluate")


class TerminalReporter:
    """Shows a run on the terminal; elsewhere prints only the iterations' lines."""

    def __init__(self) -> None:
        width = None if sys.stdout.isatty() else 160
        self.console = Console(highlight=False, markup=False, emoji=False, width=width)
        self.bar = Progress(
            TextColumn("{task.description:>12}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not sys.stdout.isatty(),
        )
        self.task = self.bar.add_task("starting", total=None, text="")
        self.lines = 0

    @contextmanager
    def shown(self) -> Iterator["TerminalReporter"]:
        """Keep the bar on the screen."""
        with self.bar:
            yield self

    def stage(self, label: str) -> stage.Progress:
        """Put the stage's name on the bar; the returned callable moves it."""
        self.bar.reset(self.task, description=one_line(label), total=None, text="")

        def move(done: int, total: int, text: str = "") -> None:
            self.bar.update(self.task, completed=done, total=total, text=one_line(text))

        return move

    def finished(self, label: str, result: StageResult) -> None:
        """Print nothing: the iteration's line has it."""

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.console.print(one_line(text), style="dim")

    def iteration(self, row: dict[str, Any]) -> None:
        """Print the iteration's line, with a heading now and then."""
        if self.lines % HEADER_EVERY == 0:
            self.bar.console.print(heading(), style="bold")
        self.lines += 1
        self.bar.console.print(iteration_line(row))

    def check(self, iteration: int, row: dict[str, Any]) -> None:
        """Print nothing: a note has it."""

    def evaluation(self, num_updates: int, figures: dict[str, float | None]) -> None:
        """Print the policy's pass rates on the held-out prompts."""
        self.bar.console.print(evaluation_line(num_updates, figures), style="bold")


@dataclass(slots=True)
class LogReporter(ForwardingReporter):
    """Tells a log the lines."""

    log: Callable[[str], None]
    lines: int = 0

    def iteration(self, row: dict[str, Any]) -> None:
        """Log the iteration's line, with a heading now and then."""
        if self.lines % HEADER_EVERY == 0:
            self.log(heading())
        self.lines += 1
        self.log(iteration_line(row))
        ForwardingReporter.iteration(self, row)

    def evaluation(self, num_updates: int, figures: dict[str, float | None]) -> None:
        self.log(evaluation_line(num_updates, figures))
        ForwardingReporter.evaluation(self, num_updates, figures)

    def note(self, text: str) -> None:
        self.log(one_line(text))
        ForwardingReporter.note(self, text)


def heading() -> str:
    """Return the line above the iterations' lines."""
    names = "  ".join(f"{name:>{width}}" for name, _, width, _ in COLUMNS)
    return f"{names}  seconds: {' '.join(SECONDS_SHOWN)}"


def iteration_line(row: dict[str, Any]) -> str:
    """Return the line of an iteration from its row of `metrics.parquet`."""
    cells = "  ".join(_cell(row[key], width, format_) for _, key, width, format_ in COLUMNS)
    seconds = {entry["stage"]: entry["seconds"] for entry in row["seconds"]}
    return f"{cells}  {' '.join(f'{seconds[name]:.2f}' for name in SECONDS_SHOWN if name in seconds)}"


def evaluation_line(num_updates: int, figures: dict[str, float | None]) -> str:
    """Return the line of a policy's pass rates on the held-out prompts."""
    known = {name: value for name, value in figures.items() if value is not None}
    labels = {"eval_pass_at_1": "greedy", "eval_pass_rate": "sampled", "eval_pass_at_k": "best of k sampled"}
    parts = [f"{labels[name]} {value:.3f}" for name, value in known.items()]
    return f"held-out after {num_updates} updates: {', '.join(parts)}"


def _cell(value: Any, width: int, format_: str) -> str:
    return " " * width if value is None else f"{value:>{width}{format_}}"
