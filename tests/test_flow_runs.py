"""What a run keeps of its flow runs, and which of their tasks are tried again."""

import uuid
from pathlib import Path
from types import SimpleNamespace

from pipeline.run_dir import RunDir


def test_what_cannot_pass_is_not_tried_again() -> None:
    from prefect.states import Failed

    from flows.flow_runs import retry_options
    from flows.training import Retries
    from pipeline.errors import CheckFailed, EngineDied, EngineError, StoreError, StoreUnreachable

    notes: list[str] = []
    options = retry_options(Retries(3, 0.5, notes.append))
    assert (options["retries"], options["retry_delay_seconds"]) == (3, [0.5, 1.0, 2.0])
    assert retry_options(Retries(3, 3000.0, notes.append))["retry_delay_seconds"] == [3000.0, 3600.0, 3600.0]
    task_run = SimpleNamespace(name="generate 3", run_count=2)
    ask = options["retry_condition_fn"]
    for error in (EngineError("a"), StoreError("b"), CheckFailed("c"), ValueError("d")):
        assert not ask(None, task_run, Failed(data=error))
    assert notes == []
    for error in (
        EngineDied("it died: expected it to live\nlog"),
        StoreUnreachable("s3://b (no network): check the URL"),
    ):
        assert ask(None, task_run, Failed(data=error))
    assert notes == [
        "warning: generate 3 is tried again in 1 s: it died",
        "warning: generate 3 is tried again in 1 s: s3://b (no network)",
    ]


def test_a_copy_of_a_run_does_not_touch_the_flow_run_of_the_original(tmp_path: Path) -> None:
    from flows.flow_runs import RECORD, record, recorded

    original, copy = RunDir(tmp_path / "original"), RunDir(tmp_path / "copy")
    one = uuid.uuid4()
    record(original, [one])
    assert recorded(original) == [one]
    (tmp_path / "link").symlink_to(tmp_path)
    assert recorded(RunDir(tmp_path / "link" / "original")) == [one]
    assert recorded(RunDir(tmp_path / "original" / ".." / "original")) == [one]
    copy.logs.mkdir(parents=True)
    (copy.logs / RECORD).write_text((original.logs / RECORD).read_text())
    assert recorded(copy) == []
    (copy.logs / RECORD).write_text('{"run": 3')
    assert recorded(copy) == []
