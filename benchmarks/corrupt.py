"""Corrupts a finished run at random, again and again, and counts what `grpo verify` finds.

    python benchmarks/corrupt.py runs/demo --scratch scratch --count 1000 --iterations 2

The first iterations of the run are copied; each trial changes the copy in one way, audits it, and puts it back. Kinds:

    bit flip, truncation    of any file of an artifact, of a manifest, of metrics.parquet
    swapped                 the same file of two artifacts, or two artifacts
    manifest                one hashed field of a manifest is edited; "hashes fixed": and its hashes made to fit
    row ...                 one row is removed, repeated or moved, or one value altered, and the hashes of the artifact
                            made to fit; "chain": and those of every artifact made from it too
    note                    what no hash covers: started_at and the environment in a manifest
    recomputed              in the last iteration a reward is changed, advantages, batches, metrics and all hashes made
                            to fit by the program's own code: a forgery that only a new scoring can find

A corruption is found when the audit reports a problem, and named when a problem names the artifact. One after which
everything reads as before, such as a flipped bit in a comment, is harmless and not counted. Two kinds and some columns
cannot be found by files alone; they are listed apart. The exit code is 1 when anything else is missed.
"""

import argparse
import json
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from flows.printing import Format, print_rows
from pipeline.conformance import conform
from pipeline.files import sha256_file
from pipeline.manifest import MANIFEST, content_hash, digest_of, recipe_hash
from pipeline.run_dir import RunDir
from stages import batch, normalize
from stages.inspect.metrics import append_metrics, iteration_metrics
from stages.inspect.verify.verify import verify_run

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

    def manifest(self, artifact: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))
        return found

    def write_manifest(self, artifact: Path, manifest: dict[str, Any]) -> None:
        self.touch(artifact / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")

    def fix_hashes(self, artifact: Path, manifest: dict[str, Any] | None = None) -> None:
        """Make a manifest fit its files, itself, and its inputs as they are now stated."""
        manifest = manifest or self.manifest(artifact)
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
        inputs = {name: facts["digest"] for name, facts in manifest["inputs"].items()}
        manifest["recipe"] = recipe_hash(manifest["stage"], manifest["stage_version"], manifest["config"], inputs)
        manifest["content"] = content_hash(manifest["dataset"], manifest["files"])
        manifest["digest"] = digest_of(manifest["recipe"], manifest["content"])
        self.write_manifest(artifact, manifest)

    def fix_chain(self, artifacts: list[Path]) -> None:
        """Make every manifest state the digests that its inputs have now, in the order of making."""
        for artifact in artifacts:
            manifest = self.manifest(artifact)
            stale = False
            for facts in manifest["inputs"].values():
                digest = self.manifest(artifact / facts["path"])["digest"]
                stale |= facts["digest"] != digest
                facts["digest"] = digest
            if stale:
                self.fix_hashes(artifact, manifest)


@dataclass
class Trial:
    """One corruption: its kind, the artifact or file, and what was done."""

    kind: str
    place: Path
    what: str
    is_findable: bool = True


def flip_bit(scratch: Scratch) -> Trial:
    path = scratch.touch(_any_file(scratch))
    data = bytearray(path.read_bytes())
    position, bit = scratch.rng.randrange(len(data)), scratch.rng.randrange(8)
    data[position] ^= 1 << bit
    path.write_bytes(data)
    return Trial("bit flip", path, f"byte {position}, bit {bit}")


def truncate(scratch: Scratch) -> Trial:
    path = scratch.touch(_any_file(scratch))
    size = scratch.rng.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:size])
    return Trial("truncation", path, f"to {size} bytes")


def _any_file(scratch: Scratch) -> Path:
    artifacts = scratch.artifacts()
    artifact = scratch.rng.choice([*artifacts, None])
    if artifact is None:
        return scratch.root / "metrics.parquet"
    return artifact / scratch.rng.choice([MANIFEST, *scratch.manifest(artifact)["files"]])


