"""The update: rows of the batches dataset in, changed weights and a record of every completion out.

Shapes: `N` trainable tokens of a microbatch, rows laid end to end; `B` rows of a microbatch; `T` input tokens, padded.

Three policies meet here. The current one is being trained. The proximal one is the weights at the start of the call;
the clip acts on current / proximal. The sampler wrote the tokens; the constant weight proximal / sampler corrects for
it, outside of the clip (decoupled PPO, arXiv:2110.00641). Nothing here is random.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import polars as pl
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from grpo.collate import MicroBatch, collate
from grpo.correction import Correction, correction_weights
from grpo.kl import kl_to_sampler
from grpo.logprobs import token_logprobs
from grpo.loss import clip_masks, clipped_surrogate, importance_ratio, weigh_tokens
from grpo.records import RECORD_SCHEMA, TOKEN_RECORD_SCHEMA, TokenFacts, completion_records

STEP_SCHEMA = pl.Schema(
    {
        "optimizer_step": pl.Int32,
        "learning_rate": pl.Float64,
        "grad_norm": pl.Float64,
        "loss": pl.Float64,
        "num_tokens": pl.Int64,
        "num_rows": pl.Int64,
    }
)

STATE_TENSORS = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW knows about a parameter."""


@dataclass(frozen=True)
class UpdateSettings:
    """Everything that decides an update besides the rows, the weights and the optimizer's state."""

    learning_rate: float = 1e-6
    """Peak, after warmup."""
    warmup_steps: int = 0
    """Optimizer steps of a linear rise; the first one already moves the weights."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warmup: no change, or a fall to 0 at ``total_steps``."""
    total_steps: int | None = None
    """Optimizer steps of the whole run, warmup included; needed unless the schedule is constant."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Applied to matrices only: a decayed norm or bias has nothing to gain."""
    max_grad_norm: float | None = 1.0
    """Longer gradients are shortened to this; None leaves them."""
    clip_low: float | None = 0.2
    clip_high: float | None = 0.28
    dual_clip: float | None = 4.0
    correction: Correction = field(default_factory=Correction)
    head_chunk_tokens: int = 1024
    """Tokens whose logits exist at one time."""
    autocast_bf16: bool = False
    """Run the base model in bfloat16, with weights, head and loss in float32."""
    record_tokens: bool = False
    """Keep per-token lists in the records (``TOKEN_RECORD_SCHEMA``)."""

    def __post_init__(self) -> None:
        """Raise for settings that contradict each other."""
        if self.schedule != "constant" and (self.total_steps is None or self.total_steps <= self.warmup_steps):
            raise ValueError(
                f"schedule is {self.schedule!r} with total_steps={self.total_steps}: expected more steps than the "
                f"{self.warmup_steps} of the warmup, where the learning rate reaches 0; set total_steps"
            )
        if self.head_chunk_tokens < 1:
            raise ValueError(f"head_chunk_tokens is {self.head_chunk_tokens}: expected at least 1; raise it")


@dataclass
class Optimizer:
    """AdamW and how far it has come; outlives a call, and is saved beside the policy."""

    adamw: torch.optim.AdamW
    num_steps: int = 0
    """Optimizer steps since the start of the run: the learning rate depends on nothing else."""


