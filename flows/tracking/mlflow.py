"""MLflow: figures, and completions as CSV files that its page shows as tables."""

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from shlex import quote
from typing import Any

import polars as pl
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from flows.tracking.base import Figures, Tracked, completion_rows
from pipeline.text import without_login
from stages.inspect.report_groups import View

TAG = "grpo_id"
"""Tag by which a run is found again."""
OUTSIDE = re.compile(r"[^\w./: -]")
"""What no name of a metric may hold."""


class MlflowTracker:
    """A run of MLflow, where MLFLOW_TRACKING_URI says, else in a database that neighbouring runs share."""

    def __init__(self, tracked: Tracked) -> None:
        folder = tracked.shared.absolute() / "mlflow"
        own = f"sqlite:///{folder}/mlflow.db"
        uri = os.environ.get("MLFLOW_TRACKING_URI") or own
        if uri == own:
            folder.mkdir(parents=True, exist_ok=True)
        self.where = f"mlflow ui --backend-store-uri {quote(own)}"
        if uri != own:  # it may hold a password
            self.where = without_login(uri) if uri.startswith("http") else "mlflow ui, with your MLFLOW_TRACKING_URI"
        self.client = MlflowClient(uri)
        found = self.client.get_experiment_by_name(tracked.project)
        if found is None:
            artifacts = (folder / "artifacts").as_uri() if uri == own else None
            experiment = self.client.create_experiment(tracked.project, artifact_location=artifacts)
        else:
            experiment = found.experiment_id
        runs = self.client.search_runs([experiment], f"tags.{TAG} = '{tracked.id}'")
        if runs:
            self.run = runs[0].info.run_id
            self.client.update_run(self.run, status="RUNNING")
        else:
            made = self.client.create_run(experiment, run_name=tracked.name, tags={TAG: tracked.id})
            self.run = made.info.run_id
            self.client.log_batch(self.run, params=[Param(key, str(value)) for key, value in _flat(tracked.settings)])

    def log(self, iteration: int, figures: Figures, groups: Sequence[View]) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(OUTSIDE.sub("_", name), value, now, iteration) for name, value in figures.items()]
        if groups:
            table = pl.DataFrame(completion_rows(groups), infer_schema_length=None).write_csv()
            self.client.log_text(self.run, table, f"completions/{iteration:06d}.csv")
        self.client.log_batch(self.run, metrics=metrics)

    def close(self, *, failed: bool) -> None:
        self.client.set_terminated(self.run, "FAILED" if failed else "FINISHED")


def _flat(tables: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield above + key, value
