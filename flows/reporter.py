"""Who is told of a run while it goes on."""

from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.stage import Progress, StageResult, silent


class Reporter(Protocol):
    """Called with the progress of a run."""

    def stage(self, label: str) -> Progress:
        """A stage begins; the returned callable takes its progress."""
        ...

    def finished(self, label: str, result: StageResult) -> None:
        """A stage has finished, or had finished before."""
        ...

    def iteration(self, row: dict[str, Any]) -> None:
        """An iteration has finished; the row is that of `metrics.parquet`. Called for those of earlier starts, too."""
        ...

    def check(self, iteration: int, row: dict[str, Any]) -> None:
        """A check of the iteration has failed; the row is that of the dataset `checks`."""
        ...

    def evaluation(self, num_updates: int, figures: dict[str, float | None]) -> None:
        """The policy after ``num_updates`` iterations was evaluated; called for the first and the last policy."""
        ...

    def note(self, text: str) -> None:
        """A line for the user."""
        ...


class SilentReporter:
    """Ignores all progress."""

    def stage(self, label: str) -> Progress:
        return silent

    def finished(self, label: str, result: StageResult) -> None: ...

    def iteration(self, row: dict[str, Any]) -> None: ...

    def check(self, iteration: int, row: dict[str, Any]) -> None: ...

    def evaluation(self, num_updates: int, figures: dict[str, float | None]) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(slots=True)
class ForwardingReporter:
    """Tells another reporter everything. Subclasses tell somebody else, too."""

    reporter: Reporter

    def stage(self, label: str) -> Progress:
        return self.reporter.stage(label)

    def finished(self, label: str, result: StageResult) -> None:
        self.reporter.finished(label, result)

    def iteration(self, row: dict[str, Any]) -> None:
        self.reporter.iteration(row)

    def check(self, iteration: int, row: dict[str, Any]) -> None:
        self.reporter.check(iteration, row)

    def evaluation(self, num_updates: int, figures: dict[str, float | None]) -> None:
        self.reporter.evaluation(num_updates, figures)

    def note(self, text: str) -> None:
        self.reporter.note(text)
