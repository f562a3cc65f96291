"""The names inside a run directory; no other module knows them."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pipeline.artifact import Artifact, open_artifact
from pipeline.chain import CHAIN, CHECKPOINTS, DATASETS, INITIAL
from pipeline.errors import ArtifactDamaged, ArtifactMissing, RecipeMismatch, UsageError
from pipeline.files import write_text
from pipeline.manifest import is_finished
from pipeline.object_store import url_of, working_copy_of
from pipeline.reading import read_json, resolved, shorten

if TYPE_CHECKING:
    import polars as pl

    from pipeline.working_copy import WorkingCopy

RESOLVED_CONFIG = "config.resolved.json"
RECORDS = ("config.toml", "fork.toml", RESOLVED_CONFIG, "environment.json", "metrics.parquet")
"""Files next to the artifacts; they may change."""
REFERENCE = ".reference.json"
MOST_DIGITS = 9
"""Of an iteration's number, which is an int32 in the rows."""
ENVIRONMENT_BYTES = 64 << 20
"""Size of the largest environment.json that is read: it may hold a diff of the source for each start."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """The paths of one run.

    runs/<name>/
        config.toml  config.resolved.json  environment.json  metrics.parquet
        initial_policy/                 the policy that iteration 0 samples from
        members/<name>/                 other policies from outside that write group members
        held_out_prompts/               the prompts of every evaluation
        evaluations/                    of the initial policy
        iterations/000000/              one folder per dataset: prompts, completions, rewards, advantages, checks,
                                        batches, training_records, optimizer_steps, policy and optimizer (after the
                                        update), evaluations;
                                        <dataset>.reference.json points to one in another run
        held/000000/                    what a check has held before it was made again: <dataset>-<digest>
        logs/                           output of the inference engine, ids of Prefect's flow runs, address of
                                        the report, files of experiment trackers

    A run on an object store has the same names there, without logs; ``root`` is its working copy on this machine.
    """

    root: Path
    copy: "WorkingCopy | None" = None
    """Keeps ``root`` and the object store in step; None for a local run."""

    @property
    def name(self) -> str:
        """What the user calls it: its path or URL."""
        return (url_of(self.root) if self.copy else None) or str(self.root)

    def shown(self, path: Path) -> str:
        """Return a path of this run for messages: relative to the current directory, or a URL."""
        return (url_of(path) if self.copy else None) or os.path.relpath(path)

    @property
    def config(self) -> Path:
        return self.root / "config.toml"

    @property
    def resolved_config(self) -> Path:
        return self.root / RESOLVED_CONFIG

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

    def settings(self) -> dict[str, Any]:
        """Return the resolved config as tables. Read-only.

        Raises:
            ArtifactDamaged: when the file cannot be read.
        """
        remedy = "restore it from a copy, or start the run's own command again, which writes it"
        try:
            tables: dict[str, Any] = read_json(self.resolved_config, remedy)
        except OSError as error:
            raise ArtifactDamaged(f"{self.resolved_config} cannot be read ({error}): {remedy}") from error
        odd = [step.name for step in CHAIN if not isinstance(tables.get(step.name, {}), dict)]
        if odd:
            raise ArtifactDamaged(f"{self.resolved_config} has {odd[0]}, expected a table of that name: {remedy}")
        return tables

    def read_metrics(self) -> "pl.DataFrame":
        """Return the rows of `metrics.parquet`, which must exist. Read-only.

        Raises:
            ArtifactDamaged: when the file cannot be read.
        """
        import polars as pl

        from pipeline.parquet import check_parts, explained

        remedy = "delete it and start the run's own command again, which makes it of the artifacts"
        with explained(self.metrics, remedy):
            check_parts({self.metrics: None})
            return pl.read_parquet(self.metrics, glob=False)

    def iteration(self, index: int) -> Path:
        return self.root / "iterations" / f"{index:06d}"

    def place(self, index: int, dataset: str) -> Path:
        """Return the directory of a dataset of an iteration, whether it exists or not; see INITIAL."""
        return self.root / dataset if index == INITIAL else self.iteration(index) / dataset

    def held(self, index: int, dataset: str, digest: str) -> Path:
        """Return the place of an artifact that a check has held, and that was made again; a store has no copy."""
        return self.root / "held" / f"{index:06d}" / f"{dataset}-{digest[:16]}"

    def member(self, name: str) -> Path:
        """Return the place of a policy from outside that writes group members."""
        return self.root / "members" / name

    def policy_before(self, index: int) -> Path:
        """Return the place of the policy that iteration ``index`` samples from and updates."""
        return self.place(index - 1, "policy") if index else self.initial_policy

    def num_updates(self, place: Path) -> int | None:
        """Return the number of updates behind the policy or state at a place of this run; None for any other place."""
        if place == self.initial_policy:
            return 0
        index = place.parent.name
        is_of_iteration = place.name in CHECKPOINTS and index.isascii() and index.isdigit()
        is_here = is_of_iteration and place == self.place(int(index), place.name)
        return int(index) + 1 if is_here else None

    def optimizer_before(self, index: int) -> Path | None:
        """Return the place of the optimizer state of `policy_before`; the initial policy has none."""
        return self.place(index - 1, "optimizer") if index else None

    def iterations(self) -> list[int]:
        """Return the iterations that exist, finished or not, in order. Read-only."""
        folder = self.root / "iterations"
        if not folder.is_dir():
            return []
        return sorted(int(p.name) for p in folder.iterdir() if is_iteration(p))

    def folders(self) -> list[Path]:
        """Return the folders that artifacts and logs are written into, whether they exist or not. Read-only."""
        folder = self.root / "iterations"
        others = (self.root / "members", self.root / "held", self.logs)
        return [folder, *(folder.iterdir() if folder.is_dir() else ()), *others]

    def artifacts(self) -> Iterator[Artifact]:
        """Yield every finished artifact, also those in other runs, in the order in which they were made. Read-only."""
        for path in self.outside_iterations():
            if is_finished(path):
                yield open_artifact(path)
        for index in self.iterations():
            for dataset in DATASETS:
                if self.has(index, dataset):
                    yield self.open(index, dataset)

    def outside_iterations(self) -> list[Path]:
        """Return the places of the artifacts that belong to no iteration, finished or not, in order. Read-only."""
        members = sorted((self.root / "members").glob("*")) if (self.root / "members").is_dir() else []
        return [self.initial_policy, *members, self.held_out_prompts, self.place(INITIAL, "evaluations")]

    def records(self) -> list[Path]:
        """Return the files next to the artifacts; see `is_record`. Read-only."""
        references = sorted(self.root.glob(f"iterations/*/*{REFERENCE}"))
        return [*references, *(self.root / name for name in RECORDS if (self.root / name).is_file())]

    def has(self, index: int, dataset: str) -> bool:
        """Return whether an iteration has a dataset, its own or another run's. Read-only."""
        return is_finished(self.place(index, dataset)) or self._reference(index, dataset).is_file()

    def open(self, index: int, dataset: str) -> Artifact:
        """Return a finished artifact of an iteration; it may be in another run, see `refer`. Read-only.

        Raises:
            ArtifactMissing: when it does not exist, here or where the reference says.
            ArtifactDamaged: when another artifact is in its place.
        """
        place, reference = self.place(index, dataset), self._reference(index, dataset)
        if is_finished(place) or not reference.is_file():
            return _of_dataset(open_artifact(place), dataset)
        noted = read_json(reference, "correct the path in the file, or restore it from a copy")
        path, digest = noted.get("path"), noted.get("digest")
        if not (isinstance(path, str) and isinstance(digest, str)) or "\0" in path:
            raise ArtifactDamaged(f"{reference} names no path and digest: expected both; restore it from a copy")
        target = self._target(reference, path)
        if not is_finished(target):
            raise ArtifactMissing(
                f"{reference} says that the {dataset} of iteration {index} lie in {target}, where no finished artifact "
                f"is: put the run with the digest {digest[:16]}... back there, or correct the path in the file"
            )
        artifact = open_artifact(target)
        if artifact.digest != digest:
            raise ArtifactDamaged(
                f"{reference} wants the digest {digest[:16]}..., but {target} has {artifact.digest[:16]}...: "
                "another artifact lies there by now; correct the path in the file"
            )
        return _of_dataset(artifact, dataset)

    def _target(self, reference: Path, noted: str) -> Path:
        """Return the place of the artifact that a reference names by path or URL.

        Only a run that the user named by URL asks the network. For a local one the working copy must be there already.
        """
        url = noted if "://" in noted else None
        target = working_copy_of(url) if url else Path(os.path.normpath(resolved(reference.parent) / noted))
        if is_finished(target):
            return target
        url = url or url_of(target)
        if url is None:
            return target
        if self.copy is None:
            raise ArtifactMissing(
                f"{reference} refers to {url}, which has no working copy here; a local run is looked at without asking "
                f"the network: if you trust that place, give `grpo ls {url.partition('/iterations/')[0]}` once, then "
                "the same command again"
            )
        from pipeline.working_copy import bring

        return bring(url)

    def refer(self, index: int, dataset: str, artifact: Artifact) -> None:
        """Make another run's artifact a dataset of this iteration: a small file names it by relative path and digest.

        Raises:
            RecipeMismatch: when the iteration has another one.
        """
        if self.has(index, dataset):
            found = self.open(index, dataset)
            if found.digest != artifact.digest:
                raise RecipeMismatch(
                    f"iteration {index} of {self.root} has other {dataset} ({found.path}) than {artifact.path}: use a "
                    "new run directory"
                )
            return
        path = self._reference(index, dataset)
        url = url_of(artifact.path)
        if self.copy is not None and url is None:
            raise UsageError(
                f"{self.name} cannot refer to {artifact.path}, which no other machine can see: copy that run to the "
                "store first (any tool that copies folders will do), and name it by its URL"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        if url is not None and self.copy is None:
            noted = url  # the working copy may be deleted
        else:
            noted = Path(os.path.relpath(artifact.path.resolve(), path.parent.resolve())).as_posix()
        note = {"path": noted, "digest": artifact.digest}
        write_text(path, json.dumps(note, indent=2) + "\n")

    def refers(self, index: int, dataset: str) -> bool:
        """Return whether a dataset of an iteration is another run's. Read-only."""
        return self._reference(index, dataset).is_file() and not is_finished(self.place(index, dataset))

    def _reference(self, index: int, dataset: str) -> Path:
        return self.iteration(index) / f"{dataset}{REFERENCE}"

    def record_config(self, toml: str, resolved: dict[str, Any]) -> None:
        """Write the config as given and as resolved. JSON because TOML has no null."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_text(self.config, toml)
        write_text(self.resolved_config, json.dumps(resolved, indent=2, ensure_ascii=False) + "\n")

    def environments(self) -> list[dict[str, Any]]:
        """Return the environments of the run's starts, in order. Read-only.

        Raises:
            ArtifactDamaged: when the file cannot be read.
        """
        remedy = "delete it, the next start writes it again"
        if not self.environment.is_file():
            return []
        seen: list[Any] = read_json(self.environment, remedy, kind=list, most_bytes=ENVIRONMENT_BYTES)
        if not all(map(_is_environment, seen)):
            raise ArtifactDamaged(f"{self.environment} is no list of tables, as every start adds one: {remedy}")
        return seen

    def record_environment(self, facts: dict[str, Any]) -> None:
        """Append the environment to the run's list unless it equals the last one."""
        seen = self.environments()
        if not seen or seen[-1] != facts:
            write_text(self.environment, json.dumps([*seen, facts], indent=2, ensure_ascii=False) + "\n")


def state_of(policy: Artifact) -> Artifact | None:
    """Return the optimizer state after the update that made this policy, pruned or not; None = missing.

    It is next to the policy. The state of another policy counts as missing. Read-only.
    """
    place = policy.path.with_name("optimizer")
    state = open_artifact(place) if is_finished(place) else None
    belongs = state is not None and state.manifest.inputs.get("policy", {}).get("digest") == policy.digest
    return state if belongs else None


def is_record(name: str) -> bool:
    """Return whether an object of a run is a record: a small file next to the artifacts that may change."""
    return PurePosixPath(name).name in RECORDS or name.endswith(REFERENCE)


def _is_environment(facts: Any) -> bool:
    kinds = {"packages": dict, "accelerators": list, "processor": str}
    return isinstance(facts, dict) and all(isinstance(facts.get(name, kind()), kind) for name, kind in kinds.items())


def is_iteration(folder: Path) -> bool:
    """Return whether a path is the folder of an iteration: its number has at least six ASCII digits. Read-only."""
    name = folder.name
    is_number = name.isascii() and name.isdigit() and len(name) <= MOST_DIGITS
    return is_number and name == f"{int(name):06d}" and folder.is_dir()


def _of_dataset(artifact: Artifact, dataset: str) -> Artifact:
    if artifact.manifest.dataset != dataset:
        raise ArtifactDamaged(
            f"{artifact.path} holds {shorten(artifact.manifest.dataset)}, expected {dataset}: another artifact was put "
            "there; restore it from a copy"
        )
    return artifact
