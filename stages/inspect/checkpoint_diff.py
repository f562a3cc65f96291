"""How far two artifacts of the same recipe lie apart: tensor by tensor for a checkpoint, column by column for rows.

Where the machine is of another kind, sums are taken in another order, and results differ in their last digits. Torch
is imported only when tensors are compared.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import Artifact
from stages.checkpoints import holds_tensors
from stages.inspect.run_diff import Deviation, column_deviations

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-5
"""Largest difference that counts as rounding, of the largest magnitude in the tensor or column: about a hundred times
float32's precision, and far less than an update with other data would leave."""

CHUNK_ELEMENTS = 1 << 22
"""Elements compared at a time: two checkpoints never lie in memory whole."""

MACHINE = ("system", "processor", "accelerators", "python", "packages")
"""Facts of a manifest's environment that can change bits."""


def deviations(name: str, stored: Artifact, computed: Artifact, tolerance: float) -> list[Deviation]:
    """Return the columns, or the tensors and files, in which two artifacts differ. Read-only.

    Empty although the digests differ: the values are equal, and only their bytes on disk are not.
    """
    if stored.files() or computed.files():
        return column_deviations(name, stored, computed, tolerance)
    return list(_file_deviations(stored, computed, tolerance))


def machine_changes(stored: Artifact, computed: Artifact) -> list[str]:
    """Return in what the machines and libraries of two artifacts differ; empty = machines of the same kind."""
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


def _file_deviations(stored: Artifact, computed: Artifact, tolerance: float) -> Iterator[Deviation]:
    ours, theirs = stored.manifest.files, computed.manifest.files
    for name in sorted({*ours, *theirs}):
        hashes = [files.get(name, {}).get("sha256") for files in (ours, theirs)]
        if hashes[0] == hashes[1]:
            continue
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
            gap, largest, is_float = _compare_tensors(one, two, name)
            if gap > 0:
                relative = gap / largest if largest > 0 else math.inf
                is_close = is_float and relative <= tolerance
                yield Deviation(part, name, relative if is_float and math.isfinite(relative) else None, is_close)


def _compare_tensors(one: Any, two: Any, name: str) -> tuple[float, float, bool]:
    """Return the largest |a - b|, the largest finite |a|, and whether the tensor holds floats."""
    gap = largest = 0.0
    is_float = True
    for x, y in zip(_chunks(one, name), _chunks(two, name), strict=True):
        is_float = x.is_floating_point()
        x, y = x.double(), y.double()
        # Equal infinities and two NaNs are no difference; a NaN against a number is an infinite one.
        distance = (x - y).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        distance[(x == y) | (x.isnan() & y.isnan())] = 0.0
        if x.numel():
            gap = max(gap, float(distance.max()))
            largest = max(largest, float(x.abs().nan_to_num(nan=0.0, posinf=0.0).max()))
    return gap, largest, is_float


def _chunks(file: Any, name: str) -> "Iterator[torch.Tensor]":
    """Yield a tensor in pieces along its first dimension."""
    part = file.get_slice(name)
    shape = part.get_shape()
    if not shape:
        yield file.get_tensor(name)
        return
    rows = max(CHUNK_ELEMENTS // max(math.prod(shape[1:]), 1), 1)
    for start in range(0, shape[0], rows):
        yield part[start : start + rows]