def swap(scratch: Scratch) -> Trial:
    """Swap a file, or all files, of two artifacts of the same kind."""
    by_kind: dict[str, list[Path]] = {}
    for artifact in scratch.artifacts():
        by_kind.setdefault(scratch.manifest(artifact)["dataset"], []).append(artifact)
    one, two = scratch.rng.sample(scratch.rng.choice([a for a in by_kind.values() if len(a) > 1]), 2)
    names = sorted({*scratch.manifest(one)["files"]} & {*scratch.manifest(two)["files"]})
    chosen = [MANIFEST, *names] if scratch.rng.random() < 0.5 else [scratch.rng.choice(names)]
    for name in chosen:
        first, second = scratch.touch(one / name), scratch.touch(two / name)
        a, b = first.read_bytes(), second.read_bytes()
        first.write_bytes(b)
        second.write_bytes(a)
    return Trial("swapped", one, f"{len(chosen)} files with {two.relative_to(scratch.root)}")


def edit_manifest(scratch: Scratch, *, is_fixed: bool) -> Trial:
    """Edit one hashed field of a manifest."""
    artifact = scratch.rng.choice(scratch.artifacts())
    manifest = scratch.manifest(artifact)
    fields = (
        ["config", "inputs", "stage_version", "dataset"]
        if is_fixed
        else ["config", "inputs", "files", "rows", "recipe"]
    )
    name = scratch.rng.choice([f for f in fields if manifest[f]])
    table = manifest[name]
    if name in ("config", "inputs"):
        key = scratch.rng.choice(sorted(table))
        if name == "inputs":
            table[key]["digest"] = _hex(scratch.rng)
        else:
            table[key] = _other(table[key], scratch.rng)
        name = f"{name} {key}"
    elif name == "files":
        key = scratch.rng.choice(sorted(table))
        fact = scratch.rng.choice(["bytes", "sha256"])
        table[key][fact] = _other(table[key][fact], scratch.rng)
        name = f"files {key} {fact}"
    else:
        manifest[name] = "rewards" if name == "dataset" and table != "rewards" else _other(table, scratch.rng)
    if is_fixed:
        scratch.fix_hashes(artifact, manifest)
    else:
        scratch.write_manifest(artifact, manifest)
    return Trial("manifest, hashes fixed" if is_fixed else "manifest", artifact, name)


def _hex(rng: random.Random) -> str:
    return f"{rng.getrandbits(256):064x}"


def _other(value: Any, rng: random.Random) -> Any:
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
        return [*value[:index], _other(value[index], rng), *value[index + 1 :]]
    if isinstance(value, dict):
        if not value:
            return {"x": 1}
        key = rng.choice(sorted(value))
        return {**value, key: _other(value[key], rng)}
    return "x"


def change_rows(scratch: Scratch, *, is_chain: bool) -> Trial:
    """Remove, repeat, move or alter rows of a part, and make hashes fit."""
    artifacts = scratch.artifacts()
    artifact = scratch.rng.choice([a for a in artifacts if scratch.manifest(a)["dataset"] != "policy"])
    dataset = scratch.manifest(artifact)["dataset"]
    path = scratch.rng.choice(sorted(artifact.glob("*.parquet")))
    frame = pl.read_parquet(path)
    how = scratch.rng.choice(
        ["removed", "repeated", "moved", "altered", "altered", "altered"] if len(frame) > 1 else ["altered"]
    )
    index = scratch.rng.randrange(len(frame))
    what, is_findable = f"{how} {index}", True
    if how == "removed":
        changed = pl.concat([frame[:index], frame[index + 1 :]])
    elif how == "repeated":
        changed = pl.concat([frame[: index + 1], frame[index:]])
    elif how == "moved":
        other = (index + scratch.rng.randrange(1, len(frame))) % len(frame)
        order = list(range(len(frame)))
        order[index], order[other] = other, index
        changed = frame[order]
        # nothing depends on the order of records
        is_findable = dataset not in ("training_records", "optimizer_steps")
    else:
        changed, column = _altered(frame, index, scratch.rng)
        what = f"{column} of row {index}"
        is_findable = column not in UNANCHORED.get(dataset, set())
    pq.write_table(conform(changed, dataset), scratch.touch(path), compression="zstd")
    scratch.fix_hashes(artifact)
    if is_chain:
        scratch.fix_chain(artifacts)
    return Trial(f"row {how}, {'chain' if is_chain else 'hashes fixed'}", artifact, what, is_findable)


