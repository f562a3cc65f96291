"""One stage of one iteration, with the config that its run has recorded."""

from pathlib import Path

from flows.reporter import Reporter
from flows.session import open_session
from flows.training import PlainWork, Work, step_tasks
from pipeline.manifest import is_finished
from pipeline.run_dir import RunDir
from stages.config import RunConfig, recorded_config
from stages.wiring import check_settings


def check_stage(run: RunDir, name: str, iteration: int) -> RunConfig:
    """Return the run's config, after checking that it is that of the step's finished artifact. Read-only.

    Raises:
        RecipeMismatch: naming the first setting or input that differs.
    """
    config = recorded_config(run)
    check_settings(config, run, name, iteration)
    return config


def perform_stage(
    config: RunConfig, run: RunDir, name: str, iteration: int, reporter: Reporter, work: Work | None = None
) -> Path:
    """Run a step of an iteration, or find what it has made; return the path of its main artifact.

    ``work`` says how it is executed, default: plainly.
    """
    work = work or PlainWork()
    with open_session(config, run, reporter) as session, work.on(run):
        tasks = step_tasks(session, work)
        is_new = name == "update" and not is_finished(run.place(iteration, "policy"))
        made = tasks[name](iteration)
        if is_new:
            tasks["optimizer"](iteration)  # else the next update would have to train on these rows again
    return Path(made)
