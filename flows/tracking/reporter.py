"""Tells a run's trackers of each iteration once, whatever starts and stops the run has had.

A session reports the iterations of earlier starts, too. A file in the run's logs keeps how far each tracker is: what it
lacks, because it was added later or has failed, it is told then. Nothing here stops a run, or holds it up: a thread of
its own tells the trackers.
"""

import queue
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any

from flows import notes
from flows.reporter import ForwardingReporter
from flows.session import Session
from flows.tracking.base import Tracked, Tracker, figures_of, groups_of
from pipeline.config import chosen
from pipeline.errors import GrpoError
from pipeline.run_dir import RunDir
from pipeline.text import without_login
from stages.config import RunConfig
from stages.inspect.report_groups import View
from stages.tracking import TrackerName, TrackingConfig

RECORD = "tracking.json"
"""In the run's logs: the run's id in trackers, and the last iteration that each has."""
ID = re.compile(r"[0-9a-f]{8}")
FAREWELL_SECONDS = 3.0
"""For trackers to end when the run was interrupted."""


@contextmanager
def tracked(session: Session) -> Iterator[None]:
    """Tell the trackers of the config's [tracking] of the session's iterations; the run's lock is held."""
    config = session.config.tracking
    if config is None:
        yield
        return
    reporter = TrackingReporter(session.reporter, session.run, session.config, config, *recorded(session.run))
    session.reporter = reporter
    seconds = None
    failed = True
    try:
        yield
        failed = False
    except Exception:
        raise
    except BaseException:  # an interrupt, which waits for no upload
        seconds = FAREWELL_SECONDS
        raise
    finally:
        reporter.close(failed=failed, seconds=seconds)


@dataclass(slots=True)
class TrackingReporter(ForwardingReporter):
    """Tells trackers each iteration that they do not have. One that fails is left out until the run's next start."""

    run: RunDir
    settings: RunConfig
    config: TrackingConfig
    id: str
    last: dict[str, int]
    """Tracker -> last iteration that it has."""
    trackers: dict[str, Tracker | None] = field(default_factory=dict)
    """Those that were opened; None = it has failed."""
    is_recorded: bool = True
    """False = the record could not be written."""
    initial: dict[str, float] = field(default_factory=dict)
    """Figures of the initial policy, which are logged with the first iteration."""
    _waiting: "queue.Queue[dict[str, Any] | None]" = field(default_factory=queue.Queue)
    """Rows that the trackers are to be told of; None = no more."""
    _thread: threading.Thread | None = None
    _has_failed: bool = False

    def evaluation(self, num_updates: int, figures: dict[str, float | None]) -> None:
        if num_updates == 0:
            self.initial = {f"initial/{name}": value for name, value in figures.items() if value is not None}
        ForwardingReporter.evaluation(self, num_updates, figures)  # the last policy's are in its iteration's row

    def iteration(self, row: dict[str, Any]) -> None:
        """Have the iteration logged where it is not logged yet; never waits."""
        ForwardingReporter.iteration(self, row)
        self._waiting.put(row)
        if self._thread is None:
            # the log of the flow run, where notes go, is a setting of the context
            self._thread = threading.Thread(target=copy_context().run, args=(self._work,), name="tracking", daemon=True)
            self._thread.start()

    def close(self, *, failed: bool, seconds: float | None = None) -> None:
        """End the run in each tracker when it was told all. ``seconds``: wait so long at most, and tell no more."""
        self._has_failed = failed
        if seconds is not None:
            with suppress(queue.Empty):
                while True:
                    self._waiting.get_nowait()
        self._waiting.put(None)
        if self._thread is not None:
            self._thread.join(seconds)

    def _work(self) -> None:
        while (row := self._waiting.get()) is not None:
            self._log(row)
        for name in list(self.trackers):
            self._told(name, lambda tracker: tracker.close(failed=self._has_failed))

    def _log(self, row: dict[str, Any]) -> None:
        iteration = row["iteration"]
        behind = [name for name in dict.fromkeys(self.config.to) if self.last.get(name, -1) < iteration]
        behind = [name for name in behind if self._tracker(name) is not None]
        if not behind:
            return
        figures = figures_of(row) | (self.initial if iteration == 0 else {})
        groups = self._groups(iteration)
        for name in behind:
            if self._told(name, lambda tracker: tracker.log(iteration, figures, groups)):
                self.last[name] = iteration
        self._record()

    def _tracker(self, name: TrackerName) -> Tracker | None:
        """Return the tracker, opened when it is first needed; None = it has failed."""
        if name not in self.trackers:
            self.trackers[name] = None
            self._record()  # the id, before a tracker knows it
            run, config = self.run, self.config
            tracked = Tracked(
                id=self.id,
                project=config.project,
                name=config.name or run.root.absolute().name,
                settings=chosen(self.settings),
                logs=run.logs,
                shared=run.root.parent,
                first=self.last.get(name, -1) + 1,
            )
            try:
                self.trackers[name] = tracker = open_tracker(name, tracked)
            except Exception as error:  # a library may raise anything
                self._leave_out(name, error)
            else:
                self.note(f"{name}: {tracker.where}")
        return self.trackers[name]

    def _told(self, name: str, tell: Callable[[Tracker], None]) -> bool:
        """Tell a tracker something; return whether that went well."""
        tracker = self.trackers[name]
        if tracker is None:
            return False
        try:
            tell(tracker)
        except Exception as error:  # a library may raise anything
            self._leave_out(name, error)
            return False
        return True

    def _leave_out(self, name: str, error: Exception) -> None:
        self.trackers[name] = None
        self.note(
            f"warning: {name} has failed and is told nothing more ({type(error).__name__}: {without_login(error)}): "
            "the run goes on, and its next start tells it what it lacks"
        )

    def _groups(self, iteration: int) -> list[View]:
        try:
            return groups_of(self.run, iteration, self.config.groups)
        except Exception as error:  # rows that cannot be read keep no figures from the trackers
            told = error if isinstance(error, GrpoError) else f"{type(error).__name__}: {error}"
            self.note(f"warning: no completions of iteration {iteration} are tracked: {told}")
            return []

    def _record(self) -> None:
        try:
            notes.write(self.run, RECORD, {"id": self.id, "last": self.last})
        except OSError as error:
            if self.is_recorded:
                self.note(f"warning: {RECORD} cannot be written ({error}): the next start tells trackers again")
            self.is_recorded = False


def open_tracker(name: TrackerName, tracked: Tracked) -> Tracker:
    """Return a tracker of a run; its library is imported here."""
    match name:
        case "trackio":
            from flows.tracking.trackio import TrackioTracker

            return TrackioTracker(tracked)
        case "tensorboard":
            from flows.tracking.tensorboard import TensorBoardTracker

            return TensorBoardTracker(tracked)
        case "wandb":
            from flows.tracking.wandb import WandbTracker

            return WandbTracker(tracked)
        case "mlflow":
            from flows.tracking.mlflow import MlflowTracker

            return MlflowTracker(tracked)


def recorded(run: RunDir) -> tuple[str, dict[str, int]]:
    """Return the run's id in trackers, and the last iteration that each has. Read-only.

    A run without a record, or a copy of another, has a new id and no iterations.
    """
    newest = max(run.iterations(), default=-1)
    try:
        found = notes.read(run, RECORD)
        if ID.fullmatch(found["id"]):
            return found["id"], {str(name): min(int(last), newest) for name, last in found["last"].items()}
    except (ValueError, LookupError, TypeError, AttributeError):  # none, or no record of ours
        pass
    return secrets.token_hex(4), {}
