"""Verifies files: bytes, hashes, counts and schemas against the manifests."""

import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from pipeline.artifact import PRUNED_NOTE, Artifact, open_artifact, pruned_files
from pipeline.chain import DATASETS, INITIAL, known_schemas
from pipeline.errors import ArtifactMissing
from pipeline.manifest import MANIFEST, STORE_NOTE, WrongBytes, wrong_bytes
from pipeline.parquet import check_parts
from pipeline.reading import resolved, shorten
from pipeline.run_dir import REFERENCE, RunDir, is_iteration
from stages.inspect.verify.ledger import Ledger, Where, describe

UPDATE_DATASETS = ("training_records", "optimizer_steps", "policy")
"""Outputs of one stage: where one is, the others must be."""
GONE = WrongBytes("file", None)


@dataclass(frozen=True, slots=True)
class Located:
    """A finished artifact and its place in the run."""

    where: Where
    artifact: Artifact
    is_own: bool
    """Lies in the run's directory, not in that of a run it refers to."""


Catalog = dict[tuple[int | None, str], Located]
"""(iteration, dataset) -> artifact; iteration None for initial_policy, held_out_prompts, members and so on."""


def open_all(run: RunDir, ledger: Ledger) -> Catalog:
    """Return every artifact of the run that can be opened; what cannot is noted. Read-only.

    They are opened from the last to the first: of a run that is being written everything that an artifact was made
    from is then there.
    """
    members = run.member("any").parent
    places: dict[tuple[int | None, str], Path] = {
        (None, "initial_policy"): run.initial_policy,
        **{(None, f"member {place.name}"): place for place in (sorted(members.iterdir()) if members.is_dir() else [])},
        (None, "held_out_prompts"): run.held_out_prompts,
        (None, "initial_evaluations"): run.place(INITIAL, "evaluations"),
        **{(index, dataset): run.place(index, dataset) for index in run.iterations() for dataset in DATASETS},
    }
    opened = {key: _open(run, key, place) for key, place in reversed(places.items())}
    catalog: Catalog = {}
    for key, place in places.items():
        where = Where(relative_path(place, run.root), key[1], key[0])
        found = opened[key]
        if found is None:
            continue
        ledger.checked("manifests")
        if isinstance(found, Artifact):
            is_own = resolved(found.path).is_relative_to(resolved(run.root))
            catalog[key] = Located(where, found, is_own)
        else:
            ledger.wrong("manifests", where, found)
    ledger.attempt("manifests", Where("iterations", "iterations"), partial(_check_names, ledger, run))
    for index in run.iterations():
        _check_update(ledger, catalog, index)
    return catalog


def _open(run: RunDir, key: tuple[int | None, str], place: Path) -> Artifact | str | None:
    """Return the artifact in its place, or why it cannot be opened; None when there is none."""
    index, dataset = key
    try:
        return open_artifact(place) if index is None else run.open(index, dataset)
    except ArtifactMissing as error:
        if place.exists():
            return f"there is no {MANIFEST}: the artifact is half there"
        return str(error) if index is not None and run.refers(index, dataset) else None
    except Exception as error:  # what is looked at may be anything
        return describe(error)


def _check_names(ledger: Ledger, run: RunDir) -> None:
    """Note what stands where only iterations and their datasets should; hidden: unfinished, or being removed."""
    folder = run.iteration(0).parent
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not is_iteration(path) and not path.name.startswith("."):
            where = Where(relative_path(path, run.root), path.name)
            ledger.wrong("manifests", where, "no iteration has this name")
    known = {*DATASETS, *(f"{name}{REFERENCE}" for name in DATASETS)}
    for index in run.iterations():
        for path in sorted(run.iteration(index).iterdir()):
            if path.name not in known and not path.name.startswith("."):
                where = Where(relative_path(path, run.root), path.name, index)
                ledger.wrong("manifests", where, "no dataset of an iteration has this name")


def _check_update(ledger: Ledger, catalog: Catalog, index: int) -> None:
    """Check that the datasets of one update are there together, and were made by it."""
    present = [name for name in UPDATE_DATASETS if (index, name) in catalog]
    if "policy" in present and len(present) < len(UPDATE_DATASETS):
        gone = ", ".join(name for name in UPDATE_DATASETS if name not in present)
        ledger.wrong("manifests", catalog[index, "policy"].where, f"{gone} of the same update cannot be opened")
    for name in present:
        if catalog[index, name].artifact.manifest.recipe != catalog[index, present[-1]].artifact.manifest.recipe:
            other = catalog[index, present[-1]].where.path
            text = f"its recipe is another one than that of {other}, which the same update made"
            ledger.wrong("manifests", catalog[index, name].where, text)


