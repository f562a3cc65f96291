"""Manifests of finished runs, and how a forger makes them fit what he has changed."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.files import sha256_file
from pipeline.manifest import MANIFEST, Recipe, content_hash, digest_of, recipe_hash


def manifest_of(place: Path) -> dict[str, Any]:
    """Return the manifest of an artifact."""
    found: dict[str, Any] = json.loads((place / MANIFEST).read_text())
    return found


def seal(manifest: dict[str, Any]) -> None:
    """Make the three hashes of a manifest fit what it says.

    Raises:
        TypeError, AttributeError, LookupError, ValueError: when it says what cannot be hashed.
    """
    inputs = {name: facts["digest"] for name, facts in manifest["inputs"].items()}
    recipe = Recipe(manifest["stage"], manifest["stage_version"], manifest["chosen"], inputs, manifest["config"])
    manifest["recipe"] = recipe_hash(recipe)
    manifest["content"] = content_hash(manifest["dataset"], manifest["files"])
    manifest["digest"] = digest_of(manifest["recipe"], manifest["content"])


def fix_hashes(place: Path, manifest: dict[str, Any] | None = None) -> None:
    """Make a manifest fit its files and itself, as a careful forger would."""
    manifest = manifest or manifest_of(place)
    for name, facts in manifest["files"].items():
        rows = pq.read_metadata(place / name).num_rows if name.endswith(".parquet") else None
        facts |= {"rows": rows, "bytes": (place / name).stat().st_size, "sha256": sha256_file(place / name)}
    counts = [facts["rows"] for facts in manifest["files"].values() if facts["rows"] is not None]
    manifest["rows"] = sum(counts) if counts else None
    seal(manifest)
    (place / MANIFEST).write_text(json.dumps(manifest))


def fix_chain(order: list[Path]) -> None:
    """Make every manifest name the digests that its inputs have now."""
    for artifact in order:
        manifest = manifest_of(artifact)
        for facts in manifest["inputs"].values():
            facts["digest"] = manifest_of(artifact / facts["path"])["digest"]
        fix_hashes(artifact, manifest)
