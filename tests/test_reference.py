"""A KL to a reference policy in a run: the dataset logprobs, what the update records of it, verify, replay."""

import shutil
from contextlib import closing
from pathlib import Path

import polars as pl
import pytest

from flows.replayer import Replayer
from pipeline.artifact import open_artifact
from pipeline.errors import GrpoError
from pipeline.run_dir import RunDir
from stages.inspect.metrics import iteration_metrics
from stages.inspect.verify.verify import verify_run
from stages.logprobs import forward_rows
from stages.trainers.local import with_logprobs
from tests.finished import finished_run, forge


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> RunDir:
    """A run whose updates hold the policy to the initial one."""
    return finished_run(tmp_path_factory.mktemp("held"), tiny_policy, learning_rate=0.02, update="kl = { coef = 0.5 }")


def test_the_reference_has_logprobs_of_what_may_train_and_the_update_records_its_kl(held: RunDir) -> None:
    for iteration in (0, 1):
        logprobs = held.open(iteration, "logprobs")
        rows = logprobs.read()
        assert rows["policy_name"].unique().to_list() == ["reference"]
        assert rows["policy_digest"].unique().to_list() == [open_artifact(held.initial_policy).digest]
        trained = held.open(iteration, "batches").read().filter(pl.col("drop_reason").is_null())
        assert set(rows["completion_id"]) == set(trained["completion_id"])
        assert held.open(iteration, "policy").manifest.inputs["logprobs"]["digest"] == logprobs.digest
    first, second = (held.open(iteration, "training_records").read()["kl_to_reference"] for iteration in (0, 1))
    assert first.abs().max() < 1e-9
    assert second.min() > 1e-6
    assert iteration_metrics(held, 1, 1.0)["kl_to_reference"] > 1e-6
    assert verify_run(held).problems == []


def test_the_kl_holds_the_policy_back(held: RunDir, tiny_policy: Path) -> None:
    """The first update is that of a run without it, up to rounding: there the policy is the reference."""
    free = finished_run(held.root.parent.parent, tiny_policy, name="free", learning_rate=0.02)

    def losses(run: RunDir, iteration: int) -> list[float]:
        return run.open(iteration, "training_records").read().sort("completion_id")["loss"].to_list()

    assert losses(held, 0) == pytest.approx(losses(free, 0), abs=1e-7)
    assert losses(held, 1) != pytest.approx(losses(free, 1), abs=1e-5)
    assert free.open(1, "training_records").read()["kl_to_reference"].null_count() == 16


def test_a_reference_that_is_refreshed_is_the_policy_that_an_iteration_begins_with(
    tmp_path: Path, tiny_policy: Path
) -> None:
    run = finished_run(tmp_path, tiny_policy, learning_rate=0.02, update="kl = { coef = 0.5, refresh_every = 1 }")
    digest = run.open(1, "logprobs").read()["policy_digest"].unique().to_list()
    assert digest == [run.open(0, "policy").digest]
    assert run.open(1, "training_records").read()["kl_to_reference"].abs().max() < 1e-9
    assert verify_run(run).problems == []


def test_replay_computes_logprobs_and_update_again(held: RunDir, tmp_path: Path) -> None:
    with closing(Replayer(held, tmp_path)) as replayer:
        found = [row for stage in ("logprobs", "update") for row in replayer.replay(stage, 1)]
    assert {(row.dataset, row.result) for row in found} >= {("logprobs", "equal"), ("policy", "equal")}


def test_groups_in_which_no_reward_differs_are_left_out() -> None:
    """Unless one is missing: what a missing one counts is decided later."""
    groups = {"same": [1.0, 1.0], "other": [0.0, 1.0], "missing": [1.0, None], "none": [None, None], "two": [0.5, 0.5]}
    completions = pl.DataFrame(
        [
            {"completion_id": f"{g}{i}", "group_id": g, "prompt_token_ids": [1], "completion_token_ids": [1] * (i + 1)}
            for g in groups
            for i in range(2)
        ]
    )
    rewards = [{"group_id": g, "reward_name": "a", "reward": r} for g, values in groups.items() for r in values]
    rewards += [{"group_id": "two", "reward_name": "b", "reward": r} for r in (0.0, 1.0)]
    found = forward_rows(completions, pl.DataFrame(rewards), 100)
    assert set(found["group_id"]) == {"other", "missing", "two"}
    assert found["num_tokens"].is_sorted()
    assert set(forward_rows(completions, None, 100)["group_id"]) == set(groups)


def test_microbatches_of_a_forward_keep_to_the_budget() -> None:
    completions = pl.DataFrame(
        {
            "completion_id": ["a", "b", "c"],
            "group_id": ["g"] * 3,
            "prompt_token_ids": [[1]] * 3,
            "completion_token_ids": [[1] * 4, [1] * 2, [1]],
        }
    )
    found = forward_rows(completions, None, 6)
    assert dict(zip(found["completion_id"], found["microbatch"], strict=True)) == {"c": 0, "b": 0, "a": 1}


def test_a_row_that_trains_without_logprobs_is_refused(held: RunDir) -> None:
    rows = held.open(1, "batches").read().filter(pl.col("drop_reason").is_null())
    logprobs = held.open(1, "logprobs").read()
    assert "reference_logprobs" in with_logprobs(rows, logprobs).columns
    lost = rows["completion_id"][0]
    with pytest.raises(GrpoError, match=f"under the policy 'reference' lack 1 rows that train, .* {lost}"):
        with_logprobs(rows, logprobs.filter(pl.col("completion_id") != lost))


def test_verify_finds_logprobs_of_another_policy(held: RunDir, tmp_path: Path) -> None:
    run = RunDir(shutil.copytree(held.root, tmp_path / "copy"))
    forge(run, run.place(1, "logprobs"), lambda frame: frame.with_columns(policy_name=pl.lit("proximal")))
    rows = [problem.row for problem in verify_run(run).problems if problem.check == "records"]
    assert {row.partition(" ")[0] for row in rows if row} == {"reference", "proximal"}