def relative_path(path: Path, root: Path) -> str:
    """Return where a path lies, seen from a run."""
    return Path(os.path.relpath(path, root)).as_posix()


def check_files(ledger: Ledger, located: Iterable[Located]) -> set[Path]:
    """Compare bytes, hashes, counts and schemas with the manifests; return the places whose rows can be read.

    Files are hashed in threads. A file that `grpo prune` dropped is pruned, not damaged. Read-only.
    """
    listed = list({item.artifact.path: item for item in located}.values())
    sound: set[Path] = set()
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 8)) as pool:
        for item, looked in [(item, pool.submit(_wrong_files, item)) for item in listed]:
            before = len(ledger.problems)
            ledger.attempt("files", item.where, partial(_check_bytes, ledger, item, looked))
            if len(ledger.problems) == before:
                ledger.attempt("schema", item.where, partial(_check_counts, ledger, item))
            if not any(p.check in ("files", "schema") for p in ledger.problems[before:]):
                sound.add(item.artifact.path)
    return sound


def _wrong_files(item: Located) -> dict[str, WrongBytes]:
    """Return in what each file differs from the manifest; those that are as it says are left out.

    Of a run on a store the files are brought first.
    """
    if not pruned_files(item.artifact):
        item.artifact.fetch()
    paths = {name: item.artifact.path / name for name in item.artifact.manifest.files}
    found = {name: _wrong(path, item.artifact.manifest.files[name]) for name, path in paths.items()}
    return {name: wrong for name, wrong in found.items() if wrong is not None}


def _wrong(path: Path, facts: dict[str, Any]) -> WrongBytes | None:
    try:
        return wrong_bytes(path, facts) if path.is_file() else GONE
    except FileNotFoundError:  # the run goes on, and has dropped it just now
        return GONE


def _check_bytes(ledger: Ledger, item: Located, looked: "Future[dict[str, WrongBytes]]") -> None:
    artifact, where = item.artifact, item.where
    wrong_files = looked.result()
    pruned = pruned_files(artifact)
    for name, facts in artifact.manifest.files.items():
        ledger.checked("files")
        wrong = wrong_files.get(name)
        if wrong == GONE and name in pruned:
            ledger.tallies["files"].pruned += 1
            ledger.pruned.append((where, name))
        elif wrong == GONE:
            ledger.wrong("files", where, "the file is gone", part=name)
        elif wrong and wrong.fact == "bytes":
            text = f"the file has {wrong.found:,} bytes, the manifest says {shorten(facts.get('bytes'))}"
            ledger.wrong("files", where, text, part=name)
        elif wrong:
            text = f"the file has SHA-256 {wrong.found[:16]}..., the manifest says {facts['sha256'][:16]}..."
            ledger.wrong("files", where, text, part=name)
    known = {*artifact.manifest.files, MANIFEST, PRUNED_NOTE, *([STORE_NOTE] if artifact.is_on_store else [])}
    for path in sorted(p for p in artifact.path.rglob("*") if p.is_file()):
        name = path.relative_to(artifact.path).as_posix()
        if name not in known:
            ledger.wrong("files", where, "the manifest does not list this file", part=name)


def _check_counts(ledger: Ledger, item: Located) -> None:
    """Compare schema, rows and drops, which no hash covers, with the files."""
    manifest, where, paths = item.artifact.manifest, item.where, item.artifact.files()
    ledger.checked("schema", len(paths))
    ledger.checked("counts", len(paths))
    check_parts(dict.fromkeys(paths))
    item.artifact.check_schema(known_schemas())
    total = 0
    drops: Counter[str] = Counter()
    for path in paths:
        rows = pq.read_metadata(path).num_rows
        drops.update(_drops(path))
        total += rows
        stated = manifest.files[path.relative_to(item.artifact.path).as_posix()]["rows"]
        if rows != stated:
            ledger.wrong("counts", where, f"{rows} rows, the manifest says {stated}", part=path.name)
    stated_total = total if paths else None
    sorted_drops = dict(sorted(drops.items()))
    if manifest.rows != stated_total or manifest.drops != sorted_drops:
        text = f"{stated_total} rows with the drops {sorted_drops}, the manifest says {manifest.rows}, {manifest.drops}"
        ledger.wrong("counts", where, text)


def _drops(path: Path) -> dict[str, int]:
    if "drop_reason" not in pq.read_schema(path).names:
        return {}
    reasons = pl.scan_parquet(path, glob=False).select("drop_reason").drop_nulls().collect()["drop_reason"]
    return dict(reasons.value_counts().iter_rows())


def policy_key(num_updates: Any) -> tuple[int | None, str] | None:
    """Return the catalog's key of the policy after so many updates."""
    if not isinstance(num_updates, int):
        return None
    return (num_updates - 1, "policy") if num_updates else (None, "initial_policy")
