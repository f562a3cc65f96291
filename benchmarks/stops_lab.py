"""What `stops.py` works with: a Prefect server and a worker of its own, runs to be stopped, what is known of them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disturbed_runs import Command, adopt_orphans, end_all, started
from remains import compare, finished_artifacts

from pipeline.errors import GrpoError
from pipeline.manifest import Manifest
from pipeline.prune import num_finished
from pipeline.run_dir import RunDir
from tests.machine import PATIENCE, Machine

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

POLL_SECONDS = 0.2


class Late(Exception):
    """Something did not come true in time."""


def wait(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Wait until a condition is true.

    Raises:
        Late: when it does not become so in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Late(f"{what}: not within {seconds:.0f} s")
        time.sleep(POLL_SECONDS)


@dataclass
class Lab:
    """A folder of runs, with server and worker, and the client of this process."""

    root: Path
    machine: Machine
    client: "SyncPrefectClient"
    command: Command
    references: dict[int, tuple[Path, dict[str, Manifest]]] = field(default_factory=dict)
    """Iterations -> an undisturbed run of so many, and what it made."""
    worker: "subprocess.Popen[bytes] | None" = None
    num_workers: int = 0
    own: set[int] = field(default_factory=set)
    """Processes that belong to no run: workers, commands that look and steer."""

    @property
    def server(self) -> int:
        from flows.schedule import local

        there = local.running()
        assert there is not None, "the server has ended"
        return there.pid

    def living(self) -> dict[int, str]:
        """Return the processes that runs and firings have started and that live, with their command lines."""
        return {pid: line for pid, line in started(self.server).items() if pid not in self.own}

    def have_worker(self) -> None:
        """Start a worker if none lives. It has a device of its own: that of a killed one is free a minute later."""
        from flows.schedule.client import has_worker, have_pool

        if self.worker is None or self.worker.poll() is not None:
            have_pool(self.client)
            self.num_workers += 1
            log = self.root / "worker.log"
            told = log.stat().st_size if log.exists() else 0
            self.worker = self.machine.start_worker(f"box{self.num_workers}")
            self.own.add(self.worker.pid)
            wait(lambda: "started!" in log.read_text(encoding="utf-8", errors="replace")[told:], "the worker's start")
            wait(lambda: has_worker(self.client), "the worker on the server")

    def kill_worker(self) -> None:
        assert self.worker is not None
        self.worker.kill()
        self.worker.wait()

    def run(self, directory: Path, *overrides: str) -> "subprocess.Popen[bytes]":
        """Start `grpo run` in directory/run."""
        own = Command(self.command.config, [*overrides], self.command.environment, PATIENCE)
        return own.start(directory, self.root / "logs" / f"{directory.name}.log")

    def finish(self, directory: Path, *overrides: str) -> None:
        """Run `grpo run` to its end.

        Raises:
            Late: when it fails, or hangs.
        """
        process = self.run(directory, *overrides)
        wait(lambda: process.poll() is not None, "the end of grpo run")
        if process.returncode:
            raise Late(f"grpo run ended with {process.returncode}: see logs/{directory.name}.log")

    def reference(self, iterations: int) -> tuple[Path, dict[str, Manifest]]:
        """Return an undisturbed run of so many iterations, made or found, and what it made."""
        if iterations not in self.references:
            began, directory = time.monotonic(), self.root / f"reference-{iterations}"
            if iterations > 2:
                shutil.copytree(self.reference(2)[0], directory)
            self.finish(directory, f"iterations={iterations}")
            self.references[iterations] = directory, finished_artifacts(directory)
            print(f"undisturbed run of {iterations} iterations in {time.monotonic() - began:.0f} s", flush=True)
        return self.references[iterations]

    def copy(self, name: str, *datasets: str) -> Path:
        """Return a copy of the undisturbed run without these datasets of its last iteration."""
        source, _ = self.reference(2)
        directory = self.root / name
        shutil.copytree(source, directory)
        run = RunDir(directory / "run")
        for dataset in datasets:
            shutil.rmtree(run.place(1, dataset), ignore_errors=True)
        run.metrics.unlink()
        return directory

    def differences(self, directory: Path) -> list[str]:
        """Return how a run that has gone on differs from the undisturbed one of as many iterations."""
        reference, manifests = self.reference(num_finished(RunDir(directory / "run")))
        return compare(manifests, reference, directory)

    def flow_runs(self, since: datetime, until: datetime | None = None) -> list["FlowRun"]:
        """Return the flow runs that were created in this time and have begun, the first one first."""
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterStartTime
        from prefect.client.schemas.sorting import FlowRunSort

        begun = FlowRunFilter(start_time=FlowRunFilterStartTime(after_=since, before_=until))
        found = self.client.read_flow_runs(flow_run_filter=begun, sort=FlowRunSort.START_TIME_ASC)
        return [run for run in found if run.start_time]  # the server counts those that are due later, too

    def task_runs(self, flow_run: "FlowRun") -> list[Any]:
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

        own = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
        return self.client.read_task_runs(flow_run_filter=own)

    def put(self, name: str, run: str, **settings: Any) -> Any:
        """Put a schedule of the benchmark's config on the server; return it."""
        from flows.schedule import deployments
        from flows.schedule.spec import Schedule

        tables = {"config": self.command.config.name, "every": "1d", "iterations": 1, **settings}
        deployments.put(self.client, Schedule(name=name, folder=str(self.root), run=run, **tables))
        return deployments.read(self.client, name)

    def firings(self, name: str) -> list["FlowRun"]:
        """Return the firings of a schedule that are or were due, the first one first."""
        from flows.schedule import deployments

        return deployments.runs_of(self.client, deployments.read(self.client, name))[::-1]


def state(run: Any) -> str:
    """Return the state of a flow run or task run in a word."""
    return str(run.state.type.value.capitalize()) if run.state else "None"


def is_over(run: Any) -> bool:
    """Return whether a flow run or task run has ended."""
    return run.state is not None and bool(run.state.is_final())


def load() -> str:
    return f"{os.getloadavg()[0]:.0f}"


@contextmanager
def open_lab(root: Path, config: Path) -> Iterator[Lab]:
    """Start a server in a new folder and stand in it; leave no process behind."""
    root.mkdir(parents=True)
    (root / "logs").mkdir()
    shutil.copy(config, root)
    machine = Machine(root)
    os.environ.update(machine.environment)
    os.environ.pop("PREFECT_API_URL", None)
    os.chdir(root)
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        machine.grpo("server", "start", "--port", machine.port)
        url = f"http://127.0.0.1:{machine.port}/api"
        os.environ["PREFECT_API_URL"] = url
        environment = machine.environment | {"PREFECT_API_URL": url}
        from flows.environment import set_defaults

        set_defaults()
        from flows.schedule.client import connected

        with connected() as client:
            lab = Lab(root, machine, client, Command(Path(config.name), [], environment, PATIENCE))
            yield lab
    finally:
        with suppress(AssertionError, subprocess.TimeoutExpired, GrpoError):
            machine.grpo("server", "stop")
        end_all(None)