def make_optimizer(model: PreTrainedModel, settings: UpdateSettings) -> Optimizer:
    """Return a fresh optimizer of the model's trainable parameters."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return Optimizer(torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps))


def learning_rate_at(num_steps: int, settings: UpdateSettings) -> float:
    """Return the learning rate of the optimizer step that follows ``num_steps`` finished ones."""
    if num_steps < settings.warmup_steps:
        return settings.learning_rate * (num_steps + 1) / settings.warmup_steps
    if settings.schedule == "constant" or settings.total_steps is None:
        return settings.learning_rate
    progress = min((num_steps - settings.warmup_steps) / (settings.total_steps - settings.warmup_steps), 1.0)
    remaining = 1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return settings.learning_rate * remaining


def train_on_batches(
    model: PreTrainedModel,
    optimizer: Optimizer,
    frame: pl.DataFrame,
    settings: UpdateSettings,
    on_microbatch: Callable[[int, int], None] | None = None,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Train in place; return the records of the completions (``RECORD_SCHEMA``) and the steps (``STEP_SCHEMA``).

    With ``record_tokens`` the records are of ``TOKEN_RECORD_SCHEMA``; weights and all other numbers stay the same.

    ``frame`` holds the rows in training order with the columns that ``collate`` needs, and optimizer_step, microbatch
    and completion_id. An optimizer step is one gradient: the sum over its microbatches, each divided by the rows'
    ``loss_denominator``, so how rows are cut into microbatches changes nothing but rounding.

    The proximal logprobs of the first optimizer step are the current ones, detached: no forward is spent on them.
    Later steps get theirs from a forward before the first step. ``on_microbatch(optimizer_step, microbatch)`` is
    called after each microbatch.

    Raises:
        ArithmeticError: if a loss or a gradient is not finite, naming the completions; the weights of that step are
            not changed.
    """
    steps = frame.partition_by("optimizer_step", maintain_order=True) if frame.height > 0 else []
    proximal = [[], *(_proximal_logprobs(model, rows, settings) for rows in steps[1:])]
    schema = TOKEN_RECORD_SCHEMA if settings.record_tokens else RECORD_SCHEMA
    records, step_rows = [pl.DataFrame(schema=schema)], []
    for index, rows in enumerate(steps):
        optimizer.adamw.zero_grad(set_to_none=True)
        step_records = []
        for microbatch, batch_rows in enumerate(rows.partition_by("microbatch", maintain_order=True)):
            batch = collate(batch_rows).to(model.device)
            facts = _accumulate_gradient(model, batch, proximal[index][microbatch] if index > 0 else None, settings)
            record = completion_records(batch_rows, batch, facts, with_tokens=settings.record_tokens)
            _check_finite_loss(record)
            step_records.append(record)
            if on_microbatch is not None:
                on_microbatch(batch_rows["optimizer_step"][0], batch_rows["microbatch"][0])
        learning_rate, grad_norm = _take_step(model, optimizer, settings, rows)
        records += step_records
        done = pl.concat(step_records)
        step_rows.append(
            {
                "optimizer_step": rows["optimizer_step"][0],
                "learning_rate": learning_rate,
                "grad_norm": grad_norm,
                "loss": done["loss"].sum(),
                "num_tokens": done["num_tokens"].sum(),
                "num_rows": rows.height,
            }
        )
    return pl.concat(records), pl.DataFrame(step_rows, schema=STEP_SCHEMA)


def save_optimizer(optimizer: Optimizer, model: PreTrainedModel, path: str | os.PathLike[str]) -> None:
    """Write the state by parameter name, as safetensors; the same state always gives the same bytes."""
    tensors = {}
    for name, parameter in _trainable(model).items():
        # A parameter that has had no gradient yet has no state; zeros are what AdamW would start it with.
        state = optimizer.adamw.state.get(parameter) or _fresh_state(parameter)
        for key in STATE_TENSORS:
            tensors[f"{name}/{key}"] = state[key].detach().cpu().contiguous()
    # One metadata entry only: safetensors writes several in no fixed order.
    save_file(tensors, path, metadata={"num_steps": str(optimizer.num_steps)})


def load_optimizer(path: str | os.PathLike[str], model: PreTrainedModel, settings: UpdateSettings) -> Optimizer:
    """Return the optimizer that ``save_optimizer`` wrote, bound to this model's parameters.

    Raises:
        ValueError: if the file was written for a model with other parameters.
    """
    optimizer = make_optimizer(model, settings)
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


def _accumulate_gradient(
    model: PreTrainedModel, batch: MicroBatch, proximal_logprobs_N: Tensor | None, settings: UpdateSettings
) -> TokenFacts:
    """Add the gradient of one microbatch to the parameters; return what the forward found out."""
    trainer_N, entropy_N = _logprobs(model, batch, settings)
    proximal_N = trainer_N.detach() if proximal_logprobs_N is None else proximal_logprobs_N
    sampling_N = batch.sampling_logprobs_N
    advantage_N = batch.advantage_B[batch.row_N]
    weight_N = correction_weights(proximal_N, sampling_N, batch.row_N, len(batch.advantage_B), settings.correction)
    ratio_N = importance_ratio(trainer_N, proximal_N)
    surrogate_N = clipped_surrogate(
        ratio_N,
        advantage_N,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
    )
    loss_N = weigh_tokens(surrogate_N, weight_N, batch.loss_denominator_B, batch.row_N)
    torch.autograd.backward(loss_N.sum())
    ratio_N = ratio_N.detach()
    low_N, high_N = clip_masks(ratio_N, advantage_N, clip_low=settings.clip_low, clip_high=settings.clip_high)
    return TokenFacts(
        trainer_logprobs=trainer_N.detach(),
        sampling_logprobs=sampling_N,
        importance_ratios=ratio_N,
        correction_weights=weight_N,
        entropies=entropy_N,
        kl_to_sampler=kl_to_sampler(trainer_N, sampling_N),
        logprob_differences=(proximal_N - sampling_N).abs(),
        is_clipped_low=low_N,
        is_clipped_high=high_N,
        losses=loss_N.detach(),
        is_dual_clipped=_dual_clipped(ratio_N, advantage_N, settings) if settings.record_tokens else None,
        is_vetoed=_vetoed(proximal_N, batch, settings.correction) if settings.record_tokens else None,
    )


