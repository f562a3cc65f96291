"""A stage, a loss, an advantage and an engine from outside the packages, each one file, run by `grpo run`.

The packages are copied, so that one line can be added to the chain; nothing else in the copy is changed.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "grpo", "stages", "flows")
LINE = """    Step("toy_stage", ("toys",), {"completions": From.here}, stage="toy_stage:STAGE"),
"""
AFTER = '    Step("score", '
"""The line goes before this one."""

FILES = {
    "toy_stage.py": '''
"""toy_stage: completions -> how long each is."""

import polars as pl
import pyarrow as pa

from pipeline.config import StrictModel
from pipeline.columns import COMPLETION_ID, column, dataset
from pipeline.stage import Stage, StageTask


class ToyConfig(StrictModel):
    factor: int = 1


def compute(task: StageTask[ToyConfig, None]) -> None:
    rows = task.inputs["completions"].scan()
    length = pl.col("completion_token_ids").list.len().cast(pl.Int64) * task.config.factor
    task.writer.write_part(0, rows.select("completion_id", num_toys=length).collect())


SCHEMA = dataset("Lengths.", [COMPLETION_ID, column("num_toys", pa.int64(), "tokens times the factor")])
STAGE = Stage("toy_stage", version=1, config=ToyConfig, compute=compute, schemas={"toys": SCHEMA})
''',
    "toy_loss.py": '''
"""A loss: the plain policy gradient, scaled; tokens of a negative advantage have none."""

import torch

from grpo.losses.base import LossInputs, TokenLosses


def positive_only(inputs: LossInputs, scale: float) -> TokenLosses:
    is_negative_N = inputs.advantage_N < 0
    loss_N = -scale * inputs.trainer_logprobs_N * inputs.advantage_N
    return TokenLosses(torch.where(is_negative_N, 0.0, loss_N), {"negative": is_negative_N})
''',
    "toy_advantage.py": '''
"""A baseline: the reward minus a half."""

from grpo.groups import Floats, Groups


def minus_half(groups: Groups) -> Floats:
    return groups.values - 0.5
''',
    "toy_reward.py": '''
"""A reward."""


def is_right(completion: str, reference: str) -> float:
    return float(completion == reference)
''',
    "toy_engine.py": '''
"""An engine: answers 2 or 3, as the seed says."""

from stages.engines.base import Engine, EngineSettings
from stages.engines.scripted import ScriptedEngine
from tests.policies import EOS

DIGIT_0 = 19


def make(settings: EngineSettings) -> Engine:
    return ScriptedEngine(lambda request: [DIGIT_0 + 2 + request.seed % 2, EOS], logprob=-0.5)
''',
}
CONFIG = """
iterations = 1
[policy]
model = "{policy}"
[prompts]
source = "rows.jsonl"
prompts_per_iteration = 6
[generate]
group_size = 4
max_tokens = 8
engine = "toy_engine:make"
[toy_stage]
factor = 10
[[score.rewards]]
name = "digits"
function = "toy_reward:is_right"
[normalize]
baseline = "toy_advantage:minus_half"
[update]
num_threads = 1
record_tokens = true
[update.loss]
name = "toy_loss:positive_only"
arguments = {{ scale = 3.0 }}
[update.correction]
kind = "none"
veto_low = 1e-30
[evaluate]
every = 1
num_prompts = 2
num_samples = 2
held_out_share = 0.3
"""


def run_command(folder: Path, *command: str) -> str:
    """Return what a command of the copied program prints; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "packages"), str(folder), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Path:
    """Return a folder with a finished run of the copied program."""
    path = tmp_path_factory.mktemp("outside")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, path / "packages" / package, ignore=shutil.ignore_patterns("__pycache__"))
    chain = path / "packages" / "pipeline" / "chain.py"
    text = chain.read_text(encoding="utf-8")
    assert text.count(AFTER) == 1
    chain.write_text(text.replace(AFTER, LINE + AFTER), encoding="utf-8")
    for name, source in FILES.items():
        (path / name).write_text(source, encoding="utf-8")
    rows = [{"question": f"{i} + {2 - i} =", "answer": "2"} for i in range(30)]
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path / "toy.toml").write_text(CONFIG.format(policy=tiny_policy))
    assert "last policy" in run_command(path, "run", "toy.toml")
    return path


def dataset(folder: Path, name: str) -> pl.DataFrame:
    return pl.read_parquet(folder / "runs" / "toy" / "iterations" / "000000" / name / "*.parquet")


def test_the_toy_engine_has_written_the_completions(folder: Path) -> None:
    rows = dataset(folder, "completions")
    assert rows["engine"].unique().to_list() == ["scripted"]
    assert set(rows["completion"]) <= {"2", "3"}


def test_the_toy_stage_ran_under_its_own_table(folder: Path) -> None:
    assert dataset(folder, "toys")["num_toys"].unique().to_list() == [20]
    resolved = json.loads((folder / "runs" / "toy" / "config.resolved.json").read_text())
    assert resolved["toy_stage"] == {"factor": 10}


def test_the_toy_baseline_made_the_advantages(folder: Path) -> None:
    rows = dataset(folder, "advantages").filter(pl.col("drop_reason").is_null())
    assert len(rows) > 0
    assert (rows["advantage"] == rows["reward"] - 0.5).all()


def test_the_toy_loss_trained_with_its_argument_and_its_reasons_are_recorded(folder: Path) -> None:
    records = dataset(folder, "training_records").join(dataset(folder, "batches"), on="completion_id")
    negative, positive = records.filter(pl.col("advantage") < 0), records.filter(pl.col("advantage") > 0)
    assert min(len(negative), len(positive)) > 0
    assert negative["loss"].to_list() == [0.0] * len(negative)
    assert set(negative["clip_reasons"].explode()) == {"negative"}
    expected = -3.0 * positive["trainer_logprobs"].list.sum() * positive["advantage"] / positive["loss_denominator"]
    assert positive["loss"].to_list() == pytest.approx(expected.to_list(), rel=1e-5)


@pytest.mark.parametrize(
    ("dataset", "settings"),
    [
        ("completions", ["generate.engine"]),
        ("advantages", ["normalize.baseline"]),
        ("policy", ["update.loss.name"]),
        ("evaluations", ["generate.engine", "normalize.baseline"]),
    ],
)
def test_the_source_of_each_function_from_outside_is_in_the_recipe(
    folder: Path, dataset: str, settings: list[str]
) -> None:
    place = folder / "runs" / "toy" / "iterations" / "000000" / dataset
    assert sorted(json.loads((place / "manifest.json").read_text())["chosen"]["function_sources"]) == settings


def test_the_commands_that_look_know_the_toy_stage(folder: Path) -> None:
    assert "nothing is wrong" in run_command(folder, "verify", "runs/toy")
    assert '"num_toys": 20' in run_command(folder, "rows", "runs/toy", "toys", "-f", "jsonl", "-n", "1")
    assert "tokens times the factor" in run_command(folder, "schema", "toys", "-f", "jsonl")
    assert "toys" in run_command(folder, "ls", "runs/toy")
    assert "toy_stage" in run_command(folder, "metrics", "runs/toy", "-f", "jsonl")
    assert "runs/toy/iterations/000000/toys" in run_command(folder, "stage", "toy_stage", "runs/toy", "-i", "0")
