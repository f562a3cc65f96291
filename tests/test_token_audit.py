"""The token audit: per-token numbers give the row's and the step's, and `grpo tokens` prints them."""

import hashlib
import json
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from flows.commands.tokens import COLUMNS, tell, token_rows, tokens
from flows.printing import Format
from grpo.optimizer import make_optimizer
from grpo.records import RECORD_SCHEMA, TOKEN_LISTS, TOKEN_RECORD_SCHEMA
from grpo.settings import UpdateConfig
from grpo.train_step import train_on_batches
from pipeline.conformance import check_schema, conform
from pipeline.errors import SchemaError, UsageError
from pipeline.run_dir import RunDir
from pipeline.schema import SCHEMAS
from stages.inspect.verify.verify import verify_run
from tests.finished import DIGIT_0, finished_run
from tests.policies import EOS
from tests.small_run import make_small_run
from tests.updates import batch_rows, sha256_of_weights
from tests.updates import tiny_policy as tiny_model

NUMBERS = [name for name in RECORD_SCHEMA if name not in TOKEN_LISTS]
LISTS = [*TOKEN_LISTS, "clip_reasons", "mask_reasons", "token_losses"]


def awkward_settings(*, record_tokens: bool) -> UpdateConfig:
    """Return settings under which every reason for a clip or a mask occurs."""
    return UpdateConfig.model_validate(
        {
            "learning_rate": 1e-2,
            "loss": {"clip_low": 0.001, "clip_high": 0.001, "dual_clip": 1.002},
            "correction": {"kind": "token_mask", "low": 0.5, "high": 3.0, "veto_low": 0.15},
            "record_tokens": record_tokens,
        }
    )


def awkward_rows() -> pl.DataFrame:
    """Return 24 rows of two optimizer steps with masked tokens, and a sampler that nobody recorded here and there."""
    frame = batch_rows(num_rows=12, num_steps=2)
    logprobs = frame["sampling_logprobs"].to_list()
    for row in range(0, 24, 5):
        logprobs[row][-1] = None
    return frame.with_columns(pl.Series("sampling_logprobs", logprobs, dtype=pl.List(pl.Float32)))


def train(*, record_tokens: bool) -> tuple[pl.DataFrame, pl.DataFrame, str]:
    model, settings = tiny_model(), awkward_settings(record_tokens=record_tokens)
    records, steps = train_on_batches(model, make_optimizer(model, settings), awkward_rows(), settings)
    return records, steps, sha256_of_weights(model)


@pytest.fixture(scope="module")
def trained() -> tuple[pl.DataFrame, pl.DataFrame, str]:
    return train(record_tokens=True)


def in_order(values: list[float | None]) -> float:
    """Return the float64 sum in token order, nulls left out. `sum` itself would compensate for rounding."""
    return reduce(add, (value for value in values if value is not None), 0.0)


def mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return in_order(known) / len(known) if known else None


def test_recording_tokens_changes_no_weight_and_no_other_number(trained: Any) -> None:
    records, steps, weights = train(record_tokens=False)
    assert weights == trained[2]
    assert steps.equals(trained[1])
    assert records.schema == RECORD_SCHEMA
    assert trained[0].schema == TOKEN_RECORD_SCHEMA
    assert records.select(NUMBERS).equals(trained[0].select(NUMBERS))


def test_every_list_is_as_long_as_the_completion_masked_or_not(trained: Any) -> None:
    lengths = awkward_rows()["completion_token_ids"].list.len().to_list()
    for name in LISTS:
        assert trained[0][name].list.len().to_list() == lengths


def test_every_reason_occurs_and_masks_are_those_of_the_batch(trained: Any) -> None:
    records = trained[0]
    assert set(records["clip_reasons"].explode()) == {None, "clipped_low", "clipped_high", "dual_clip"}
    assert set(records["mask_reasons"].explode()) == {None, "loss_mask", "veto", "unknown_sampler", "correction"}
    for mask, reasons in zip(awkward_rows()["loss_mask"], records["mask_reasons"].to_list(), strict=True):
        trains = [reason != "loss_mask" for reason in reasons]
        assert trains == ([True] * len(reasons) if mask is None else mask.to_list())


