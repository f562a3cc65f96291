"""The deep audit: the trainer's model computes the sampler's log probabilities again."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from flows.commands.verify import print_verification
from flows.printing import Format
from pipeline.prune import prunable, prune
from pipeline.retention import RetentionConfig
from pipeline.run_dir import RunDir
from stages.engines.base import EngineSettings
from stages.engines.scripted import ScriptedEngine
from stages.engines.transformers_engine import TransformersEngine
from stages.inspect.verify.ledger import Ledger
from stages.inspect.verify.logprobs import CHECK, DeepSettings, Mismatch, check_logprobs, sample_rows
from tests.finished import finished_run, forge, replace_value
from tests.policies import save_tiny_policy
from tests.tiny_models import save_uniform_lm

torch.set_num_threads(1)  # the tensors are tiny: a second thread would only wait

ALL = DeepSettings(rows=0)

SAMPLING = """
engine = "transformers"
temperature = 0.7
top_k = 20
[[generate.members]]
name = "current"
count = 2
[[generate.members]]
name = "older"
policy = "age:1"
count = 1
[[generate.members]]
name = "outside"
policy = "{outside}"
count = 1
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Path:
    """Return a run that a real engine has sampled, with truncation and three authors a group; not to be changed."""
    folder = tmp_path_factory.mktemp("deep")
    save_tiny_policy(folder / "outside", seed=1)
    engine = TransformersEngine(
        EngineSettings(engine="transformers", dtype="float32", max_model_len=128, max_num_seqs=8, num_threads=1)
    )
    return finished_run(
        folder, tiny_policy, generate=SAMPLING.format(outside=folder / "outside"), engine=engine, learning_rate=0.1
    ).root


def check(run: RunDir, settings: DeepSettings = ALL) -> tuple[list[Mismatch], Ledger]:
    findings = Ledger()
    return check_logprobs(run, findings, settings), findings


def test_a_real_engine_and_the_trainer_agree_on_every_row_whoever_wrote_it(original: Path) -> None:
    found, findings = check(RunDir(original))
    assert findings.problems == []
    assert findings.notes == {}
    assert findings.tallies[CHECK].checked == 32
    for iteration, mismatch in enumerate(found):
        assert (mismatch.iteration, mismatch.rows, mismatch.of_rows, mismatch.beyond) == (iteration, 16, 16, 0)
        lengths = RunDir(original).open(iteration, "completions").read()["completion_token_ids"].list.len()
        assert mismatch.tokens == lengths.sum()
        assert mismatch.difference_mean is not None
        assert mismatch.difference_max is not None
        assert mismatch.kl_to_sampler is not None
        assert 0 < mismatch.difference_mean < mismatch.difference_max < 1e-4
        assert 0 <= mismatch.kl_to_sampler < 1e-8


def test_figures_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    # Every token has probability 1 / 14, and the engine says 1 / e of each: equal rewards leave the weights alone.
    save_uniform_lm(tmp_path / "policy", chat=True, context=64)
    engine = ScriptedEngine(lambda _: [4, 1])
    run = finished_run(tmp_path, tmp_path / "policy", engine=engine)
    found, findings = check(run)
    difference = math.log(14) - 1
    for mismatch in found:
        assert (mismatch.rows, mismatch.tokens, mismatch.beyond) == (16, 32, 16)
        assert mismatch.difference_mean == pytest.approx(difference, rel=1e-5)
        assert mismatch.difference_max == pytest.approx(difference, rel=1e-5)
        assert mismatch.kl_to_sampler == pytest.approx(math.e / 14 - 1 + difference, rel=1e-5)
    assert findings.tallies[CHECK].wrong == 32
    assert "of token 0 lies 1.639 nats from the stored one, more than 0.1" in findings.problems[0].found
    assert check(run, DeepSettings(rows=0, threshold=1.7))[1].problems == []


def shift(place: int, by: float) -> Any:
    """Return a change of one number of the second row of a part."""

    def change(values: list[float]) -> list[float]:
        return [*values[:place], values[place] - by, *values[place + 1 :]]

    return replace_value("sampling_logprobs", 1, change)


def test_one_forged_number_is_named_with_its_row_and_token(run: RunDir) -> None:
    forge(run, run.place(1, "completions"), shift(1, 0.25))
    (mismatch, forged), findings = check(run)
    (problem,) = findings.problems
    row = pl.read_parquet(run.place(1, "completions") / "part-00000.parquet")["completion_id"][1]
    assert (problem.check, problem.where.iteration, problem.row) == (CHECK, 1, row)
    assert problem.found.startswith("the trainer's logprob of token 1 lies 0.25 nats from the stored one")
    assert (mismatch.beyond, forged.beyond) == (0, 1)
    assert forged.difference_max == pytest.approx(0.25, abs=1e-3)
    assert check(run, DeepSettings(rows=0, threshold=0.3))[1].problems == []


