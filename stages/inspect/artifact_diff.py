"""How much two artifacts of the same recipe differ: column by column for rows, tensor by tensor for a checkpoint.

Another kind of machine adds in another order, so results differ in their last digits. Neither polars.testing nor
torch.testing fits: here a difference is relative to the largest magnitude of its column or tensor, and the first row
beyond the tolerance is named. torch is imported only when tensors are compared.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from pipeline.artifact import Artifact
from stages.checkpoints import holds_tensors
from stages.rewards.results import has_timed_out

TOLERANCE = 1e-5
"""Largest difference that counts as rounding, relative to the largest magnitude in the tensor or column: about a
hundred times float32's precision, and far less than an update with other data would leave."""

CHUNK_ROWS = 65_536
"""Rows compared at a time."""

CHUNK_ELEMENTS = 1 << 22
"""Elements compared at a time: two whole checkpoints are never in memory."""

MACHINE = ("system", "processor", "accelerators", "python", "packages")
"""Facts of a manifest's environment that can change bits."""

SCALE_OF_ONE = {
    "completions": {"sampling_logprobs"},
    "training_records": {
        "trainer_logprobs",
        "sampling_logprobs",
        "entropies",
        "entropy_mean",
        "kl_to_sampler",
        "kl_to_reference",
        "logprob_difference_max",
    },
    "optimizer_steps": {"loss"},
}
"""Dataset -> columns whose differences are relative to at least 1: nats, which approach 0 where a policy is sure
of itself or equals its sampler, and a sum of advantages that cancel. There rounding can exceed the values."""

Floats = npt.NDArray[np.float64]


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


def deviations(name: str, stored: Artifact, computed: Artifact, tolerance: float) -> list[Deviation]:
    """Return the columns, or the tensors and files, in which two artifacts differ. Read-only.

    Empty in spite of different digests: the values are equal, their bytes on disk differ.
    """
    if stored.files() or computed.files():
        return column_deviations(name, stored, computed, tolerance)
    return list(_file_deviations(stored, computed, tolerance))


def machine_changes(stored: Artifact, computed: Artifact) -> list[str]:
    """Return the facts in which machines and libraries of two artifacts differ; empty = machines of the same kind."""
    was, now = (artifact.manifest.environment for artifact in (stored, computed))
    found = []
    for key in MACHINE:
        before, after = was.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            odd = sorted(n for n in {*before, *after} if before.get(n) != after.get(n))
            found += [f"{n} was {before.get(n)}, now {after.get(n)}" for n in odd]
        elif before != after:
            found.append(f"{key} was {before}, now {after}")
    return found


def changed_files(a: Artifact, b: Artifact) -> dict[str, tuple[str | None, str | None]]:
    """Return the files that differ with their SHA-256 in both; None = this one has no such file."""
    ours, theirs = ({n: f["sha256"] for n, f in artifact.manifest.files.items()} for artifact in (a, b))
    pairs = {name: (ours.get(name), theirs.get(name)) for name in sorted({*ours, *theirs})}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _file_deviations(stored: Artifact, computed: Artifact, tolerance: float) -> Iterator[Deviation]:
    for name, hashes in changed_files(stored, computed).items():
        paths = [artifact.path / name for artifact in (stored, computed)]
        if holds_tensors(name) and all(path.is_file() for path in paths):
            yield from tensor_deviations(name, paths[0], paths[1], tolerance)
        else:
            words = [
                "absent" if value is None else value[:16] + ("" if path.is_file() else " (pruned)")
                for value, path in zip(hashes, paths, strict=True)
            ]
            yield Deviation(name, "file", None, False, a=words[0], b=words[1])


def tensor_deviations(part: str, a: Path, b: Path, tolerance: float) -> Iterator[Deviation]:
    """Yield every tensor of two safetensors files that differs, in the order of names. Read-only.

    Names, types, shapes, metadata and whole numbers must be equal; floats are compared in chunks.
    """
    from safetensors import safe_open

    with safe_open(a, framework="pt") as one, safe_open(b, framework="pt") as two:
        if one.metadata() != two.metadata():
            yield Deviation(part, "metadata", None, False, a=one.metadata(), b=two.metadata())
        names = [set(file.keys()) for file in (one, two)]
        for name in sorted(names[0] ^ names[1]):
            words = ["there" if name in found else "absent" for found in names]
            yield Deviation(part, name, None, False, a=words[0], b=words[1])
        for name in sorted(names[0] & names[1]):
            kinds = [f"{x.get_dtype()} {x.get_shape()}" for x in (file.get_slice(name) for file in (one, two))]
            if kinds[0] != kinds[1]:
                yield Deviation(part, name, None, False, a=kinds[0], b=kinds[1])
                continue
            gap = largest = 0.0
            is_float = True
            for x, y in zip(_chunks(one, name), _chunks(two, name), strict=True):
                is_float = x.is_floating_point()
                values = x.double().numpy()
                gap = max(gap, float(_distances(values, y.double().numpy()).max(initial=0.0)))
                largest = max(largest, float(np.abs(values[np.isfinite(values)]).max(initial=0.0)))
            if gap > 0:
                relative = gap / largest if largest > 0 else math.inf
                is_close = is_float and relative <= tolerance
                yield Deviation(part, name, relative if is_float and math.isfinite(relative) else None, is_close)


def _chunks(file: Any, name: str) -> Iterator[Any]:
    """Yield a tensor in pieces along its first dimension."""
    part = file.get_slice(name)
    shape = part.get_shape()
    if not shape:
        yield file.get_tensor(name)
        return
    rows = max(CHUNK_ELEMENTS // max(math.prod(shape[1:]), 1), 1)
    for start in range(0, shape[0], rows):
        yield part[start : start + rows]


def _distances(x: Floats, y: Floats) -> Floats:
    """Return |x - y|: 0 for two equal infinities or two NaNs, infinite for a NaN or an infinity against a number."""
    with np.errstate(invalid="ignore"):
        distances = np.nan_to_num(np.abs(x - y), nan=np.inf, posinf=np.inf)
    return np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, distances)


