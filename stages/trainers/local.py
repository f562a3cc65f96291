"""Model and optimizer in this process."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from grpo.settings import UpdateConfig
from pipeline.artifact import Artifact
from pipeline.errors import GrpoError, PolicyError
from pipeline.stage import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from grpo.optimizer import Optimizer


@dataclass(slots=True)
class Trainer:
    """Model and optimizer, kept in memory from one update to the next."""

    device: str = "cpu"
    digest: str | None = None
    """Of the policy artifact that the model equals."""
    model: "PreTrainedModel | None" = None
    optimizer: "Optimizer | None" = None

    def is_at(self, policy: Artifact) -> bool:
        """Return whether model and optimizer are those after the policy's update."""
        return self.model is not None and self.optimizer is not None and self.digest == policy.digest

    def at(self, policy: Artifact) -> tuple["PreTrainedModel", "Optimizer"]:
        """Return model and optimizer as they are after the policy's update."""
        assert self.model is not None, "resume it first"
        assert self.optimizer is not None
        assert self.is_at(policy), f"the trainer is at {self.digest}, not at {policy.path}"
        return self.model, self.optimizer

    def load(self, policy: Artifact, state: Path | None, config: UpdateConfig) -> None:
        """Read the policy's weights, and the optimizer's state from a file; None = a new optimizer.

        Raises:
            PolicyError: when one of them cannot be read, or the two do not belong together.
        """
        from grpo.optimizer import deterministic, load_optimizer, make_optimizer
        from grpo.policy import load_policy

        deterministic(config.num_threads)  # before the first work on a GPU
        self.digest = None
        try:
            model = load_policy(policy.path, device=self.device, gradient_checkpointing=config.gradient_checkpointing)
            optimizer = make_optimizer(model, config) if state is None else load_optimizer(state, model, config)
        except ValueError as error:
            raise PolicyError(str(error)) from error
        self.model, self.optimizer, self.digest = model, optimizer, policy.digest


def resolve_device(device: str) -> str:
    """Return cpu or cuda for ``auto``."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def train(
    trainer: Trainer, batches: Artifact, config: UpdateConfig, progress: Progress = silent
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Train on the rows that are not dropped; return training records and optimizer steps.

    Afterwards the trainer is at no artifact: that is for the caller to say, who knows whether one was made.
    """
    from grpo.optimizer import deterministic
    from grpo.train_step import train_on_batches

    assert trainer.model is not None
    assert trainer.optimizer is not None
    rows = batches.read().filter(pl.col("drop_reason").is_null())
    deterministic(config.num_threads)
    trainer.digest = None
    listener = _listener(progress, rows)
    try:
        return train_on_batches(trainer.model, trainer.optimizer, rows, config, listener)
    except ArithmeticError as error:
        raise GrpoError(str(error)) from error


def _listener(progress: Progress, batches: pl.DataFrame) -> Callable[..., Any]:
    total = batches.select(pl.struct("optimizer_step", "microbatch").n_unique()).item() if len(batches) else 0
    done = 0

    def listen(*_: Any) -> None:
        nonlocal done
        done += 1
        progress(done, total)

    return listen
