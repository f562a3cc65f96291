"""Every setting of an update reaches its loss and its weights."""

import itertools
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor

from grpo.optimizer import make_optimizer
from grpo.policy_logprobs import frame_logprobs
from grpo.settings import UpdateConfig
from grpo.train_step import train_on_batches
from tests.updates import batch_rows, frozen, gradients, tiny_policy


def with_loss(**options: float | str) -> UpdateConfig:
    """Return settings with these options of the loss."""
    return UpdateConfig.model_validate({"learning_rate": 1e-2, "loss": options})


def test_settings_reach_the_correction_and_the_clip() -> None:
    frame = batch_rows()
    loss, _ = gradients(frame)
    for changed in (
        frozen(correction={"kind": "none"}),
        frozen(correction={"kind": "token_mask", "low": 0.8, "high": 1.2}),
    ):
        assert gradients(frame, changed)[0] != pytest.approx(loss, rel=1e-3)

    model, clipped = tiny_policy(), with_loss(clip_low=1e-3, clip_high=1e-3)
    records, _ = train_on_batches(model, make_optimizer(model, clipped), batch_rows(num_steps=2), clipped)
    counts = records.group_by("optimizer_step").agg(pl.col("clipped_low_tokens", "clipped_high_tokens").sum())
    assert counts.sort("optimizer_step").rows()[0] == (0, 0, 0)
    assert min(counts.sort("optimizer_step").rows()[1]) > 0

    # A bound on the loss of tokens with A < 0 can only lower it.
    losses = []
    for dual_clip in ("none", 1.01):
        settings = with_loss(clip_low="none", clip_high="none", dual_clip=dual_clip)
        model = tiny_policy()
        _, steps = train_on_batches(model, make_optimizer(model, settings), batch_rows(num_steps=2), settings)
        losses.append(steps["loss"].to_list())
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] > losses[1][1] + 1e-4


@pytest.mark.parametrize(
    "correction",
    [
        {"kind": "token_clip", "low": 0.9},
        {"high": 1.1},
        {"kind": "k3_mask", "high": 100.0, "token_cap": 1.0},
        {"veto_low": 0.5},
        {"veto_high": 1.5},
    ],
)
def test_every_option_of_the_correction_reaches_the_loss(correction: dict[str, Any]) -> None:
    loss, _ = gradients(batch_rows())
    assert gradients(batch_rows(), frozen(correction=correction))[0] != pytest.approx(loss)


LARGE = {"learning_rate": 0.02, "loss": {"clip_low": 0.05, "clip_high": 0.1, "dual_clip": 1.2}}
"""Settings under which, in the second step of a call, every bound of the clip acts."""

CHANGES: dict[str, dict[str, Any]] = {
    "learning_rate": {"learning_rate": 0.03},
    "warmup_steps": {"warmup_steps": 3},
    "schedule": {"schedule": "linear", "total_steps": 9},
    "total_steps": {"schedule": "linear", "total_steps": 5},
    "beta1": {"beta1": 0.5},
    "beta2": {"beta2": 0.5},
    "adam_eps": {"adam_eps": 0.1},
    "weight_decay": {"weight_decay": 0.5},
    "max_grad_norm": {"max_grad_norm": 1e-3},
    "loss": {"loss": {"clip_low": 0.5, "clip_high": 0.1, "dual_clip": 1.2}},
    "loss.clip_high": {"loss": {"clip_low": 0.05, "clip_high": 0.15, "dual_clip": 1.2}},
    "loss.dual_clip": {"loss": {"clip_low": 0.05, "clip_high": 0.1, "dual_clip": 1.5}},
    "correction": {"correction": {"high": 1.5}},
    "proximal": {"proximal": "sampler"},
    "offline_kl_coef": {"offline_kl_coef": 1.0},
    "entropy_coef": {"entropy_coef": 0.1},
    "kl": {"kl": {"coef": 0.5}},
    "kl.coef": {"kl": {"coef": 0.7}},
    "kl.name": {"kl": {"coef": 0.5, "name": "k3"}},
    "kl.ratio_cap": {"kl": {"coef": 0.5, "ratio_cap": None}},
    "autocast_bf16": {"autocast_bf16": True},
}
BITS_ALONE = {"head_chunk_tokens", "gradient_checkpointing", "record_tokens", "num_threads"}
"""Settings that change no weight beyond rounding; tests of their own hold them."""


def weights_after(settings: dict[str, Any]) -> Tensor:
    """Return the weights after two calls of two steps each, the second one with optimizer and proximal policy of
    the first."""
    model, config = tiny_policy(), UpdateConfig.model_validate({**LARGE, **settings})
    optimizer = make_optimizer(model, config)
    rows = [batch_rows(num_steps=2, seed=seed) for seed in (1, 2)]
    before = [frame_logprobs(model, frame, config) for frame in rows]
    first, second = (
        frame.join(own.rename({"logprobs": "reference_logprobs"}), on="completion_id", maintain_order="left")
        for frame, own in zip(rows, before, strict=True)
    )
    train_on_batches(model, optimizer, first, config)
    train_on_batches(model, optimizer, second.with_columns(proximal_logprobs="reference_logprobs"), config)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_every_setting_of_an_update_reaches_its_weights() -> None:
    assert {name.partition(".")[0] for name in CHANGES} | BITS_ALONE == set(UpdateConfig.model_fields)
    weights = {name: weights_after(change) for name, change in {"": {}, **CHANGES}.items()}
    for (name, found), (other, expected) in itertools.combinations(weights.items(), 2):
        assert float((found - expected).abs().max()) > 1e-5, (name, other)