def test_numbers_of_the_tokens_give_those_of_the_row_exactly(trained: Any) -> None:
    for row in trained[0].to_dicts():
        ratios = [value for value in row["importance_ratios"] if value is not None]
        assert row["num_tokens"] == len(ratios)
        assert row["importance_ratio_mean"] == mean(ratios)
        assert row["importance_ratio_max"] == max(ratios, default=None)
        assert row["correction_weight_mean"] == mean(row["correction_weights"])
        assert row["entropy_mean"] == mean(row["entropies"])
        assert row["loss"] == in_order(row["token_losses"])
        assert row["clipped_low_tokens"] == row["clip_reasons"].count("clipped_low")
        assert row["clipped_high_tokens"] == row["clip_reasons"].count("clipped_high")
        masked = [reason for reason in row["mask_reasons"] if reason not in (None, "loss_mask")]
        assert row["masked_tokens"] == len(masked) == row["correction_weights"].count(0.0)


def test_losses_of_the_tokens_give_that_of_the_optimizer_step(trained: Any) -> None:
    records, steps, _ = trained
    for part, step in zip(records.partition_by("optimizer_step", maintain_order=True), steps.to_dicts(), strict=True):
        rows = [in_order(losses) for losses in part["token_losses"].to_list()]
        assert pl.Series(rows).sum() == pytest.approx(step["loss"], rel=1e-15)
        assert step["num_tokens"] == sum(value is not None for x in part["token_losses"].to_list() for value in x)


def test_a_masked_token_has_no_loss_and_an_untrained_one_no_number(trained: Any) -> None:
    tokens = trained[0].select(LISTS).explode(LISTS)
    untrained = tokens.filter(pl.col("mask_reasons") == "loss_mask")
    assert len(untrained) > 0
    assert untrained.drop("mask_reasons").null_count().row(0) == (len(untrained),) * (len(LISTS) - 1)
    masked = tokens.filter(pl.col("mask_reasons").is_in(["veto", "unknown_sampler", "correction"]))
    assert set(masked["token_losses"]) == {0.0}


def test_reasons_agree_with_the_numbers_they_explain(trained: Any) -> None:
    frame = awkward_rows().select("completion_id", "advantage")
    tokens = trained[0].join(frame, on="completion_id").select("advantage", *LISTS).explode(LISTS)
    ratio = pl.col("importance_ratios")
    for reason, is_so in {
        "clipped_low": (pl.col("advantage") < 0) & (ratio < 0.999),
        "clipped_high": (pl.col("advantage") > 0) & (ratio > 1.001),
        "dual_clip": (pl.col("advantage") < 0) & (ratio > 1.002),
    }.items():
        found = tokens.filter(pl.col("clip_reasons") == reason)["importance_ratios"].to_list()
        # float32 puts a ratio on the bound on either side
        assert found == pytest.approx(tokens.filter(is_so)["importance_ratios"].to_list()), reason


def test_no_rows_have_the_columns_of_tokens() -> None:
    model, settings = tiny_model(), awkward_settings(record_tokens=True)
    records, _ = train_on_batches(model, make_optimizer(model, settings), awkward_rows()[:0], settings)
    assert (records.height, records.schema) == (0, TOKEN_RECORD_SCHEMA)


