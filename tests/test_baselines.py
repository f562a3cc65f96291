"""Baselines and scales that need more than rewards: what the stages normalize and logprobs give them in a run."""

import math
import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from flows.commands.whatif import whatif
from flows.printing import Format
from flows.reporter import SilentReporter
from flows.rescoring import rescore_run
from pipeline.artifact import Artifact, open_artifact
from pipeline.errors import UsageError
from pipeline.run_dir import RunDir
from stages.inspect.verify.verify import verify_run
from stages.normalize import NormalizeConfig, member_facts
from stages.trainers.local import LocalTrainer
from tests.builders import fill
from tests.finished import finished_run, forge, problems_of, replace_value
from tests.manifests import fix_hashes, manifest_of


def run_with(folder: Path, policy: Path, normalize: str, *, name: str = "run") -> RunDir:
    """Return a finished run with these settings of [normalize]."""
    return finished_run(folder, policy, name=name, learning_rate=0.02, update=f"[normalize]\n{normalize}\n")


def test_a_scale_over_tokens_reads_the_completions(tmp_path: Path, tiny_policy: Path) -> None:
    run = run_with(tmp_path, tiny_policy, 'scale = "token_whitened"')
    assert not run.has(0, "logprobs")
    assert set(run.open(0, "advantages").manifest.inputs) == {"rewards", "completions"}
    rows = run.open(0, "advantages").read().filter(pl.col("drop_reason").is_null())
    tokens = run.open(0, "completions").read().select("completion_id", n=pl.col("completion_token_ids").list.len())
    weighed = rows.join(tokens, on="completion_id")
    assert (weighed["advantage"] * weighed["n"]).sum() == pytest.approx(0.0, abs=1e-9)
    assert verify_run(run).problems == []
    forge(run, run.place(0, "advantages"), replace_value("advantage", 0, 3.0))
    assert "advantages" in {problem.check for problem in verify_run(run).problems}


def test_a_baseline_weighs_by_the_policy_with_which_the_iteration_begins(tmp_path: Path, tiny_policy: Path) -> None:
    run = run_with(tmp_path, tiny_policy, 'baseline = "importance_weighted"')
    logprobs = run.open(1, "logprobs").read()
    assert logprobs["policy_name"].unique().to_list() == ["current"]
    assert logprobs["policy_digest"].unique().to_list() == [run.open(0, "policy").digest]
    assert set(run.open(1, "advantages").manifest.inputs) == {"rewards", "completions", "logprobs"}
    assert set(run.open(1, "policy").manifest.inputs) == {"batches", "policy"}
    assert verify_run(run).problems == []


def test_a_policy_of_several_names_has_one_forward(
    tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference that is refreshed in every iteration is the current policy."""
    compute, forwards = LocalTrainer.logprobs, []

    def counted(self: LocalTrainer, policy: Artifact, *rest: Any) -> pl.DataFrame:
        forwards.append(policy.digest)
        return compute(self, policy, *rest)

    monkeypatch.setattr(LocalTrainer, "logprobs", counted)
    run = run_with(tmp_path, tiny_policy, 'baseline = "importance_weighted"\n[update.kl]\nrefresh_every = 1')
    assert len(forwards) == len(set(forwards)) == 2
    for iteration in (0, 1):
        rows = run.open(iteration, "logprobs").read().partition_by("policy_name", as_dict=True, include_key=False)
        assert rows["current",].equals(rows["reference",])


def test_verify_finds_logprobs_of_another_policy_under_the_name_of_the_current_one(
    tmp_path: Path, tiny_policy: Path
) -> None:
    run = run_with(tmp_path, tiny_policy, 'baseline = "importance_weighted"')
    place = run.place(1, "logprobs")
    initial = open_artifact(run.initial_policy)
    manifest = manifest_of(place)
    path = os.path.relpath(initial.path.resolve(), place.resolve())
    manifest["inputs"]["policy:current"] = {"path": path, "digest": initial.digest}
    fix_hashes(place, manifest)
    forge(run, place, lambda rows: rows.with_columns(policy_digest=pl.lit(initial.digest)))
    (found,) = problems_of(run, "inputs")
    assert found.found.endswith("policy:current is initial_policy, expected iterations/000000/policy")


def test_what_a_run_lacks_cannot_be_tried(tmp_path: Path, tiny_policy: Path) -> None:
    run = run_with(tmp_path, tiny_policy, "")
    whatif(str(run.root), ["normalize.baseline=length_weighted"], Format.jsonl)
    for lacking in (run, run_with(tmp_path, tiny_policy, "[update.kl]", name="held")):  # which has those of a reference
        assert lacking.has(0, "logprobs") == (lacking is not run)
        with pytest.raises(UsageError, match=r"reads logprobs, which iteration 0 of .* does not have of the policy"):
            whatif(str(lacking.root), ["normalize.baseline=importance_weighted"], Format.jsonl)


def test_a_baseline_that_weighs_by_a_policy_cannot_be_re_scored_with(tmp_path: Path, tiny_policy: Path) -> None:
    run, own = run_with(tmp_path, tiny_policy, ""), {"normalize": {"baseline": "importance_weighted"}}
    new = RunDir(tmp_path / "runs" / "again")
    with pytest.raises(UsageError, match=r"importance_weighted weighs by the policy that trains, .*grpo fork"):
        rescore_run(run, own, new, None, [], SilentReporter())
    assert not new.resolved_config.exists()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, set()),
        ({"scale": "token_whitened"}, {"completions"}),
        ({"baseline": "length_weighted"}, {"completions"}),
        ({"baseline": "per_policy"}, {"completions"}),
        ({"baseline": "importance_weighted"}, {"completions", "logprobs"}),
        ({"baseline": "importance_weighted_squared"}, {"completions", "logprobs"}),
    ],
)
def test_a_config_reads_what_its_functions_need(settings: dict[str, str], expected: set[str]) -> None:
    assert NormalizeConfig(**settings).reads == expected


def test_the_weight_of_a_completion_is_the_product_of_its_known_ratios() -> None:
    """Over trainable tokens, with truncated sampling's kept mass taken back."""
    rows = [
        {"completion_id": "a", "policy_digest": "y", "completion_token_ids": [1, 2, 3],
         "sampling_logprobs": [-1.0, -2.0, -3.0], "kept_mass": None, "loss_mask": [True, False, True]},
        {"completion_id": "b", "policy_digest": "x", "completion_token_ids": [1, 2], "sampling_logprobs": [-1.0, None],
         "kept_mass": [0.5, 0.5], "loss_mask": None},
        {"completion_id": "c", "policy_digest": "y", "completion_token_ids": [1], "sampling_logprobs": [-1.0],
         "kept_mass": None, "loss_mask": None},
    ]  # fmt: skip
    logprobs = pl.DataFrame(
        {
            "completion_id": ["a", "b", "a"],
            "policy_name": ["current", "current", "reference"],
            "logprobs": [[-0.5, None, -2.0], [-0.25, -9.0], [-7.0, -7.0, -7.0]],
        },
        schema_overrides={"logprobs": pl.List(pl.Float32)},
    )
    found = member_facts(fill("completions", rows).lazy(), logprobs.lazy()).collect()
    assert found["tokens"].to_list() == [2.0, 2.0, 1.0]
    assert found["policy"].to_list() == [1, 0, 1]
    assert found["log_weight"].to_list() == pytest.approx([0.5 + 1.0, 0.75 + math.log(2), 0.0])
