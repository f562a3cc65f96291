"""The names inside a run directory; nothing else in the program knows them."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact, is_finished, open_artifact
from pipeline.errors import ArtifactMissing, UsageError
from pipeline.storage import sha256_text, write_text

ITERATION_DATASETS = (
    "prompts",
    "completions",
    "rewards",
    "advantages",
    "batches",
    "training_records",
    "optimizer_steps",
    "policy",
    "evaluations",
)
"""Folders of an iteration in the order of the stages; ``policy`` holds the weights after its update."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """The places of one run.

    runs/<name>/
        config.toml  config.resolved.json  environment.json  metrics.parquet
        initial_policy/                 the policy that iteration 0 samples from
        members/<name>/                 other policies from outside that write group members
        held_out_prompts/               the questions of every evaluation
        evaluations/                    of the initial policy
        iterations/000000/              one folder per dataset: prompts, completions, rewards, advantages, batches,
                                        training_records, optimizer_steps, policy (after the update), evaluations
        logs/                           what the inference engine printed
    """

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.toml"

    @property
    def resolved_config(self) -> Path:
        return self.root / "config.resolved.json"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.parquet"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def initial_policy(self) -> Path:
        return self.root / "initial_policy"

    @property
    def held_out_prompts(self) -> Path:
        return self.root / "held_out_prompts"

    @property
    def initial_evaluations(self) -> Path:
        return self.root / "evaluations"

    def iteration(self, index: int) -> Path:
        return self.root / "iterations" / f"{index:06d}"

    def place(self, index: int, dataset: str) -> Path:
        """Return the directory of a dataset of an iteration, whether it exists or not."""
        return self.iteration(index) / dataset

    def member(self, name: str) -> Path:
        """Return the place of a policy from outside that writes group members."""
        return self.root / "members" / name

    def evaluations_of(self, num_updates: int) -> Path:
        """Return the place of the evaluation of the policy after ``num_updates`` iterations."""
        return self.place(num_updates - 1, "evaluations") if num_updates else self.initial_evaluations

    def policy_before(self, index: int) -> Path:
        """Return the place of the policy that iteration ``index`` samples from and updates."""
        return self.place(index - 1, "policy") if index else self.initial_policy

    def iterations(self) -> list[int]:
        """Return the iterations that exist, finished or not, in order. Read-only."""
        folder = self.root / "iterations"
        if not folder.is_dir():
            return []
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())

    def artifacts(self) -> Iterator[Artifact]:
        """Yield every finished artifact in the order in which it was made. Read-only."""
        members = sorted((self.root / "members").glob("*")) if (self.root / "members").is_dir() else []
        for path in (self.initial_policy, *members, self.held_out_prompts, self.initial_evaluations):
            if is_finished(path):
                yield open_artifact(path)
        for index in self.iterations():
            for dataset in ITERATION_DATASETS:
                if is_finished(self.place(index, dataset)):
                    yield open_artifact(self.place(index, dataset))

    def open(self, index: int, dataset: str) -> Artifact:
        """Return a finished artifact of an iteration. Read-only."""
        return open_artifact(self.place(index, dataset))

    def record_config(self, toml: str, resolved: dict[str, Any]) -> None:
        """Write the config as given and as resolved. JSON because TOML has no null."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_text(self.config, toml)
        write_text(self.resolved_config, json.dumps(resolved, indent=2, ensure_ascii=False) + "\n")

    def record_environment(self, facts: dict[str, Any]) -> None:
        """Append the environment to the list of those this run has seen, unless it is the last one."""
        seen = json.loads(self.environment.read_text(encoding="utf-8")) if self.environment.is_file() else []
        if not seen or seen[-1] != facts:
            write_text(self.environment, json.dumps([*seen, facts], indent=2, ensure_ascii=False) + "\n")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for writing; the system releases it when the process ends, however it ends.

        Raises:
            UsageError: when another process is writing this run.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            file = (self.root / ".lock").open("w")
        except OSError as error:
            raise UsageError(f"{self.root} cannot be written ({error}): name a directory that can (--run)") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"another process is writing {self.root}: wait for it, or give this run another directory"
                ) from None
            yield


def open_run(path: Path) -> RunDir:
    """Return the run at ``path``. Read-only.

    Raises:
        ArtifactMissing: when there is no run.
    """
    run = RunDir(path)
    if not run.resolved_config.is_file():
        raise ArtifactMissing(f"{path} is not a run directory (no {run.resolved_config.name}): see `grpo ls`")
    return run


def identity(*parts: object) -> str:
    """Return a short opaque id for what the parts name: 16 hexadecimal digits."""
    return sha256_text("\x1f".join(str(part) for part in parts))[:16]
