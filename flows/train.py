"""The train flow: a Prefect flow whose tasks are the stages.

Tasks take an iteration and return a path, never frames, and Prefect's own cache is off: the artifacts are the only
cache. What lives as long as the run (engine, trainer) is in the `Session` of this process.
"""

from contextvars import ContextVar
from pathlib import Path

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.background import ONE_BY_ONE, Beside
from flows.prefect_server import temporary_server_watched
from flows.session import Reporter, Session, SilentReporter, open_session
from pipeline.artifact import open_artifact
from pipeline.manifest import is_finished
from pipeline.provenance import environment, git_state
from pipeline.run_dir import state_of
from pipeline.runs import run_at
from pipeline.stage import find_finished
from stages.config import check_unchanged, load_config
from stages.evaluate import summarize
from stages.iteration import outside_members
from stages.preflight import preflight

session_of_flow: ContextVar[Session] = ContextVar("session_of_flow")
SILENT = SilentReporter()
reporter_of_flow: ContextVar[Reporter] = ContextVar("reporter_of_flow", default=SILENT)


@flow(name="train", persist_result=False, task_runner=ONE_BY_ONE)
def train(config: str, run: str, overrides: list[str] | None = None) -> str:
    """Train a policy; return the path of its last checkpoint.

    Args:
        config: path of the TOML file.
        run: the run directory or URL. What the same config has left there is used and not computed again.
        overrides: ``key=value`` settings that take precedence over the file.
    """
    settings = load_config(Path(config), overrides)
    run_dir = run_at(run)
    check_unchanged(run_dir, settings)
    preflight(settings, run_dir)
    with temporary_server_watched(), open_session(settings, run_dir, reporter_of_flow.get()) as session:
        run_dir.record_config(Path(config).read_text(encoding="utf-8"), settings.model_dump(mode="json"))
        run_dir.record_environment({**environment(), "git_diff": git_state()["diff"]})
        token = session_of_flow.set(session)
        beside = Beside()
        try:
            initial_policy()
            for member in outside_members(settings):
                member_policy(member.name)
            for num_updates in range(settings.iterations + 1):
                was_done = num_updates == 0 or train_iteration(session, beside, num_updates - 1)
                if session.wiring.is_evaluated(num_updates):
                    evaluate_once(session, num_updates)
                if num_updates:
                    report(session, beside, num_updates - 1, was_done=was_done)
                if num_updates in (0, settings.iterations) and session.wiring.is_evaluated(num_updates):
                    beside.wait_for_all()
                    session.reporter.evaluation(num_updates, summarize_evaluation(session, num_updates))
            if settings.iterations:
                have_state(session, beside, settings.iterations - 1)
            beside.wait_for_all()
        finally:
            beside.end()
            session_of_flow.reset(token)
    return str(run_dir.policy_before(settings.iterations))


def train_iteration(session: Session, beside: Beside, iteration: int) -> bool:
    """Run the six stages of an iteration; return whether this config had run them. Finished ones cost no Prefect task.

    In an offline iteration the completions of another run take the place of the first two stages. While the engine
    samples, there is time for what it does not need: the next prompts, and what the last iteration has left to write.
    """
    wiring = session.wiring
    is_offline = session.config.stored(iteration) is not None
    if is_finished(session.run.place(iteration, "policy")):
        sampled = () if is_offline else (wiring.prompts, wiring.generate)
        calls = (*sampled, wiring.score, wiring.normalize, wiring.batch, wiring.update)
        if all(find_finished(call(iteration)) is not None for call in calls):
            return True
    if iteration and not beside.is_begun(optimizer, iteration - 1):
        have_state(session, beside, iteration - 1)  # a lost one: before the engine measures what memory it may take
    session.warm_up(iteration)
    if is_offline:
        refer_stored(iteration)
    else:
        beside.wait_for(prompts, iteration)
        if iteration + 1 < session.config.iterations and session.config.stored(iteration + 1) is None:
            beside.begin(prompts, iteration + 1)
        beside.raise_failed()
        generate(iteration)
    for stage in (score, normalize, batch):
        beside.raise_failed()
        stage(iteration)
    beside.settle(metrics)  # a killed run lacks the figures of its last iteration at most
    if iteration:
        have_state(session, beside, iteration - 1)
    update(iteration)
    beside.begin(optimizer, iteration)
    return False


def have_state(session: Session, beside: Beside, iteration: int) -> None:
    """Have the optimizer's state after an iteration on disk: it may be there, on its way, or lost."""
    policy = open_artifact(session.run.policy_before(iteration + 1))
    if beside.is_begun(optimizer, iteration) or state_of(policy) is None:
        beside.wait_for(optimizer, iteration)


def report(session: Session, beside: Beside, iteration: int, *, was_done: bool) -> None:
    """Put the iteration's row into `metrics.parquet` and show it; beside the flow when the iteration was run now."""
    if was_done:
        beside.settle(metrics)  # one at a time
        session.metrics(iteration)
    else:
        beside.begin(metrics, iteration)


def evaluate_once(session: Session, num_updates: int) -> None:
    """Evaluate the policy after so many iterations, unless that is done."""
    if is_finished(session.run.evaluations_of(num_updates)) and is_finished(session.run.held_out_prompts):
        find_finished(session.wiring.held_out_prompts())
        if find_finished(session.wiring.evaluate(num_updates)) is not None:
            return
    held_out_prompts()
    evaluate(num_updates)


def summarize_evaluation(session: Session, num_updates: int) -> dict[str, float | None]:
    """Return the figures of an evaluation."""
    return summarize(open_artifact(session.run.evaluations_of(num_updates)).read())


stage_task = task(cache_policy=NO_CACHE, persist_result=False)


@stage_task
def initial_policy() -> str:
    """Take the policy that the run begins with into the run."""
    return session_of_flow.get().initial_policy()


@stage_task
def member_policy(name: str) -> str:
    """Take a group member's checkpoint from outside into the run."""
    return session_of_flow.get().member_policy(name)


@stage_task
def held_out_prompts() -> str:
    """Draw the questions of every evaluation."""
    return session_of_flow.get().held_out_prompts()


@stage_task
def prompts(iteration: int) -> str:
    """Draw the questions of an iteration."""
    return session_of_flow.get().prompts(iteration)


@stage_task
def refer_stored(iteration: int) -> str:
    """Take completions that another run has stored as those of an iteration."""
    return session_of_flow.get().refer_stored(iteration)


@stage_task
def generate(iteration: int) -> str:
    """Sample groups of answers."""
    return session_of_flow.get().generate(iteration)


@stage_task
def score(iteration: int) -> str:
    """Score the answers."""
    return session_of_flow.get().score(iteration)


@stage_task
def normalize(iteration: int) -> str:
    """Turn rewards into advantages."""
    return session_of_flow.get().normalize(iteration)


@stage_task
def batch(iteration: int) -> str:
    """Put the rows into training order."""
    return session_of_flow.get().batch(iteration)


@stage_task
def update(iteration: int) -> str:
    """Train on the rows."""
    return session_of_flow.get().update(iteration)


@stage_task
def optimizer(iteration: int) -> str:
    """Keep the optimizer's state after an update."""
    return session_of_flow.get().optimizer(iteration)


@stage_task
def metrics(iteration: int) -> str:
    """Put the iteration's row into `metrics.parquet` and show it."""
    return session_of_flow.get().metrics(iteration)


@stage_task
def evaluate(num_updates: int) -> str:
    """Answer the held-out questions."""
    return session_of_flow.get().evaluate(num_updates)
