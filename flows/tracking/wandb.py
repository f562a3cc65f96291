"""Weights & Biases: figures, and a table of completions. WANDB_MODE=offline keeps them in files to be synced later."""

import os
from collections.abc import Sequence

import wandb

from flows.tracking.base import Figures, Tracked, completion_rows
from pipeline.errors import UsageError
from pipeline.reading import inside
from stages.inspect.report_groups import View

FLUSH_SECONDS = 0.5
"""A killed run has all but what was logged in so many seconds before; the library's own 15 are some iterations."""


class WandbTracker:
    """A run of Weights & Biases, with the run's own id."""

    def __init__(self, tracked: Tracked) -> None:
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,  # a diff of the source may hold a secret; environment.json has the commit
            disable_code=True,
            x_transaction_log_flush_interval=FLUSH_SECONDS,
        )
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
            raise UsageError("not logged in: give `wandb login`, or set WANDB_MODE=offline")
        inside(tracked.logs, "wandb").mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=tracked.project,
            name=tracked.name,
            id=tracked.id,
            resume="allow",
            config=tracked.settings,
            dir=None if "WANDB_DIR" in os.environ else tracked.logs,
            settings=settings,
        )
        self.where = f"wandb sync {self.run.settings.sync_dir}" if self.run.offline else str(self.run.url)

    def log(self, iteration: int, figures: Figures, groups: Sequence[View]) -> None:
        rows = completion_rows(groups)
        table = {"completions": wandb.Table(list(rows[0]), [list(row.values()) for row in rows])} if rows else {}
        self.run.log({**figures, **table}, step=iteration, commit=True)

    def close(self, *, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))
        wandb.teardown()
