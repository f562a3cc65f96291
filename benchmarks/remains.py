"""What lies in the directory of a run, while it goes on or after its death, compared with an undisturbed run."""

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from pipeline.artifact import open_artifact
from pipeline.errors import GrpoError
from pipeline.manifest import MANIFEST, Manifest

TIMES = ("seconds", "generate_tokens_per_second")
"""Columns of the metrics that no two runs share."""


@dataclass
class State:
    """What lies in the directory of a run at one moment."""

    partial: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Path of the artifact that is being written -> inode and time of change of its hidden directory."""
    doomed: set[str] = field(default_factory=set)
    temporary: set[str] = field(default_factory=set)


def look(directory: Path) -> State:
    """Return what is unfinished at this moment; fast, as it is called every half millisecond. Read-only."""
    state = State()
    run = directory / "run"
    folders = [run, run / "members", directory / "starters", *_children(run / "iterations")]
    for folder in folders:
        with suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if not name.startswith("."):
                    continue
                stem, _, ending = name[1:].rpartition(".")
                place = os.path.relpath(folder / stem, directory)
                if ending == "partial":
                    with suppress(FileNotFoundError):
                        status = entry.stat()
                        state.partial[place] = (status.st_ino, status.st_mtime_ns)
                elif ending == "doomed":
                    state.doomed.add(place)
                elif ending == "tmp":
                    state.temporary.add(stem.rpartition(".")[0])
    return state


def _children(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in os.listdir(folder)]  # noqa: PTH208 (called every half millisecond)
    except FileNotFoundError:
        return []


def finished_artifacts(directory: Path) -> dict[str, Manifest]:
    """Return the manifests below a directory by relative path, after comparing every file with them. Read-only."""
    found = {}
    for manifest in sorted(directory.rglob(MANIFEST)):
        if any(part.startswith(".") for part in manifest.relative_to(directory).parts):
            continue
        artifact = open_artifact(manifest.parent)
        artifact.verify()
        found[os.path.relpath(manifest.parent, directory)] = artifact.manifest
    return found


def differences(reference: dict[str, Manifest], directory: Path) -> list[str]:
    """Return how the finished artifacts below ``directory`` contradict the reference. Read-only."""
    try:
        found = finished_artifacts(directory)
    except GrpoError as error:
        return [str(error)]
    problems = [f"{path} is not in the reference" for path in found if path not in reference]
    for path, manifest in found.items():
        if path in reference and manifest.digest != reference[path].digest:
            same = "same" if manifest.recipe == reference[path].recipe else "other"
            problems.append(f"{path} has another digest ({same} recipe)")
    return problems


def leftovers(directory: Path) -> list[str]:
    """Return hidden files that a finished run must not have. Read-only."""
    endings = (".partial", ".tmp", ".doomed")
    return [os.path.relpath(p, directory) for p in directory.rglob(".*") if p.name.endswith(endings)]


def metrics_differences(reference: Path, run: Path) -> list[str]:
    """Return in which figures, times apart, the metrics of two runs differ. Read-only."""
    tables = [pl.read_parquet(path / "metrics.parquet").drop(TIMES) for path in (reference, run)]
    if tables[0].shape != tables[1].shape:
        return [f"metrics.parquet has the shape {tables[1].shape}, the reference's {tables[0].shape}"]
    return [f"metrics.parquet differs in {c}" for c in tables[0].columns if not tables[0][c].equals(tables[1][c])]


def compare(manifests: dict[str, Manifest], reference: Path, directory: Path) -> list[str]:
    """Return how a finished run differs from the reference. Read-only."""
    name = directory.name
    missing = [f"{path} is missing" for path in manifests if not (directory / path / MANIFEST).is_file()]
    problems = [*missing, *differences(manifests, directory)]
    problems += [f"{path} is left behind" for path in leftovers(directory)]
    if not missing:
        problems += metrics_differences(reference / "run", directory / "run")
    return [f"{name}: {text}" for text in problems]
