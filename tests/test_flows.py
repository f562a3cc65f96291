"""The flows on a real Prefect server: names, states, logs; and the same run without Prefect.

The engine is a script of the user's, so that no model is loaded for it; all else is real.
"""

import json
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from pipeline.run_dir import RunDir
from tests.flow_runs import (
    CONFIG,
    ENGINE,
    NO_PREFECT,
    PATIENCE,
    SERVE,
    artifacts_of,
    digests,
    events_of,
    finish,
    new_flow_runs,
    start,
)
from tests.processes import descendants, survivors, until


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Path:
    """Return a folder with a config, its source and its engine."""
    path = tmp_path_factory.mktemp("flows")
    rows = [{"question": f"{i} + {2 - i} =", "answer": "2"} for i in range(30)]
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path / "scripted_answers.py").write_text(ENGINE)
    (path / "small.toml").write_text(CONFIG.format(policy=tiny_policy))
    (path / "serve.py").write_text(SERVE)
    return path


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Offer a Prefect server to this process; return its address."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=PATIENCE):
        from prefect.settings import PREFECT_API_URL

        yield str(PREFECT_API_URL.value())


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[Any]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as found:
        yield found


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in the folder, as `prefect deploy` lets a flow run do."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path, client: Any) -> Any:
    """Return the flow run of a finished run."""
    from flows.train import train

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])
        (found,) = new_flow_runs(client, lambda: train("small.toml", "runs/flow", ["seed=1"]))
    return found


def test_a_flow_run_is_named_after_run_and_iterations_and_has_the_commands_parameters(trained: Any) -> None:
    assert trained.name == "flow 0-1"
    assert trained.state_name == "Completed"
    assert trained.parameters == {"config": "small.toml", "run": "runs/flow", "overrides": ["seed=1"]}


def test_a_task_run_is_named_after_stage_and_iteration(trained: Any, client: Any) -> None:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    wanted = ["prompts", "generate", "score", "normalize", "batch", "update", "optimizer", "metrics"]
    names = [f"{stage} {i}" for stage in wanted for i in range(2)]
    names += ["initial_policy", "held_out_prompts", "held_out_prompts", "evaluate initial", "evaluate 1"]

    def found() -> list[str]:
        by_flow_run = FlowRunFilter(id=FlowRunFilterId(any_=[trained.id]))
        return sorted(task.name for task in client.read_task_runs(flow_run_filter=by_flow_run) if task.state)

    assert until(lambda: found() == sorted(names)), found()  # the server is told of tasks by events, in the end


def test_the_flow_runs_log_has_the_lines_of_the_iterations(trained: Any, client: Any) -> None:
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    def lines() -> list[list[str]]:
        logs = client.read_logs(log_filter=LogFilter(flow_run_id=LogFilterFlowRunId(any_=[trained.id])))
        return [log.message.split() for log in logs if log.task_run_id is None]

    def is_told() -> bool:
        firsts = [words[0] for words in lines()]
        return {"iter", "0", "1"} <= set(firsts) and firsts.count("held-out") == 2

    assert until(is_told), lines()


def test_the_page_of_a_run_has_its_metrics_and_each_iteration_is_an_event(trained: Any, client: Any) -> None:
    def tables() -> list[Any]:
        return [artifact for artifact in artifacts_of(client, trained) if artifact.key == "flow-metrics"]

    assert until(lambda: len(tables()) == 2)  # a version for each iteration
    found = tables()
    assert [len(json.loads(artifact.data)) for artifact in found] == [1, 2]
    first, last = json.loads(found[-1].data)
    assert (first["iter"], last["iter"]) == ("0", "1")
    assert "grpo report runs/flow --live" in found[-1].description
    assert until(lambda: len(events_of(client, trained, "grpo.iteration.finished")) == 2)
    told = events_of(client, trained, "grpo.iteration.finished")
    assert [event.payload["iteration"] for event in told] == [0, 1]
    assert {event.resource.id for event in told} == {"grpo.run.flow"}


