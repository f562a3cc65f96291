"""The audit: a whole run is fine, and each way to damage or forge it is found and named."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from flows.commands.verify import print_verification
from flows.printing import Format
from pipeline.conformance import conform
from pipeline.manifest import MANIFEST
from pipeline.prune import prunable, prune
from pipeline.run_dir import RunDir
from stages.inspect.verify.ledger import CHECKS, Ledger, Problem, compare
from stages.inspect.verify.verify import verify_run
from tests.finished import finished_run, fix_chain, fix_hashes, forge, manifest_of, replace_value


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Path:
    """Return a finished run, not to be changed."""
    return finished_run(tmp_path_factory.mktemp("verify"), tiny_policy).root


@pytest.fixture
def run(original: Path, tmp_path: Path) -> RunDir:
    """Return a copy of the finished run."""
    shutil.copytree(original, tmp_path / "run")
    return RunDir(tmp_path / "run")


def found(run: RunDir) -> set[tuple[str, str]]:
    """Return check and artifact of every problem."""
    return {(p.check, p.where.path) for p in verify_run(run).problems}


def problems_of(run: RunDir, check: str) -> list[Problem]:
    return [p for p in verify_run(run).problems if p.check == check]


def test_a_finished_run_is_fine_and_every_check_has_looked_at_something(original: Path) -> None:
    findings = verify_run(RunDir(original))
    assert findings.problems == []
    assert [name for name in CHECKS if findings.tallies[name].checked == 0] == []
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


def test_rows_altered_with_their_own_hashes_fixed_are_named_by_the_next_artifact(run: RunDir) -> None:
    place = run.place(0, "completions")
    change = replace_value("finish_reason", 0, "length")
    path = place / "part-00000.parquet"
    pq.write_table(conform(change(pl.read_parquet(path)), "completions"), path)
    fix_hashes(place)
    inputs = problems_of(run, "inputs")
    assert {p.where.dataset for p in inputs} == {"rewards", "batches"}
    assert all("iterations/000000/completions is" in p.found for p in inputs)
    assert "endings" in {p.check for p in verify_run(run).problems}


FORGERIES: list[tuple[str, str, Callable[[pl.DataFrame], pl.DataFrame], str]] = [
    ("prompts", "reference_answer", replace_value("reference_answer", 1, "3"), "prompt ids"),
    ("prompts", "drop_reason", replace_value("drop_reason", 1, "too_long"), "prompt split"),
    ("completions", "text", replace_value("completion", 1, "9"), "text"),
    ("completions", "tokens", replace_value("completion_token_ids", 1, [19, 1]), "text"),
    ("completions", "vocabulary", replace_value("completion_token_ids", 1, [99, 1]), "token ids"),
    ("completions", "negative id", replace_value("completion_token_ids", 1, [-1, 1]), "token ids"),
    ("completions", "no end", replace_value("completion_token_ids", 1, [21, 21]), "endings"),
    ("completions", "stop reason", replace_value("stop_reason", 1, "7"), "endings"),
    ("completions", "stop string", replace_value("stop_reason", 1, "1x"), "endings"),
    ("completions", "engine", replace_value("engine_version", 1, "2"), "sampling plan"),
    ("completions", "length", replace_value("finish_reason", 1, "length"), "endings"),
    ("completions", "unknown end", replace_value("finish_reason", 1, "tired"), "endings"),
    ("completions", "positive", replace_value("sampling_logprobs", 1, [-1.0, 0.5]), "logprobs"),
    ("completions", "NaN", replace_value("sampling_logprobs", 1, [-1.0, float("nan")]), "logprobs"),
    ("completions", "infinite", replace_value("sampling_logprobs", 1, [-1.0, float("-inf")]), "logprobs"),
    ("completions", "too few", replace_value("sampling_logprobs", 1, [-1.0]), "lengths"),
    ("completions", "mask", replace_value("loss_mask", 1, [True]), "lengths"),
    ("completions", "mass", replace_value("kept_mass", 1, [0.5]), "lengths"),
    ("completions", "impossible mass", replace_value("kept_mass", 1, [0.5, 1.5]), "logprobs"),
    ("completions", "digest", replace_value("policy_digest", 1, "0" * 64), "policy digests"),
    ("completions", "prompt", replace_value("prompt_token_ids", 1, [5]), "groups"),
    ("completions", "seed", replace_value("seed", 1, 5), "sampling plan"),
    ("completions", "temperature", replace_value("temperature", 1, 0.5), "sampling plan"),
    ("completions", "twice", lambda f: pl.concat([f, f[:1]]), "groups"),
    ("completions", "removed", lambda f: f[1:], "sampling plan"),
    ("completions", "reordered", lambda f: f.reverse(), "sampling plan"),
    ("completions", "logprob", replace_value("sampling_logprobs", 1, [-1.0, -2.0]), "batches"),
    ("rewards", "value", replace_value("reward", 1, 0.25), "advantages"),
    ("rewards", "infinite", replace_value("reward", 1, float("inf")), "rewards"),
    ("rewards", "nothing", replace_value("reward", 1, None), "rewards"),
    ("rewards", "error", replace_value("error", 1, "no"), "rewards"),
    ("rewards", "recipe", replace_value("reward_recipe", 1, "r"), "rewards"),
    ("rewards", "name", replace_value("reward_name", 1, "other"), "rewards"),
    ("rewards", "removed", lambda f: f[1:], "rewards"),
    ("advantages", "value", replace_value("advantage", 1, lambda a: a + 1e-12), "advantages"),
    ("advantages", "drop", replace_value("drop_reason", 1, "unscored"), "advantages"),
    ("advantages", "reordered", lambda f: f.reverse(), "advantages"),
    ("batches", "tokens", replace_value("completion_token_ids", 1, [21, 22]), "batches"),
    ("batches", "place", replace_value("row", 1, 7), "batches"),
    ("batches", "denominator", replace_value("loss_denominator", 1, 7.0), "batches"),
    ("batches", "advantage", replace_value("advantage", 1, 7.0), "batches"),
    ("batches", "removed", lambda f: f[1:], "batches"),
    ("batches", "swapped", lambda f: f[[1, 0, *range(2, len(f))]], "batches"),
    ("training_records", "tokens", replace_value("num_tokens", 0, 1), "records"),
    ("training_records", "known", replace_value("known_tokens", 0, 0), "records"),
    ("training_records", "loss", replace_value("loss", 0, lambda x: x + 1e-3), "records"),
    ("training_records", "ratio", replace_value("importance_ratio_mean", 0, 1.5), "records"),
    ("training_records", "removed", lambda f: f[1:], "records"),
    ("training_records", "entropy", replace_value("entropy_mean", 0, lambda x: x + 1), "metrics"),
    ("optimizer_steps", "rows", replace_value("num_rows", 0, 1), "records"),
    ("optimizer_steps", "rate", replace_value("learning_rate", 0, 1.0), "metrics"),
    ("evaluations", "text", replace_value("completion", 0, "x"), "text"),
    ("evaluations", "correct", replace_value("is_correct", 0, lambda x: not x), "evaluations"),
    ("evaluations", "reference", replace_value("reference_answer", 0, "5"), "evaluations"),
    ("evaluations", "seed", replace_value("seed", 0, 5), "evaluations"),
]  # fmt: skip


@pytest.mark.parametrize(("dataset", "change", "check"), [(d, c, k) for d, _, c, k in FORGERIES],
                         ids=[f"{d}: {n}" for d, n, _, _ in FORGERIES])  # fmt: skip
def test_a_forgery_with_every_hash_fixed_is_found_by_its_meaning(
    run: RunDir, dataset: str, change: Callable[[pl.DataFrame], pl.DataFrame], check: str
) -> None:
    forge(run, run.place(1, dataset), change)
    assert check in {p.check for p in verify_run(run).problems if p.where.iteration in (1, None)}


def test_a_figure_that_is_not_that_of_its_artifact_names_both(run: RunDir) -> None:
    forge(run, run.place(0, "optimizer_steps"), replace_value("learning_rate", 0, 1.0))
    (problem,) = verify_run(run).problems
    assert (problem.where.path, problem.row) == ("metrics.parquet", "iteration 0")
    assert problem.found == "learning_rate is 0.001, recomputed from iterations/000000/optimizer_steps 1.0"


def test_the_exact_row_of_a_forgery_is_named(run: RunDir) -> None:
    forge(run, run.place(1, "completions"), replace_value("completion", 1, "9"), part=1)
    completion_id = pl.read_parquet(run.place(1, "completions") / "part-00001.parquet")["completion_id"][1]
    problem = problems_of(run, "text")[0]
    assert (problem.where.iteration, problem.where.dataset) == (1, "completions")
    assert (problem.part, problem.row) == ("part-00001.parquet", completion_id)
    assert problem.found.startswith("the text is '9', its tokens decode to '")


def test_an_evaluated_question_among_the_training_prompts_is_found(run: RunDir) -> None:
    held_out = pl.read_parquet(run.held_out_prompts / "part-00000.parquet")
    forge(run, run.place(1, "prompts"), lambda f: pl.concat([f[:-1], held_out[:1]]))
    rows = [(p.check, p.row) for p in verify_run(run).problems if p.check in ("held out", "prompt split")]
    assert sorted(rows) == [("held out", held_out["prompt_id"][0]), ("prompt split", held_out["prompt_id"][0])]


def test_a_setting_that_is_not_the_runs_is_found_with_every_hash_fixed(run: RunDir) -> None:
    place = run.place(0, "advantages")
    manifest = manifest_of(place)
    manifest["config"]["eps"] = manifest["chosen"]["eps"] = 0.5
    fix_hashes(place, manifest)
    fix_chain([a.path for a in run.artifacts()])
    (problem,) = problems_of(run, "config")
    assert problem.found == "normalize.eps is 0.5, config.resolved.json says 0.0001"


def test_a_setting_that_may_change_between_two_starts_is_no_problem(run: RunDir) -> None:
    tables = json.loads(run.resolved_config.read_text())
    tables["score"]["max_failed_share"] = 0.5
    tables["score"]["rewards"][0]["concurrency"] = 3
    run.resolved_config.write_text(json.dumps(tables))
    assert problems_of(run, "config") == []


def test_a_setting_at_its_default_that_no_hash_covers_is_derived(run: RunDir) -> None:
    place = run.place(0, "advantages")
    manifest = manifest_of(place)
    manifest["config"]["eps"] = 0.5
    (place / MANIFEST).write_text(json.dumps(manifest))
    found = {problem.found for problem in problems_of(run, "config")}
    assert "eps is 0.5, which nobody has chosen: the default is 0.0001" in found


def test_a_setting_that_no_stage_has_is_found(run: RunDir) -> None:
    place = run.place(0, "advantages")
    manifest = manifest_of(place)
    manifest["config"]["ep3"] = manifest["config"].pop("eps")
    (place / MANIFEST).write_text(json.dumps(manifest))
    assert "'ep3' is no setting of stage normalize 4" in {problem.found for problem in problems_of(run, "config")}


def test_an_input_of_another_iteration_is_found_with_every_hash_fixed(run: RunDir) -> None:
    place = run.place(1, "advantages")
    manifest = manifest_of(place)
    manifest["inputs"]["rewards"]["path"] = "../../000000/rewards"
    fix_hashes(place, manifest)
    fix_chain([a.path for a in run.artifacts()])
    assert [p.found for p in problems_of(run, "inputs")] == [
        "its input rewards is iterations/000000/rewards, expected iterations/000001/rewards"
    ]


def test_a_manifest_without_an_input_is_found_with_every_hash_fixed(run: RunDir) -> None:
    place = run.place(1, "batches")
    manifest = manifest_of(place)
    del manifest["inputs"]["advantages"]
    fix_hashes(place, manifest)
    fix_chain([a.path for a in run.artifacts()])
    assert [p.found for p in problems_of(run, "inputs")] == ["the manifest of stage batch names no advantages"]


def test_weights_of_another_shape_are_found_with_every_hash_fixed(run: RunDir) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    path = run.policy_before(2) / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file({**tensors, name: torch.zeros(3)}, path)
    fix_chain([a.path for a in run.artifacts()])
    (problem,) = problems_of(run, "policies")
    assert name in problem.found


def test_swapped_artifacts_are_found(run: RunDir, tmp_path: Path) -> None:
    one, two = run.place(0, "rewards"), run.place(1, "rewards")
    one.rename(tmp_path / "aside")
    two.rename(one)
    (tmp_path / "aside").rename(two)
    assert {("inputs", "iterations/000000/rewards"), ("inputs", "iterations/000001/rewards")} <= found(run)


def test_figures_of_an_iteration_that_is_gone_are_found(run: RunDir) -> None:
    shutil.rmtree(run.iteration(1))
    assert found(run) == {("metrics", "metrics.parquet")}


def test_of_many_wrong_rows_some_are_named_and_all_counted(run: RunDir) -> None:
    forge(run, run.place(1, "completions"), lambda f: f.with_columns(completion=pl.lit("x")))
    findings = verify_run(run, limit=3)
    named = [p for p in findings.problems if p.check == "text"]
    assert findings.tallies["text"].wrong == 8  # one part: 2 groups of 4
    assert [(p.row is not None, p.num_rows) for p in named] == [(True, 1)] * 3 + [(False, 5)]


def test_pruned_checkpoints_are_told_and_are_no_damage(run: RunDir) -> None:
    list(prune(prunable(run, 1, [])))
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


def test_compare_tells_what_became_of_each_row() -> None:
    expected = pl.DataFrame({"id": ["a", "b", "c", "d"], "x": [1.0, 2.0, 3.0, None]})
    now = pl.DataFrame({"id": ["a", "b", "b", "e", "d"], "x": [1.0, 2.5, 2.0, 5.0, None]})
    rows, count = compare(expected, now, ["id"], limit=9)
    assert [(r.row, r.found) for r in rows] == [
        ("c", "the row is missing"),
        ("e", "the row should not be there"),
        ("b", "the row stands twice"),
        ("b", "x is 2.5, expected 2.0"),
    ]
    assert count == 4


def test_compare_finds_rows_out_of_order_only_where_order_matters() -> None:
    expected = pl.DataFrame({"id": ["a", "b"]})
    rows, count = compare(expected, expected.reverse(), ["id"], limit=1)
    assert ([r.found for r in rows], count) == (["stands at row 0, expected 1"], 2)
    assert compare(expected, expected.reverse(), ["id"], limit=1, is_ordered=False) == ([], 0)


def test_compare_allows_the_tolerance_and_no_more() -> None:
    expected = pl.DataFrame({"id": ["a", "b"], "x": [100.0, float("nan")]})
    near = expected.with_columns(x=pl.Series([100.0 + 1e-8, float("nan")]))
    assert compare(expected, near, ["id"], limit=1, tolerance=1e-9) == ([], 0)
    assert compare(expected, near, ["id"], limit=1)[1] == 1


def test_a_ledger_of_nothing_is_fine() -> None:
    assert Ledger().is_fine


def test_the_audit_imports_nothing_heavy() -> None:
    heavy = "('torch', 'vllm', 'prefect')"
    code = "import sys, flows.commands.verify, stages.inspect.verify.verify; "
    code += f"print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
