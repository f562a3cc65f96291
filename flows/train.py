"""The train flow: a Prefect flow whose tasks are the steps of `pipeline.chain`, see `flows.training`.

`train.serve(...)` and `prefect deploy flows/train.py:train` schedule it. Prefect's own cache is off, and its results
are not persisted: the artifacts are the only cache.
"""

from dataclasses import replace
from pathlib import Path

from prefect import flow, runtime

from flows import prefect_server
from flows.environment import set_defaults
from flows.flow_runs import PrefectWork, logged, title
from flows.prepare import Prepared, prepare
from flows.training import train_run
from flows.watching import watched
from pipeline.files import user_path

_prepared: dict[str, Prepared] = {}
"""Runs that were loaded and checked in this process for the flow that begins next, so that this happens once."""


def train_prepared(prepared: Prepared, config: Path, overrides: list[str] | None = None) -> str:
    """Run the flow on a prepared run; return the path of the last checkpoint."""
    run = prepared.run
    source, place = str(config.resolve()), run.name if run.copy else str(run.root.resolve())
    _prepared[_key(source, place, overrides)] = prepared
    try:
        return train(source, place, overrides)
    finally:
        _prepared.clear()


def flow_run_name() -> str:
    """Return the name of the current flow run: run and iterations, ``demo 0-89``. A run that fails has only the run's.

    What was loaded for the name is kept for the flow.
    """
    parameters = runtime.flow_run.parameters
    try:
        prepared = _take(**parameters)
    except Exception:  # the flow meets it next; here Prefect would leave the flow run pending
        return str(parameters["run"] or Path(parameters["config"]).stem)
    _prepared[_key(**parameters)] = prepared
    return title(prepared)


@flow(name="train", flow_run_name=flow_run_name, persist_result=False)
def train(config: str, run: str | None = None, overrides: list[str] | None = None) -> str:
    """Train a policy; return the path of its last checkpoint.

    Args:
        config: path of the TOML file. Relative paths, here and in the file, begin in the current directory: where
            ``serve`` was called, or where ``prefect deploy`` was.
        run: the run directory or URL; default: runs/<name of the config>. What the same config has left there is used
            and not computed again.
        overrides: ``key=value`` settings that take precedence over the file.
    """
    set_defaults()
    prepared = logged(_take(config, run, overrides))
    try:
        with watched(prepared.run, prepared.reporter) as reporter:
            return train_run(replace(prepared, reporter=reporter), PrefectWork())
    finally:
        prefect_server.computed.set()  # from here on only Prefect is at work


def _take(config: str, run: str | None, overrides: list[str] | None) -> Prepared:
    found = _prepared.pop(_key(config, run, overrides), None)
    return found or prepare(user_path(config), run or f"runs/{Path(config).stem}", overrides)


def _key(config: str, run: str | None, overrides: list[str] | None) -> str:
    return repr((config, run, overrides or []))