def _altered(frame: pl.DataFrame, index: int, rng: random.Random) -> tuple[pl.DataFrame, str]:
    known = [name for name in frame.columns if frame[name][index] is not None]
    column = rng.choice(known)
    series = frame[column]
    values = series.to_list()
    values[index] = _other(values[index], rng)
    return frame.with_columns(pl.Series(column, values, dtype=series.dtype)), column


def edit_note(scratch: Scratch) -> Trial:
    artifact = scratch.rng.choice(scratch.artifacts())
    manifest = scratch.manifest(artifact)
    name = scratch.rng.choice(["environment", "started_at"])
    manifest[name] = _other(manifest[name], scratch.rng)
    scratch.write_manifest(artifact, manifest)
    return Trial("note", artifact, name, is_findable=False)


def forge(scratch: Scratch) -> Trial:
    """Change a reward of the last iteration and recompute everything after it but the policy."""
    run = RunDir(scratch.root)
    last = run.iterations()[-1]
    places = {name: run.place(last, name) for name in ("rewards", "advantages", "batches", "completions")}
    part = places["rewards"] / "part-00000.parquet"
    rewards = pl.read_parquet(part)
    # of a group that trains in any case, so that the rows that train stay the same
    advantages = pl.read_parquet(places["advantages"] / "part-00000.parquet")
    useful = advantages.filter(pl.col("drop_reason").is_null())["completion_id"].to_list()
    chosen = scratch.rng.choice(useful)
    changed = rewards.with_columns(
        pl.when(pl.col("completion_id") == chosen)
        .then(pl.col("reward") + 0.01)
        .otherwise(pl.col("reward"))
        .alias("reward")
    )
    _write(scratch, part, "rewards", changed)
    settings = scratch.manifest(places["advantages"])["config"]
    advantages = normalize.normalize_rows(changed.lazy(), normalize.NormalizeConfig(**settings))
    _write(scratch, places["advantages"] / "part-00000.parquet", "advantages", advantages)
    settings = dict(scratch.manifest(places["batches"])["config"])
    seed, iteration = settings.pop("seed"), settings.pop("iteration")
    batches = batch.batch_rows(
        pl.read_parquet(places["completions"] / "*.parquet"),
        advantages.select("completion_id", "advantage", "drop_reason"),
        batch.BatchConfig(**settings),
        seed=seed,
        iteration=iteration,
    )
    _write(scratch, places["batches"] / "part-00000.parquet", "batches", batches)
    for name in ("rewards", "advantages", "batches"):
        scratch.fix_hashes(places[name])
    scratch.fix_chain(scratch.artifacts())
    threshold = json.loads(run.resolved_config.read_text(encoding="utf-8"))["evaluate"]["pass_threshold"]
    scratch.touch(run.metrics)
    append_metrics(run, iteration_metrics(run, last, threshold))
    return Trial("recomputed", places["rewards"], chosen, is_findable=False)


def _write(scratch: Scratch, path: Path, dataset: str, frame: pl.DataFrame) -> None:
    pq.write_table(conform(frame, dataset), scratch.touch(path), compression="zstd")


