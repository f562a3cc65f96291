"""The golden numbers of grpo_vectors.json: its fixture as tensors, and its tolerances."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.losses.base import LossInputs

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "grpo_vectors.json").read_text())
FIXTURE: dict[str, Any] = VECTORS["losses"]["fixture"]
MASK = torch.tensor(FIXTURE["mask"], dtype=torch.bool)
ROW = MASK.nonzero()[:, 0]
ROW_TOKENS = MASK.sum(1)
PROMPT = torch.tensor([0, 0, 1, 1])
NUM_ROWS = len(MASK)
NUM_TOKENS = float(VECTORS["losses"]["active_tokens"])
TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 2e-5, "atol": 1e-6},
}


def tokens(values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the trainable tokens of a table of the fixture's shape, laid end to end."""
    return torch.tensor(values, dtype=dtype)[MASK]


NEW, OLD, SAMPLER, REF = (tokens(FIXTURE[name]) for name in ("logp_new", "logp_old", "logp_sampler", "logp_ref"))
ADVANTAGE = torch.tensor(FIXTURE["advantage"], dtype=torch.float64)[ROW]


def inputs(*, proximal: Tensor = OLD, sign: float = 1.0, dtype: torch.dtype = torch.float64) -> LossInputs:
    """Return the fixture as a loss sees it, with a gradient for the current logprobs."""
    return LossInputs(
        NEW.to(dtype, copy=True).requires_grad_(),
        proximal.to(dtype),
        SAMPLER.to(dtype),
        sign * ADVANTAGE.to(dtype),
        ROW,
        NUM_ROWS,
    )


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    """Return the gradient of a sum."""
    (found,) = torch.autograd.grad(loss.sum(), of)
    return found


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Compare at the tolerance of the vectors."""
    torch.testing.assert_close(found, expected, **TOLERANCE[found.dtype])
