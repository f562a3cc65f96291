"""Ways to corrupt a finished run at random, and to put it back."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from pipeline.conformance import conform
from pipeline.files import sha256_file
from pipeline.manifest import MANIFEST
from pipeline.run_dir import RunDir
from stages import batch, normalize
from stages.inspect.metrics import append_metrics, iteration_metrics
from tests.manifests import manifest_of, seal

UNHASHED = ("environment", "started_at", "seconds")
"""Fields of a manifest that no hash covers; ``seconds`` stands in the metrics as well."""

UNANCHORED = {
    "training_records": {
        "correction_weight_mean", "masked_tokens", "logprob_difference_max", "importance_ratio_mean",
        "importance_ratio_max", "kl_to_sampler",
    },
    "rewards": {"detail"},
    "evaluations": {"reward", "error", "sampling_logprobs"},
}  # fmt: skip
"""Columns of artifacts that nothing is made from, which no other file repeats."""


@dataclass
class Scratch:
    """A copy of a run that is changed and put back."""

    root: Path
    pristine: Path
    rng: random.Random
    touched: set[Path] = field(default_factory=set)

    def artifacts(self) -> list[Path]:
        """Return the directories of all artifacts in the order in which they were made."""
        return [artifact.path for artifact in RunDir(self.root).artifacts()]

    def touch(self, path: Path) -> Path:
        self.touched.add(path)
        return path

    def restore(self) -> None:
        """Put back every file that was touched."""
        for path in self.touched:
            original = self.pristine / path.relative_to(self.root)
            path.unlink(missing_ok=True)
            shutil.copyfile(original, path)
        self.touched.clear()

    def is_harmless(self) -> bool:
        """Return whether every touched file reads as before: then nothing was corrupted."""
        return all(meaning(path) == meaning(self.pristine / path.relative_to(self.root)) for path in self.touched)

    def write_manifest(self, artifact: Path, manifest: dict[str, Any]) -> None:
        self.touch(artifact / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")

    def write_part(self, path: Path, dataset: str, frame: pl.DataFrame) -> None:
        pq.write_table(conform(frame, dataset), self.touch(path), compression="zstd")

    def fix_hashes(self, artifact: Path, manifest: dict[str, Any] | None = None) -> None:
        """Make a manifest fit its files, itself, and its inputs as they are now stated."""
        manifest = manifest or manifest_of(artifact)
        for name, facts in manifest["files"].items():
            path = artifact / name
            rows = pq.read_metadata(path).num_rows if name.endswith(".parquet") else None
            facts |= {"rows": rows, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
        parts = [artifact / name for name in manifest["files"] if name.endswith(".parquet")]
        if parts:
            frame = pl.scan_parquet(parts)
            manifest["rows"] = sum(manifest["files"][p.name]["rows"] for p in parts)
            if "drop_reason" in frame.collect_schema():
                reasons = frame.select("drop_reason").drop_nulls().collect()["drop_reason"].value_counts()
                manifest["drops"] = dict(sorted(reasons.iter_rows()))
        seal(manifest)
        self.write_manifest(artifact, manifest)

    def fix_chain(self, artifacts: list[Path]) -> None:
        """Make every manifest state the digests that its inputs have now, in the order of making."""
        for artifact in artifacts:
            manifest = manifest_of(artifact)
            stale = False
            for facts in manifest["inputs"].values():
                digest = manifest_of(artifact / facts["path"])["digest"]
                stale |= facts["digest"] != digest
                facts["digest"] = digest
            if stale:
                self.fix_hashes(artifact, manifest)


@dataclass
class Trial:
    """One corruption: the artifact or file, and what was done."""

    place: Path
    what: str
    is_findable: bool = True
    """Whether files alone can tell."""


def flip_bit(scratch: Scratch) -> Trial:
    """Flip a bit of any file of an artifact, of a manifest, or of metrics.parquet."""
    path = scratch.touch(any_file(scratch))
    data = bytearray(path.read_bytes())
    position, bit = scratch.rng.randrange(len(data)), scratch.rng.randrange(8)
    data[position] ^= 1 << bit
    path.write_bytes(data)
    return Trial(path, f"byte {position}, bit {bit}")


def truncate(scratch: Scratch) -> Trial:
    """Cut off the end of such a file."""
    path = scratch.touch(any_file(scratch))
    size = scratch.rng.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:size])
    return Trial(path, f"to {size} bytes")


def any_file(scratch: Scratch) -> Path:
    artifacts = scratch.artifacts()
    artifact = scratch.rng.choice([*artifacts, None])
    if artifact is None:
        return scratch.root / "metrics.parquet"
    return artifact / scratch.rng.choice([MANIFEST, *manifest_of(artifact)["files"]])


def swap(scratch: Scratch) -> Trial:
    """Swap a file, or all files, of two artifacts of the same kind."""
    by_kind: dict[str, list[Path]] = {}
    for artifact in scratch.artifacts():
        by_kind.setdefault(manifest_of(artifact)["dataset"], []).append(artifact)
    one, two = scratch.rng.sample(scratch.rng.choice([a for a in by_kind.values() if len(a) > 1]), 2)
    names = sorted({*manifest_of(one)["files"]} & {*manifest_of(two)["files"]})
    chosen = [MANIFEST, *names] if scratch.rng.random() < 0.5 else [scratch.rng.choice(names)]
    for name in chosen:
        first, second = scratch.touch(one / name), scratch.touch(two / name)
        a, b = first.read_bytes(), second.read_bytes()
        first.write_bytes(b)
        second.write_bytes(a)
    return Trial(one, f"{len(chosen)} files with {two.relative_to(scratch.root)}")


def edit_manifest(scratch: Scratch) -> Trial:
    """Edit one hashed field of a manifest."""
    artifact, manifest, what = edited(scratch, ["config", "inputs", "files", "rows", "recipe"])
    scratch.write_manifest(artifact, manifest)
    return Trial(artifact, what)


def edit_manifest_and_fix_its_hashes(scratch: Scratch) -> Trial:
    """Edit one hashed field of a manifest and make its hashes fit."""
    artifact, manifest, what = edited(scratch, ["config", "inputs", "stage_version", "dataset"])
    # nothing contradicts the version of an artifact that nothing was made from: an older one is skipped, and counted
    is_leaf = not any(
        (place / facts["path"]).resolve() == artifact.resolve()
        for place in scratch.artifacts()
        for facts in manifest_of(place)["inputs"].values()
    )
    scratch.fix_hashes(artifact, manifest)
    return Trial(artifact, what, is_findable=not (is_leaf and what == "stage_version"))


def edited(scratch: Scratch, fields: list[str]) -> tuple[Path, dict[str, Any], str]:
    """Return an artifact, its manifest with another value in one of the fields, and where that is."""
    rng = scratch.rng
    artifact = rng.choice(scratch.artifacts())
    manifest = manifest_of(artifact)
    name = rng.choice([f for f in fields if manifest[f]])
    table = manifest[name]
    if name == "inputs":
        key = rng.choice(sorted(table))
        table[key]["digest"] = f"{rng.getrandbits(256):064x}"
    elif name == "config":
        key = rng.choice(sorted(table))
        table[key] = other(table[key], rng)
    elif name == "files":
        key, fact = rng.choice(sorted(table)), rng.choice(["bytes", "sha256"])
        table[key][fact] = other(table[key][fact], rng)
    else:
        key = ""
        manifest[name] = "rewards" if name == "dataset" and table != "rewards" else other(table, rng)
    return artifact, manifest, f"{name} {key}".strip()


def other(value: Any, rng: random.Random) -> Any:
    """Return a value of the same type that differs."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + rng.choice([-1, 1])
    if isinstance(value, float):
        return value * 1.01 + 0.01
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        if not value:
            return ["x"]
        index = rng.randrange(len(value))
        return [*value[:index], other(value[index], rng), *value[index + 1 :]]
    if isinstance(value, dict):
        if not value:
            return {"x": 1}
        key = rng.choice(sorted(value))
        return {**value, key: other(value[key], rng)}
    return "x"