def test_the_progress_of_a_long_stage_moves_on_the_page_and_ends_at_100(trained: Any, client: Any) -> None:
    from flows.artifacts import LongStage, Pace, Teller

    now = 0.0
    notes: list[str] = []
    teller = Teller(notes.append)
    stage = LongStage(teller, "flow-generate", trained.id, "generate of flow", Pace(lambda: now))

    def progress() -> list[tuple[Any, str]]:
        found = [artifact for artifact in artifacts_of(client, trained) if artifact.key == "flow-generate"]
        return [(artifact.data, artifact.description) for artifact in found]

    stage.move(1, 4)  # too early
    now = 10.0
    stage.move(2, 4, "12 tok/s")
    assert until(lambda: progress() == [(50, "generate of flow: 2 of 4 12 tok/s")]), (progress(), notes)
    now = 12.0
    stage.move(3, 4)  # too soon after the last one
    stage.end()
    teller.close()
    assert until(lambda: progress() == [(100, "generate of flow: finished")]), (progress(), notes)
    assert notes == []


@pytest.mark.slow
def test_without_prefect_the_command_does_the_same(folder: Path, trained: Any) -> None:
    """It asks no server, not even one that is named, and imports neither Prefect nor a tracker."""
    command = ("-c", NO_PREFECT, "run", "small.toml", "--run", "runs/plain", "--set", "seed=1", "--no-prefect")
    output = finish(start(folder, *command, server="http://127.0.0.1:9/api"))
    assert output.splitlines()[-1] == "[]"
    assert digests(folder / "runs" / "plain") == digests(folder / "runs" / "flow")
    assert len(digests(folder / "runs" / "plain")) == 22
    rows = [RunDir(folder / "runs" / name).read_metrics().drop("seconds") for name in ("plain", "flow")]
    assert rows[0].select("iteration", "reward_mean", "loss").equals(rows[1].select("iteration", "reward_mean", "loss"))
    command = ("-c", NO_PREFECT, "fork", "runs/plain", "small.toml", "--at", "1", "--run", "runs/fork", "--no-prefect")
    output = finish(start(folder, *command, "--set", "iterations=1", server="http://127.0.0.1:9/api"))
    assert output.splitlines()[-1] == "[]"
    assert RunDir(folder / "runs" / "fork").has(0, "policy")


@pytest.mark.slow
def test_a_run_that_is_tracked_has_the_same_digests(folder: Path, trained: Any) -> None:
    tracked = ("--no-prefect", "--set", "seed=1", "--set", 'tracking.to=["tensorboard"]')
    output = finish(start(folder, "-m", "flows.cli", "run", "small.toml", "--run", "runs/tracked", *tracked))
    assert "tensorboard: tensorboard --logdir runs" in output
    assert list((folder / "runs" / "tracked" / "logs" / "tensorboard").iterdir())
    assert digests(folder / "runs" / "tracked") == digests(folder / "runs" / "flow")


def test_a_finished_run_is_found_and_says_so(here: Path, client: Any, trained: Any) -> None:
    from flows.train import train

    before = digests(here / "runs" / "flow")
    (found,) = new_flow_runs(client, lambda: train("small.toml", "runs/flow", ["seed=1"]))
    assert (found.name, found.state_name) == ("flow finished", "Completed")
    assert artifacts_of(client, found) == []  # nothing of it is news
    assert digests(here / "runs" / "flow") == before


def test_a_config_that_is_wrong_fails_the_flow_run_with_its_message(here: Path, client: Any) -> None:
    from flows.train import train
    from pipeline.errors import ConfigError

    def work() -> None:
        with pytest.raises(ConfigError, match="iterations"):
            train("small.toml", "runs/wrong", ["iterations=-1"])

    (found,) = new_flow_runs(client, work)
    assert (found.name, found.state_name) == ("runs/wrong", "Failed")
    assert "iterations" in found.state.message
    assert not (here / "runs" / "wrong").exists()


