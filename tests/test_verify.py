"""The audit: a whole run is fine, and each way to damage it is found and named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from flows.commands.verify import print_verification
from flows.printing import Format
from pipeline.conformance import conform
from pipeline.manifest import MANIFEST
from pipeline.prune import prunable, prune
from pipeline.retention import RetentionConfig
from pipeline.run_dir import RunDir
from stages.inspect.verify.ledger import CHECKS
from stages.inspect.verify.verify import verify_run
from tests.finished import forge, problems_of
from tests.manifests import fix_hashes, manifest_of


def found(run: RunDir) -> set[tuple[str, str]]:
    """Return check and artifact of every problem."""
    return {(p.check, p.where.path) for p in verify_run(run).problems}


def test_a_finished_run_is_fine_and_every_check_has_looked_at_something(original: Path) -> None:
    findings = verify_run(RunDir(original))
    assert findings.problems == []
    # what [[checks]] have said is looked at in tests/test_brakes.py
    assert [name for name in CHECKS if findings.tallies[name].checked == 0] == ["checks"]
    # 2 iterations of 4 groups of 4, and 2 evaluations of 2 prompts with a greedy and 2 sampled answers
    assert findings.tallies["sampling plan"].checked == 32
    assert findings.tallies["text"].checked == 32 + 12
    assert findings.tallies["advantages"].checked == 32
    assert findings.tallies["policies"].checked == 4
    assert findings.notes == {}


def test_an_unfinished_run_is_fine(run: RunDir) -> None:
    for dataset in ("optimizer", "policy", "optimizer_steps", "training_records", "batches", "evaluations"):
        shutil.rmtree(run.place(1, dataset))
    pq.write_table(conform(pl.read_parquet(run.metrics).head(1), "metrics"), run.metrics)
    assert found(run) == set()


def test_a_run_that_takes_its_answers_from_another_run_is_audited_with_them(original: Path, tmp_path: Path) -> None:
    other, here = RunDir(original), RunDir(tmp_path / "rescored")
    here.iteration(1).mkdir(parents=True)
    shutil.copyfile(other.resolved_config, here.resolved_config)
    for dataset in ("prompts", "completions"):
        here.place(1, dataset).symlink_to(other.place(1, dataset), target_is_directory=True)
    for dataset in ("rewards", "advantages"):
        shutil.copytree(other.place(1, dataset), here.place(1, dataset))
    findings = verify_run(here)
    assert findings.problems == []
    assert findings.notes == {}
    assert findings.tallies["text"].checked == 16
    assert findings.tallies["policy digests"].checked == 16
    assert findings.tallies["advantages"].checked == 16


def test_a_changed_byte_is_found_in_its_file(run: RunDir) -> None:
    path = run.place(0, "rewards") / "part-00000.parquet"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    (problem,) = verify_run(run).problems
    assert (problem.check, problem.where.path, problem.part) == (
        "files", "iterations/000000/rewards", "part-00000.parquet",
    )  # fmt: skip
    assert "SHA-256" in problem.found


def test_a_missing_and_an_additional_file_are_found(run: RunDir) -> None:
    (run.place(1, "optimizer") / "state.safetensors").unlink()
    (run.policy_before(1) / "adapter.safetensors").touch()
    told = {(p.where.path, p.part, p.found) for p in verify_run(run).problems if p.check == "files"}
    assert told == {
        ("iterations/000001/optimizer", "state.safetensors", "the file is gone"),
        ("iterations/000000/policy", "adapter.safetensors", "the manifest does not list this file"),
    }


def test_a_missing_manifest_is_found_with_those_that_name_it(run: RunDir) -> None:
    (run.place(0, "advantages") / MANIFEST).unlink()
    assert {("manifests", "iterations/000000/advantages"), ("inputs", "iterations/000000/batches")} <= found(run)


def test_what_is_no_dataset_of_an_iteration_is_found_unless_it_is_hidden(run: RunDir) -> None:
    (run.iteration(1) / "rewards.old").mkdir()
    (run.iteration(1) / ".rewards.partial").mkdir()
    assert found(run) == {("manifests", "iterations/000001/rewards.old")}


@pytest.mark.parametrize(("place", "updates"), [("evaluations", 0), ("iterations/000001/evaluations", 2)])
def test_an_evaluation_that_is_due_and_not_there_is_found(run: RunDir, place: str, updates: int) -> None:
    shutil.rmtree(run.root / place)
    (problem,) = problems_of(run, "evaluations")
    assert (problem.where.path, f"after {updates} updates has no evaluation" in problem.found) == (place, True)


def test_the_evaluation_of_the_last_policy_may_be_coming_while_the_run_goes_on(run: RunDir) -> None:
    config = json.loads(run.resolved_config.read_text())
    run.resolved_config.write_text(json.dumps({**config, "iterations": 3}))
    shutil.rmtree(run.place(1, "evaluations"))
    assert problems_of(run, "evaluations") == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"manifest_version": 1}', "\xff"])
def test_a_manifest_of_nonsense_is_a_finding_and_no_crash(run: RunDir, text: str) -> None:
    (run.place(0, "prompts") / MANIFEST).write_bytes(text.encode("latin-1"))
    assert ("manifests", "iterations/000000/prompts") in found(run)


@pytest.mark.parametrize(
    ("field", "value", "check"),
    [("rows", 99, "counts"), ("drops", {"stale": 1}, "counts"), ("seconds", 5000.0, "metrics")],
)
def test_a_field_that_no_hash_covers_is_compared(run: RunDir, field: str, value: object, check: str) -> None:
    place = run.place(0, "batches")
    (place / MANIFEST).write_text(json.dumps({**manifest_of(place), field: value}))
    assert {c for c, _ in found(run)} == {check}


def test_swapped_artifacts_are_found(run: RunDir, tmp_path: Path) -> None:
    one, two = run.place(0, "rewards"), run.place(1, "rewards")
    one.rename(tmp_path / "aside")
    two.rename(one)
    (tmp_path / "aside").rename(two)
    assert {("inputs", "iterations/000000/rewards"), ("inputs", "iterations/000001/rewards")} <= found(run)


def test_figures_of_an_iteration_that_is_gone_are_found(run: RunDir) -> None:
    shutil.rmtree(run.iteration(1))
    assert found(run) == {("metrics", "metrics.parquet")}


def test_pruned_checkpoints_are_told_and_are_no_damage(run: RunDir) -> None:
    list(prune(prunable(run, RetentionConfig(keep_last=1), [])))
    findings = verify_run(run)
    assert findings.problems == []
    assert [(where.path, name) for where, name in findings.pruned] == [
        ("iterations/000000/policy", "model.safetensors"),
        ("iterations/000000/optimizer", "state.safetensors"),
    ]


@pytest.mark.parametrize("note", ["", "[]", '{"files": 3}', '{"files": {"model.safetensors": "0"}}'])
def test_a_note_that_names_no_dropped_file_hides_no_damage(run: RunDir, note: str) -> None:
    (run.policy_before(1) / "pruned.json").write_text(note)
    (run.policy_before(1) / "model.safetensors").unlink()
    assert ("files", "iterations/000000/policy") in found(run)


def test_a_note_excuses_no_rows(run: RunDir) -> None:
    place = run.place(0, "rewards")
    facts = manifest_of(place)["files"]["part-00000.parquet"]
    (place / "pruned.json").write_text(json.dumps({"files": {"part-00000.parquet": facts["sha256"]}}))
    (place / "part-00000.parquet").unlink()
    assert ("files", "iterations/000000/rewards") in found(run)


def test_rows_of_a_newer_stage_are_not_passed_over(run: RunDir) -> None:
    place = run.place(1, "evaluations")
    manifest = manifest_of(place)
    manifest["stage_version"] = 99
    fix_hashes(place, manifest)
    assert [p.found for p in problems_of(run, "manifests")] == [
        "made by stage evaluate 99, this program knows versions to 1: audit it with the program that made it"
    ]


def test_the_table_has_every_check_and_the_verdict(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_verification(run.root, 20, Format.table)
    output = capsys.readouterr().out
    assert [name for name in CHECKS if name not in output] == []
    assert "nothing is wrong" in output
    forge(run, run.place(1, "rewards"), lambda f: f[1:])
    assert not print_verification(run.root, 20, Format.table)
    assert "rewards: iterations/000001/rewards" in capsys.readouterr().out


def test_jsonl_has_a_line_for_each_wrong_row(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_verification(run.root, 20, Format.jsonl)
    assert capsys.readouterr().out == ""
    (run.place(0, "rewards") / "part-00000.parquet").unlink()
    assert not print_verification(run.root, 20, Format.jsonl)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["check"], r["iteration"], r["part"]) for r in rows] == [("files", 0, "part-00000.parquet")]


def test_the_audit_imports_nothing_heavy() -> None:
    heavy = "('torch', 'vllm', 'prefect')"
    code = "import sys, flows.commands.verify, stages.inspect.verify.verify; "
    code += f"print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
