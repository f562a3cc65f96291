"""The manifest of an artifact, and the three hashes in it.

``recipe`` says what should be computed, ``content`` what came out (names and bytes), ``digest`` both. A recipe holds
the digests of the inputs, so digests form a Merkle chain: the digest of the last policy vouches for every row before
it.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import ArtifactDamaged
from pipeline.files import sha256_file, sha256_text
from pipeline.reading import is_plain, shorten

MANIFEST_VERSION = 2
MANIFEST = "manifest.json"
STORE_NOTE = ".store.json"
"""In an artifact of a working copy: its URL on the object store, which has the missing files."""


def canonical_json(value: object) -> str:
    """Return JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


class Recipe(NamedTuple):
    """What should be computed; its hash is `recipe_hash`."""

    stage: str
    version: int
    chosen: Mapping[str, Any]
    """Parameters, and the settings that differ from the defaults of that version."""
    inputs: Mapping[str, str]
    """Name -> digest."""
    settings: Mapping[str, Any]
    """The whole config and the parameters, for readers; part of no hash."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `manifest.json` holds."""

    manifest_version: int
    stage: str
    stage_version: int
    dataset: str
    """Name of the schema; ``policy`` or ``optimizer`` for a checkpoint."""
    config: dict[str, Any]
    """The stage's resolved configuration and parameters (seed, iteration, hashes of user code), for readers."""
    chosen: dict[str, Any]
    """The part of ``config`` in the recipe: parameters, and settings that differ from that version's defaults."""
    inputs: dict[str, dict[str, str]]
    """Name -> path relative to this artifact, and digest."""
    files: dict[str, dict[str, Any]]
    """Name, a plain path below the artifact -> rows (null for files that hold no rows), bytes, sha256."""
    rows: int | None
    drops: dict[str, int]
    """Number of rows with each drop_reason; they stay in the data."""
    environment: dict[str, Any]
    started_at: str
    seconds: float
    recipe: str
    content: str
    digest: str

    def recipe_parts(self) -> Recipe:
        """Return everything that decided the result."""
        inputs = {name: found["digest"] for name, found in self.inputs.items()}
        return Recipe(self.stage, self.stage_version, self.chosen, inputs, self.config)

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def parse_manifest(values: Mapping[str, Any]) -> Manifest:
    """Return the manifest that a table holds, whose every field is of its kind, every name plain, every hash right.

    This is the one place where what a manifest says is checked: all readers may rely on it.

    Raises:
        ValueError: saying what is wrong.
    """
    unknown, missing = sorted(values.keys() - _KINDS), sorted(_KINDS.keys() - values)
    if unknown or missing:
        raise ValueError(f"it has the unknown fields {unknown} and lacks {missing}")
    wrong = next((name for name, is_right in _KINDS.items() if not is_right(values[name])), None)
    if wrong is not None:
        raise ValueError(f"{wrong} is {shorten(values[wrong])}, which is not of its kind")
    odd = next((name for name in values["files"] if not is_plain(name)), None)
    if odd is not None:
        raise ValueError(f"{odd!r} is no name of a file: expected a plain path below the artifact")
    manifest = Manifest(**values)
    content = content_hash(manifest.dataset, manifest.files)
    if (content, digest_of(manifest.recipe, content)) != (manifest.content, manifest.digest):
        raise ValueError("its file hashes do not add up to its digest")
    if recipe_hash(manifest.recipe_parts()) != manifest.recipe:
        raise ValueError("its config and inputs do not add up to its recipe")
    if not is_part_of(manifest.chosen, manifest.config):
        raise ValueError("its config is not the one of its recipe")
    return manifest


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_table(value: object) -> bool:
    return isinstance(value, dict)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_COUNT  # True is no number


def _is_count_or_null(value: object) -> bool:
    return value is None or _is_count(value)


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and bool(_HASH.fullmatch(value))


def _are_files(value: object) -> bool:
    kinds = {"rows": _is_count_or_null, "bytes": _is_count, "sha256": _is_hash}
    return isinstance(value, dict) and all(_fits(facts, kinds) for facts in value.values())


def _are_inputs(value: object) -> bool:
    kinds = {"path": lambda path: _is_text(path) and "\0" not in path, "digest": _is_hash}
    return isinstance(value, dict) and all(_fits(facts, kinds) for facts in value.values())


def _fits(facts: object, kinds: Mapping[str, Callable[[Any], bool]]) -> bool:
    return isinstance(facts, dict) and facts.keys() == kinds.keys() and all(kinds[n](facts[n]) for n in kinds)


