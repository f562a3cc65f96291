"""The flow rescore: what `grpo rescore` does, as a Prefect flow."""

from pathlib import PurePosixPath

from prefect import flow, get_run_logger, runtime

from flows.commands.options import named_after, permit_named
from flows.environment import set_defaults
from flows.flow_runs import PrefectWork
from flows.progress import LogReporter
from flows.reporter import SilentReporter
from flows.rescoring import parse_iterations, rescore_run, summary
from flows.watching import watched
from pipeline.config import load_toml
from pipeline.files import user_path
from pipeline.functions import permitting_only
from pipeline.runs import open_run, run_at


def flow_run_name() -> str:
    """Return the name of the current flow run: ``demo with terse, 0-9``."""
    given = runtime.flow_run.parameters
    chosen = f", {given['iterations']}" if given["iterations"] else ""
    return f"{PurePosixPath(given['run']).name} with {PurePosixPath(given['config']).stem}{chosen}"


@flow(name="rescore", flow_run_name=flow_run_name, persist_result=False)
def rescore(
    run: str,
    config: str,
    new: str | None = None,
    iterations: str | None = None,
    overrides: list[str] | None = None,
    trust: bool = False,
) -> str:
    """Give stored completions new rewards and advantages, in a new run that refers to them; return its place.

    Args:
        run: the run directory or URL whose completions are scored.
        config: path of the TOML file with the tables that replace those of the run: [score], [normalize].
        new: the new run; default: next to ``run``, named after both.
        iterations: which, e.g. ``0-9`` or ``3,5``; default: all stored ones.
        overrides: ``key=value`` settings that take precedence over the file.
        trust: execute what only the run's own config names.
    """
    set_defaults()
    log = get_run_logger().info
    own, place = load_toml(user_path(config)), new or named_after(run, user_path(config).stem)
    with permitting_only():
        permit_named(own, overrides, is_trusted=trust)
        chosen, made = parse_iterations(iterations), run_at(place)
        with watched(made, LogReporter(SilentReporter(), log)) as reporter:
            done = rescore_run(open_run(run), own, made, chosen, overrides or [], reporter, PrefectWork())
        for row in summary(open_run(run), done):
            log(", ".join(f"{name} {value}" for name, value in row.items() if value is not None))
    return place