def test_files_have_all_columns_of_tokens_or_none(trained: Any) -> None:
    whole = conform(trained[0], "training_records")
    assert whole.schema.equals(SCHEMAS["training_records"], check_metadata=True)
    bare = conform(trained[0].select(list(RECORD_SCHEMA)), "training_records")
    check_schema(bare.schema, "training_records", "here")
    assert bare.schema.metadata == whole.schema.metadata
    with pytest.raises(SchemaError, match="lack the columns \\['token_losses'\\]"):
        conform(trained[0].drop("token_losses"), "training_records")
    with pytest.raises(SchemaError, match="clip_reasons: missing"):
        check_schema(whole.schema.remove(whole.schema.get_field_index("clip_reasons")), "training_records", "here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Path:
    """Return a folder with two runs of the same questions, of which one records tokens; not to be changed."""
    path = tmp_path_factory.mktemp("tokens")
    finished_run(path, tiny_policy, name="recorded", update="record_tokens = true")
    finished_run(path, tiny_policy, name="bare")
    return path / "runs"


@pytest.fixture
def run(folder: Path) -> RunDir:
    return RunDir(folder / "recorded")


@pytest.fixture
def bare(folder: Path) -> RunDir:
    return RunDir(folder / "bare")


def trained_id(run: RunDir, iteration: int = 0) -> str:
    return str(run.open(iteration, "training_records").read()["completion_id"][0])


def test_a_run_with_tokens_passes_the_audit_and_has_the_weights_of_one_without(run: RunDir, bare: RunDir) -> None:
    assert verify_run(run).problems == []
    # of the first iteration: the second one's ids, hence its order of rows, follow from the first one's recipe
    ours, theirs = (r.open(0, "policy").path / "model.safetensors" for r in (run, bare))
    assert hashlib.sha256(ours.read_bytes()).digest() == hashlib.sha256(theirs.read_bytes()).digest()
    names = [pq.read_schema(r.open(0, "training_records").files()[0]).names for r in (run, bare)]
    assert set(names[0]) - set(names[1]) == {"clip_reasons", "mask_reasons", "token_losses"}


@pytest.mark.parametrize(
    ("settings", "column", "reason"),
    [
        ('loss = { name = "dppo_k2", low = 1e-9, high = 1e-9 }', "clipped_low_tokens", "clipped_low"),
        ("correction = { off_policy_sequence_mask = 1e-9 }", "masked_tokens", "off_policy_sequence_mask"),
    ],
)
def test_every_reason_and_bound_is_counted_as_verify_counts_it(
    tmp_path: Path, tiny_policy: Path, settings: str, column: str, reason: str
) -> None:
    """With the clips of a loss that leaves the tokens some gradient, and a mask of whole rows."""
    recorded = f'record_tokens = true\nproximal = "sampler"\n{settings}'
    run = finished_run(tmp_path, tiny_policy, learning_rate=0.02, update=recorded)
    rows = run.open(0, "training_records").read()
    lists = "mask_reasons" if column == "masked_tokens" else "clip_reasons"
    counted = rows.select(pl.col(lists).explode() == reason).to_series().sum()
    assert rows[column].sum() == counted > 0
    assert verify_run(run).problems == []


def test_each_token_of_a_completion_is_a_line(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    completion = trained_id(run)
    tokens(run.root, completion, 0, Format.jsonl)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [tuple(row) for row in rows] == [COLUMNS] * 2
    assert {row["completion_id"] for row in rows} == {completion}
    assert [row["position"] for row in rows] == [0, 1]
    assert rows[0]["token_id"] in (DIGIT_0 + 2, DIGIT_0 + 3)
    assert rows[0]["text"] == str(rows[0]["token_id"] - DIGIT_0)
    assert (rows[1]["token_id"], rows[1]["text"]) == (EOS, "<eos>")
    assert [row["sampling_logprob"] for row in rows] == [-1.0, -1.0]
    (record,) = run.open(0, "training_records").read().filter(pl.col("completion_id") == completion).to_dicts()
    assert [row["trainer_logprob"] for row in rows] == record["trainer_logprobs"]
    assert sum(row["loss"] for row in rows) == record["loss"]


def test_the_table_tells_reasons_and_numbers(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    tokens(run.root, trained_id(run, 1), None, Format.table)
    output = capsys.readouterr().out
    assert output.startswith("iteration 1, completion ")
    assert '"<eos>"' in output
    assert "optimizer step 0: 2 tokens trained" in output
    assert "set update.record_tokens" not in output


def test_without_recorded_tokens_the_stored_numbers_are_shown_with_a_note(
    bare: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    completion = trained_id(bare)
    tokens(bare.root, completion, 0, Format.table)
    assert "the update recorded no tokens: set update.record_tokens = true" in capsys.readouterr().out
    rows = list(token_rows(bare, tell(bare, 0, completion)))
    assert [(row["sampling_logprob"], row["trainer_logprob"]) for row in rows] == [(-1.0, None)] * 2


def test_a_dropped_row_is_shown_with_its_reason(
    tmp_path: Path,
    tiny_policy: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = RunDir(make_small_run(tmp_path, tiny_policy))
    dropped = small.open(0, "batches").read().filter(pl.col("drop_reason").is_not_null())["completion_id"][0]
    tokens(small.root, dropped, None, Format.table)
    assert "the row did not train: zero_variance" in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["nothing", ""])
def test_an_id_that_names_none_or_several_is_refused(run: RunDir, prefix: str) -> None:
    with pytest.raises(UsageError, match=r"completions whose id begins with .*expected one: see `grpo rows"):
        tokens(run.root, prefix, 0, Format.table)
