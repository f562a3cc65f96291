"""Comparison: where two runs part - in their settings, in a recipe, and in a row; how far apart two artifacts lie."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from pipeline.artifact import Artifact, open_artifact
from pipeline.chain import DATASETS, INITIAL
from pipeline.errors import ArtifactMissing
from pipeline.manifest import canonical_json, is_finished, recipe_differences
from pipeline.run_dir import RunDir

IDENTITIES = ("completion_id", "group_id", "policy_digest", "policy_iteration", "reward_recipe")
"""Columns that follow from the recipe: rows that differ in nothing else say the same."""

ABSENT = "(absent)"
"""What only the other run has."""
CHUNK_ROWS = 65_536
"""Rows compared at a time."""

SCALE_OF_ONE = {
    "completions": {"sampling_logprobs"},
    "training_records": {
        "trainer_logprobs",
        "sampling_logprobs",
        "entropies",
        "entropy_mean",
        "kl_to_sampler",
        "logprob_difference_max",
    },
    "optimizer_steps": {"loss"},
}
"""Dataset -> columns whose differences are not measured by less than 1: nats, which approach 0 where a policy is sure
of itself or equals its sampler, and a sum of advantages that cancel. There rounding is larger than the values."""


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


@dataclass(frozen=True, slots=True)
class Deviation:
    """A column or tensor whose values are not equal to the bit."""

    part: str | None
    """The file of a checkpoint; None = a column of rows."""
    name: str
    relative: float | None
    """Largest |a - b|, divided by the largest |a| of the column or tensor; None = it must be equal, and is not."""
    is_close: bool
    where: str | None = None
    """The first row beyond the tolerance."""
    row: int | None = None
    a: Any = None
    b: Any = None


def compare_runs(a: RunDir, b: RunDir) -> list[Difference]:
    """Return how the configs differ, key by key, and where the artifacts part first. Empty = the runs are equal.

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
            of_a, of_b = _open_dataset(a, index, dataset), _open_dataset(b, index, dataset)
            if dataset == "optimizer" and not (of_a and of_b):
                continue  # it may be missing, and follows from the rest
            if of_a or of_b:
                yield f"iteration {index} {dataset}", of_a, of_b


def _open(place: Path) -> Artifact | None:
    return open_artifact(place) if is_finished(place) else None


def _open_dataset(run: RunDir, index: int, dataset: str) -> Artifact | None:
    try:
        return run.open(index, dataset)
    except ArtifactMissing:
        return None


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
        facts = [{n: f["sha256"] for n, f in artifact.manifest.files.items()} for artifact in (a, b)]
        odd = [n for n in sorted({*facts[0], *facts[1]}) if facts[0].get(n) != facts[1].get(n)]
        return [
            Difference("rows", name, f"file {n}", facts[0].get(n, "absent"), facts[1].get(n, "absent")) for n in odd
        ]
    frames = [artifact.scan() for artifact in (a, b)]
    schemas = [frame.collect_schema().names() for frame in frames]
    if schemas[0] != schemas[1]:
        return [Difference("rows", name, "columns", *schemas)]
    columns = [column for column in schemas[0] if column not in IDENTITIES]
    heights = [frame.select(pl.len()).collect().item() for frame in frames]
    for start in range(0, min(heights), CHUNK_ROWS):
        chunks = [f.slice(start, min(CHUNK_ROWS, min(heights) - start)).collect() for f in frames]
        renamed = chunks[1].rename({column: f"_b_{column}" for column in chunks[1].columns})
        beside = pl.concat([chunks[0], renamed], how="horizontal").with_row_index("_row", offset=start)
        differ = [pl.col(column).ne_missing(pl.col(f"_b_{column}")) for column in columns]
        odd_rows = beside.filter(pl.any_horizontal(differ)).head(1).to_dicts()
        if odd_rows:
            row = odd_rows[0]
            key = next((f" {row[k]}" for k in ("completion_id", "prompt_id") if k in row), "")
            return [
                Difference("rows", f"{name} row {row['_row']}{key}", column, row[column], row[f"_b_{column}"])
                for column in columns
                if row[column] != row[f"_b_{column}"]
            ]
    return [] if heights[0] == heights[1] else [Difference("rows", name, "number of rows", *heights)]


