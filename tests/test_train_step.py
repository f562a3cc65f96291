"""Tests of grpo.train_step: the gradient of an update, its records, and its state between calls."""

import math
from collections.abc import Iterator
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.optimizer import deterministic, make_optimizer
from grpo.policy_logprobs import frame_logprobs
from grpo.records import RECORD_SCHEMA
from grpo.settings import UpdateConfig
from grpo.train_step import STEP_SCHEMA, train_on_batches
from tests.updates import FROZEN, SCHEMA, batch_rows, frozen, gradients, sha256_of_weights, tiny_policy


def assert_same_update(found: pl.DataFrame, expected: pl.DataFrame) -> None:
    """Compare loss and gradients of two ways to write the same optimizer step."""
    loss, gradient = gradients(found)
    expected_loss, expected_gradient = gradients(expected)
    assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-8)
    assert gradient.keys() == expected_gradient.keys()
    for name, value in expected_gradient.items():
        torch.testing.assert_close(gradient[name], value, rtol=1e-4, atol=1e-6, msg=name)


def reference_loss(model: PreTrainedModel, frame: pl.DataFrame) -> Tensor:
    """Return the on-policy loss under the default correction, token by token, from the model's own forward."""
    total = torch.zeros(())
    for row in frame.to_dicts():
        prompt, completion = row["prompt_token_ids"], row["completion_token_ids"]
        logits = model(torch.tensor([prompt + completion])).logits[0] / row["temperature"]
        logprobs = logits.log_softmax(-1)
        for place, token in enumerate(completion):
            if row["loss_mask"] is not None and not row["loss_mask"][place]:
                continue
            logprob = logprobs[len(prompt) + place - 1, token]
            sampling = row["sampling_logprobs"][place]
            weight = min(math.exp(logprob.item() - sampling), 2.0)
            total = total - weight * (logprob - logprob.detach()).exp() * row["advantage"] / row["loss_denominator"]
    return total


def test_loss_and_gradient_equal_those_of_a_plain_loop_over_tokens() -> None:
    model, frame = tiny_policy(), batch_rows()
    expected = reference_loss(model, frame)
    torch.autograd.backward(expected)
    loss, found = gradients(frame)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("microbatch_rows", [1, 3, 8])
