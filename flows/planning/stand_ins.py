"""What stands for the moving parts of a run while it is rehearsed: nothing is written, and no thread is started."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flows.background import Background
from flows.reporter import SilentReporter
from pipeline.artifact import Artifact
from pipeline.run_dir import RunDir


@dataclass(frozen=True)
class RehearsedRun(RunDir):
    """A run directory in which a reference to another run's artifact is kept in memory."""

    references: dict[tuple[int, str], Artifact] = field(default_factory=dict, compare=False)

    def open(self, index: int, dataset: str) -> Artifact:
        """Return a finished artifact of an iteration; see `RunDir.open`."""
        found = self.references.get((index, dataset))
        return RunDir.open(self, index, dataset) if found is None else found

    def refer(self, index: int, dataset: str, artifact: Artifact) -> None:
        """Remember the artifact as a dataset of the iteration; see `RunDir.refer`."""
        if self.has(index, dataset):
            RunDir.refer(self, index, dataset, artifact)  # only compares
        else:
            self.references[index, dataset] = artifact


@dataclass(slots=True)
class NoteKeeper(SilentReporter):
    """Keeps the lines for the user."""

    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)


class ChainAlone(dict[str, Callable[[int], str]]):
    """The tasks of a rehearsal: those that are no steps of the chain, which make no artifact, do nothing."""

    def __missing__(self, name: str) -> Callable[[int], str]:
        return lambda iteration: ""


class AtOnce(Background):
    """Background tasks that run when they are begun."""

    def __init__(self, tasks: Mapping[str, Callable[[int], str]]) -> None:
        """``tasks``: step name -> its task, which takes an iteration."""
        self._of_name = tasks
        self._left: set[tuple[str, int]] = set()

    def begin(self, name: str, iteration: int) -> None:
        """Run the task."""
        self._left.add((name, iteration))
        self._of_name[name](iteration)

    def is_begun(self, name: str, iteration: int) -> bool:
        """Return whether the task was begun and not yet waited for."""
        return (name, iteration) in self._left

    def wait_for(self, name: str, iteration: int) -> None:
        """Run the task unless it was begun."""
        if not self.is_begun(name, iteration):
            self._of_name[name](iteration)
        self._left.discard((name, iteration))

    def settle(self, name: str) -> None:
        """Count the step's tasks as waited for."""
        self._left = {key for key in self._left if key[0] != name}

    def raise_failed(self) -> None:
        """Nothing has failed: a failed task has raised when it was begun."""

    def wait_for_all(self) -> None:
        """Count all tasks as waited for."""
        self._left.clear()

    def end(self) -> None:
        """No thread is there to end."""
