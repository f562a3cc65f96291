"""EngineProcess with scripted engines: no test here imports torch or starts vLLM."""

import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from pipeline.errors import EngineError, PolicyError
from stages.engines.base import Engine, EngineSettings, Generated, Request, Sampling
from stages.engines.child import child_environment
from stages.engines.process import EngineProcess
from stages.engines.scripted import ScriptedEngine
from tests.processes import is_alive, survivors

SETTINGS = EngineSettings(engine="vllm", dtype="float32", max_model_len=64, max_num_seqs=8, num_threads=1)
SAMPLING = Sampling(temperature=1.0, max_tokens=8, stop_token_ids=(1,))


def echo_engine(settings: EngineSettings) -> Engine:
    """Answers a prompt with itself and the stop token."""
    return ScriptedEngine(lambda request: [*request.prompt_token_ids, 1])


def misbehaving_engine(settings: EngineSettings) -> Engine:
    """Does what the first token of the prompt says."""
    return ScriptedEngine(misbehave)


def misbehave(request: Request) -> Sequence[int]:
    match request.prompt_token_ids[0]:
        case 10:
            raise ZeroDivisionError("ten is not a number")
        case 11:
            print("my last words", file=sys.stderr)
            os._exit(3)
        case 12:
            os.kill(os.getpid(), signal.SIGKILL)
        case 13:
            return [os.getpid(), subprocess.Popen(["sleep", "600"]).pid, 1]
        case 14:
            time.sleep(600)
        case 15:
            print("noise on stdout", flush=True)
        case 16:
            return [100 + int(os.environ["OMP_NUM_THREADS"]), os.getsid(0), 1]
        case 17:
            raise EngineError("refused")
    return [1]


def held_engine(settings: EngineSettings) -> Engine:
    """Start when a file is there, whose path the environment holds."""
    deadline = time.monotonic() + 60
    while not Path(os.environ["GATE"]).exists():
        if time.monotonic() > deadline:
            raise TimeoutError("nobody opened the gate")
        time.sleep(0.02)
    return echo_engine(settings)


def broken_engine(settings: EngineSettings) -> Engine:
    raise OSError("no such accelerator")


def make_policy(path: Path, *, hidden_size: int = 8, written_by: str = "5.19.0") -> Path:
    """Write a checkpoint that has a layout but no weights."""
    path.mkdir()
    config = {"model_type": "toy", "hidden_size": hidden_size, "transformers_version": written_by}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    header = json.dumps({"weight": {"dtype": "F32", "shape": [hidden_size], "data_offsets": [0, 0]}}).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return path


def ask(engine: Engine, *first_tokens: int) -> list[list[int]]:
    rows = engine.generate([Request([token], seed=0) for token in first_tokens], SAMPLING, None)
    return [row.token_ids for row in rows]


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return make_policy(tmp_path / "policy")


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "engine.log"


@pytest.fixture
def misbehaving(policy: Path, log_path: Path) -> Iterator[EngineProcess]:
    with EngineProcess(SETTINGS, log_path, misbehaving_engine) as engine:
        engine.load(policy)
        yield engine


