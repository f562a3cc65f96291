"""Artifacts of a flow run on Prefect's server, created by a thread that nobody waits for."""

import queue
import re
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate

from pipeline.files import identity
from pipeline.text import one_line

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

LONG_SECONDS = 10.0
"""A stage that goes on longer has its progress on the page."""
EVERY_SECONDS = 5.0
"""Between two updates of a progress. Each costs the server some 25 ms."""
REQUEST_SECONDS = 10.0
PAUSE_SECONDS = 60.0
"""After a request that failed nothing is told for so long."""
FAREWELL_SECONDS = 5.0
"""For what is still to be told when a flow ends."""
MOST_WAITING = 20
"""Artifacts that wait for a slow server; more are left out."""

Request = Callable[["SyncPrefectClient"], object]


class Teller:
    """Makes requests to the server, one after the other in a thread of its own."""

    def __init__(self, note: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._note, self._clock = note, clock
        self._waiting: queue.Queue[Request | None] = queue.Queue()
        self._silent_until = 0.0
        self._has_failed = False
        # the server's address is a setting of the context
        self._thread = threading.Thread(target=copy_context().run, args=(self._work,), name="watching", daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether something waits to be told."""
        return not self._waiting.empty()

    def tell(self, request: Request) -> None:
        """Have a request made; leave it out when too many wait."""
        if self._waiting.qsize() < MOST_WAITING:
            self._waiting.put(request)

    def close(self) -> None:
        """Wait until all is told, but not for long."""
        self._waiting.put(None)
        self._thread.join(FAREWELL_SECONDS)

    def _work(self) -> None:
        while (request := self._waiting.get()) is not None:
            if self._clock() < self._silent_until:
                continue
            try:
                with get_client(sync_client=True, httpx_settings={"timeout": REQUEST_SECONDS}) as client:
                    request(client)
            except Exception as error:
                self._silent_until = self._clock() + PAUSE_SECONDS
                if not self._has_failed:
                    self._has_failed = True
                    self._note(
                        f"Prefect's server has not taken an artifact ({type(error).__name__}): its page lacks some; "
                        "the training goes on"
                    )


class Pace:
    """Says when the progress of a stage is worth a request: once the stage is long, and from then on now and then."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due = clock() + LONG_SECONDS

    def is_due(self) -> bool:
        """Return whether a request is due; the next one is later."""
        if self._clock() < self._due:
            return False
        self._due = self._clock() + EVERY_SECONDS
        return True


@dataclass(slots=True)
class LongStage:
    """The progress of one stage: an artifact once the stage is long."""

    teller: Teller
    key: str
    flow_run: UUID
    title: str
    pace: Pace = field(default_factory=Pace)
    _is_shown: bool = False
    _artifact: UUID | None = None

    def move(self, done: int, total: int, text: str = "") -> None:
        """Tell how far the stage is, unless that was told just now."""
        if self.pace.is_due() and not self.teller.is_busy:
            self._tell(100.0 * done / max(total, 1), f"{self.title}: {done:,} of {total:,} {text}")

    def end(self) -> None:
        """Tell that the stage has finished, if anything was told of it."""
        if self._is_shown:
            self._tell(100.0, f"{self.title}: finished")

    def _tell(self, percent: float, said: str) -> None:
        self._is_shown = True
        percent, description = min(percent, 100.0), one_line(said)

        def put(client: "SyncPrefectClient") -> None:
            if self._artifact is None:
                self._artifact = client.create_artifact(
                    ArtifactCreate(
                        key=self.key, type="progress", description=description, data=percent, flow_run_id=self.flow_run
                    )
                ).id
            else:
                client.update_artifact(self._artifact, ArtifactUpdate(data=percent, description=description))

        self.teller.tell(put)


def key_of(run: str, suffix: str) -> str:
    """Return the key of an artifact: lowercase letters, digits and dashes. Others are told apart by a hash."""
    name = run if run.isascii() else f"{run} {identity(run)[:6]}"
    return re.sub("[^a-z0-9]+", "-", f"{name} {suffix}".lower()).strip("-")
