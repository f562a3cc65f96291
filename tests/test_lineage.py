"""Lineage: what an artifact was made from, and what became of a completion."""

import json
import shutil
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from flows.commands.lineage import lineage
from flows.printing import Format
from pipeline.artifact import open_artifact
from pipeline.conformance import conform
from pipeline.errors import ArtifactDamaged, ArtifactMissing, UsageError
from pipeline.lineage import ancestry, trace, updates_of
from pipeline.run_dir import RunDir
from tests.finished import finished_run
from tests.manifests import fix_hashes, manifest_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> RunDir:
    """Return a finished run of two iterations, not to be changed."""
    return finished_run(tmp_path_factory.mktemp("lineage"), tiny_policy)


def test_the_tree_of_a_policy_goes_back_to_the_first_prompt(run: RunDir) -> None:
    nodes = [
        (n.depth, n.name, n.artifact.path.relative_to(run.root).as_posix(), n.is_repeated)
        for n in ancestry(open_artifact(run.policy_before(1)))
    ]
    assert nodes == [
        (0, "", "iterations/000000/policy", False),
        (1, "batches", "iterations/000000/batches", False),
        (2, "completions", "iterations/000000/completions", False),
        (3, "prompts", "iterations/000000/prompts", False),
        (4, "policy", "initial_policy", False),
        (3, "policy:current", "initial_policy", True),
        (2, "advantages", "iterations/000000/advantages", False),
        (3, "rewards", "iterations/000000/rewards", False),
        (4, "prompts", "iterations/000000/prompts", True),
        (4, "completions", "iterations/000000/completions", True),
        (1, "policy", "initial_policy", True),
    ]


def test_the_tree_stops_at_the_depth_asked_for(run: RunDir) -> None:
    assert [n.name for n in ancestry(open_artifact(run.policy_before(2)), depth=1)] == ["", "batches", "policy"]


def test_every_artifact_stands_once_with_its_inputs(run: RunDir) -> None:
    followed = [n.artifact.digest for n in ancestry(open_artifact(run.policy_before(2))) if not n.is_repeated]
    assert len(followed) == len(set(followed)) == 1 + 2 * 6  # the initial policy, and six of each iteration


def test_updates_name_the_rows_that_made_a_policy(run: RunDir) -> None:
    updates = list(updates_of(open_artifact(run.policy_before(2))))
    assert [u.policy.path for u in updates] == [run.policy_before(2), run.policy_before(1)]
    for index, update in zip((1, 0), updates, strict=True):
        kept = pl.read_parquet(run.place(index, "batches") / "*.parquet")["drop_reason"].null_count()
        assert (update.num_rows, update.num_dropped) == (kept, 16 - kept)


def test_an_initial_policy_has_no_updates(run: RunDir) -> None:
    assert list(updates_of(open_artifact(run.initial_policy))) == []


def completion_of(run: RunDir, iteration: int, *, is_kept: bool) -> str:
    rows = pl.read_parquet(run.place(iteration, "batches") / "*.parquet")
    chosen = rows.filter(pl.col("drop_reason").is_null() == is_kept)
    if not len(chosen):
        pytest.skip("the seed gave no such row")
    return str(chosen["completion_id"][0])


def test_a_completion_is_followed_to_every_policy_it_helped_to_train(run: RunDir) -> None:
    steps = trace(run, completion_of(run, 0, is_kept=True))
    assert [s.what for s in steps] == [
        "prompt", "author", "completion", "rewards", "advantages", "batches", "training_records", "trained", "trained",
    ]  # fmt: skip
    assert steps[1].artifact.path == run.initial_policy
    assert [(s.artifact.path, s.says.split(":")[0]) for s in steps[-2:]] == [
        (run.policy_before(1), "directly"),
        (run.policy_before(2), "by descent"),
    ]


def test_a_completion_of_the_last_iteration_trains_the_last_policy_alone(run: RunDir) -> None:
    steps = trace(run, completion_of(run, 1, is_kept=True))
    assert [s.artifact.path for s in steps if s.what == "trained"] == [run.policy_before(2)]


def test_a_dropped_completion_trains_nothing(run: RunDir, tmp_path: Path) -> None:
    shutil.copytree(run.root, tmp_path / "copy")
    copy = RunDir(tmp_path / "copy")
    dropped = completion_of(copy, 0, is_kept=True)
    path = copy.place(0, "batches") / "part-00000.parquet"
    is_it = pl.col("completion_id") == dropped
    rows = pl.read_parquet(path).with_columns(
        drop_reason=pl.when(is_it).then(pl.lit("stale")).otherwise(pl.col("drop_reason"))
    )
    pq.write_table(conform(rows, "batches"), path)
    fix_hashes(copy.place(0, "batches"))
    manifest = manifest_of(copy.policy_before(1))
    manifest["inputs"]["batches"]["digest"] = manifest_of(copy.place(0, "batches"))["digest"]
    fix_hashes(copy.policy_before(1), manifest)
    steps = trace(copy, dropped)
    assert [s for s in steps if s.what == "trained"] == []
    assert next(s for s in steps if s.what == "batches").says.endswith("dropped: stale")


def test_a_beginning_that_fits_none_or_several_completions_is_refused(run: RunDir) -> None:
    with pytest.raises(UsageError, match="has 32 completions whose id begins with ''"):
        trace(run, "")
    with pytest.raises(UsageError, match="has no completions whose id begins with 'zz'"):
        trace(run, "zz")


def test_a_replaced_input_is_refused(run: RunDir, tmp_path: Path) -> None:
    shutil.copytree(run.root, tmp_path / "copy")
    copy = RunDir(tmp_path / "copy")
    shutil.rmtree(copy.place(0, "rewards"))
    shutil.copytree(copy.place(1, "rewards"), copy.place(0, "rewards"))
    with pytest.raises(ArtifactDamaged, match=r"was made from rewards .* it was replaced"):
        list(ancestry(open_artifact(copy.policy_before(1))))


def test_a_missing_input_is_refused(run: RunDir, tmp_path: Path) -> None:
    shutil.copytree(run.root, tmp_path / "copy")
    copy = RunDir(tmp_path / "copy")
    shutil.rmtree(copy.place(0, "rewards"))
    with pytest.raises(ArtifactMissing, match="rewards has no manifest"):
        list(ancestry(open_artifact(copy.policy_before(1))))


def test_the_command_prints_tree_and_updates(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    lineage(run.policy_before(2), None, None, Format.table)
    output = capsys.readouterr().out
    assert "    iterations/000001/completions" in output
    assert "updated from" in output
    lineage(run.policy_before(2), None, 1, Format.jsonl)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["depth"], r["input"], len(r["digest"])) for r in rows] == [
        (0, "", 64), (1, "batches", 64), (1, "policy", 64),
    ]  # fmt: skip


def test_the_command_follows_a_completion(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    lineage(run.root, completion_of(run, 0, is_kept=True), None, Format.jsonl)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["artifact"] for r in rows if r["what"] == "trained"] == [
        "iterations/000000/policy", "iterations/000001/policy",
    ]  # fmt: skip


def test_something_that_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no finished artifact"):
        lineage(tmp_path, None, None, Format.table)
