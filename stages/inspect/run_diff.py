"""Where two runs differ first: in their settings, in a recipe, and in a row."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.artifact import Artifact, open_artifact
from pipeline.chain import DATASETS, INITIAL
from pipeline.lineage import open_if_there
from pipeline.manifest import canonical_json, is_finished, recipe_differences
from pipeline.run_dir import RunDir
from stages.inspect.artifact_diff import changed_chunks, changed_files, row_name

IDENTITIES = ("completion_id", "group_id", "policy_digest", "policy_iteration", "reward_recipe")
"""Columns that follow from the recipe: rows that differ in nothing else are equal."""

ABSENT = "(absent)"
"""Value of what only the other run has."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which the runs differ."""

    kind: str
    """config; recipe = the first artifact that was to be computed from other settings or inputs; rows = the first
    artifact whose content differs, with its first row; missing = only one of the runs has it."""
    where: str
    """The key of the config, or the artifact and its row."""
    what: str
    """The setting, input, column or file."""
    a: Any
    b: Any


def compare_runs(a: RunDir, b: RunDir) -> list[Difference]:
    """Return how the configs differ, key by key, and where the artifacts differ first. Empty = the runs are equal.

    Artifacts are compared in the order in which they are made. Read-only.
    """
    differences = list(compare_configs(a, b))
    kinds: set[str] = set()
    for name, of_a, of_b in _pairs(a, b):
        if "missing" not in kinds and (of_a is None or of_b is None):
            kinds.add("missing")
            differences.append(Difference("missing", name, "artifact", _state(of_a), _state(of_b)))
        if of_a is None or of_b is None or of_a.digest == of_b.digest:
            continue
        if "recipe" not in kinds and of_a.manifest.recipe != of_b.manifest.recipe:
            kinds.add("recipe")
            differences += _recipes(name, of_a, of_b)
        if "rows" not in kinds and of_a.manifest.content != of_b.manifest.content:
            found = first_difference(name, of_a, of_b)
            if found:
                kinds.add("rows")
                differences += found
        if kinds >= {"recipe", "rows", "missing"}:
            break
    return differences


def compare_configs(a: RunDir, b: RunDir) -> Iterator[Difference]:
    """Yield every setting that differs, by its key. Read-only."""
    flat = [_flat(run.settings()) for run in (a, b)]
    for key in sorted({*flat[0], *flat[1]}):
        values = [table.get(key, ABSENT) for table in flat]
        if canonical_json(values[0]) != canonical_json(values[1]):
            yield Difference("config", key, "setting", *values)


def _flat(table: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested tables and lists by their dotted key."""
    if not isinstance(table, dict | list) or not table:
        return {prefix: table}
    items = table.items() if isinstance(table, dict) else enumerate(table)
    found: dict[str, Any] = {}
    for key, value in items:
        found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _pairs(a: RunDir, b: RunDir) -> Iterator[tuple[str, Artifact | None, Artifact | None]]:
    """Yield the artifacts of both runs by name, in the order in which they are made; None = not finished."""
    firsts = [(r.initial_policy, r.held_out_prompts, r.place(INITIAL, "evaluations")) for r in (a, b)]
    for name, *places in zip(("initial_policy", "held_out_prompts", "initial_evaluations"), *firsts, strict=True):
        of_a, of_b = map(_open, places)
        if of_a or of_b:
            yield name, of_a, of_b
    for index in sorted({*a.iterations(), *b.iterations()}):
        for dataset in DATASETS:
            of_a, of_b = (open_if_there(run, index, dataset) for run in (a, b))
            if dataset == "optimizer" and not (of_a and of_b):
                continue  # it may be missing, and follows from the rest
            if of_a or of_b:
                yield f"iteration {index} {dataset}", of_a, of_b


def _open(place: Path) -> Artifact | None:
    return open_artifact(place) if is_finished(place) else None


def _state(artifact: Artifact | None) -> str:
    return "absent" if artifact is None else artifact.digest


def _recipes(name: str, a: Artifact, b: Artifact) -> list[Difference]:
    """Return what differs between two recipes."""
    found = recipe_differences(a.manifest.recipe_parts(), b.manifest.recipe_parts(), ABSENT)
    return [Difference("recipe", name, f"{part} {key}".rstrip(), *values) for part, key, *values in found]


def first_difference(name: str, a: Artifact, b: Artifact) -> list[Difference]:
    """Return the columns in which the first differing rows differ, or the files that do where there are no rows.

    Identities that follow from the recipe are not compared. Empty = the rows say the same. Read-only.
    """
    if not a.files() or not b.files():
        return [
            Difference("rows", name, f"file {n}", one or "absent", two or "absent")
            for n, (one, two) in changed_files(a, b).items()
        ]
    frames = [artifact.scan() for artifact in (a, b)]
    schemas = [frame.collect_schema().names() for frame in frames]
    if schemas[0] != schemas[1]:
        return [Difference("rows", name, "columns", *schemas)]
    columns = [column for column in schemas[0] if column not in IDENTITIES]
    heights = [frame.select(pl.len()).collect().item() for frame in frames]
    for start, one, two, odd in changed_chunks(frames[0], frames[1], columns, min(heights)):
        first = min(mask.arg_true()[0] for mask in odd.values())
        row, other = (frame.row(first, named=True) for frame in (one, two))
        where = row_name(name, start + first, row)
        return [Difference("rows", where, c, row[c], other[c]) for c, mask in odd.items() if mask[first]]
    return [] if heights[0] == heights[1] else [Difference("rows", name, "number of rows", *heights)]
