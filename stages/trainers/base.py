"""What a trainer is: model and optimizer, kept from one update to the next, and the policy that they are at."""

from pathlib import Path
from typing import Protocol

import polars as pl

from grpo.settings import UpdateConfig
from pipeline.artifact import Artifact
from pipeline.stage import Progress, silent


class Trainer(Protocol):
    """Trains a policy, and knows which one it has come to."""

    def is_at(self, policy: Artifact) -> bool:
        """Return whether weights and optimizer are those after the policy's update. Read-only."""
        ...

    def load(self, policy: Artifact, state: Path | None, config: UpdateConfig) -> None:
        """Read the policy's weights, and the optimizer's state from a file; None = a new optimizer.

        Raises:
            PolicyError: when one of them cannot be read, or the two do not belong together.
        """
        ...

    def train(
        self, batches: Artifact, config: UpdateConfig, progress: Progress = silent
    ) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Train on the rows that are not dropped; return training records and optimizer steps.

        Afterwards the trainer is at no policy until it has saved one.

        Raises:
            GrpoError: when a loss or a gradient is not finite.
        """
        ...

    def save_policy(self, directory: Path, recipe: str) -> None:
        """Write the weights, as transformers loads them. Now the trainer is at the policy of this recipe."""
        ...

    def save_state(self, path: Path) -> None:
        """Write the optimizer's state."""
        ...

    def close(self) -> None:
        """Let go of model and optimizer."""
        ...
