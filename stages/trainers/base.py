"""The trainer protocol: a model and its optimizer, kept between updates, and the policy that they are at."""

from pathlib import Path
from typing import Protocol

import polars as pl

from grpo.settings import ForwardConfig, UpdateConfig
from pipeline.artifact import Artifact
from pipeline.stage import Progress, silent


class Trainer(Protocol):
    """Trains a policy, and knows which one it is at."""

    def is_at(self, policy: Artifact) -> bool:
        """Return whether weights and optimizer are those after the policy's update. Read-only."""
        ...

    def load(self, policy: Artifact, state: Path | None, config: UpdateConfig) -> None:
        """Read the policy's weights, and the optimizer's state from a file; None = a new optimizer.

        Raises:
            PolicyError: when one of them cannot be read, or the two do not belong together.
        """
        ...

    def logprobs(
        self, policy: Artifact, rows: pl.DataFrame, config: ForwardConfig, progress: Progress = silent
    ) -> pl.DataFrame:
        """Return completion_id and logprobs of rows, as `frame_logprobs` takes them, under a policy.

        It may be another one than the trainer is at, and need memory for a second model.

        Raises:
            PolicyError: when the policy cannot be read.
            GrpoError: when a logprob is not finite.
        """
        ...

    def train(
        self,
        batches: Artifact,
        logprobs: Artifact | None,
        config: UpdateConfig,
        progress: Progress = silent,
    ) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Train on the rows that are not dropped; return training records and optimizer steps.

        ``logprobs`` are those of named policies; without a proximal one it is the policy that the trainer is at.
        Afterwards the trainer is at no policy until it has saved one.

        Raises:
            GrpoError: when a loss or a gradient is not finite.
        """
        ...

    def save_policy(self, directory: Path, recipe: str) -> None:
        """Write the weights as transformers loads them; the trainer is then at the policy of this recipe."""
        ...

    def save_state(self, path: Path) -> None:
        """Write the optimizer's state."""
        ...

    def close(self) -> None:
        """Free model and optimizer."""
        ...
