"""What Prefect's page shows of a run while it goes on: artifacts with its figures, and the events of `flows.events`.

A server that is slow or gone never harms the training: a thread of its own creates the artifacts, and leaves out what
it cannot tell in time.
"""

import json
import re
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from shlex import quote
from typing import Any
from uuid import UUID

from prefect import runtime
from prefect.client.schemas.actions import ArtifactCreate
from prefect.events import emit_event

from flows import events, prefect_server
from flows.artifacts import LongStage, Teller, key_of
from flows.progress import COLUMNS
from flows.report.live import served_at
from flows.reporter import ForwardingReporter, Reporter
from pipeline.run_dir import RunDir
from pipeline.stage import Progress, StageResult
from pipeline.text import one_line

ROWS_SHOWN = 20
"""Iterations in the table of metrics."""
HEARTBEAT_SECONDS = 30.0


@contextmanager
def watched(run: RunDir, reporter: Reporter) -> Iterator[Reporter]:
    """Yield a reporter that tells the server of the current flow run about a run, and the given reporter everything."""
    if prefect_server.is_temporary.is_set():  # nobody will look at it
        yield reporter
        return
    teller = Teller(reporter.note)
    watcher = Watcher(reporter, run, UUID(runtime.flow_run.id), teller, _recorded(run))
    with alive():
        try:
            yield watcher
        except Exception:
            teller.close()
            raise
        teller.close()  # an interrupt waits for nothing


@contextmanager
def alive() -> Iterator[None]:
    """Tell the server now and then that the process of the current flow run is alive, and at the end that it is not."""
    flow_run = {
        "prefect.resource.id": f"prefect.flow-run.{runtime.flow_run.id}",
        "prefect.resource.name": str(runtime.flow_run.name),
    }
    is_over = threading.Event()

    def beat() -> None:
        emit_event(events.HEARTBEAT, flow_run)
        while not is_over.wait(HEARTBEAT_SECONDS):
            emit_event(events.HEARTBEAT, flow_run)

    heart = threading.Thread(target=copy_context().run, args=(beat,), name="heartbeat", daemon=True)
    heart.start()
    try:
        yield
    finally:
        is_over.set()
        heart.join(1.0)  # no heartbeat comes after the end
        emit_event(events.ENDED, flow_run)


@dataclass(slots=True)
class Watcher(ForwardingReporter):
    """Tells the server of the stages, iterations and failed checks of a run."""

    run: RunDir
    flow_run: UUID
    teller: Teller
    recorded: frozenset[int]
    """Iterations that had finished before: they are in the table, but no news."""
    _rows: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=ROWS_SHOWN))
    _collapsed: set[int] = field(default_factory=set)
    _stages: dict[str, LongStage] = field(default_factory=dict)
    _report: str | None = None

    @property
    def name(self) -> str:
        """Last part of the run's path or URL."""
        return PurePosixPath(self.run.name).name

    def stage(self, label: str) -> Progress:
        forward = ForwardingReporter.stage(self, label)
        long = LongStage(self.teller, key_of(self.name, label), self.flow_run, f"{label} of {self.name}")
        self._stages[label] = long

        def move(done: int, total: int, text: str = "") -> None:
            forward(done, total, text)
            long.move(done, total, text)

        return move

    def finished(self, label: str, result: StageResult) -> None:
        ForwardingReporter.finished(self, label, result)
        if (long := self._stages.pop(label, None)) is not None:
            long.end()

    def iteration(self, row: dict[str, Any]) -> None:
        ForwardingReporter.iteration(self, row)
        self._rows.append(row)
        iteration = row["iteration"]
        if iteration in self.recorded:
            return
        self._emit(events.ITERATION_FINISHED, events.of_iteration(row))
        if events.is_collapsed(row):
            self._tell_collapse(iteration, "all completions of each group have got the same reward")
        url = served_at(self.run)
        table = json.dumps([table_row(each) for each in self._rows])
        self._create("metrics", "table", table, where_to_look(self.run.name, url))
        if url is not None and url != self._report:
            self._report = url
            self._create(
                "report", "markdown", f"[the report of {markdown(self.name)}]({url})", "Served by `grpo report`."
            )

    def check(self, iteration: int, row: dict[str, Any]) -> None:
        ForwardingReporter.check(self, iteration, row)
        self._emit(events.CHECK_FAILED, events.of_check(iteration, row))
        if events.is_collapse(row):
            self._tell_collapse(iteration, row["note"])

    def _tell_collapse(self, iteration: int, why: str) -> None:
        if iteration not in self._collapsed:
            self._collapsed.add(iteration)
            self._emit(events.REWARD_COLLAPSED, events.of_collapse(iteration, why))

    def _emit(self, event: str, payload: events.Payload) -> None:
        events.emit(event, self.name, self.run.name, payload)

    def _create(self, suffix: str, kind: str, data: Any, description: str) -> None:
        artifact = ArtifactCreate(
            key=key_of(self.name, suffix), type=kind, data=data, description=description, flow_run_id=self.flow_run
        )
        self.teller.tell(lambda client: client.create_artifact(artifact))


def table_row(row: dict[str, Any]) -> dict[str, str]:
    """Return the figures of an iteration that the terminal shows, too."""
    return {heading: "" if row[key] is None else format(row[key], format_) for heading, key, _, format_ in COLUMNS}


def where_to_look(run: str, url: str | None) -> str:
    """Return, as Markdown, where the rest of a run is to be seen."""
    served = f", or the one that is served now: [{url}]({url})" if url else ""
    command = f"grpo report {quote(one_line(run))} --live".replace("`", "\\x60")
    return f"The last {ROWS_SHOWN} iterations; the report with all: `{command}`{served}"


def markdown(text: str) -> str:
    """Return a text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", one_line(text))


def _recorded(run: RunDir) -> frozenset[int]:
    """Return the iterations whose metrics are stored. Read-only."""
    return frozenset(run.read_metrics()["iteration"]) if run.metrics.is_file() else frozenset()
