"""Policies, rows and settings for tests of an update."""

import hashlib
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from grpo.optimizer import make_optimizer
from grpo.settings import UpdateConfig
from grpo.train_step import train_on_batches
from pipeline.schema import SCHEMAS
from tests.builders import fill

torch.set_num_threads(1)  # the tensors are tiny: a second thread would only wait

SCHEMA = pl.DataFrame(SCHEMAS["batches"].empty_table()).schema


def frozen(**options: Any) -> UpdateConfig:
    """Return a config that leaves the weights alone, so that the gradients of a call can be read afterwards."""
    return UpdateConfig(**{"max_grad_norm": None, **options}).model_copy(update={"learning_rate": 0.0})


FROZEN = frozen()


def tiny_policy(**options: Any) -> PreTrainedModel:
    """Return a small random Qwen2 in evaluation mode; the same arguments give the same weights."""
    torch.manual_seed(7)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    auto: Any = AutoModelForCausalLM
    model: Any = auto.from_config(AutoConfig.for_model("qwen2", **sizes | layers | options))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    policy: PreTrainedModel = model.eval()
    return policy


def batch_rows(num_rows: int = 8, num_steps: int = 1, microbatch_rows: int = 3, seed: int = 0) -> pl.DataFrame:
    """Return random rows in training order, with a masked token here and there."""
    random = np.random.default_rng(seed)
    rows = []
    for index in range(num_rows * num_steps):
        length = int(random.integers(1, 7))
        rows.append(
            {
                "optimizer_step": index // num_rows,
                "microbatch": index % num_rows // microbatch_rows,
                "row": index % num_rows,
                "completion_id": f"c{index}",
                "group_id": f"g{index // 4}",
                "prompt_token_ids": random.integers(1, 40, int(random.integers(1, 5))).tolist(),
                "completion_token_ids": random.integers(1, 40, length).tolist(),
                "loss_mask": None if index % 3 else (random.random(length) < 0.7).tolist(),
                "sampling_logprobs": (-3.7 + random.normal(size=length)).tolist(),
                "advantage": float(random.normal()),
                "temperature": 1.0 if index % 2 else 0.7,
                "loss_denominator": 25.0,
            }
        )
    return fill("batches", rows)


def sha256_of_weights(model: PreTrainedModel) -> str:
    """Return a hash of all parameters."""
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


def gradients(frame: pl.DataFrame, settings: UpdateConfig = FROZEN) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of one optimizer step of the tiny policy on these rows."""
    model = tiny_policy()
    _, steps = train_on_batches(model, make_optimizer(model, settings), frame, settings)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return steps["loss"][0], {name: gradient for name, gradient in found.items() if gradient is not None}
