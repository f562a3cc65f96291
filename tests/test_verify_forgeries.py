"""The audit against forgers: rows and settings that were changed with their hashes are found by their meaning."""

import json
from collections.abc import Callable

import polars as pl
import pyarrow.parquet as pq
import pytest

from pipeline.conformance import conform
from pipeline.manifest import MANIFEST
from pipeline.run_dir import RunDir
from stages.inspect.verify.verify import verify_run
from tests.finished import forge, problems_of, replace_value
from tests.manifests import fix_chain, fix_hashes, manifest_of


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


def test_of_many_wrong_rows_some_are_named_and_all_counted(run: RunDir) -> None:
    forge(run, run.place(1, "completions"), lambda f: f.with_columns(completion=pl.lit("x")))
    findings = verify_run(run, limit=3)
    named = [p for p in findings.problems if p.check == "text"]
    assert findings.tallies["text"].wrong == 8  # one part: 2 groups of 4
    assert [(p.row is not None, p.num_rows) for p in named] == [(True, 1)] * 3 + [(False, 5)]