def test_flow_runs_that_died_are_marked_crashed_at_the_next_start(here: Path, client: Any, trained: Any) -> None:
    """With their tasks; of those that the run has recorded, and only those that still count as running."""
    from prefect import task
    from prefect.states import AwaitingRetry, Completed, Crashed, Running

    from flows.flow_runs import DIED, record, recorded
    from flows.train import train

    run = RunDir(Path("runs/flow"))
    assert recorded(run) == []
    parameters = {"config": "small.toml", "run": "runs/flow", "overrides": ["seed=1"]}
    dead, done, strange = (
        client.create_flow_run(train, parameters=parameters, state=state()) for state in (Running, Completed, Running)
    )
    found_dead = client.create_flow_run(train, parameters=parameters, state=Crashed())  # a server's automation did it
    nowhere = uuid.uuid4()
    record(run, [dead.id, done.id, found_dead.id, nowhere])
    tasks = [
        client.create_task_run(task(artifacts_of), flow_run_id=one.id, dynamic_key=str(number), state=state())
        for one in (dead, found_dead, strange)
        for number, state in enumerate((Running, Completed, AwaitingRetry))
    ]
    (found,) = new_flow_runs(client, lambda: train(**parameters))
    after = [client.read_flow_run(one.id).state for one in (dead, done, strange)]
    assert [state.name for state in after] == ["Crashed", "Completed", "Running"]
    assert after[0].message == DIED
    names = [client.read_task_run(one.id).state_name for one in tasks]
    begun, ended = ["Crashed", "Completed", "Crashed"], ["Running", "Completed", "AwaitingRetry"]
    assert names == [*begun, *begun, *ended]
    assert client.read_flow_run(found.id).state_name == "Completed"
    assert recorded(run) == [nowhere]


def test_a_stage_whose_engine_dies_is_tried_again(here: Path, client: Any, trained: Any) -> None:
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    from flows.train import train
    from pipeline.errors import EngineDied

    (here / "die").touch()
    overrides = ["seed=1", "resources.retry_seconds=0.01"]
    (found,) = new_flow_runs(client, lambda: train("small.toml", "runs/mortal", overrides))
    assert not (here / "die").exists()
    assert digests(here / "runs" / "mortal") == digests(here / "runs" / "flow")
    told = "warning: evaluate initial is tried again in 0.01 s: the scripted_answers:make engine's process ended with"

    def is_told() -> bool:
        logs = client.read_logs(log_filter=LogFilter(flow_run_id=LogFilterFlowRunId(any_=[found.id])))
        return any(log.message.startswith(told) for log in logs)

    assert until(is_told)
    (here / "die").touch()
    with pytest.raises(EngineDied):
        train("small.toml", "runs/once", [*overrides, "resources.retries=0"])


def test_the_flow_can_be_handed_to_another_process() -> None:
    """Each run of a served flow is a process to which Prefect pickles it."""
    from flows.train import train

    assert cloudpickle.loads(cloudpickle.dumps(train)).name == "train"


def test_the_flows_rescore_and_evaluate_do_what_the_commands_do(here: Path, client: Any, trained: Any) -> None:
    import shutil

    from flows.evaluate import evaluate
    from flows.reporter import SilentReporter
    from flows.rescore import rescore
    from flows.rescoring import rescore_run
    from pipeline.config import load_toml
    from pipeline.runs import open_run

    (here / "other.toml").write_text('[[score.rewards]]\nname = "other"\nfunction = "tests.rewards:opposite"\n')
    (found,) = new_flow_runs(client, lambda: rescore("runs/flow", "other.toml", iterations="0"))
    assert (found.name, found.state_name) == ("flow with other, 0", "Completed")
    own = load_toml(here / "other.toml")
    rescore_run(open_run("runs/flow"), own, RunDir(Path("runs/same")), [0], [], SilentReporter())
    assert digests(here / "runs" / "flow-other") == digests(here / "runs" / "same")

    shutil.copytree("runs/flow", "runs/again")
    shutil.rmtree("runs/again/iterations/000001/evaluations")
    (found,) = new_flow_runs(client, lambda: evaluate("runs/again", trust=True))
    assert (found.name, found.state_name) == ("again last policy", "Completed")
    assert digests(here / "runs" / "again") == digests(here / "runs" / "flow")


