"""The train flow: a Prefect flow whose tasks are the steps of `pipeline.chain`.

Tasks take an iteration and return a path, never frames, and Prefect's own cache is off: the artifacts are the only
cache. What lives as long as the run (engine, trainer) is in the `Session` of this process.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ParamSpec

from prefect import Task, flow
from prefect.cache_policies import NO_CACHE

from flows import prefect_server
from flows.background import ONE_BY_ONE, Background
from flows.prepare import Prepared, prepare
from flows.session import Session, open_session
from pipeline.artifact import Artifact
from pipeline.chain import CHAIN, INITIAL, When
from pipeline.provenance import recorded_environment
from stages.preflight import remarks
from stages.wiring import outside_members

P = ParamSpec("P")
Tasks = Mapping[str, Task[[int], str]]
RunOnce = Callable[..., None]
"""Takes a function and its arguments."""
METRICS = "metrics"
"""Not a step of the chain: the row of `metrics.parquet`, computed from the steps' artifacts."""
RETENTION = "retention"
"""Not a step either: drops the checkpoints that [retention] does not keep."""


_handed_over: dict[tuple[str, str, tuple[str, ...]], Prepared] = {}
"""Passed from a command of this process to the flow that it calls, so that a config is loaded and checked once."""


def train_prepared(prepared: Prepared, config: Path, overrides: list[str] | None = None) -> str:
    """Run the flow on a prepared run; return the path of the last checkpoint."""
    run = prepared.run
    where = run.name if run.copy else str(run.root.resolve())
    key = (str(config.resolve()), where, tuple(overrides or ()))
    _handed_over[key] = prepared
    try:
        return train(config=key[0], run=where, overrides=overrides)
    finally:
        _handed_over.pop(key, None)


@flow(name="train", persist_result=False, task_runner=ONE_BY_ONE)
def train(config: str, run: str, overrides: list[str] | None = None) -> str:
    """Train a policy; return the path of its last checkpoint.

    Args:
        config: path of the TOML file.
        run: the run directory or URL. What the same config has left there is used and not computed again.
        overrides: ``key=value`` settings that take precedence over the file.
    """
    prepared = _handed_over.pop((config, run, tuple(overrides or ())), None) or prepare(Path(config), run, overrides)
    settings, run_dir = prepared.settings, prepared.run
    for remark in (*prepared.remarks, *remarks(settings)):
        prepared.reporter.note(remark)
    try:
        with open_session(settings, run_dir, prepared.reporter) as session:
            run_dir.record_config(prepared.toml, settings.model_dump(mode="json"))
            run_dir.record_environment(recorded_environment(with_diff=prepared.records_diff))
            tasks = step_tasks(session)
            background = Background(tasks)
            try:
                train_all(session, tasks, background, run_task)
            finally:
                background.end()
    finally:
        prefect_server.computed.set()  # from here on only Prefect is at work
    return str(run_dir.policy_before(settings.iterations))


def train_all(session: Session, tasks: Tasks, background: Background, run_once: RunOnce) -> None:
    """Run every iteration of a run, and the evaluations that its config asks for.

    ``run_once`` runs what belongs to no iteration. `flows.planning.rehearsal` calls this with a session that computes
    nothing.
    """
    settings = session.config
    run_once(session.initial_policy)
    for member in outside_members(settings):
        run_once(session.member_policy, member.name)
    for iteration in range(INITIAL, settings.iterations):
        was_done = iteration == INITIAL or train_iteration(session, tasks, background, iteration)
        is_to_be_evaluated = settings.is_to_be_evaluated(iteration + 1)
        if is_to_be_evaluated and not session.is_evaluated(iteration):
            run_once(session.held_out_prompts)
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
    """Run the steps of an iteration; return whether this config had run them. Finished ones cost no Prefect task.

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


def step_tasks(session: Session) -> Tasks:
    """Return a Prefect task for each step; it returns the path of the step's artifact."""

    def perform(name: str) -> Callable[[int], str]:
        return lambda iteration: str(session.perform(name, iteration).path)

    tasks = {step.name: _task(step.name, perform(step.name)) for step in CHAIN}
    return {
        **tasks,
        METRICS: _task(METRICS, lambda iteration: str(session.metrics(iteration))),
        RETENTION: _task(RETENTION, lambda _: str(session.retain())),
    }


def run_task(make: Callable[..., Artifact], *arguments: str) -> None:
    """Run a function as a Prefect task, before the first iteration."""
    _task(make.__name__, lambda: str(make(*arguments).path))()


def _task(name: str, run: Callable[P, str]) -> Task[P, str]:
    return Task(run, name=name, cache_policy=NO_CACHE, persist_result=False)
