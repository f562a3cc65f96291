"""Closeness: how far apart artifacts lie, column by column and tensor by tensor."""

import json
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from flows.commands.replay import print_replay
from flows.printing import Format
from pipeline.run_dir import RunDir
from stages.inspect import artifact_diff
from stages.inspect.artifact_diff import column_deviations, machine_changes, tensor_deviations
from tests.builders import advantage_rows, completion_rows, fill, write_artifact
from tests.finished import forge, replace_value
from tests.manifests import fix_chain, fix_hashes, manifest_of

NAN, INF = float("nan"), float("inf")


def columns(tmp_path: Path, dataset: str, a: pl.DataFrame, b: pl.DataFrame, tolerance: float = 1e-3) -> list[Any]:
    artifacts = [write_artifact(tmp_path / name, dataset, frame) for name, frame in (("a", a), ("b", b))]
    found = column_deviations(dataset, *artifacts, tolerance)
    return [(d.name, d.relative, d.is_close, d.row) for d in found]


def test_floats_are_measured_by_the_largest_of_their_column(tmp_path: Path) -> None:
    a = advantage_rows({"reward": 8.0}, {"reward": 0.5})
    b = advantage_rows({"reward": 8.0}, {"reward": 0.5078125})
    # 0.0078125 / 8
    assert columns(tmp_path, "advantages", a, b) == [("reward", 0.0009765625, True, None)]


def test_the_first_row_beyond_the_tolerance_is_named_and_the_largest_difference_given(tmp_path: Path) -> None:
    a = advantage_rows({"reward": 1.0}, {"reward": 2.0}, {"reward": 4.0})
    b = advantage_rows({"reward": 1.001}, {"reward": 2.5}, {"reward": 5.0})
    artifacts = [write_artifact(tmp_path / name, "advantages", frame) for name, frame in (("a", a), ("b", b))]
    (found,) = column_deviations("advantages", *artifacts, 1e-3)
    assert (found.relative, found.is_close, found.where) == (0.25, False, "advantages row 1 c1")
    assert (found.a, found.b) == (2.0, 2.5)


def test_lists_are_compared_element_by_element(tmp_path: Path) -> None:
    a = completion_rows({"sampling_logprobs": [-1.0, -4.0]}, {"sampling_logprobs": [-2.0, None]})
    b = completion_rows({"sampling_logprobs": [-1.0, -4.0]}, {"sampling_logprobs": [-2.0 + 2**-10, None]})
    # 2^-10 / 4
    assert columns(tmp_path, "completions", a, b) == [("sampling_logprobs", 2**-12, True, None)]


@pytest.mark.parametrize("other", [[-1.0], [-1.0, None], [-1.0, NAN], [-1.0, -INF]])
def test_another_length_a_null_and_what_is_no_number_are_never_close(tmp_path: Path, other: list[float | None]) -> None:
    a = completion_rows({}, {"sampling_logprobs": [-1.0, -2.0]})
    b = completion_rows({}, {"sampling_logprobs": other})
    assert columns(tmp_path, "completions", a, b, 1e9) == [("sampling_logprobs", None, False, 1)]


def test_equal_nulls_and_nans_are_no_difference(tmp_path: Path) -> None:
    rows = ({"advantage": NAN, "reward": None}, {"advantage": INF, "reward": 1.0})
    assert columns(tmp_path, "advantages", advantage_rows(*rows), advantage_rows(*rows)) == []


def test_a_column_of_zeros_is_close_to_nothing_else(tmp_path: Path) -> None:
    a, b = advantage_rows({"advantage": 0.0}), advantage_rows({"advantage": 1e-12})
    assert columns(tmp_path, "advantages", a, b) == [("advantage", None, False, 0)]


@pytest.mark.parametrize(
    ("column", "a", "b"),
    [
        ("completion", "7", "8"),
        ("completion_token_ids", [7, 1], [7, 2]),
        ("seed", 4, 5),
        ("finish_reason", "stop", "length"),
    ],
)
def test_ids_tokens_and_texts_are_equal_or_not(tmp_path: Path, column: str, a: object, b: object) -> None:
    frames = (completion_rows({}, {column: value}) for value in (a, b))
    assert columns(tmp_path, "completions", *frames, tolerance=1e9) == [(column, None, False, 1)]