def change_rows(scratch: Scratch) -> Trial:
    """Remove, repeat, move or alter a row, and make the hashes of the artifact fit."""
    artifact, trial = changed(scratch)
    scratch.fix_hashes(artifact)
    return trial


def change_rows_and_fix_the_chain(scratch: Scratch) -> Trial:
    """The same, with the hashes of every artifact that was made from it."""
    artifacts = scratch.artifacts()
    artifact, trial = changed(scratch)
    scratch.fix_hashes(artifact)
    scratch.fix_chain(artifacts)
    return trial


def changed(scratch: Scratch) -> tuple[Path, Trial]:
    """Change the rows of a part; return its artifact with what was done."""
    rng = scratch.rng
    artifact = rng.choice([a for a in scratch.artifacts() if list(a.glob("*.parquet"))])
    dataset = manifest_of(artifact)["dataset"]
    path = rng.choice(sorted(artifact.glob("*.parquet")))
    frame = pl.read_parquet(path)
    how = rng.choice(["removed", "repeated", "moved", *["altered"] * 3] if len(frame) > 1 else ["altered"])
    index = rng.randrange(len(frame))
    what, is_findable = f"row {index} {how}", True
    if how == "removed":
        frame = pl.concat([frame[:index], frame[index + 1 :]])
    elif how == "repeated":
        frame = pl.concat([frame[: index + 1], frame[index:]])
    elif how == "moved":
        place = (index + rng.randrange(1, len(frame))) % len(frame)
        order = list(range(len(frame)))
        order[index], order[place] = place, index
        frame = frame[order]
        is_findable = dataset not in ("training_records", "optimizer_steps")  # nothing depends on their order
    else:
        column = rng.choice([name for name in frame.columns if frame[name][index] is not None])
        values = frame[column].to_list()
        values[index] = other(values[index], rng)
        frame = frame.with_columns(pl.Series(column, values, dtype=frame[column].dtype))
        what, is_findable = f"{column} of row {index}", column not in UNANCHORED.get(dataset, set())
    scratch.write_part(path, dataset, frame)
    return artifact, Trial(artifact, what, is_findable)


