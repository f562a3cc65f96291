"""Model and optimizer in this process."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from grpo.settings import ForwardConfig, UpdateConfig
from pipeline.artifact import WEIGHTS, Artifact
from pipeline.errors import GrpoError, PolicyError
from pipeline.files import sha256_file
from pipeline.stage import Progress, silent
from stages.custom_functions import custom_function, is_custom

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from grpo.optimizer import Optimizer


@dataclass(slots=True)
class LocalTrainer:
    """The `Trainer` of one process and one device."""

    device: str = "cpu"
    _model: "PreTrainedModel | None" = None
    _optimizer: "Optimizer | None" = None
    _recipe: str | None = None
    """Recipe of the policy that model and optimizer belong to; None = no policy."""
    _weights: Mapping[str, str] = field(default_factory=dict)
    """Weight file of that policy -> sha256."""

    def is_at(self, policy: Artifact) -> bool:
        """Return whether weights and optimizer are those after the policy's update.

        Equal recipes mean equal training data; equal weights mean that the machine made no difference.
        """
        files = policy.manifest.files
        return self._recipe == policy.manifest.recipe and all(
            files.get(name, {}).get("sha256") == sha256 for name, sha256 in self._weights.items()
        )

    def load(self, policy: Artifact, state: Path | None, config: UpdateConfig) -> None:
        """Read the policy's weights, and the optimizer's state from a file; None = a new optimizer."""
        from grpo.optimizer import deterministic, load_optimizer, make_optimizer
        from grpo.policy import load_policy

        deterministic(config.num_threads)  # before the first work on a GPU
        self._recipe = None
        try:
            model = load_policy(policy.path, device=self.device, gradient_checkpointing=config.gradient_checkpointing)
            optimizer = make_optimizer(model, config) if state is None else load_optimizer(state, model, config)
        except ValueError as error:
            raise PolicyError(str(error)) from error
        self._model, self._optimizer, self._recipe = model, optimizer, policy.manifest.recipe
        self._weights = {n: facts["sha256"] for n, facts in policy.manifest.files.items() if n.endswith(WEIGHTS)}

    def logprobs(
        self, policy: Artifact, rows: pl.DataFrame, config: ForwardConfig, progress: Progress = silent
    ) -> pl.DataFrame:
        """Return completion_id and logprobs of rows under a policy."""
        from grpo.optimizer import deterministic
        from grpo.policy import load_policy
        from grpo.policy_logprobs import frame_logprobs

        deterministic(config.num_threads)
        try:
            model = self._loaded()[0] if self.is_at(policy) else load_policy(policy.path, device=self.device)
            return frame_logprobs(model, rows, config, _listener(progress, rows))
        except ValueError as error:
            raise PolicyError(str(error)) from error
        except ArithmeticError as error:
            raise GrpoError(str(error)) from error

    def train(
        self,
        batches: Artifact,
        logprobs: Artifact | None,
        config: UpdateConfig,
        progress: Progress = silent,
    ) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Train on the rows that are not dropped; return training records and optimizer steps."""
        from grpo.optimizer import deterministic
        from grpo.train_step import train_on_batches

        if is_custom(config.loss.name):
            custom_function("update.loss.name", config.loss.name)  # which `grpo` would import unasked
        model, optimizer = self._loaded()
        rows = _trained_rows(batches)
        if logprobs is not None:
            rows = with_logprobs(rows, logprobs.read())
        deterministic(config.num_threads)
        self._recipe = None
        try:
            return train_on_batches(model, optimizer, rows, config, _listener(progress, rows))
        except (ArithmeticError, ValueError) as error:
            raise GrpoError(str(error)) from error

    def save_policy(self, directory: Path, recipe: str) -> None:
        """Write the weights as transformers loads them; the trainer is then at the policy of this recipe."""
        from grpo.policy import save_policy

        model, _ = self._loaded()
        save_policy(model, directory)
        self._weights = {path.name: sha256_file(path) for path in directory.glob(f"*{WEIGHTS}")}
        self._recipe = recipe

    def save_state(self, path: Path) -> None:
        """Write the optimizer's state."""
        from grpo.optimizer import save_optimizer

        model, optimizer = self._loaded()
        save_optimizer(optimizer, model, path)

    def close(self) -> None:
        """Free model and optimizer."""
        self._model = self._optimizer = self._recipe = None

    def _loaded(self) -> tuple["PreTrainedModel", "Optimizer"]:
        assert self._model is not None, "load a policy first"
        assert self._optimizer is not None
        return self._model, self._optimizer


def resolve_device(device: str) -> str:
    """Return cpu or cuda for ``auto``."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def with_logprobs(rows: pl.DataFrame, logprobs: pl.DataFrame) -> pl.DataFrame:
    """Return rows with a column ``<name>_logprobs`` for each policy that has a name there.

    Raises:
        GrpoError: when one lacks a row.
    """
    for (name,), found in logprobs.partition_by("policy_name", as_dict=True, maintain_order=True).items():
        column = f"{name}_logprobs"
        named = found.select("completion_id", pl.col("logprobs").alias(column))
        rows = rows.join(named, on="completion_id", how="left", validate="m:1", maintain_order="left")
        if len(lacking := rows.filter(pl.col(column).is_null())):
            raise GrpoError(
                f"the logprobs under the policy {name!r} lack {len(lacking)} rows that train, the first is completion "
                f"{lacking['completion_id'][0]}: expected one for each; delete the dataset logprobs, to have it made "
                "again"
            )
    return rows


def _trained_rows(batches: Artifact) -> pl.DataFrame:
    return batches.read().filter(pl.col("drop_reason").is_null())


def _listener(progress: Progress, batches: pl.DataFrame) -> Callable[..., Any]:
    total = batches.select(pl.struct("optimizer_step", "microbatch").n_unique()).item() if len(batches) else 0
    done = 0

    def listen(*_: Any) -> None:
        nonlocal done
        done += 1
        progress(done, total)

    return listen