def test_another_number_of_rows_and_other_columns_are_told(tmp_path: Path, trained_records: pl.DataFrame) -> None:
    assert columns(tmp_path / "1", "advantages", advantage_rows({}, {}), advantage_rows({})) == [
        ("number of rows", None, False, None)
    ]
    bare = trained_records.drop("clip_reasons", "mask_reasons", "token_losses")
    assert columns(tmp_path / "2", "training_records", trained_records, bare) == [("columns", None, False, None)]


@pytest.fixture
def trained_records() -> pl.DataFrame:
    names = (
        "num_tokens",
        "clipped_low_tokens",
        "clipped_high_tokens",
        "bounded_tokens",
        "masked_tokens",
        "known_tokens",
    )
    return fill("training_records", [{}], completion_id="c0", optimizer_step=0, loss=1e-4, **dict.fromkeys(names, 0))


def test_what_rounding_leaves_of_nothing_is_measured_by_one(tmp_path: Path, trained_records: pl.DataFrame) -> None:
    a = trained_records.with_columns(kl_to_sampler=pl.lit(1e-14))
    b = trained_records.with_columns(kl_to_sampler=pl.lit(3e-14), loss=pl.lit(2e-4))
    found = columns(tmp_path, "training_records", a, b, 1e-5)
    assert found == [("kl_to_sampler", pytest.approx(2e-14), True, None), ("loss", 1.0, False, 0)]


def test_a_difference_in_a_later_chunk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.inspect.artifact_diff.CHUNK_ROWS", 2)
    a = advantage_rows(*({"reward": 1.0} for _ in range(5)))
    b = advantage_rows(*({"reward": x} for x in (1.0005, 1.0, 1.25, 1.0, 1.5)))
    assert columns(tmp_path, "advantages", a, b) == [("reward", 0.5, False, 2)]


def tensors(tmp_path: Path, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], **metadata: str) -> list[Any]:
    save_file(a, tmp_path / "a", metadata={"num_steps": "3"})
    save_file(b, tmp_path / "b", metadata={"num_steps": "3", **metadata})
    found = tensor_deviations("state", tmp_path / "a", tmp_path / "b", 1e-3)
    return [(d.name, d.relative, d.is_close) for d in found]


def test_tensors_are_measured_by_their_own_largest_value(tmp_path: Path) -> None:
    a = {"x": torch.tensor([[1.0, -8.0]]), "y": torch.tensor([2**-10]), "z": torch.tensor(3.0)}
    b = {"x": torch.tensor([[1.0078125, -8.0]]), "y": torch.tensor([2**-11]), "z": torch.tensor(3.0)}
    assert tensors(tmp_path, a, b) == [("x", 0.0009765625, True), ("y", 0.5, False)]


def test_a_tensor_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_diff, "CHUNK_ELEMENTS", 4)
    a = torch.ones(5, 2)
    b = a.clone()
    b[4, 1] = 1.5
    assert tensors(tmp_path, {"x": a}, {"x": b}) == [("x", 0.5, False)]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (torch.zeros(2), torch.tensor([0.0, 1e-30]), [("x", None, False)]),
        (torch.tensor([NAN, INF]), torch.tensor([NAN, INF]), []),
        (torch.tensor([NAN, 1.0]), torch.tensor([1.0, 1.0]), [("x", None, False)]),
        (torch.tensor([0.0]), torch.tensor([-0.0]), []),
        (torch.tensor([2, 3]), torch.tensor([2, 4]), [("x", None, False)]),
        (torch.ones(2), torch.ones(2, dtype=torch.bfloat16), [("x", None, False)]),
        (torch.ones(2), torch.ones(1, 2), [("x", None, False)]),
        (torch.ones(2, dtype=torch.bfloat16), torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16),
         [("x", 0.0078125, False)]),
        (torch.empty(0, 3), torch.empty(0, 3), []),
    ],
)  # fmt: skip
def test_awkward_tensors(tmp_path: Path, a: torch.Tensor, b: torch.Tensor, expected: list[Any]) -> None:
    assert tensors(tmp_path, {"x": a}, {"x": b}) == expected


def test_a_missing_tensor_and_another_step_count_are_told(tmp_path: Path) -> None:
    one = torch.ones(1)
    assert tensors(tmp_path, {"x": one, "y": one.clone()}, {"x": one}, num_steps="4") == [
        ("metadata", None, False), ("y", None, False),
    ]  # fmt: skip


FILES = {"policy": "model.safetensors", "optimizer": "state.safetensors"}