KINDS: list[tuple[int, Callable[[Scratch], Trial]]] = [
    (3, flip_bit),
    (3, truncate),
    (2, swap),
    (2, lambda s: edit_manifest(s, is_fixed=False)),
    (2, lambda s: edit_manifest(s, is_fixed=True)),
    (5, lambda s: change_rows(s, is_chain=False)),
    (5, lambda s: change_rows(s, is_chain=True)),
    (1, edit_note),
    (1, forge),
]


def is_harmless(scratch: Scratch) -> bool:
    """Return whether every touched file reads as before: then nothing was corrupted."""
    return all(
        _meaning(path) == _meaning(scratch.pristine / path.relative_to(scratch.root)) for path in scratch.touched
    )


def _meaning(path: Path) -> object:
    try:
        if path.name == MANIFEST:
            manifest = json.loads(path.read_bytes())
            return {k: v for k, v in manifest.items() if k not in UNHASHED}
        if path.name == "metrics.parquet":
            return pl.read_parquet(path).to_dicts()
    except Exception as error:  # any failure to read is a meaning of its own
        return repr(error)
    return path.read_bytes()


def copy_run(source: Path, target: Path, iterations: int) -> None:
    """Copy the first iterations of a run."""
    shutil.rmtree(target, ignore_errors=True)
    first = RunDir(source).iterations()[:iterations]
    skipped = {RunDir(source).iteration(i).name for i in RunDir(source).iterations() if i not in first}
    shutil.copytree(
        source, target, ignore=lambda _, names: [n for n in names if n in skipped or n in ("logs", ".lock")]
    )
    metrics = pl.read_parquet(RunDir(target).metrics).filter(pl.col("iteration").is_in(first))
    pq.write_table(conform(metrics, "metrics"), RunDir(target).metrics, compression="zstd")


def main() -> int:
    """Corrupt and count; return 1 when something that can be found was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    copy_run(options.run, options.scratch / "pristine", options.iterations)
    shutil.rmtree(options.scratch / "run", ignore_errors=True)
    shutil.copytree(options.scratch / "pristine", options.scratch / "run")
    scratch = Scratch(options.scratch / "run", options.scratch / "pristine", random.Random(options.seed))
    kinds = KINDS
    if RunDir(scratch.root).place(RunDir(scratch.root).iterations()[-1], "evaluations").exists():
        kinds = [kind for kind in KINDS if kind[1] is not forge]  # its forger does not forge evaluations
    if not verify_run(RunDir(scratch.root)).is_fine:
        raise SystemExit(f"{options.run} is not fine as it stands: see `grpo verify`")
    counts: dict[str, Counter[str]] = {}
    missed: list[Trial] = []
    for _ in range(options.count):
        (make,) = scratch.rng.choices([k for _, k in kinds], weights=[w for w, _ in kinds])
        trial = make(scratch)
        label = trial.kind if trial.is_findable else f"{trial.kind} *"
        counter = counts.setdefault(label, Counter())
        if trial.kind != "note" and is_harmless(scratch):
            counter["harmless"] += 1
        else:
            findings = verify_run(RunDir(scratch.root))
            around = [trial.place, *trial.place.parents]
            artifact = next((place for place in around if (place / MANIFEST).exists()), trial.place)
            name = artifact.relative_to(scratch.root).as_posix()
            is_named = any(name in (p.where.path, *re.split(r"[ ,()]+", p.found)) for p in findings.problems)
            counter["tried"] += 1
            counter["found"] += not findings.is_fine
            counter["named"] += is_named
            if trial.is_findable and not is_named:
                missed.append(trial)
        scratch.restore()
    columns = ("kind", "tried", "found", "named", "harmless")
    print_rows(
        [{"kind": k, **{c: counts[k][c] for c in columns[1:]}} for k in sorted(counts)], Format.table, columns=columns
    )
    print("* files alone cannot tell: nothing else repeats what was changed")
    for trial in missed:
        print(f"missed: {trial.kind}: {trial.place.relative_to(scratch.root)}: {trial.what}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
