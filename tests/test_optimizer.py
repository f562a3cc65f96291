"""Tests of grpo.optimizer: the schedule, what decays, and the state between calls."""

import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from grpo.optimizer import learning_rate_at, load_optimizer, make_optimizer, save_optimizer
from grpo.policy import load_policy, save_policy
from grpo.settings import AdamWConfig, UpdateConfig
from grpo.train_step import train_on_batches
from tests.updates import FROZEN, batch_rows, sha256_of_weights, tiny_policy


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_is_a_function_of_the_step(schedule: Any) -> None:
    settings = UpdateConfig(learning_rate=1.0, warmup_steps=2, schedule=schedule, total_steps=6)
    expected = {
        "constant": [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
        "linear": [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0],
        "cosine": [0.5, 1.0, 1.0, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0.0, 0.0],
    }[schedule]
    assert [learning_rate_at(step, settings) for step in range(8)] == pytest.approx(expected)


@pytest.mark.parametrize("options", [{"schedule": "linear"}, {"schedule": "cosine", "total_steps": 3}])
def test_a_falling_schedule_without_an_end_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="total_steps"):
        UpdateConfig(warmup_steps=3, **options)


def test_weight_decay_leaves_norms_and_biases_alone() -> None:
    model = tiny_policy()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = UpdateConfig(learning_rate=0.1, weight_decay=0.5)
    frame = batch_rows().with_columns(advantage=pl.lit(0.0))
    train_on_batches(model, make_optimizer(model, settings), frame, settings)
    assert {parameter.dim() for parameter in model.parameters()} == {1, 2}
    for name, parameter in model.named_parameters():
        expected = before[name] * (1.0 if parameter.dim() == 1 else 1 - 0.1 * 0.5)
        torch.testing.assert_close(parameter.detach(), expected, msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path: Path, tied: bool) -> None:
    settings = UpdateConfig(learning_rate=1e-2, warmup_steps=1, schedule="linear", total_steps=6, weight_decay=0.1)
    frames = [batch_rows(num_steps=2, seed=seed) for seed in (1, 2)]
    save_policy(tiny_policy(tie_word_embeddings=tied), tmp_path / "start")

    model = load_policy(tmp_path / "start")
    optimizer = make_optimizer(model, settings)
    expected = [train_on_batches(model, optimizer, frame, settings) for frame in frames]
    save_optimizer(optimizer, model, tmp_path / "expected.safetensors")

    again = load_policy(tmp_path / "start")
    optimizer = make_optimizer(again, settings)
    train_on_batches(again, optimizer, frames[0], settings)
    save_policy(again, tmp_path / "middle")
    save_optimizer(optimizer, again, tmp_path / "middle.safetensors")

    resumed = load_policy(tmp_path / "middle")
    optimizer = load_optimizer(tmp_path / "middle.safetensors", resumed, settings)
    records, steps = train_on_batches(resumed, optimizer, frames[1], settings)
    save_optimizer(optimizer, resumed, tmp_path / "found.safetensors")

    assert sha256_of_weights(resumed) == sha256_of_weights(model)
    assert sha256_of_weights(resumed) != sha256_of_weights(again)
    assert records.equals(expected[1][0], null_equal=True)
    assert steps.equals(expected[1][1])
    assert (tmp_path / "found.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_a_fresh_optimizer_is_saved_as_zeros_and_loads(tmp_path: Path) -> None:
    model = tiny_policy()
    save_optimizer(make_optimizer(model, FROZEN), model, tmp_path / "fresh")
    tensors = load_file(tmp_path / "fresh")
    assert not any(tensor.any() for tensor in tensors.values())
    assert load_optimizer(tmp_path / "fresh", model, FROZEN).num_steps == 0


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    model = tiny_policy()
    save_optimizer(make_optimizer(model, FROZEN), model, tmp_path / "state")
    with pytest.raises(ValueError, match=r"state of another model .*expected the state saved with this policy"):
        load_optimizer(tmp_path / "state", tiny_policy(vocab_size=41), FROZEN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_half_precision_are_refused(dtype: torch.dtype) -> None:
    model: Any = tiny_policy()
    with pytest.raises(ValueError, match=rf"parameters have half precision, such as .* \({dtype}\): expected float32"):
        make_optimizer(model.to(dtype), AdamWConfig())
    frozen_body: Any = tiny_policy()
    for parameter in frozen_body.model.parameters():
        parameter.requires_grad_(False).data = parameter.data.to(dtype)
    make_optimizer(frozen_body, AdamWConfig())


def test_the_settings_of_adamw_reach_it() -> None:
    config = AdamWConfig(learning_rate=0.5, beta1=0.25, beta2=0.75, adam_eps=1e-3, weight_decay=0.125)
    matrices, others = make_optimizer(tiny_policy(), config).adamw.param_groups
    for group in (matrices, others):
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.25, 0.75), 1e-3)
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.125, 0.0)