def edit_note(scratch: Scratch) -> Trial:
    """Edit what no hash covers."""
    artifact = scratch.rng.choice(scratch.artifacts())
    manifest = manifest_of(artifact)
    name = scratch.rng.choice(["environment", "started_at"])
    manifest[name] = other(manifest[name], scratch.rng)
    scratch.write_manifest(artifact, manifest)
    return Trial(artifact, name, is_findable=False)


def recompute(scratch: Scratch) -> Trial:
    """Change a reward of the last iteration, and recompute everything after it but the policy by the program's own
    code: a forgery that only a new scoring can find."""
    run = RunDir(scratch.root)
    last = run.iterations()[-1]
    places = {name: run.place(last, name) for name in ("rewards", "advantages", "batches", "completions")}
    rewards = pl.read_parquet(places["rewards"] / "part-00000.parquet")
    # of a group that trains in any case, so that the rows that train stay the same
    advantages = pl.read_parquet(places["advantages"] / "part-00000.parquet")
    chosen = scratch.rng.choice(advantages.filter(pl.col("drop_reason").is_null())["completion_id"].to_list())
    raised = pl.col("reward") + pl.when(pl.col("completion_id") == chosen).then(0.01).otherwise(0.0)
    rewards = rewards.with_columns(raised)
    scratch.write_part(places["rewards"] / "part-00000.parquet", "rewards", rewards)
    settings = manifest_of(places["advantages"])["config"]
    advantages = normalize.normalize_rows(rewards.lazy(), normalize.NormalizeConfig(**settings))
    scratch.write_part(places["advantages"] / "part-00000.parquet", "advantages", advantages)
    settings = dict(manifest_of(places["batches"])["config"])
    seed, iteration = settings.pop("seed"), settings.pop("iteration")
    batches = batch.batch_rows(
        pl.read_parquet(places["completions"] / "*.parquet"),
        advantages.select("completion_id", "advantage", "drop_reason"),
        batch.BatchConfig(**settings),
        seed=seed,
        iteration=iteration,
    )
    scratch.write_part(places["batches"] / "part-00000.parquet", "batches", batches)
    for name in ("rewards", "advantages", "batches"):
        scratch.fix_hashes(places[name])
    scratch.fix_chain(scratch.artifacts())
    threshold = json.loads(run.resolved_config.read_text(encoding="utf-8"))["evaluate"]["pass_threshold"]
    scratch.touch(run.metrics)
    append_metrics(run, iteration_metrics(run, last, threshold))
    return Trial(places["rewards"], chosen, is_findable=False)


KINDS: list[Callable[[Scratch], Trial]] = [
    flip_bit,
    truncate,
    swap,
    edit_manifest,
    edit_manifest_and_fix_its_hashes,
    change_rows,
    change_rows_and_fix_the_chain,
]
"""Those that `grpo verify` finds, apart from `UNANCHORED` columns."""


def meaning(path: Path) -> object:
    """Return what a file says; of a manifest only what a hash covers."""
    try:
        if path.name == MANIFEST:
            manifest = json.loads(path.read_bytes())
            return {k: v for k, v in manifest.items() if k not in UNHASHED}
        if path.name == "metrics.parquet":
            return pl.read_parquet(path).to_dicts()
    except Exception as error:  # any failure to read is a meaning of its own
        return repr(error)
    return path.read_bytes()