def test_the_entropy_bonus_is_the_mean_over_the_tokens_of_the_step(microbatch_rows: int) -> None:
    """Whatever the rows' denominators and weights are, and however they are cut into microbatches."""
    model, frame = tiny_policy(), batch_rows(microbatch_rows=microbatch_rows)
    entropies = []
    for row in frame.to_dicts():
        prompt, completion = row["prompt_token_ids"], row["completion_token_ids"]
        logprobs = (model(torch.tensor([prompt + completion])).logits[0] / row["temperature"]).log_softmax(-1)
        for place in range(len(completion)):
            if row["loss_mask"] is None or row["loss_mask"][place]:
                of_token = logprobs[len(prompt) + place - 1]
                entropies.append(-(of_token.exp() * of_token).sum())
    bonus = torch.stack(entropies).mean()
    torch.autograd.backward(-0.3 * bonus)
    (without, before), (loss, found) = gradients(frame), gradients(frame, frozen(entropy_coef=0.3))
    assert loss - without == pytest.approx(-0.3 * bonus.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name] - before[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("microbatch_rows", [1, 3])
def test_the_kl_to_a_reference_has_the_mean_of_the_loss_and_no_weight_of_a_correction(microbatch_rows: int) -> None:
    """Rows have denominators of their own, and the correction leaves no token a weight."""
    model = tiny_policy()
    rows = batch_rows(microbatch_rows=microbatch_rows)
    rows = rows.with_columns(loss_denominator=pl.Series(range(3, 3 + rows.height), dtype=pl.Float64))
    other = frame_logprobs(model, rows.with_columns(temperature=pl.lit(1.5)), FROZEN)  # of another distribution
    frame = rows.join(other.rename({"logprobs": "reference_logprobs"}), on="completion_id", maintain_order="left")
    expected = torch.zeros(())
    for row in frame.to_dicts():
        prompt, completion = row["prompt_token_ids"], row["completion_token_ids"]
        logprobs = (model(torch.tensor([prompt + completion])).logits[0] / row["temperature"]).log_softmax(-1)
        for place, (token, reference) in enumerate(zip(completion, row["reference_logprobs"], strict=True)):
            if reference is not None:
                kl = (logprobs[len(prompt) + place - 1, token] - reference) ** 2 / 2
                expected = expected + 0.3 * kl / row["loss_denominator"]
    torch.autograd.backward(expected)
    settings = {"kl": {"name": "k2", "coef": 0.3}, "correction": {"kind": "token_mask", "low": 1.0, "high": 1.0}}
    loss, found = gradients(frame, frozen(**settings))
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_the_recorded_kl_to_a_reference_is_the_k3_estimate_of_the_trainers_divergence_from_it() -> None:
    model, rows, settings = tiny_policy(), batch_rows(), frozen(kl={"coef": 0.3}, record_tokens=True)
    other = frame_logprobs(model, rows.with_columns(temperature=pl.lit(1.5)), FROZEN)
    frame = rows.join(other.rename({"logprobs": "reference_logprobs"}), on="completion_id", maintain_order="left")
    records, _ = train_on_batches(model, make_optimizer(model, settings), frame, settings)
    for record, reference in zip(records.to_dicts(), frame["reference_logprobs"].to_list(), strict=True):
        pairs = zip(reference, record["trainer_logprobs"], strict=True)
        k3 = [math.exp(of - own) - 1 - (of - own) for of, own in pairs if own is not None]
        expected = pytest.approx(sum(k3) / len(k3), rel=1e-4) if k3 else None
        assert record["kl_to_reference"] == expected


@pytest.mark.parametrize("microbatch_rows", [1, 2, 8])
def test_how_rows_are_cut_into_microbatches_changes_nothing(microbatch_rows: int) -> None:
    assert_same_update(batch_rows(microbatch_rows=microbatch_rows), batch_rows(microbatch_rows=3))


def test_the_order_of_rows_changes_nothing() -> None:
    frame = batch_rows()
    order = [5, 0, 7, 2, 6, 1, 4, 3]
    assert_same_update(frame[order].with_columns(microbatch=frame["microbatch"]), frame)


def test_a_fully_masked_row_changes_nothing() -> None:
    frame = batch_rows()
    masked = frame[:1].with_columns(
        completion_id=pl.lit("masked"),
        completion_token_ids=pl.lit([9] * 20, dtype=pl.List(pl.Int32)),
        loss_mask=pl.lit([False] * 20),
        sampling_logprobs=pl.lit([None] * 20, dtype=pl.List(pl.Float32)),
        advantage=pl.lit(1e9),
    )
    assert_same_update(pl.concat([frame, masked]), frame)
    assert_same_update(pl.concat([frame, masked.with_columns(microbatch=pl.lit(9, dtype=pl.Int32))]), frame)


@pytest.mark.parametrize("filler", [float("nan"), 1e9, -1e9, None])
def test_sampling_logprobs_under_the_mask_are_never_read(filler: float | None) -> None:
    frame = batch_rows()
    rows = frame.to_dicts()
    for row in rows:
        if row["loss_mask"] is not None:
            row["sampling_logprobs"] = [
                value if trained else filler
                for value, trained in zip(row["sampling_logprobs"], row["loss_mask"], strict=True)
            ]
    assert_same_update(pl.DataFrame(rows, schema=SCHEMA), frame)


def test_the_head_chunk_changes_nothing() -> None:
    loss, found = gradients(batch_rows())
    expected_loss, expected = gradients(batch_rows(), frozen(head_chunk_tokens=2))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_an_unknown_sampler_masks_its_token_and_keeps_the_denominator() -> None:
    frame = batch_rows(num_rows=2, microbatch_rows=2).with_columns(loss_mask=pl.lit(None, dtype=pl.List(pl.Boolean)))
    first = frame["completion_token_ids"].list.len()[0]
    unknown = frame.with_columns(
        sampling_logprobs=pl.Series([[None] * first, frame["sampling_logprobs"][1]], dtype=pl.List(pl.Float32))
    )
    masked = frame.with_columns(loss_mask=pl.Series([[False] * first, None], dtype=pl.List(pl.Boolean)))
    assert_same_update(unknown, masked)
    model = tiny_policy()
    records, _ = train_on_batches(model, make_optimizer(model, FROZEN), unknown, FROZEN)
    assert records["masked_tokens"].to_list() == [first, 0]
    assert records["num_tokens"][0] == first
    assert records["kl_to_sampler"][0] is None


def test_without_correction_rows_of_an_unknown_sampler_train_like_others() -> None:
    settings = frozen(correction={"kind": "none"})
    frame = batch_rows()
    unknown = frame.with_columns(sampling_logprobs=pl.col("sampling_logprobs").list.eval(pl.lit(None, pl.Float32)))
    loss, gradient = gradients(unknown, settings)
    expected_loss, expected = gradients(frame, settings)
    assert loss == expected_loss
    assert all(torch.equal(gradient[name], value) for name, value in expected.items())
    records, _ = train_on_batches(model := tiny_policy(), make_optimizer(model, settings), unknown, settings)
    assert records["num_tokens"].sum() > 0
    assert records.select("masked_tokens", "known_tokens").sum().row(0) == (0, 0)


def test_the_first_step_is_on_policy_and_the_second_is_compared_with_the_start() -> None:
    model = tiny_policy()
    start = tiny_policy()
    frame = batch_rows(num_steps=2)
    settings = UpdateConfig(learning_rate=1e-2, record_tokens=True)
    records, _ = train_on_batches(model, make_optimizer(model, settings), frame, settings)
    first, second = records.partition_by("optimizer_step", maintain_order=True)
    assert set(first["importance_ratio_max"].drop_nulls()) == {1.0}
    assert second["importance_ratio_max"].max() != 1.0

    still, _ = train_on_batches(start, make_optimizer(start, FROZEN), frame[8:], settings)
    lists = ["trainer_logprobs", "importance_ratios", "correction_weights"]
    now, then = (part.select(lists).explode(lists).drop_nulls() for part in (second, still))
    expected = (now["trainer_logprobs"] - then["trainer_logprobs"]).exp()
    assert now["importance_ratios"].to_list() == pytest.approx(expected.to_list(), rel=1e-4)
    assert now["correction_weights"].to_list() == pytest.approx(then["correction_weights"].to_list(), rel=1e-4)


def test_a_sampler_equal_to_the_policy_gives_weights_of_one_and_no_kl() -> None:
    model, settings = tiny_policy(), frozen(record_tokens=True)
    frame = batch_rows()
    records, _ = train_on_batches(model, make_optimizer(model, settings), frame, settings)
    own = frame.with_columns(records["trainer_logprobs"].alias("sampling_logprobs"))
    records, _ = train_on_batches(model, make_optimizer(model, settings), own, settings)
    assert set(records["correction_weight_mean"].drop_nulls()) == {1.0}
    assert set(records["kl_to_sampler"].drop_nulls()) == {0.0}
    assert set(records["logprob_difference_max"].drop_nulls()) == {0.0}


def test_records_and_steps_tell_what_was_done() -> None:
    model = tiny_policy()
    frame = batch_rows(num_steps=2)
    settings = UpdateConfig(learning_rate=1e-3, warmup_steps=4)
    seen: list[tuple[int, int]] = []
    records, steps = train_on_batches(
        model, make_optimizer(model, settings), frame, settings, lambda step, part: seen.append((step, part))
    )
    assert records.schema == RECORD_SCHEMA
    assert steps.schema == STEP_SCHEMA
    assert records["completion_id"].to_list() == frame["completion_id"].to_list()
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert steps["learning_rate"].to_list() == [0.00025, 0.0005]
    assert steps["num_rows"].to_list() == [8, 8]
    trainable = frame["loss_mask"].list.sum().fill_null(frame["completion_token_ids"].list.len())
    assert records["num_tokens"].to_list() == trainable.to_list()
    assert steps["num_tokens"].sum() == trainable.sum()
    assert steps["loss"].to_list() == pytest.approx(
        [part["loss"].sum() for part in records.partition_by("optimizer_step", maintain_order=True)]
    )


def test_the_norm_of_the_gradient_is_the_one_before_clipping() -> None:
    norms = []
    for limit in (None, 1e-3):
        model, settings = tiny_policy(), frozen(max_grad_norm=limit)
        _, steps = train_on_batches(model, make_optimizer(model, settings), batch_rows(), settings)
        squares = [float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None]
        norms.append((steps["grad_norm"][0], math.sqrt(sum(squares))))
    assert norms[0][0] == pytest.approx(norms[0][1], rel=1e-5)
    assert norms[1] == pytest.approx((norms[0][0], 1e-3), rel=1e-3)


def test_no_rows_give_no_records_and_no_step() -> None:
    model = tiny_policy()
    optimizer = make_optimizer(model, FROZEN)
    records, steps = train_on_batches(model, optimizer, pl.DataFrame(schema=SCHEMA), FROZEN)
    assert (records.shape, steps.shape) == ((0, len(RECORD_SCHEMA)), (0, len(STEP_SCHEMA)))
    assert optimizer.num_steps == 0


def test_a_loss_that_is_not_finite_names_its_completion_and_changes_no_weight() -> None:
    model, settings = tiny_policy(), UpdateConfig(learning_rate=1e-2)
    before = sha256_of_weights(model)
    frame = batch_rows().with_columns(
        pl.when(pl.col("completion_id") == "c4").then(float("inf")).otherwise("advantage").alias("advantage")
    )
    with pytest.raises(ArithmeticError, match=r"loss of completions c4 is .*expected a finite one"):
        train_on_batches(model, make_optimizer(model, settings), frame, settings)
    assert sha256_of_weights(model) == before


def test_a_gradient_that_is_not_finite_names_the_completions_of_the_step() -> None:
    model: Any = tiny_policy()
    model.model.embed_tokens.weight.register_hook(lambda gradient: gradient * float("nan"))
    before = sha256_of_weights(model)
    settings = UpdateConfig(learning_rate=1e-2)
    with pytest.raises(ArithmeticError, match=r"gradient of completions c0, c1, .* and 2 more has norm nan"):
        train_on_batches(model, make_optimizer(model, settings), batch_rows(num_rows=10), settings)
    assert sha256_of_weights(model) == before


def test_autocast_gives_nearly_the_same_gradient() -> None:
    _, expected = gradients(batch_rows())
    settings = frozen(autocast_bf16=True)
    _, found = gradients(batch_rows(), settings)
    assert any(not torch.equal(found[name], gradient) for name, gradient in expected.items())
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.98, name


@pytest.fixture
def _restored_determinism() -> Iterator[None]:
    """Put torch's global switches back after a test has set them."""
    threads, was_on = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(was_on)


@pytest.mark.usefixtures("_restored_determinism")
def test_deterministic_mode_runs_an_update_twice_with_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    deterministic(1)
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()
    hashes = set()
    for _ in range(2):
        model, settings = tiny_policy(), UpdateConfig(learning_rate=1e-2)
        train_on_batches(model, make_optimizer(model, settings), batch_rows(num_steps=2), settings)
        hashes.add(sha256_of_weights(model))
    assert len(hashes) == 1


def test_the_kl_of_a_later_step_is_that_of_the_policy_it_begins_with() -> None:
    model, settings = tiny_policy(), UpdateConfig(learning_rate=1e-2, record_tokens=True)
    frame = batch_rows(num_steps=2)
    records, _ = train_on_batches(model, make_optimizer(model, settings), frame, settings)
    assert records["importance_ratio_max"][8:].max() != 1.0
    for row in records.drop_nulls("kl_to_sampler").to_dicts():
        pairs = zip(row["trainer_logprobs"], row["sampling_logprobs"], strict=True)
        differences = [trainer - sampler for trainer, sampler in pairs if trainer is not None]
        k3 = [math.exp(x) - 1 - x for x in differences]
        assert row["kl_to_sampler"] == pytest.approx(sum(k3) / len(k3), rel=1e-4)
