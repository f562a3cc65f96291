"""The flow evaluate: what `grpo stage evaluate` does, as a Prefect flow."""

from pathlib import PurePosixPath

from prefect import flow, get_run_logger, runtime

from flows.environment import set_defaults
from flows.flow_runs import PrefectWork
from flows.one_stage import check_stage, perform_stage
from flows.progress import LogReporter, evaluation_line
from flows.reporter import SilentReporter
from flows.watching import watched
from pipeline.artifact import open_artifact
from pipeline.functions import permit, permitting_only
from pipeline.manifest import is_finished
from pipeline.runs import open_run
from stages.evaluate import summarize


def flow_run_name() -> str:
    """Return the name of the current flow run: ``demo after 90``."""
    given = runtime.flow_run.parameters
    which = "last policy" if given["updates"] is None else f"after {given['updates']}"
    return f"{PurePosixPath(given['run']).name} {which}"


@flow(name="evaluate", flow_run_name=flow_run_name, persist_result=False)
def evaluate(run: str, updates: int | None = None, trust: bool = False) -> str:
    """Evaluate a policy of a run on its held-out prompts; return the path of the evaluations.

    Args:
        run: the run directory or URL; it has held-out prompts when its config has evaluate.every.
        updates: the policy after so many updates; default: the last one.
        trust: execute what only the run's own config names.
    """
    set_defaults()
    log, run_dir = get_run_logger().info, open_run(run)
    if updates is None:
        updates = max((i + 1 for i in run_dir.iterations() if is_finished(run_dir.place(i, "policy"))), default=0)
    with permitting_only():
        if trust:
            permit(None)
        config = check_stage(run_dir, "evaluate", updates - 1)
        with watched(run_dir, LogReporter(SilentReporter(), log)) as reporter:
            made = perform_stage(config, run_dir, "evaluate", updates - 1, reporter, PrefectWork())
    log(evaluation_line(updates, summarize(open_artifact(made).read())))
    return str(made)