def row_name(name: str, number: int, row: dict[str, Any]) -> str:
    """Return how a message names a row of a dataset."""
    key = next((f" {row[k]}" for k in ("completion_id", "prompt_id") if k in row), "")
    return f"{name} row {number}{key}"


def changed_chunks(
    one: pl.LazyFrame, two: pl.LazyFrame, columns: list[str], height: int
) -> Iterator[tuple[int, pl.DataFrame, pl.DataFrame, dict[str, pl.Series]]]:
    """Yield each chunk of the first ``height`` rows in which a column differs, and where it does.

    Each item has the chunk's first row, both frames, and a mask of the differing rows per column that has some.
    """
    for start in range(0, height, CHUNK_ROWS):
        a, b = (frame.slice(start, min(CHUNK_ROWS, height - start)).collect() for frame in (one, two))
        masks = {column: a[column].ne_missing(b[column]) for column in columns}
        if odd := {column: mask for column, mask in masks.items() if mask.any()}:
            yield start, a, b, odd


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
    columns = schemas[0].names()
    scales = _magnitudes(frames[0], SCALE_OF_ONE.get(name, set()))
    largest = dict.fromkeys(columns, 0.0)
    beyond: dict[str, tuple[str, int, Any, Any]] = {}
    for start, one, two, odd in changed_chunks(frames[0], frames[1], columns, heights[0]):
        for column, mask in odd.items():
            gaps = _gaps(one[column], two[column]) if column in scales else np.where(mask, np.inf, 0.0)
            scale = scales.get(column, 1.0)
            relative = np.divide(gaps, scale, out=np.where(gaps > 0, np.inf, 0.0), where=scale > 0)
            largest[column] = max(largest[column], float(relative.max()))
            if largest[column] > tolerance and column not in beyond:
                first = int(np.flatnonzero(relative > tolerance)[0])
                row, other = (frame.row(first, named=True) for frame in (one, two))
                beyond[column] = (row_name(name, start + first, row), start + first, row[column], other[column])
    return [
        Deviation(None, c, largest[c] if math.isfinite(largest[c]) else None, c not in beyond, *beyond.get(c, ()))
        for c in columns
        if largest[c] > 0
    ]


SCORED = frozenset({"reward", "error", "detail", "is_correct"})
"""Columns that a reward function decides."""


def timed_out_rows(name: str, stored: Artifact, computed: Artifact, odd: Sequence[Deviation]) -> str:
    """Return in words how rewards differ, when all that do were cut off by a time limit in one of both; else nothing.

    Then nothing is wrong with either: one machine was quicker. Read-only.
    """
    beyond = [d.name for d in odd if not d.is_close]
    if not SCORED.issuperset(beyond) or "error" not in beyond:
        return ""
    is_odd = pl.any_horizontal(pl.col(c).ne_missing(pl.col(f"{c}_now")) for c in beyond)
    then, now = has_timed_out(), has_timed_out("error_now")
    frames = [stored.scan().with_row_index("row"), computed.scan().select(pl.col(beyond).name.suffix("_now"))]
    counts, first = pl.collect_all(
        [
            (rows := pl.concat(frames, how="horizontal").filter(is_odd)).select(
                all=pl.len(), then=then.sum(), now=(now & ~then).sum()
            ),
            rows.head(1),
        ]
    )
    all_, lost, won = counts.row(0)
    if all_ != lost + won:
        return ""
    row = first.row(0, named=True)
    parts = [f"{lost} timed out then, scored now"] if lost else []
    parts += [f"{won} scored then, timed out now"] if won else []
    return f"{', '.join(parts)}; the first: {row_name(name, row['row'], row)}"


def _magnitudes(frame: pl.LazyFrame, at_least_one: set[str]) -> dict[str, float]:
    """Return the largest finite magnitude of each column of floats or lists of them, 0 where there is none."""
    schema = frame.collect_schema()
    flat = {c: pl.col(c).explode() if isinstance(kind, pl.List) else pl.col(c) for c, kind in schema.items()}
    kinds = {c: kind.inner if isinstance(kind, pl.List) else kind for c, kind in schema.items()}
    largest = [
        x.filter(x.is_finite()).abs().max().cast(pl.Float64).alias(c) for c, x in flat.items() if kinds[c].is_float()
    ]
    found = frame.select(largest).collect(engine="streaming").to_dicts() if largest else [{}]
    return {c: max(value or 0.0, 1.0 if c in at_least_one else 0.0) for c, value in found[0].items()}


def _gaps(one: pl.Series, two: pl.Series) -> Floats:
    """Return the largest |a - b| of each row; infinite where only one is null, not a number, or longer."""
    if not isinstance(one.dtype, pl.List):
        x, y = (values.cast(pl.Float64).fill_null(np.nan).to_numpy() for values in (one, two))
        return np.where(one.is_null() != two.is_null(), np.inf, _distances(x, y))
    lengths = one.list.len()
    is_comparable = lengths.eq_missing(two.list.len())
    gaps = np.where(is_comparable, 0.0, np.inf)
    rows = np.flatnonzero(is_comparable)
    flat = (x.filter(is_comparable).explode(empty_as_null=False, keep_nulls=False) for x in (one, two))
    counts = lengths.filter(is_comparable).fill_null(0).to_numpy()
    np.maximum.at(gaps, np.repeat(rows, counts), _gaps(*flat))
    return gaps