def scale_weight(run: RunDir, dataset: str, by: float) -> str:
    """Multiply the largest element of a tensor of the last update, as another machine's rounding would; name it."""
    place, file = run.place(1, dataset), FILES[dataset]
    order = [artifact.path for artifact in run.artifacts()]
    found = load_file(place / file)
    name = next(key for key, value in found.items() if value.dim() == 2)
    flat = found[name].view(-1)
    flat[flat.abs().argmax()] *= by
    kept = {"format": "pt"} if dataset == "policy" else {"num_steps": "2"}
    save_file(found, place / file, metadata=kept)
    fix_hashes(place)
    fix_chain(order)
    return name


def replayed(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {row["dataset"]: row for row in rows}


@pytest.mark.parametrize(("dataset", "file"), FILES.items())
def test_a_checkpoint_within_the_tolerance_is_close_and_beyond_it_differs(
    run: RunDir, dataset: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = scale_weight(run, dataset, 1 + 1e-6)
    assert print_replay(run.root, [1], "update", Format.jsonl)
    rows = replayed(capsys)
    others = dict.fromkeys(("training_records", "optimizer_steps", "policy", "optimizer"), "equal")
    assert {name: row["result"] for name, row in rows.items()} == {**others, dataset: "close"}
    (odd,) = rows[dataset]["deviations"]
    assert (odd["part"], odd["name"], odd["is_close"]) == (file, name, True)
    assert odd["relative"] == pytest.approx(1e-6, rel=0.1)
    assert rows[dataset]["machine"] == []
    assert not print_replay(run.root, [1], "update", Format.jsonl, tolerance=1e-7)
    row = replayed(capsys)[dataset]
    assert (row["result"], row["tolerance"]) == ("differs", 1e-7)
    assert row["found"].startswith(f"{file}: {name} differs by ")


def test_the_table_says_what_close_means(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    name = scale_weight(run, "policy", 1 + 1e-6)
    assert print_replay(run.root, [1], "update", Format.table)
    output = capsys.readouterr().out
    assert "4 artifacts: 3 equal to the bit, 1 close" in output
    assert re.search(
        rf"iteration 1 policy \(close\): 1 within the tolerance, at most [\d.]+e-0[67] in {name}\n", output
    )
    assert "close = every float within 1e-05 of the largest magnitude" in output
    assert "the machine is of the same kind: equal bits were to be expected" in output
    assert name in output


def test_rows_within_the_tolerance_are_close(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    forge(run, run.place(1, "advantages"), replace_value("advantage", 3, lambda x: x * (1 + 1e-9)))
    assert print_replay(run.root, [1], "normalize", Format.jsonl)
    row = replayed(capsys)["advantages"]
    assert (row["result"], [d["name"] for d in row["deviations"]]) == ("close", ["advantage"])
    assert not print_replay(run.root, [1], "normalize", Format.jsonl, tolerance=0.0)


def test_a_forged_token_is_never_close(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    forge(run, run.place(1, "batches"), replace_value("completion_token_ids", 0, [25, 1]))
    assert not print_replay(run.root, [1], "batch", Format.jsonl, tolerance=1e9)
    assert "completion_token_ids stored" in replayed(capsys)["batches"]["found"]


def test_pruned_weights_can_only_be_told_apart_by_their_hash(run: RunDir) -> None:
    scale_weight(run, "policy", 1 + 1e-6)
    (run.policy_before(2) / "model.safetensors").unlink()
    stored, computed = run.open(1, "policy"), run.open(0, "policy")
    found = {d.part: (d.name, d.a) for d in artifact_diff.deviations("policy", stored, computed, 1e9)}
    assert found["model.safetensors"][0] == "file"
    assert str(found["model.safetensors"][1]).endswith("(pruned)")


def test_another_kind_of_machine_is_described(run: RunDir) -> None:
    stored = run.open(0, "rewards")
    facts = manifest_of(stored.path)
    facts["environment"] |= {"processor": "Z80", "packages": {**facts["environment"]["packages"], "torch": "0.1"}}
    (stored.path / "manifest.json").write_text(json.dumps(facts))
    changes = machine_changes(run.open(0, "rewards"), run.open(0, "advantages"))
    assert len(changes) == 2
    assert changes[0].startswith("processor was Z80, now ")
    assert changes[1].startswith("torch was 0.1, now ")
