"""When the data of a schedule counts as changed, and what a schedule remembers of it."""

import os
from pathlib import Path

import polars as pl
import pytest

from flows.schedule import record
from flows.schedule.spec import Job
from flows.schedule.triggers import look, reason
from pipeline.errors import ArtifactDamaged, SourceError
from pipeline.object_store import open_store
from tests.schedules import job
from tests.stores import new_machine


def test_a_firing_without_a_condition_runs(tmp_path: Path) -> None:
    assert reason(job(tmp_path), {}, {}) == (True, "each firing runs")


def due(now: Job) -> tuple[bool, str]:
    """Return whether a job with a condition runs, as the flow finds out."""
    assert now.when is not None
    return reason(now, look(now.when, Path(now.folder)), record.seen(now))


def works(now: Job) -> None:
    """Do what the flow does after a command that has worked."""
    assert now.when is not None
    record.remember(now, look(now.when, Path(now.folder)), {})


def test_a_changed_file_fires_once_and_a_touched_one_never(tmp_path: Path) -> None:
    reward = tmp_path / "close.py"
    reward.write_text("one")
    fires = job(tmp_path, when={"changed": "close.py"})
    assert due(fires) == (True, "first run: no earlier one has worked")
    works(fires)
    os.utime(reward, (0, 0))
    assert due(fires) == (False, "nothing changed since the last run that worked: changed close.py")
    before = reward.stat()
    reward.write_text("two")
    os.utime(reward, ns=(before.st_atime_ns, before.st_mtime_ns))  # the times and the size say nothing
    assert due(fires) == (True, "close.py changed")
    assert due(fires) == (True, "close.py changed"), "until a run has worked"
    works(fires)
    assert due(fires)[0] is False


def test_a_new_and_a_missing_file_are_changes_too(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a")
    fires = job(tmp_path, when={"changed": "*.py"})
    works(fires)
    (tmp_path / "b.py").write_text("b")
    assert due(fires) == (True, "b.py changed")
    works(fires)
    (tmp_path / "a.py").unlink()
    assert due(fires) == (True, "a.py changed")
    (tmp_path / "b.py").unlink()
    with pytest.raises(SourceError, match=r"when.changed names \*.py, and .* has no such file"):
        due(fires)


def test_rows_are_new_by_their_content_and_not_by_their_file_name(tmp_path: Path) -> None:
    fires = job(tmp_path, when={"new_rows": "data/*.parquet"})
    data = tmp_path / "data"
    data.mkdir()
    works(fires)
    assert due(fires) == (False, "nothing changed since the last run that worked: new_rows data/*.parquet")
    pl.DataFrame({"question": ["a"]}).write_parquet(data / "one.parquet")
    pl.DataFrame({"question": pl.Series([], dtype=pl.String)}).write_parquet(data / "empty.parquet")
    assert due(fires) == (True, "new rows in data/one.parquet")
    works(fires)
    (data / "one.parquet").rename(data / "renamed.parquet")
    assert due(fires)[0] is False
    (data / "renamed.parquet").unlink()
    assert due(fires)[0] is False, "rows that go are not new"
    pl.DataFrame({"question": ["b"]}).write_parquet(data / "two.parquet")
    assert due(fires) == (True, "new rows in data/two.parquet")


def test_files_of_all_folders_and_of_the_home_are_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    files = [tmp_path / "code" / "very" / "deep" / f"{name}.py" for name in "abcd"] + [tmp_path / "home" / "mine.py"]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("one")
    fires = job(tmp_path, when={"changed": ["code/**/*.py", "~/mine.py"]})
    works(fires)
    for file in files:
        file.write_text("two")
    four = "code/very/deep/a.py, code/very/deep/b.py, code/very/deep/c.py and 1 more changed"
    assert due(fires) == (True, f"{four}; {files[-1]} changed")


def test_one_of_several_conditions_is_enough_and_a_new_condition_counts(tmp_path: Path) -> None:
    (tmp_path / "close.py").write_text("one")
    works(job(tmp_path, when={"changed": "close.py"}))
    both = job(tmp_path, when={"changed": "close.py", "new_rows": "*.jsonl"})
    assert due(both) == (True, "new condition: new_rows *.jsonl")
    works(both)
    (tmp_path / "empty.jsonl").touch()
    assert due(both)[0] is False
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert due(both) == (True, "new rows in rows.jsonl")


def test_rows_on_a_store_are_watched_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_machine(tmp_path / "work", monkeypatch)
    url = f"memory://bucket/{tmp_path.name}"
    fires = job(tmp_path, when={"new_rows": f"{url}/*.jsonl"})
    open_store(url).write("one.jsonl", b"{}\n")
    works(fires)
    open_store(url).write("other.txt", b"x")
    open_store(f"{url}/deep").write("two.jsonl", b"{}\n{}\n{}\n")
    assert due(fires)[0] is False
    open_store(url).write("two.jsonl", b"{}\n{}\n")
    assert due(fires) == (True, f"new rows in {url}/two.jsonl")
    with pytest.raises(SourceError, match="has a wildcard in a folder's name"):
        due(job(tmp_path, when={"new_rows": "memory://bucket/*/rows.jsonl"}))


def test_the_record_is_next_to_the_run_and_a_damaged_one_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "close.py").write_text("one")
    fires = job(tmp_path, run="runs/demo", when={"changed": "close.py"})
    works(fires)
    path = tmp_path / "runs" / ".schedules" / "a.json"
    assert path.is_file()
    for text in ('{"data": 1}', '{"data": {"changed close.py": 1}}'):
        path.write_text(text)
        with pytest.raises(ArtifactDamaged, match="delete it, and the schedule runs once as if its data were new"):
            due(fires)


def test_the_record_of_a_run_on_a_store_is_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    log = record.log_path(job(tmp_path, run="s3://bucket/runs/demo"))
    assert log == tmp_path / "state" / "grpo" / ".schedules" / "a.log"