def test_an_evaluation_executes_nothing_that_only_the_run_names(here: Path, trained: Any) -> None:
    import shutil

    from flows.evaluate import evaluate
    from pipeline.errors import UntrustedFunction

    shutil.copytree("runs/flow", "runs/strange")
    shutil.rmtree("runs/strange/evaluations")
    with pytest.raises(UntrustedFunction, match="scripted_answers:make"):
        evaluate("runs/strange", updates=0)


def test_the_flow_audit_fails_where_the_command_answers_no(here: Path, client: Any, trained: Any) -> None:
    from flows.audit import audit

    (found,) = new_flow_runs(client, lambda: audit("runs/flow", fail=False))
    assert (found.name, found.state_name) == ("audit of flow", "Completed")
    command = start(here, "-m", "flows.cli", "audit", "runs/flow")
    command.communicate(timeout=PATIENCE)
    (found,) = new_flow_runs(client, lambda: audit("runs/flow", return_state=True))
    assert found.state_name == {0: "Completed", 1: "Failed"}[command.returncode]


@pytest.mark.slow
def test_a_served_flow_runs_where_it_is_served(folder: Path, server: str, client: Any) -> None:
    """As Prefect's tutorial has it; the paths are relative."""
    process = start(folder, "serve.py", server=server)
    try:
        assert until(lambda: client.read_deployments() or process.poll() is not None, PATIENCE)
        (deployment,) = client.read_deployments()
        assert [schedule.schedule.cron for schedule in deployment.schedules] == ["0 3 * * *"]
        begun = client.create_flow_run_from_deployment(deployment.id, parameters={"config": "small.toml"})
        assert until(lambda: client.read_flow_run(begun.id).state.is_final(), PATIENCE)
        found = client.read_flow_run(begun.id)
        assert (found.name, found.state_name) == ("small 0-1", "Completed"), found.state.message
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=PATIENCE)
    assert (folder / "runs" / "small" / "iterations" / "000001" / "policy" / "manifest.json").is_file(), output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_flow_run_that_is_stopped_has_a_state_of_the_end(
    folder: Path, server: str, client: Any, number: signal.Signals
) -> None:
    """A killed one has it from the next start on; nothing of ours is left running."""
    from flows.flow_runs import recorded

    name = f"runs/{number.name}"
    command = ("-m", "flows.cli", "run", "small.toml", "--run", name, "--set", "iterations=500")

    def begin() -> "subprocess.Popen[str]":
        process = start(folder, *command, server=server)
        assert until(lambda: (folder / name / "iterations" / "000000" / "policy").exists() or process.poll(), PATIENCE)
        assert process.poll() is None
        return process

    first: list[Any] = []
    process = begin()
    first = [found for found in client.read_flow_runs() if found.parameters.get("run") == str(folder / name)]
    assert [found.state_name for found in first] == ["Running"]
    children = descendants(process.pid)
    process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == (-9 if number is signal.SIGKILL else 130), output
    assert survivors(*children) == []
    assert recorded(RunDir(folder / name)) == [first[0].id]  # the next start sees to it that it is told
    if number is signal.SIGKILL:
        assert client.read_flow_run(first[0].id).state_name == "Running"
        again = start(folder, *command[:-1], "iterations=1", server=server)
        again.communicate(timeout=PATIENCE)
    assert client.read_flow_run(first[0].id).state_name == "Crashed"