_HASH = re.compile("[0-9a-f]{64}")
LARGEST_COUNT = 2**53
"""Largest number that every reader of JSON holds exactly."""
_KINDS: Mapping[str, Callable[[Any], bool]] = {
    "manifest_version": _is_count,
    "stage": _is_text,
    "stage_version": _is_count,
    "dataset": _is_text,
    "config": _is_table,
    "chosen": _is_table,
    "inputs": _are_inputs,
    "files": _are_files,
    "rows": _is_count_or_null,
    "drops": lambda drops: isinstance(drops, dict) and all(map(_is_count, drops.values())),
    "environment": _is_table,
    "started_at": _is_text,
    "seconds": lambda seconds: type(seconds) in (int, float) and math.isfinite(seconds),
    "recipe": _is_hash,
    "content": _is_hash,
    "digest": _is_hash,
}
"""Field -> whether a value is of its kind."""


def is_finished(path: Path) -> bool:
    """Return whether ``path`` is a finished artifact. Read-only."""
    return (path / MANIFEST).is_file()


def recipe_hash(recipe: Recipe) -> str:
    """Return the hash of what should be computed."""
    parts = {
        "stage": recipe.stage,
        "version": recipe.version,
        "config": dict(recipe.chosen),
        "inputs": dict(recipe.inputs),
    }
    return sha256_text(canonical_json(parts))


class RecipeDifference(NamedTuple):
    """One difference between two recipes."""

    part: str
    """stage, config or input."""
    name: str
    """The key of the config or the name of the input; empty for the stage."""
    a: Any
    """The stage's name and version, the value of the key, or the digest of the input."""
    b: Any


def recipe_differences(a: Recipe, b: Recipe, absent: object = None) -> Iterator[RecipeDifference]:
    """Yield the differences between two recipes: the stage, then the config by key, then the inputs by name.

    ``absent`` is the value of a key that a recipe lacks: with None, a missing key equals null.
    """
    if (a.stage, a.version) != (b.stage, b.version):
        yield RecipeDifference("stage", "", f"{a.stage} {a.version}", f"{b.stage} {b.version}")
    for part, of_a, of_b, shown in (
        ("config", a.chosen, b.chosen, (a.settings, b.settings)),
        ("input", a.inputs, b.inputs, (a.inputs, b.inputs)),
    ):
        for name in sorted({*of_a, *of_b}):
            if canonical_json(of_a.get(name, absent)) != canonical_json(of_b.get(name, absent)):
                yield RecipeDifference(part, name, *(values.get(name, absent) for values in shown))


def is_part_of(chosen: Any, config: Any) -> bool:
    """Return whether every setting that a recipe holds has the same value in the whole config."""
    if isinstance(chosen, dict) and isinstance(config, dict):
        return all(key in config and is_part_of(value, config[key]) for key, value in chosen.items())
    if isinstance(chosen, list) and isinstance(config, list):
        return len(chosen) == len(config) and all(map(is_part_of, chosen, config))
    return bool(chosen == config)


def content_hash(dataset: str, files: dict[str, dict[str, Any]]) -> str:
    """Return the hash of the result: the dataset, and every file's name and bytes."""
    return sha256_text(canonical_json([dataset, {name: facts["sha256"] for name, facts in files.items()}]))


def digest_of(recipe: str, content: str) -> str:
    """Return the hash that vouches for an artifact and for everything it was made from."""
    return sha256_text(canonical_json([recipe, content]))


class WrongBytes(NamedTuple):
    """The first difference between a file and its manifest."""

    fact: str
    """``bytes`` or ``sha256``."""
    found: Any
    """What the file has instead."""

    def as_error(self, name: object, facts: Mapping[str, Any], remedy: str) -> ArtifactDamaged:
        """Return the error that names the file and what to do."""
        if self.fact == "bytes":
            return ArtifactDamaged(f"{name} has {self.found:,} bytes, its manifest says {facts['bytes']:,}: {remedy}")
        return ArtifactDamaged(
            f"{name} has SHA-256 {self.found[:16]}..., its manifest says {facts['sha256'][:16]}...: bytes were changed "
            f"after it was written; {remedy}"
        )


def wrong_bytes(path: Path, facts: Mapping[str, Any], *, hashed: bool = True) -> WrongBytes | None:
    """Compare a file's size, and if ``hashed`` its SHA-256, with a manifest; None = equal. Read-only."""
    size = path.stat().st_size
    if size != facts.get("bytes"):
        return WrongBytes("bytes", size)
    if hashed and (digest := sha256_file(path)) != facts["sha256"]:
        return WrongBytes("sha256", digest)
    return None
