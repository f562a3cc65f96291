"""AdamW, its schedule and its file."""

import math
import os
from dataclasses import dataclass

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from grpo.settings import AdamWConfig

STATE_TENSORS = ("exp_avg", "exp_avg_sq", "step")
"""AdamW's state of a parameter."""

FLOAT32_EPS = torch.finfo(torch.float32).eps


@dataclass
class Optimizer:
    """AdamW and its number of steps; outlives a call, and is saved next to the policy."""

    adamw: torch.optim.AdamW
    num_steps: int = 0
    """Optimizer steps since the start of the run: the learning rate depends on nothing else."""


def make_optimizer(model: PreTrainedModel, config: AdamWConfig) -> Optimizer:
    """Return a fresh optimizer of the model's trainable parameters.

    Raises:
        ValueError: if one of them has half precision, in which most steps of AdamW are rounded away.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _check_precision(model)
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    return Optimizer(torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_eps))


def learning_rate_at(num_steps: int, config: AdamWConfig) -> float:
    """Return the learning rate of the optimizer step that follows ``num_steps`` finished ones."""
    if num_steps < config.warmup_steps:
        return config.learning_rate * (num_steps + 1) / config.warmup_steps
    if config.schedule == "constant" or config.total_steps is None:
        return config.learning_rate
    progress = min((num_steps - config.warmup_steps) / (config.total_steps - config.warmup_steps), 1.0)
    remaining = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * remaining


def clip_gradient(model: PreTrainedModel, max_norm: float | None) -> float:
    """Scale a larger gradient down to this norm, None = to none; return the norm that it had."""
    limit = math.inf if max_norm is None else max_norm
    return float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))


def take_step(optimizer: Optimizer, config: AdamWConfig) -> float:
    """Change the weights; return the learning rate of this step."""
    learning_rate = learning_rate_at(optimizer.num_steps, config)
    for group in optimizer.adamw.param_groups:
        group["lr"] = learning_rate
    optimizer.adamw.step()
    optimizer.num_steps += 1
    return learning_rate


def save_optimizer(optimizer: Optimizer, model: PreTrainedModel, path: str | os.PathLike[str]) -> None:
    """Write the state by parameter name, as safetensors; the same state always gives the same bytes."""
    tensors = {}
    for name, parameter in _trainable(model).items():
        # A parameter that has had no gradient yet has no state; AdamW would start it with zeros.
        state = optimizer.adamw.state.get(parameter) or _fresh_state(parameter)
        for key in STATE_TENSORS:
            tensors[f"{name}/{key}"] = state[key].detach().cpu().contiguous()
    # One metadata entry only: safetensors writes several in no fixed order.
    save_file(tensors, path, metadata={"num_steps": str(optimizer.num_steps)})


def load_optimizer(path: str | os.PathLike[str], model: PreTrainedModel, config: AdamWConfig) -> Optimizer:
    """Return the optimizer that ``save_optimizer`` wrote, bound to this model's parameters.

    Raises:
        ValueError: if the file was written for a model with other parameters.
    """
    optimizer = make_optimizer(model, config)
    parameters = _trainable(model)
    expected = {
        f"{name}/{key}": list(tensor.shape)
        for name, parameter in parameters.items()
        for key, tensor in _fresh_state(parameter, device="meta").items()
    }
    with safe_open(path, framework="pt") as file:
        found = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
        if found != expected:
            odd = sorted(set(map(str, found.items())) ^ set(map(str, expected.items())))
            raise ValueError(
                f"{path} holds the optimizer state of another model ({len(odd)} differences, such as {odd[0]}): "
                "expected the state saved with this policy; load the two from the same place"
            )
        optimizer.num_steps = int(file.metadata()["num_steps"])
        for name, parameter in parameters.items():
            state = {key: file.get_tensor(f"{name}/{key}") for key in STATE_TENSORS}
            # AdamW keeps its step count on the CPU, whatever the device of the parameter.
            optimizer.adamw.state[parameter] = {
                key: tensor.clone() if key == "step" else tensor.to(parameter.device, copy=True)
                for key, tensor in state.items()
            }
    return optimizer


def deterministic(num_threads: int) -> None:
    """Make torch give the same bits for the same inputs on the same hardware, in this process from now on.

    The number of threads decides how sums are split, so other numbers of threads give other bits.
    """
    # cuBLAS reads this when its first handle is made, so it must be set before any work on a GPU.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _trainable(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Return the trainable parameters by name; a tied one appears once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _check_precision(model: PreTrainedModel) -> None:
    """Raise unless all trainable parameters, and so AdamW's moments of them, have at least the precision of float32."""
    half = {name: p.dtype for name, p in _trainable(model).items() if torch.finfo(p.dtype).eps > FLOAT32_EPS}
    if half:
        name, dtype = next(iter(half.items()))
        raise ValueError(
            f"{len(half)} parameters have half precision, such as {name} ({dtype}): expected float32, as a step of a "
            "usual learning rate is smaller than their rounding; load the policy in float32, and set "
            "update.autocast_bf16 for speed"
        )


def _fresh_state(parameter: Tensor, device: str | None = None) -> dict[str, Tensor]:
    """Return AdamW's initial state of a parameter."""
    return {
        "exp_avg": torch.zeros_like(parameter, device=device),
        "exp_avg_sq": torch.zeros_like(parameter, device=device),
        "step": torch.zeros((), device=device),
    }
