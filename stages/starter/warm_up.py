"""The supervised warm-up of the starter, in torch.

Matrices inside the layers are trained with Muon (https://kellerjordan.github.io/posts/muon/), the rest with AdamW.
With AdamW alone a model of this size stays on a plateau, with all digits of a sum right but the last one, for several
times the length of the warm-up.

Shapes: `B` demonstrations of a batch, `T` tokens, right-padded, `N` answer tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from grpo.logprobs import token_logprobs
from pipeline.stage import Progress, silent

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration: five rounds bring every singular value near 1."""
ROUNDS = 5
HEAD_CHUNK_TOKENS = 1024
"""Positions whose logits exist at the same time."""


@dataclass(frozen=True, slots=True)
class Example:
    """One demonstration in tokens."""

    prompt_ids: list[int]
    answer_ids: list[int]
    """With the end of sequence; only these are learned."""


def new_model(
    *,
    seed: int,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
    max_context: int,
    pad_token_id: int,
    eos_token_id: int,
) -> PreTrainedModel:
    """Return a model with random float32 weights, the same for the same arguments."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=max_context,
        attention_bias=True,  # GRPO improves such a starter faster
        tie_word_embeddings=True,
        bos_token_id=None,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    return model


def imitate(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    matrix_learning_rate: float,
    warmup_steps: int,
    progress: Progress = silent,
) -> list[float]:
    """Train in place and return the loss of each step: the mean over the answer tokens of its batch.

    Batches take the examples in their order, and begin again at the first one after the last.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("model.layers.")]
    taken = set(map(id, matrices))
    muon = Muon(matrices)
    adamw = torch.optim.AdamW([p for p in model.parameters() if id(p) not in taken], betas=(0.9, 0.99), weight_decay=0)
    pad_token_id = model.config.pad_token_id
    losses = []
    for step in range(steps):
        batch = [examples[(step * batch_size + row) % len(examples)] for row in range(batch_size)]
        loss = answer_loss(model, batch, pad_token_id)
        model.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        pace = min(1.0, (step + 1) / warmup_steps) * (1 + math.cos(math.pi * step / steps)) / 2
        for group in adamw.param_groups:
            group["lr"] = learning_rate * pace
        adamw.step()
        muon.step(matrix_learning_rate * pace)
        losses.append(loss.item())
        progress(step + 1, steps, f"loss {losses[-1]:.3f}")
    model.zero_grad()
    return losses


def answer_loss(model: PreTrainedModel, batch: Sequence[Example], pad_token_id: int) -> Tensor:
    """Return the mean negative logprob of the answer tokens."""
    width = max(len(e.prompt_ids) + len(e.answer_ids) for e in batch)
    ids_BT = torch.full((len(batch), width), pad_token_id)
    positions: list[int] = []
    for row, example in enumerate(batch):
        start, end = len(example.prompt_ids), len(example.prompt_ids) + len(example.answer_ids)
        ids_BT[row, :end] = torch.tensor(example.prompt_ids + example.answer_ids)
        positions += range(row * width + start - 1, row * width + end - 1)
    position_N = torch.tensor(positions)
    target_N = ids_BT.flatten()[position_N + 1]
    logprob_N, _ = token_logprobs(
        model, ids_BT, position_N, target_N, torch.ones(len(positions)), chunk_tokens=HEAD_CHUNK_TOKENS
    )
    return -logprob_N.mean()


class Muon:
    """Momentum whose matrices are orthogonalised before they are applied.

    `torch.optim.Muon` calculates in bfloat16, which is twenty times slower on processors without such instructions.
    """

    def __init__(self, matrices: Sequence[Parameter]) -> None:
        self.matrices = list(matrices)
        self.momenta = [torch.zeros_like(matrix) for matrix in self.matrices]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Move each matrix by ``learning_rate`` along its orthogonalised Nesterov momentum."""
        directions = []
        for matrix, momentum in zip(self.matrices, self.momenta, strict=True):
            assert matrix.grad is not None
            momentum.lerp_(matrix.grad, 1 - MOMENTUM)
            directions.append(matrix.grad.lerp(momentum, MOMENTUM))
        for matrix, direction in zip(self.matrices, _orthogonalised(directions), strict=True):
            rows, columns = matrix.shape
            matrix.add_(direction, alpha=-learning_rate * math.sqrt(max(1.0, rows / columns)))


def _orthogonalised(matrices: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield each matrix with its singular values brought near 1; equal shapes are calculated together."""
    wide = [matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT for matrix in matrices]
    results: dict[int, Tensor] = {}
    for shape in dict.fromkeys(matrix.shape for matrix in wide):
        members = [index for index, matrix in enumerate(wide) if matrix.shape == shape]
        stacked = torch.stack([wide[index] for index in members])
        stacked = stacked / (torch.linalg.matrix_norm(stacked, keepdim=True) + 1e-7)
        linear, cubic, quintic = NEWTON_SCHULZ
        for _ in range(ROUNDS):
            gram = stacked @ stacked.mT
            stacked = linear * stacked + (cubic * gram + quintic * gram @ gram) @ stacked
        results.update(zip(members, stacked, strict=True))
    for index, matrix in enumerate(matrices):
        yield results[index] if wide[index] is matrix else results[index].mT