def test_tokens_that_do_not_train_and_unknown_ones_are_left_out(run: RunDir) -> None:
    forge(run, run.place(0, "completions"), shift(0, 9.0))
    place = run.open(0, "completions").read().row(1, named=True)
    length = len(place["completion_token_ids"])
    forge(run, run.place(0, "completions"), replace_value("loss_mask", 1, [False] + [True] * (length - 1)))
    forge(
        run, run.place(0, "completions"),
        replace_value("sampling_logprobs", 2, lambda values: [None] * len(values)),
    )  # fmt: skip
    (first, _), findings = check(run)
    total = run.open(0, "completions").read()["completion_token_ids"].list.len()
    assert findings.problems == []
    assert first.tokens == total.sum() - 1 - total[2]
    assert first.rows == 16


def test_rows_are_chosen_by_seed_and_id(original: Path) -> None:
    completions = RunDir(original).open(0, "completions")

    def chosen(rows: int, seed: int = 0) -> list[str]:
        return sorted(sample_rows(completions, 0, DeepSettings(rows=rows, seed=seed))[0]["completion_id"])

    assert (len(chosen(3)), len(chosen(99)), len(chosen(0))) == (3, 16, 16)
    assert chosen(3) == chosen(3)
    assert set(chosen(3)) < set(chosen(6))
    assert chosen(3) != chosen(3, seed=1)
    found, findings = check(RunDir(original), DeepSettings(rows=3))
    assert [(m.rows, m.of_rows) for m in found] == [(3, 16), (3, 16)]
    assert findings.tallies[CHECK].checked == 6


def test_rows_of_pruned_and_missing_policies_are_not_judged(run: RunDir) -> None:
    list(prune(prunable(run, RetentionConfig(keep_last=1), set(), initial=True)))
    shutil.rmtree(run.member("outside"))
    found, findings = check(run)
    # iteration 0 has 12 answers of the initial policy, iteration 1 has 4, and 8 of the policy between
    assert [m.rows for m in found] == [0, 0]
    assert findings.problems == []
    assert set(findings.notes) == {
        (CHECK, "its weights are pruned"), (CHECK, "the policy that wrote the answers is not there"),
    }  # fmt: skip
    assert found[0].difference_mean is None


def test_weights_that_cannot_be_read_are_a_finding(run: RunDir) -> None:
    (run.member("outside") / "model.safetensors").write_bytes(b"nonsense")
    found, findings = check(run)
    assert [m.rows for m in found] == [12, 12]
    assert [p.where.iteration for p in findings.problems] == [0, 1]
    assert "cannot be checked with policy" in findings.problems[0].found


def test_damaged_completions_are_a_finding(run: RunDir) -> None:
    path = run.place(0, "completions") / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    found, findings = check(run)
    assert [m.iteration for m in found] == [1]
    assert [(p.where.path, p.check) for p in findings.problems] == [("iterations/000000/completions", CHECK)]


def test_the_table_has_a_line_for_each_iteration(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_verification(original, 20, Format.table, deep=DeepSettings(rows=2))
    output = capsys.readouterr().out
    assert "engine mismatch" in output
    assert "log probabilities, trainer against sampler, in nats per token:" in output
    assert "nothing is wrong" in output


def test_jsonl_has_the_figures_and_the_wrong_rows(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    forge(run, run.place(1, "completions"), shift(0, 0.5))
    assert not print_verification(run.root, 20, Format.jsonl, deep=ALL)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["kind"], r["iteration"], r["rows"], r["beyond"]) for r in rows[:2]] == [
        ("mismatch", 0, 16, 0), ("mismatch", 1, 16, 1),
    ]  # fmt: skip
    (forged,) = (r for r in rows if r["check"] == CHECK)
    assert (forged["artifact"], forged["beyond"]) == ("iterations/000001/completions", None)
    assert {r["kind"] for r in rows[2:]} == {"problem"}
    assert len({tuple(row) for row in rows}) == 1


def test_torch_is_imported_only_for_a_deep_audit() -> None:
    code = "import sys, flows.commands.verify, stages.inspect.verify.logprobs, flows.commands.tokens; "
    code += "import stages.inspect.artifact_diff; "
    code += "print([m for m in ('torch', 'vllm', 'prefect', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
