"""The train flow on real vLLM: equal configs give equal digests, an interrupted run ends like an undisturbed one."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from pipeline.artifact import open_artifact
from pipeline.run_dir import RunDir
from tests.processes import descendants, survivors

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parent.parent
PATIENCE = 1200
"""Seconds after which a process hangs, on however busy a machine."""
CONFIG = """
seed = 3
iterations = 2

[policy]
model = "{policy}"

[prompts]
source = "rows.jsonl"
prompts_per_iteration = 8

[generate]
max_tokens = 6
num_threads = 1

[[generate.members]]
name = "now"
count = 3

[[generate.members]]
name = "before"
policy = "age:1"
count = 3

[[score.rewards]]
name = "digits"
function = "tests.rewards:share_of_digits"

[update]
learning_rate = 1e-3
num_threads = 1

[evaluate]
every = 2
num_prompts = 4
num_samples = 2
held_out_share = 0.3

[resources]
kv_cache_gib = 0.1
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Return the address of a Prefect server that all runs of this module use."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=PATIENCE):
        from prefect.settings import PREFECT_API_URL

        yield str(PREFECT_API_URL.value())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Path:
    """Return a folder with a config and its source."""
    path = tmp_path_factory.mktemp("train")
    (path / "rows.jsonl").write_text(
        "".join(f'{{"question": "{i} + {i} =", "answer": "{2 * i}"}}\n' for i in range(40))
    )
    (path / "config.toml").write_text(CONFIG.format(policy=tiny_policy))
    return path


def start(folder: Path, server: str, run: str, *command: str) -> subprocess.Popen[str]:
    """Start `grpo run`, or another command, as a user would, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *(command or ("run", "config.toml")), "--run", run],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_API_URL": server},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a run that must succeed; return what it printed."""
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    return output


def digests(run: Path) -> dict[str, str]:
    """Return the digest of every artifact by its place in the run."""
    return {os.path.relpath(a.path, run): a.digest for a in RunDir(run).artifacts()}


@pytest.fixture(scope="module")
def undisturbed(folder: Path, server: str) -> Path:
    """Return a finished run."""
    assert "last policy" in finish(start(folder, server, "runs/undisturbed"))
    return folder / "runs" / "undisturbed"


def test_every_stage_of_every_iteration_left_its_artifact(undisturbed: Path) -> None:
    found = digests(undisturbed)
    stages = (
        "prompts",
        "completions",
        "rewards",
        "advantages",
        "batches",
        "training_records",
        "optimizer_steps",
        "policy",
        "optimizer",
    )
    assert [
        f"iterations/00000{i}/{s}" for i in range(2) for s in stages if f"iterations/00000{i}/{s}" not in found
    ] == []
    assert {"initial_policy", "held_out_prompts", "evaluations", "iterations/000001/evaluations"} <= set(found)
    assert len(pl.read_parquet(undisturbed / "metrics.parquet")) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills",
    [
        [("000001/.completions.partial", "000001/completions")],
        [("000000/prompts",), ("000000/policy",)],
    ],
    ids=["once", "twice"],
)
def test_an_interrupted_run_ends_bit_for_bit_like_an_undisturbed_one(
    folder: Path, server: str, undisturbed: Path, kills: list[tuple[str, ...]]
) -> None:
    """SIGTERM ends a start in mid-generation or after an update, and its children with it; the optimizer's state is
    then lost; the last start finishes."""
    name = f"runs/interrupted-{len(kills)}"
    run = folder / name
    for places in kills:
        process = start(folder, server, name)
        while not any((run / "iterations" / place).exists() for place in places):
            assert process.poll() is None, process.stderr
            time.sleep(0.01)
        children = descendants(process.pid)
        assert children
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 130, errors
        assert survivors(*children) == []
    shutil.rmtree(run / "iterations" / "000000" / "optimizer", ignore_errors=True)
    finish(start(folder, server, name))
    assert digests(run) == digests(undisturbed)
    assert [p for p in run.rglob(".*") if p.name != ".lock"] == []


def test_rows_carry_the_policy_that_wrote_them(undisturbed: Path) -> None:
    rows = open_artifact(undisturbed / "iterations" / "000001" / "completions").read()
    by_name = dict(rows.group_by("policy_name").agg(pl.col("policy_digest").unique().first()).iter_rows())
    now = open_artifact(undisturbed / "iterations" / "000000" / "policy").digest
    assert by_name == {"now": now, "before": open_artifact(undisturbed / "initial_policy").digest}


def test_the_engine_and_the_trainer_agree_on_the_current_policy(undisturbed: Path) -> None:
    """A reload that left old weights anywhere would show here."""
    records = open_artifact(undisturbed / "iterations" / "000001" / "training_records").read()
    rows = open_artifact(undisturbed / "iterations" / "000001" / "completions").read()
    joined = records.join(rows, on="completion_id").group_by("policy_name").agg(pl.col("logprob_difference_max").max())
    difference = dict(joined.iter_rows())
    assert difference["now"] < 1e-4
    assert difference["before"] > 1e-4  # other weights, and their own log probabilities


@pytest.mark.slow
def test_the_last_state_of_a_finished_run_is_made_again_and_nothing_else(
    folder: Path, server: str, undisturbed: Path
) -> None:
    before, times = digests(undisturbed), written(undisturbed, "model.safetensors")
    shutil.rmtree(undisturbed / "iterations" / "000001" / "optimizer")
    finish(start(folder, server, "runs/undisturbed"))
    assert digests(undisturbed) == before
    assert written(undisturbed, "model.safetensors") == times


@pytest.fixture(scope="module")
def fork(folder: Path, server: str, undisturbed: Path) -> RunDir:
    """Return a finished fork: the second stored iteration feeds its first, then it generates, with the engine that
    starts sooner."""
    (folder / "other.toml").write_text('[[score.rewards]]\nname = "seven"\nfunction = "tests.rewards:letters"\n')
    settings = ("--set", "evaluate.every=0", "--set", "generate.engine=transformers")
    command = ("fork", "runs/undisturbed", "other.toml", "--at", "1", *settings)
    assert "last policy" in finish(start(folder, server, "runs/fork", *command))
    return RunDir(folder / "runs" / "fork")


@pytest.mark.slow
def test_a_fork_trains_on_stored_completions_and_then_generates(fork: RunDir, undisturbed: Path) -> None:
    """Its weights are other ones, as its rewards are."""
    assert not fork.place(0, "completions").exists()
    stored = RunDir(undisturbed).open(1, "completions")
    assert fork.open(0, "completions").digest == stored.digest
    assert fork.place(1, "completions").exists()
    assert fork.open(1, "completions").manifest.inputs["policy:now"]["digest"] == fork.open(0, "policy").digest
    assert fork.open(0, "policy").digest != RunDir(undisturbed).open(1, "policy").digest


@pytest.mark.slow
def test_a_finished_run_is_found_and_not_run_again(folder: Path, server: str, fork: RunDir) -> None:
    before, times = digests(fork.root), written(fork.root, "*.safetensors")
    finish(start(folder, server, "runs/fork", "run", str(fork.root / "fork.toml")))
    assert digests(fork.root) == before
    assert written(fork.root, "*.safetensors") == times


def written(run: Path, name: str) -> dict[Path, int]:
    """Return when each file of a name was written."""
    return {p: p.stat().st_mtime_ns for p in run.rglob(name)}
