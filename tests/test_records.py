"""Tests of grpo.records: what an update leaves behind about each completion."""

from dataclasses import replace
from typing import Any

import polars as pl
import pytest
import torch

from grpo.collate import collate
from grpo.records import RECORD_SCHEMA, TOKEN_LISTS, TOKEN_RECORD_SCHEMA, TokenFacts, completion_records

NAN = float("nan")


def rows() -> pl.DataFrame:
    """Return three rows: three tokens of which the middle one is masked, none at all, and one."""
    return pl.DataFrame(
        {
            "optimizer_step": [4, 4, 4],
            "completion_id": ["a", "b", "c"],
            "prompt_token_ids": [[1], [1], [1]],
            "completion_token_ids": [[2, 3, 4], [], [5]],
            "loss_mask": [[True, False, True], None, None],
            "sampling_logprobs": [[-1.0, -1.0, -1.5], [], [None]],
            "advantage": [1.0, 1.0, 1.0],
            "temperature": [1.0, 1.0, 1.0],
            "loss_denominator": [3.0, 3.0, 3.0],
        },
        schema_overrides={"optimizer_step": pl.Int32},
    )


def flags(**held: str) -> dict[str, torch.Tensor]:
    """Return reasons: name -> whether it holds of each token, written as 0 and 1."""
    return {name: torch.tensor([digit == "1" for digit in digits]) for name, digits in held.items()}


def facts() -> TokenFacts:
    """Return facts about the three trainable tokens: the first and last of row a, and the one of row c."""
    return TokenFacts(
        trainer_logprobs=torch.tensor([-1.25, -1.5, -3.0]),
        sampling_logprobs=torch.tensor([-1.0, -1.5, NAN]),
        importance_ratios=torch.tensor([0.5, 2.0, 1.0]),
        correction_weights=torch.tensor([1.5, 0.5, 0.0]),
        entropies=torch.tensor([1.0, 3.0, 2.0]),
        kl_to_sampler=torch.tensor([0.5, 0.25, NAN]),
        kl_to_reference=torch.tensor([0.25, 0.5, NAN]),
        logprob_differences=torch.tensor([0.25, 0.0, NAN]),
        losses=torch.tensor([0.5, -0.25, 0.0]),
        clip_reasons=flags(clipped_low="100", clipped_high="011", dual_clip="000"),
        bounds=flags(ratio_cap="100", ratio_floor="101"),
        mask_reasons=flags(veto="000", unknown_sampler="001", correction="000"),
    )


def record(with_tokens: bool = False) -> list[dict[str, Any]]:
    """Return the records of the three rows as dictionaries."""
    frame = completion_records(rows(), collate(rows()), facts(), with_tokens=with_tokens)
    assert frame.schema == (TOKEN_RECORD_SCHEMA if with_tokens else RECORD_SCHEMA)
    return frame.to_dicts()


def test_numbers_of_a_completion_are_over_its_trainable_tokens() -> None:
    assert {key: value for key, value in record()[0].items() if key not in TOKEN_LISTS} == {
        "completion_id": "a",
        "optimizer_step": 4,
        "num_tokens": 2,
        "importance_ratio_mean": 1.25,
        "importance_ratio_max": 2.0,
        "clipped_low_tokens": 1,
        "clipped_high_tokens": 1,
        "bounded_tokens": 1,
        "correction_weight_mean": 1.0,
        "masked_tokens": 0,
        "known_tokens": 2,
        "entropy_mean": 2.0,
        "kl_to_sampler": 0.375,
        "kl_to_reference": 0.375,
        "logprob_difference_max": 0.25,
        "loss": 0.25,
    }


def test_a_completion_without_tokens_has_counts_of_zero_and_means_of_null() -> None:
    empty = record()[1]
    assert [empty[name] for name in ("num_tokens", "masked_tokens", "clipped_low_tokens", "loss")] == [0, 0, 0, 0.0]
    unknown = ("importance_ratio_mean", "importance_ratio_max", "correction_weight_mean", "entropy_mean")
    assert {empty[name] for name in (*unknown, "kl_to_sampler", "kl_to_reference", "logprob_difference_max")} == {None}


def test_a_sampler_nobody_recorded_is_null_and_counted_as_masked() -> None:
    unknown = record()[2]
    assert unknown["kl_to_sampler"] is None
    assert unknown["kl_to_reference"] is None
    assert unknown["logprob_difference_max"] is None
    assert (unknown["masked_tokens"], unknown["known_tokens"]) == (1, 0)
    assert unknown["importance_ratio_max"] == 1.0


def test_token_lists_stand_beside_the_completion_tokens() -> None:
    first, second, third = record(with_tokens=True)
    assert first["trainer_logprobs"] == [-1.25, None, -1.5]
    assert first["sampling_logprobs"] == [-1.0, None, -1.5]
    assert first["importance_ratios"] == [0.5, None, 2.0]
    assert first["correction_weights"] == [1.5, None, 0.5]
    assert first["entropies"] == [1.0, None, 3.0]
    assert [second[name] for name in TOKEN_LISTS] == [[]] * 5
    assert third["sampling_logprobs"] == [None]
    assert third["trainer_logprobs"] == [-3.0]
    assert [row["token_losses"] for row in (first, second, third)] == [[0.5, None, -0.25], [], [0.0]]


def test_each_token_has_its_reasons() -> None:
    first, second, third = record(with_tokens=True)
    assert first["clip_reasons"] == ["clipped_low", None, "clipped_high"]
    assert first["mask_reasons"] == [None, "loss_mask", None]
    assert (second["clip_reasons"], second["mask_reasons"]) == ([], [])
    assert (third["clip_reasons"], third["mask_reasons"]) == (["clipped_high"], ["unknown_sampler"])


def test_a_veto_comes_before_other_reasons_for_a_weight_of_0() -> None:
    vetoed = replace(
        facts(),
        correction_weights=torch.tensor([0.0, 0.0, 0.0]),
        clip_reasons=flags(clipped_low="100", clipped_high="000", dual_clip="001"),
        mask_reasons=flags(veto="011", unknown_sampler="001", correction="111"),
    )
    frame = completion_records(rows(), collate(rows()), vetoed, with_tokens=True)
    assert frame["mask_reasons"].to_list() == [["correction", "loss_mask", "veto"], [], ["veto"]]
    assert frame["clip_reasons"].to_list() == [["clipped_low", None, None], [], ["dual_clip"]]


def test_a_loss_with_reasons_of_its_own_has_them_recorded_and_clips_nothing() -> None:
    other = replace(facts(), clip_reasons=flags(capped="110"), mask_reasons={})
    frame = completion_records(rows(), collate(rows()), other, with_tokens=True)
    assert frame["clip_reasons"].to_list() == [["capped", None, "capped"], [], ["ratio_floor"]]
    assert frame["mask_reasons"].to_list() == [[None, "loss_mask", None], [], [None]]
    assert frame["clipped_low_tokens"].to_list() == [0, 0, 0]


def test_columns_of_reasons_are_absent_unless_asked_for() -> None:
    assert set(TOKEN_RECORD_SCHEMA) - set(record()[0]) == {"clip_reasons", "mask_reasons", "token_losses"}


@pytest.mark.parametrize("name", TOKEN_LISTS)
def test_token_lists_are_null_unless_asked_for(name: str) -> None:
    assert [row[name] for row in record()] == [None, None, None]
