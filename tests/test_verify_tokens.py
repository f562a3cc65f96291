"""The audit of recorded tokens: each way to forge a list is found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.run_dir import RunDir
from stages.inspect.verify.files import open_all
from stages.inspect.verify.ledger import Ledger
from stages.inspect.verify.tokens import check_tokens
from tests.finished import finished_run, forge, replace_value

FORGERY = Callable[[pl.DataFrame], pl.DataFrame]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Path:
    """Return a finished run with recorded tokens and two optimizer steps, not to be changed."""
    folder = tmp_path_factory.mktemp("verify_tokens")
    return finished_run(folder, tiny_policy, update="record_tokens = true\n[batch]\noptimizer_steps = 2").root


def found(run: RunDir) -> list[str]:
    """Return what is wrong with the tokens of iteration 1, up to the first colon."""
    findings = Ledger()
    catalog = open_all(run, findings)
    check_tokens(findings, catalog[1, "training_records"], catalog[1, "batches"])
    assert {problem.check for problem in findings.problems} <= {"records"}
    return [problem.found.split(":")[0] for problem in findings.problems]


def first(change: Callable[[list[Any]], list[Any]], column: str) -> FORGERY:
    return replace_value(column, 0, change)


def test_tokens_as_recorded_are_fine(run: RunDir) -> None:
    assert found(run) == []


def test_a_loss_mask_is_fine_where_the_records_know_it(run: RunDir) -> None:
    ids = run.open(1, "training_records").read()["completion_id"]
    position = run.open(1, "batches").read()["completion_id"].to_list().index(ids[0])
    forge(run, run.place(1, "batches"), replace_value("loss_mask", position, [False, True]))
    assert found(run) == ["the tokens that trained are not those of the batch's loss_mask"]
    for column in ("trainer_logprobs", "importance_ratios", "correction_weights", "entropies", "token_losses"):
        forge(run, run.place(1, "training_records"), first(lambda values: [None, values[1]], column))
    forge(run, run.place(1, "training_records"), first(lambda values: ["loss_mask", values[1]], "mask_reasons"))
    assert "the tokens that trained are not those of the batch's loss_mask" not in found(run)


@pytest.mark.parametrize(
    ("column", "change", "expected"),
    [
        ("token_losses", lambda v: [v[0] + 1e-3, v[1]], "token_losses do not sum to loss"),
        ("token_losses", lambda v: [v[0], None], "the tokens that trained are not those of the batch's loss_mask"),
        ("entropies", lambda v: [v[0] * 1.01, v[1]], "entropy_mean is not the mean of entropies"),
        ("importance_ratios", lambda v: [2.0, v[1]], "importance_ratio_mean is not the mean of importance_ratios"),
        ("correction_weights", lambda _: [None, None], "correction_weight_mean is not the mean of correction_weights"),
        ("clip_reasons", lambda v: ["clipped_low", v[1]], "clipped_low_tokens is not the count of clip_reasons"),
        ("mask_reasons", lambda v: ["veto", v[1]], "masked_tokens is not the count of mask_reasons"),
        ("trainer_logprobs", lambda v: v[:1], "a list of tokens has another length than the completion"),
        ("sampling_logprobs", lambda _: None, "a list of tokens has another length than the completion"),
    ],
)
def test_a_forged_list_is_found(
    run: RunDir, column: str, change: Callable[[list[Any]], list[Any]], expected: str
) -> None:
    forge(run, run.place(1, "training_records"), first(change, column))
    assert expected in found(run)
