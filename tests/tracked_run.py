"""A run that trackers are told of, and what each has of it by its library's own means."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.reporter import SilentReporter
from flows.session import Session
from flows.tracking.reporter import RECORD, tracked
from pipeline.run_dir import RunDir
from stages.config import recorded_config
from stages.tracking import TrackingConfig


@dataclass
class Told:
    """What a tracker has of a run, by its library's own means."""

    project: str | None
    name: str | None
    figures: list[tuple[int, dict[str, float]]]
    """Step and figures, in the order in which they were logged."""
    completions: dict[int, str]
    """Step -> everything that is shown of its groups, as text."""


@dataclass(slots=True)
class Notes(SilentReporter):
    texts: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.texts.append(text)


def copied(finished: Path, folder: Path) -> RunDir:
    place = folder / "runs" / "small"
    shutil.copytree(finished, place)
    return RunDir(place)


def start(run: RunDir, *to: str, until: int = 2, **table: Any) -> list[str]:
    """Report the iterations of a run as one of its starts does; return the notes."""
    with_tracking = {"tracking": TrackingConfig.model_validate({"to": list(to), **table})}
    session = Session(recorded_config(run).model_copy(update=with_tracking), run, notes := Notes())
    with tracked(session):
        session.reporter.evaluation(0, {"eval_pass_at_1": 0.25, "eval_pass_rate": None})
        for iteration in range(until):
            session.metrics(iteration)
    return notes.texts


def in_tensorboard(run: RunDir) -> Told:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(run.logs / "tensorboard"))
    events.Reload()
    figures: list[tuple[int, dict[str, float]]] = []
    completions: dict[int, str] = {}
    for tag in events.Tags()["tensors"]:
        for event in events.Tensors(tag):
            value = make_ndarray(event.tensor_proto)
            if value.dtype == object:
                completions[event.step] = completions.get(event.step, "") + value.item().decode()
            else:
                figures.append((event.step, {tag: value.item()}))
    return Told(None, None, _joined(figures), completions)


def in_trackio(run: RunDir) -> Told:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    project, name = named(run)
    (found,) = [one for one in trackio.Api().runs(project) if one.name == f"{name}-{id_of(run)}"]
    logs = SQLiteStorage.get_logs(project, found.name, run_id=found.id)
    figures = [(log["step"], {k: v for k, v in log.items() if k not in ("step", "timestamp")}) for log in logs]
    completions: dict[int, str] = {}
    for trace in SQLiteStorage.get_traces(project, found.name, run_id=found.id):
        completions[trace["step"]] = completions.get(trace["step"], "") + json.dumps(trace)
    return Told(found.project, found.name.rpartition("-")[0], figures, completions)


def in_mlflow(run: RunDir) -> Told:
    from mlflow import MlflowClient

    project, _ = named(run)
    client = MlflowClient(f"sqlite:///{run.root.parent}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name(project)
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    names = found.data.metrics
    history = [one for name in names for one in client.get_metric_history(found.info.run_id, name)]
    completions = {}
    for file in client.list_artifacts(found.info.run_id, "completions"):
        path = client.download_artifacts(found.info.run_id, file.path)
        completions[int(Path(path).stem)] = Path(path).read_text()
    figures = _joined([(one.step, {one.key: one.value}) for one in history])
    return Told(experiment.name, found.info.run_name, figures, completions)


def in_wandb(run: RunDir) -> Told:
    """Read the offline files: records of Protocol Buffers in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    told = Told(None, None, [], {})
    for path in sorted((run.logs / "wandb").glob(f"offline-run-*-{id_of(run)}/*.wandb")):
        for data in _log_records(path.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                told.project, told.name = record.run.project, record.run.display_name
            if record.HasField("history"):
                items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                step = items.pop("_step", record.history.step.num)
                told.completions[step] = (path.parent / "files" / items["completions/path"]).read_text()
                numbers = {k: v for k, v in items.items() if not k.startswith(("_", "completions"))}
                told.figures.append((step, numbers))
    return told


def _log_records(data: bytes) -> Iterator[bytes]:
    position, record = 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


READERS: dict[str, Callable[[RunDir], Told]] = {
    "tensorboard": in_tensorboard,
    "trackio": in_trackio,
    "mlflow": in_mlflow,
    "wandb": in_wandb,
}


def _joined(figures: list[tuple[int, dict[str, float]]]) -> list[tuple[int, dict[str, float]]]:
    """Return one entry a step; a figure that was logged twice at a step begins another one."""
    found: list[tuple[int, dict[str, float]]] = []
    for step, one in figures:
        entry = next((entry for at, entry in found if at == step and not entry.keys() & one.keys()), None)
        if entry is None:
            found.append((step, dict(one)))
        else:
            entry |= one
    return sorted(found, key=lambda entry: entry[0])


def named(run: RunDir) -> tuple[str, str]:
    return f"sums-{run.root.parent.parent.name}", "first try"


def id_of(run: RunDir) -> str:
    return str(json.loads((run.logs / RECORD).read_text())["id"])