def _dual_clipped(ratio_N: Tensor, advantage_N: Tensor, settings: UpdateSettings) -> Tensor:
    """Return which tokens have another loss with ``dual_clip`` than without, shape [N]."""
    with_N, without_N = (
        clipped_surrogate(
            ratio_N, advantage_N, clip_low=settings.clip_low, clip_high=settings.clip_high, dual_clip=bound
        )
        for bound in (settings.dual_clip, None)
    )
    return with_N != without_N


def _vetoed(proximal_N: Tensor, batch: MicroBatch, correction: Correction) -> Tensor:
    """Return the tokens of vetoed rows, shape [N]: those that a correction of nothing but vetoes gives weight 0."""
    vetoes = Correction("none", veto_low=correction.veto_low, veto_high=correction.veto_high, unknown="on_policy")
    weight_N = correction_weights(proximal_N, batch.sampling_logprobs_N, batch.row_N, len(batch.advantage_B), vetoes)
    return weight_N == 0


def _logprobs(model: PreTrainedModel, batch: MicroBatch, settings: UpdateSettings) -> tuple[Tensor, Tensor]:
    """Return logprobs and entropies of the trainable tokens, shape [N] each."""
    return token_logprobs(
        model,
        batch.input_ids_BT,
        batch.position_N,
        batch.target_N,
        batch.temperature_B[batch.row_N],
        chunk_tokens=settings.head_chunk_tokens,
        autocast_bf16=settings.autocast_bf16,
    )


@torch.no_grad()
def _proximal_logprobs(model: PreTrainedModel, rows: pl.DataFrame, settings: UpdateSettings) -> list[Tensor]:
    """Return the logprobs under the weights as they are, one tensor per microbatch."""
    batches = (collate(batch_rows) for batch_rows in rows.partition_by("microbatch", maintain_order=True))
    return [_logprobs(model, batch.to(model.device), settings)[0] for batch in batches]


def _take_step(
    model: PreTrainedModel, optimizer: Optimizer, settings: UpdateSettings, rows: pl.DataFrame
) -> tuple[float, float]:
    """Change the weights; return the learning rate used and the gradient norm before clipping."""
    limit = math.inf if settings.max_grad_norm is None else settings.max_grad_norm
    grad_norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
    if not math.isfinite(grad_norm):
        raise ArithmeticError(
            f"the gradient of {_named(rows)} has norm {grad_norm}: expected a finite one; lower the learning rate, or "
            "bound the correction and dual_clip, and look at these completions"
        )
    learning_rate = learning_rate_at(optimizer.num_steps, settings)
    for group in optimizer.adamw.param_groups:
        group["lr"] = learning_rate
    optimizer.adamw.step()
    optimizer.num_steps += 1
    return learning_rate, grad_norm


def _check_finite_loss(record: pl.DataFrame) -> None:
    """Raise if the loss of a completion is not finite."""
    wrong = record.filter(~pl.col("loss").is_finite())
    if wrong.height > 0:
        raise ArithmeticError(
            f"the loss of {_named(wrong)} is {wrong['loss'][0]}: expected a finite one; look at their advantages, "
            "loss_denominator and temperature, and at the weights of the policy"
        )


def _named(rows: pl.DataFrame) -> str:
    """Return the completions of these rows for a message: the first ones by id, the others by number."""
    shown = ", ".join(rows["completion_id"].head(8))
    return f"completions {shown}" + (f" and {rows.height - 8} more" if rows.height > 8 else "")


def _trainable(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Return the trainable parameters by name; a tied one appears once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _fresh_state(parameter: Tensor, device: str | None = None) -> dict[str, Tensor]:
    """Return what AdamW starts a parameter with."""
    return {
        "exp_avg": torch.zeros_like(parameter, device=device),
        "exp_avg_sq": torch.zeros_like(parameter, device=device),
        "step": torch.zeros((), device=device),
    }