def column_deviations(name: str, a: Artifact, b: Artifact, tolerance: float) -> list[Deviation]:
    """Return the columns in which two artifacts of a dataset differ. Empty = the rows say the same. Read-only.

    Floats, and lists of them, are close when no element differs by more than ``tolerance`` times the largest magnitude
    in the column of ``a`` (at least 1 in ``SCALE_OF_ONE``). Everything else is equal or not: ids, tokens, texts,
    counts, nulls, and the lengths of lists.
    """
    frames = [artifact.scan() for artifact in (a, b)]
    schemas = [frame.collect_schema() for frame in frames]
    if schemas[0] != schemas[1]:
        return [Deviation(None, "columns", None, False, a=schemas[0].names(), b=schemas[1].names())]
    heights = [frame.select(pl.len()).collect().item() for frame in frames]
    if heights[0] != heights[1]:
        return [Deviation(None, "number of rows", None, False, a=heights[0], b=heights[1])]
    floats = [column for column, kind in schemas[0].items() if _is_float(kind)]
    scales = _magnitudes(frames[0], floats)
    for column in SCALE_OF_ONE.get(name, set()) & scales.keys():
        scales[column] = max(scales[column], 1.0)
    found: dict[str, Deviation] = {}
    for start in range(0, heights[0], CHUNK_ROWS):
        one, two = (frame.slice(start, CHUNK_ROWS).collect() for frame in frames)
        for column in one.columns:
            differs = one[column].ne_missing(two[column])
            if differs.any():
                gaps = _gaps(one[column], two[column]) if column in scales else np.where(differs, np.inf, 0.0)
                scale = scales.get(column, 1.0)
                relative = np.divide(gaps, scale, out=np.where(gaps > 0, np.inf, 0.0), where=scale > 0)
                known = found.get(column)
                found[column] = _worse(known, _deviation(name, one, two, column, relative, tolerance, start))
    return [found[column] for column in schemas[0].names() if column in found]


def _is_float(kind: pl.DataType) -> bool:
    return kind.is_float() or kind in (pl.List(pl.Float32), pl.List(pl.Float64))


def _magnitudes(frame: pl.LazyFrame, columns: list[str]) -> dict[str, float]:
    """Return the largest finite magnitude of each column, 0 where there is none."""
    if not columns:
        return {}
    schema = frame.collect_schema()
    flat = {c: pl.col(c).explode() if isinstance(schema[c], pl.List) else pl.col(c) for c in columns}
    largest = [x.filter(x.is_finite()).abs().max().cast(pl.Float64).alias(c) for c, x in flat.items()]
    row = frame.select(largest).collect(engine="streaming").row(0, named=True)
    return {column: value or 0.0 for column, value in row.items()}


def _gaps(one: pl.Series, two: pl.Series) -> npt.NDArray[np.float64]:
    """Return the largest |a - b| of each row; infinite where only one is null, not a number, or longer."""
    if not isinstance(one.dtype, pl.List):
        return _distances(one, two)
    lengths = one.list.len()
    is_comparable = lengths.eq_missing(two.list.len())
    gaps = np.where(is_comparable, 0.0, np.inf)
    rows = np.flatnonzero(is_comparable)
    flat = (x.filter(is_comparable).explode(empty_as_null=False, keep_nulls=False) for x in (one, two))
    counts = lengths.filter(is_comparable).fill_null(0).to_numpy()
    np.maximum.at(gaps, np.repeat(rows, counts), _distances(*flat))
    return gaps


def _distances(one: pl.Series, two: pl.Series) -> npt.NDArray[np.float64]:
    """Return |a - b| of each pair of floats; infinite where only one is null or not a number."""
    x, y = (values.cast(pl.Float64).fill_null(np.nan).to_numpy() for values in (one, two))
    with np.errstate(invalid="ignore"):
        distance = np.nan_to_num(np.abs(x - y), nan=np.inf, posinf=np.inf)
    return np.where(one.eq_missing(two), 0.0, distance)


def _deviation(
    name: str,
    one: pl.DataFrame,
    two: pl.DataFrame,
    column: str,
    relative: npt.NDArray[np.float64],
    tolerance: float,
    start: int,
) -> Deviation:
    largest = float(relative.max())
    beyond = np.flatnonzero(relative > tolerance)
    stated = largest if np.isfinite(largest) else None
    if not len(beyond):
        return Deviation(None, column, stated, True)
    first = int(beyond[0])
    row = one.row(first, named=True)
    key = next((f" {row[k]}" for k in ("completion_id", "prompt_id") if k in row), "")
    where = f"{name} row {start + first}{key}"
    return Deviation(None, column, stated, False, where, start + first, row[column], two.row(first, named=True)[column])


def _worse(known: Deviation | None, new: Deviation) -> Deviation:
    """Return a column's deviation over the chunks up to now: the first row beyond, and the largest difference."""
    if known is None:
        return new
    relative = None if None in (known.relative, new.relative) else max(known.relative or 0.0, new.relative or 0.0)
    return replace(new if known.is_close and not new.is_close else known, relative=relative)