def test_rows_come_back_in_the_order_of_requests_and_progress_ends_with_all(policy: Path, log_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with EngineProcess(SETTINGS, log_path, echo_engine) as engine:
        engine.load(policy)
        requests = [Request([5, 6], seed=1), Request([7], seed=2)]
        rows = engine.generate(requests, SAMPLING, lambda *counts: seen.append(counts))
    assert rows == [
        Generated([5, 6, 1], [-1.0, -1.0, -1.0], "stop", "1", None),
        Generated([7, 1], [-1.0, -1.0], "stop", "1", None),
    ]
    assert seen[-1] == (2, 5)


def test_start_returns_before_the_engine_is_ready_and_the_first_call_waits(
    policy: Path, log_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATE", str(tmp_path / "gate"))
    with EngineProcess(SETTINGS, log_path, held_engine) as engine:
        engine.start(policy)
        opening = threading.Timer(0.5, (tmp_path / "gate").touch)
        opening.start()
        engine.load(policy)
        assert (tmp_path / "gate").exists()
        opening.join()
        assert engine.info.name == "scripted"
        assert ask(engine, 5) == [[5, 1]]


def test_error_of_the_start_surfaces_on_the_first_call(policy: Path, log_path: Path) -> None:
    engine = EngineProcess(SETTINGS, log_path, broken_engine)
    engine.start(policy)
    with pytest.raises(EngineError, match="failed to load a policy: OSError: no such accelerator"):
        engine.load(policy)
    assert engine.pid is None


def test_child_without_vllm_says_what_to_install(
    tmp_path: Path, policy: Path, log_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm.py").write_text("raise ImportError('libfoo.so is missing')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with (
        EngineProcess(SETTINGS, log_path) as engine,
        pytest.raises(EngineError, match=r'libfoo.*extras `cpu` or `gpu`.*generate.engine = "transformers"'),
    ):
        engine.load(policy)


def test_calls_before_a_policy_are_refused(log_path: Path) -> None:
    engine = EngineProcess(SETTINGS, log_path, echo_engine)
    with pytest.raises(EngineError, match="has no policy"):
        ask(engine, 5)
    with pytest.raises(EngineError, match="has no policy"):
        _ = engine.info


def test_exception_in_the_child_names_the_log_and_ends_the_child(misbehaving: EngineProcess, log_path: Path) -> None:
    pid = misbehaving.pid
    assert pid is not None
    with pytest.raises(EngineError, match="failed to generate: ZeroDivisionError: ten is not a number") as caught:
        ask(misbehaving, 10)
    assert str(log_path) in str(caught.value)
    assert "Traceback" in log_path.read_text(encoding="utf-8")
    assert not is_alive(pid)


def test_refused_request_leaves_the_child_running(misbehaving: EngineProcess) -> None:
    with pytest.raises(EngineError, match=r"^refused$"):
        ask(misbehaving, 17)
    assert ask(misbehaving, 20) == [[1]]


def test_child_that_dies_is_reported_with_its_last_words(misbehaving: EngineProcess) -> None:
    with pytest.raises(EngineError, match=r"(?s)ended with status 3 while it should generate.*my last words"):
        ask(misbehaving, 11)


def test_child_that_dies_takes_its_children_with_it(misbehaving: EngineProcess) -> None:
    ((_, grandchild, _),) = ask(misbehaving, 13)
    with pytest.raises(EngineError):
        ask(misbehaving, 11)
    assert survivors(grandchild) == []


def test_child_outlives_the_thread_that_started_it(policy: Path, log_path: Path) -> None:
    with EngineProcess(SETTINGS, log_path, echo_engine) as engine:
        thread = threading.Thread(target=engine.load, args=(policy,))
        thread.start()
        thread.join()
        time.sleep(0.5)
        assert ask(engine, 5) == [[5, 1]]


def test_killed_child_points_at_memory(misbehaving: EngineProcess) -> None:
    with pytest.raises(EngineError, match=r"(?s)killed by SIGKILL.*memory.*it wrote nothing"):
        ask(misbehaving, 12)


def test_load_after_a_death_starts_another_child(misbehaving: EngineProcess, policy: Path) -> None:
    with pytest.raises(EngineError):
        ask(misbehaving, 12)
    misbehaving.load(policy)
    assert ask(misbehaving, 20) == [[1]]


def test_interrupt_of_the_caller_ends_the_child_and_its_children(misbehaving: EngineProcess) -> None:
    ((child, grandchild, _),) = ask(misbehaving, 13)
    assert child == misbehaving.pid

    def interrupt(finished_requests: int, generated_tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        misbehaving.generate([Request([20], seed=0), Request([14], seed=0)], SAMPLING, interrupt)
    assert survivors(child, grandchild) == []


def test_close_ends_and_reaps_a_busy_child_and_its_children(misbehaving: EngineProcess) -> None:
    ((child, grandchild, _),) = ask(misbehaving, 13)
    misbehaving.close()
    misbehaving.close()
    assert survivors(child, grandchild) == []
    with pytest.raises(ChildProcessError):
        os.waitpid(child, os.WNOHANG)  # nothing is left to reap


PARENT = """
import sys
from pathlib import Path
from test_engine_process import SETTINGS, ask, misbehaving_engine
from stages.engines.process import EngineProcess
engine = EngineProcess(SETTINGS, Path(sys.argv[2]), misbehaving_engine)
engine.load(Path(sys.argv[1]))
print(*ask(engine, 13)[0], flush=True)
if sys.argv[3] == "wait":
    ask(engine, 14)
"""


def start_parent(policy: Path, log_path: Path, how: str) -> tuple["subprocess.Popen[str]", int, int]:
    """Return a process that owns an engine, that engine's process, and a process which the engine started."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PARENT, str(policy), str(log_path), how]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    child, grandchild, _ = map(int, parent.stdout.readline().split())
    return parent, child, grandchild


def test_kill_of_the_parent_leaves_no_child_alive(policy: Path, log_path: Path) -> None:
    parent, child, grandchild = start_parent(policy, log_path, "wait")
    with parent:
        assert is_alive(child)
        assert is_alive(grandchild)
        scratch = temporary_directory(child)
        assert scratch.is_dir()
        parent.kill()
    assert survivors(child, grandchild) == []
    assert not scratch.exists()


def temporary_directory(pid: int) -> Path:
    """Return the process's TMPDIR."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    (entry,) = (v for v in variables if v.startswith("TMPDIR="))
    return Path(entry.removeprefix("TMPDIR="))


def test_temporary_files_of_the_child_go_with_it(misbehaving: EngineProcess) -> None:
    assert misbehaving.pid is not None
    scratch = temporary_directory(misbehaving.pid)
    assert scratch.is_dir()
    misbehaving.close()
    assert not scratch.exists()


def test_end_of_a_program_that_never_closes_leaves_no_child_alive(policy: Path, log_path: Path) -> None:
    parent, child, grandchild = start_parent(policy, log_path, "leave")
    with parent:
        assert parent.wait(timeout=600) == 0
    assert survivors(child, grandchild) == []


def test_output_of_the_child_goes_to_the_log_only(
    misbehaving: EngineProcess, log_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ask(misbehaving, 15)
    assert "noise on stdout" in log_path.read_text(encoding="utf-8")
    assert capfd.readouterr() == ("", "")


def test_weights_of_the_same_shape_keep_the_child_and_others_replace_it(tmp_path: Path, log_path: Path) -> None:
    with EngineProcess(SETTINGS, log_path, echo_engine) as engine:
        engine.load(make_policy(tmp_path / "first"))
        first = engine.pid
        engine.load(make_policy(tmp_path / "second", written_by="5.20.0"))
        assert engine.pid == first
        engine.load(make_policy(tmp_path / "wider", hidden_size=16))
        assert engine.pid != first
        assert ask(engine, 5) == [[5, 1]]


def test_checkpoint_without_safetensors_is_refused_before_anything_starts(tmp_path: Path, log_path: Path) -> None:
    engine = EngineProcess(SETTINGS, log_path, echo_engine)
    with pytest.raises(PolicyError, match=r"has no config\.json"):
        engine.start(tmp_path)
    (make_policy(tmp_path / "damaged") / "model.safetensors").write_bytes(b"\x00")
    with pytest.raises(PolicyError, match="is no safetensors file"):
        engine.start(tmp_path / "damaged")
    assert engine.pid is None


def test_more_threads_than_cores_are_refused() -> None:
    settings = EngineSettings(engine="vllm", dtype="float32", max_model_len=64, max_num_seqs=8, num_threads=100_000)
    with pytest.raises(EngineError, match=r"generate\.num_threads is 100000.*cores"):
        child_environment(settings)


def test_child_has_its_own_threads_and_session(misbehaving: EngineProcess) -> None:
    ((num_threads, session, _),) = ask(misbehaving, 16)
    assert num_threads == 101
    assert session == misbehaving.pid


def test_shell_variables_that_decide_results_do_not_reach_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("HF_HOME", "/somewhere")
    environment = child_environment(SETTINGS)
    assert "VLLM_USE_V2_MODEL_RUNNER" not in environment
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["HF_HOME"] == "/somewhere"
    assert environment["VLLM_NO_USAGE_STATS"] == environment["DO_NOT_TRACK"] == environment["HF_HUB_OFFLINE"] == "1"


def test_parent_needs_neither_torch_nor_vllm() -> None:
    program = "import sys, stages.engines.process, stages.engines.scripted; print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    assert not {"torch", "vllm", "transformers", "numpy"} & set(done.stdout.split())


def test_factory_must_be_importable_by_the_child(policy: Path, log_path: Path) -> None:
    def local_engine(settings: EngineSettings) -> Engine:
        return ScriptedEngine({})

    engine = EngineProcess(SETTINGS, log_path, local_engine)
    with pytest.raises((AttributeError, pickle.PicklingError), match="local_engine"):
        engine.start(policy)
    assert engine.pid is None
