"""The training of a run: its iterations, each the steps of `pipeline.chain`. It knows no Prefect.

A task is a function that takes an iteration and returns a path, never frames: the artifacts are the only cache. `Work`
says how a task is executed, and decides no result. What lives as long as the run is in the `Session`.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ParamSpec, Protocol

from flows.background import Background
from flows.prepare import Prepared
from flows.session import Session, open_session
from flows.tracking.reporter import tracked
from pipeline.artifact import Artifact
from pipeline.chain import CHAIN, INITIAL, When
from pipeline.provenance import recorded_environment
from pipeline.run_dir import RunDir
from stages.preflight import remarks
from stages.wiring import outside_members

P = ParamSpec("P")
Tasks = Mapping[str, Callable[[int], str]]
METRICS = "metrics"
"""Not a step of the chain: the row of `metrics.parquet`, computed from the steps' artifacts."""
RETENTION = "retention"
"""Not a step either: drops the checkpoints that [retention] does not keep."""


@dataclass(frozen=True, slots=True)
class Retries:
    """How often a task that met what may pass is tried again, see `pipeline.errors.MAY_PASS`."""

    most: int
    seconds: float
    """Before the first; each later one waits twice as long."""
    note: Callable[[str], None]
    """Takes a line for the user."""


class Work(Protocol):
    """How the tasks of a run are executed, and who is told."""

    def on(self, run: RunDir) -> AbstractContextManager[None]:
        """Work on a run in this context; its lock is held."""
        ...

    def task(self, name: str, work: Callable[P, str], retries: Retries | None = None) -> Callable[P, str]:
        """Return a function that does the work as a task of this name."""
        ...


class PlainWork:
    """Executes tasks by calling them, once, and tells nobody."""

    def on(self, run: RunDir) -> AbstractContextManager[None]:
        return nullcontext()

    def task(self, name: str, work: Callable[P, str], retries: Retries | None = None) -> Callable[P, str]:
        return work


def train_run(prepared: Prepared, work: Work) -> str:
    """Train the policy of a run; return the path of its last checkpoint."""
    settings, run = prepared.settings, prepared.run
    for remark in (*prepared.remarks, *remarks(settings)):
        prepared.reporter.note(remark)
    with open_session(settings, run, prepared.reporter) as session, work.on(run), tracked(session):
        run.record_config(prepared.toml, settings.model_dump(mode="json"))
        run.record_environment(recorded_environment(with_diff=prepared.records_diff))
        train_in(session, work)
    return str(run.policy_before(settings.iterations))


def train_in(session: Session, work: Work) -> None:
    """Train in an open session; the background tasks have ended afterwards, whatever happens."""
    tasks = step_tasks(session, work)
    background = Background(tasks)
    try:
        train_all(session, work, tasks, background)
    finally:
        background.end()


def train_all(session: Session, work: Work, tasks: Tasks, background: Background) -> None:
    """Run every iteration of a run, and the evaluations that its config asks for.

    `flows.planning.rehearsal` calls this with a session that computes nothing.
    """
    settings = session.config
    run_once(work, session, session.initial_policy)
    for member in outside_members(settings):
        bring = work.task("member_policy", lambda name: str(session.member_policy(name).path), retries_of(session))
        bring(member.name)
    for iteration in range(INITIAL, settings.iterations):
        was_done = iteration == INITIAL or train_iteration(session, tasks, background, iteration)
        is_to_be_evaluated = settings.is_to_be_evaluated(iteration + 1)
        if is_to_be_evaluated and not session.is_evaluated(iteration):
            run_once(work, session, session.held_out_prompts)
            for step in CHAIN:
                if step.when is When.evaluation:
                    tasks[step.name](iteration)
        if iteration > INITIAL:
            report(session, background, iteration, was_done=was_done)
            if settings.retention is not None and (not was_done or iteration + 1 == settings.iterations):
                # the policy's evaluation, if it is due, is finished, and its state and metrics were begun before
                background.begin(RETENTION, iteration)
        if is_to_be_evaluated and iteration + 1 in (0, settings.iterations):
            background.wait_for_all()
            session.report_evaluation(iteration)
    if settings.iterations:
        have_state(session, background, settings.iterations - 1)
    background.wait_for_all()


def train_iteration(session: Session, tasks: Tasks, background: Background, iteration: int) -> bool:
    """Run the steps of an iteration; return whether this config had run them. Finished ones cost no task.

    In an offline iteration another run's completions replace the first two steps. While the engine samples, background
    tasks write the next prompts and the rest of the last iteration.
    """
    if session.is_done(iteration):
        return True
    if iteration and not background.is_begun("optimizer", iteration - 1):
        have_state(session, background, iteration - 1)  # a lost state, before the engine measures free memory
    session.warm_up(iteration)
    for step in CHAIN:
        match step.when:
            case When.ahead:
                background.wait_for(step.name, iteration)
                if iteration + 1 < session.config.iterations and session.config.stored(iteration + 1) is None:
                    background.begin(step.name, iteration + 1)
            case When.in_order if session.config.executes(step.name, iteration):
                background.raise_failed()
                if "trainer" in step.uses:
                    background.settle(METRICS)  # a killed run lacks at most its last iteration's metrics
                    have_state(session, background, iteration - 1)
                tasks[step.name](iteration)
            case When.late:
                background.begin(step.name, iteration)
    return False


def have_state(session: Session, background: Background, iteration: int) -> None:
    """Make sure that the optimizer state after an iteration is on disk: wait for it, or make a lost one again."""
    if iteration == INITIAL:
        return
    if background.is_begun("optimizer", iteration) or not session.has_state(iteration):
        background.wait_for("optimizer", iteration)


def report(session: Session, background: Background, iteration: int, *, was_done: bool) -> None:
    """Add the iteration's row to `metrics.parquet` and show it; in the background if the iteration ran just now."""
    if was_done:
        background.settle(METRICS)  # one at a time
        session.metrics(iteration)
    else:
        background.begin(METRICS, iteration)


def step_tasks(session: Session, work: Work) -> Tasks:
    """Return a task for each step; it returns the path of the step's artifact."""

    def perform(name: str) -> Callable[[int], str]:
        return lambda iteration: str(session.perform(name, iteration).path)

    tasks = {step.name: work.task(step.name, perform(step.name), retries_of(session)) for step in CHAIN}
    return {
        **tasks,
        METRICS: work.task(METRICS, lambda iteration: str(session.metrics(iteration))),
        RETENTION: work.task(RETENTION, lambda _: str(session.retain())),
    }


def retries_of(session: Session) -> Retries:
    """Return how often a stage of the session is tried again."""
    resources = session.config.resources
    return Retries(resources.retries, resources.retry_seconds, session.reporter.note)


def run_once(work: Work, session: Session, make: Callable[[], Artifact]) -> None:
    """Run a function that belongs to no iteration as a task."""
    work.task(make.__name__, lambda: str(make().path), retries_of(session))()
