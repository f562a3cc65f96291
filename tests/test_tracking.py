"""[tracking] with the trackers' own libraries: what they are told, once, and that nothing of it stops a run."""

import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.commands.fork import fork_tables
from flows.environment import set_defaults
from flows.prepare import prepare
from flows.session import Session
from flows.tracking import reporter
from flows.tracking.base import Figures
from flows.tracking.reporter import RECORD, TrackingReporter, recorded, tracked
from pipeline.errors import ConfigError
from pipeline.run_dir import RunDir
from stages.config import changed_settings, recorded_config
from stages.inspect.verify.verify import verify_run
from stages.tracking import TrackingConfig
from tests.small_run import make_small_run
from tests.tracked_run import READERS, Notes, Told, copied, id_of, in_tensorboard, in_trackio, named, start

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("wandb", "mlflow")]  # each needs some seconds to start
EVERY = ["trackio", "tensorboard", *SLOW]


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let no tracker ask the network or write into the home directory."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(home / "trackio"))  # read when Trackio is imported
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_CONFIG_DIR", str(home))
        patch.setenv("WANDB_CACHE_DIR", str(home))
        patch.setenv("WANDB_DATA_DIR", str(home))
        for name in ("WANDB_DIR", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
            patch.delenv(name, raising=False)
        before = set(os.environ)
        set_defaults()
        yield
        for name in set(os.environ) - before:
            del os.environ[name]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Path:
    """Return a finished run of two iterations; not to be changed."""
    return make_small_run(tmp_path_factory.mktemp("finished"), tiny_policy, 2)


@pytest.fixture(scope="module", params=EVERY)
def told(request: pytest.FixtureRequest, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """Return what a tracker has of a run that was started twice: once for its first iteration, then for both."""
    run = copied(finished, tmp_path_factory.mktemp(request.param))
    project, name = named(run)
    for until in (1, 2):
        notes = start(run, request.param, until=until, project=project, name=name)
        assert not [note for note in notes if "warning" in note]
    assert not verify_run(run).problems
    return READERS[request.param](run)


def test_each_tracker_has_the_figures_of_the_metrics_at_their_iterations(told: Told, finished: Path) -> None:
    rows = RunDir(finished).read_metrics().to_dicts()
    expected = []
    for row in rows:
        figures = {name: value for name, value in row.items() if isinstance(value, int | float)}
        step = figures.pop("iteration")
        seconds = {f"seconds/{entry['stage']}": entry["seconds"] for entry in row["seconds"]}
        (part,) = row["rewards"]
        parts = {f"rewards/exact/{name}": part[name] for name in ("mean", "null_count", "timed_out_count")}
        expected.append((step, {**figures, **seconds, **parts}))
    expected[0][1]["initial/eval_pass_at_1"] = 0.25
    assert [(step, sorted(figures)) for step, figures in told.figures] == [(s, sorted(f)) for s, f in expected]
    for (_, found), (_, figures) in zip(told.figures, expected, strict=True):
        assert {name: value for name, value in found.items() if not math.isclose(value, figures[name])} == {}
    assert told.figures[1][1]["reward_mean"] == 0.25


def test_a_restart_continues_the_same_run_of_the_tracker_without_doubled_steps(told: Told) -> None:
    assert [step for step, _ in told.figures] == [0, 1]


def test_the_config_names_project_and_run(told: Told) -> None:
    assert told.name in ("first try", None)
    assert told.project is None or told.project.startswith("sums-")


def test_each_tracker_shows_groups_with_prompt_reward_and_advantage(told: Told, finished: Path) -> None:
    for iteration in (0, 1):
        shown = told.completions[iteration]
        assert "1 + 1 =" in shown
        assert "[red]0 + 2 =" in shown
        rows = RunDir(finished).open(iteration, "advantages").read()
        assert rows["advantage"].to_list().count(0.5) == 1
        assert "0.5" in shown
        assert "-0.5" in shown
        assert all(str(group) in shown for group in rows["group_id"].unique())


def test_a_tracker_that_is_added_later_gets_the_earlier_iterations(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    project, name = named(run)
    start(run, "tensorboard", project=project, name=name)
    start(run, "tensorboard", "trackio", project=project, name=name)
    assert [step for step, _ in in_trackio(run).figures] == [0, 1]
    assert [step for step, _ in in_tensorboard(run).figures] == [0, 1]


def test_without_groups_no_completion_is_logged(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    start(run, "tensorboard", groups=0)
    assert list(in_tensorboard(run).completions) == [0]  # the config


def test_what_a_tracker_does_not_take_costs_one_note_and_comes_with_the_next_start(
    finished: Path, tmp_path: Path
) -> None:
    run = copied(finished, tmp_path)
    run.logs.mkdir(exist_ok=True)
    (run.logs / "tensorboard").write_text("in the way")
    project, name = named(run)
    notes = start(run, "tensorboard", "trackio", project=project, name=name)
    assert [note.partition(" (")[0] for note in notes if "warning" in note] == [
        "warning: tensorboard has failed and is told nothing more"
    ]
    assert [step for step, _ in in_trackio(run).figures] == [0, 1]
    (run.logs / "tensorboard").unlink()
    start(run, "tensorboard", "trackio", project=project, name=name)
    assert [step for step, _ in in_tensorboard(run).figures] == [0, 1]
    assert [step for step, _ in in_trackio(run).figures] == [0, 1]


class Broken:
    """A tracker whose server is away from its second iteration on."""

    where = "nowhere"

    def log(self, iteration: int, figures: Figures, groups: Any) -> None:
        if iteration:
            raise ConnectionError("away")

    def close(self, *, failed: bool) -> None:
        raise AssertionError("it has failed already")


def test_a_tracker_that_fails_while_the_run_goes_on_is_left_out_until_the_next_start(
    finished: Path, tmp_path: Path
) -> None:
    run = copied(finished, tmp_path)
    config = TrackingConfig(to=["wandb"])
    told = TrackingReporter(notes := Notes(), run, recorded_config(run), config, "0a0b0c0d", {})
    told.trackers["wandb"] = Broken()
    rows = run.read_metrics().to_dicts()
    for row in (*rows, {**rows[1], "iteration": 2}):
        told.iteration(row)
    told.close(failed=False)
    assert len(notes.texts) == 1
    assert "wandb has failed and is told nothing more (ConnectionError: away)" in notes.texts[0]
    assert json.loads((run.logs / RECORD).read_text())["last"] == {"wandb": 0}


class Silent:
    """A tracker that does not answer."""

    where = "nowhere"

    def __init__(self) -> None:
        self.is_over = threading.Event()

    def log(self, iteration: int, figures: Figures, groups: Any) -> None:
        self.is_over.wait(60)

    def close(self, *, failed: bool) -> None: ...


def test_a_tracker_that_does_not_answer_holds_neither_the_run_up_nor_its_interruption(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter, "FAREWELL_SECONDS", 0.1)
    run = copied(finished, tmp_path)
    config = recorded_config(run).model_copy(update={"tracking": TrackingConfig(to=["wandb"])})
    session, silent = Session(config, run, Notes()), Silent()

    def work() -> None:
        with tracked(session):
            assert isinstance(session.reporter, TrackingReporter)
            session.reporter.trackers["wandb"] = silent
            for iteration in (0, 1):
                session.metrics(iteration)
            raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        work()
    assert time.monotonic() - begin < 30
    silent.is_over.set()


def test_rows_that_cannot_be_read_keep_no_figures_from_a_tracker(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    rewards = run.open(1, "rewards")
    rewards.read()  # what was verified is not verified again
    rewards.files()[0].unlink()
    notes = start(run, "tensorboard")
    assert [note.partition(":")[2].partition(":")[0] for note in notes if "warning" in note] == [
        " no completions of iteration 1 are tracked"
    ]
    assert [step for step, _ in in_tensorboard(run).figures] == [0, 1]


def test_nothing_is_written_through_a_link(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    run.logs.mkdir(exist_ok=True)
    (tmp_path / "elsewhere").mkdir()
    (run.logs / "tensorboard").symlink_to(tmp_path / "elsewhere")
    assert any("leads out of" in note for note in start(run, "tensorboard"))
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", '{"run": 1}', '{"run": "RUN", "id": "../..", "last": {}}',
                                  '{"run": "RUN", "id": "-0x12345", "last": {}}', "[" * 9999])  # fmt: skip
def test_a_record_that_is_none_counts_as_missing(finished: Path, tmp_path: Path, text: str) -> None:
    run = copied(finished, tmp_path)
    run.logs.mkdir(exist_ok=True)
    (run.logs / RECORD).write_text(text.replace("RUN", str(run.root.absolute())))
    start(run, "tensorboard")
    assert len(id_of(run)) == 8
    assert [step for step, _ in in_tensorboard(run).figures] == [0, 1]


def test_a_record_cannot_claim_iterations_that_the_run_does_not_have(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    run.logs.mkdir(exist_ok=True)
    record = {"run": str(run.root.absolute()), "id": "0a0b0c0d", "last": {"wandb": 99999}}
    (run.logs / RECORD).write_text(json.dumps(record))
    assert recorded(run) == ("0a0b0c0d", {"wandb": 1})


def test_a_record_that_cannot_be_written_costs_one_note(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    (run.logs / RECORD).mkdir(parents=True)
    notes = start(run, "tensorboard")
    assert [note for note in notes if "cannot be written" in note] == [note for note in notes if "warning" in note]
    assert len([note for note in notes if "cannot be written" in note]) == 1
    assert [step for step, _ in in_tensorboard(run).figures] == [0, 1]


def test_an_error_of_a_tracker_is_told_without_the_login_in_it(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    told = TrackingReporter(notes := Notes(), run, recorded_config(run), TrackingConfig(to=["wandb"]), "0a0b0c0d", {})
    told._leave_out("mlflow", ConnectionError("http://me:s3cr3t@host/api is gone"))
    assert "(ConnectionError: http://host/api is gone)" in notes.texts[0]


def test_a_fork_tells_nobody_whom_the_other_run_has_told(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    tables = {**json.loads(run.resolved_config.read_text()), "tracking": {"to": ["wandb"], "project": "strangers"}}
    run.resolved_config.write_text(json.dumps(tables))
    assert "tracking" not in fork_tables(run, 1, {}, None, [])
    assert fork_tables(run, 1, {"tracking": {"to": ["mlflow"]}}, None, [])["tracking"] == {"to": ["mlflow"]}


def test_a_copy_of_a_run_is_a_run_of_its_own_in_trackers(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    project, name = named(run)
    start(run, "trackio", until=1, project=project, name=name)
    copy = RunDir(run.root.with_name("copy"))
    shutil.copytree(run.root, copy.root)
    start(copy, "trackio", project=project, name=name)
    assert id_of(copy) != id_of(run)
    assert [step for step, _ in in_trackio(run).figures] == [0]
    assert [step for step, _ in in_trackio(copy).figures] == [0, 1]


def test_a_library_that_is_not_installed_is_named_before_anything_is_written(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    config = tmp_path / "config.toml"
    config.write_text((finished.parent.parent / "config.toml").read_text() + '\n[tracking]\nto = ["wandb", "mlflow"]\n')
    message = r"wandb and mlflow, not installed here: give `pip install 'grpo-pipeline\[wandb,mlflow\]'`"
    with pytest.raises(ConfigError, match=message):
        prepare(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_upload_that_does_not_end_keeps_no_run_from_its_end() -> None:
    import wandb

    settings = wandb.Settings()
    settings.update_from_env_vars(dict(os.environ))
    assert settings.finish_timeout == 30.0


def test_tracking_may_come_and_go_between_two_starts(finished: Path) -> None:
    run = RunDir(finished)
    config = recorded_config(run)
    assert changed_settings(run, config.model_copy(update={"tracking": TrackingConfig(to=["mlflow"])})) == []
    assert changed_settings(run, config.model_copy(update={"seed": 7})) != []


def test_without_the_table_nobody_is_told_and_nothing_is_recorded(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    session = Session(recorded_config(run), run, notes := Notes())
    with tracked(session):
        session.metrics(0)
    assert session.reporter is notes
    assert not (run.logs / RECORD).exists()
