"""Bringing the files of an artifact from an object store, each verified."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import ArtifactDamaged, StoreError
from pipeline.files import atomic_write, locked, sha256_file
from pipeline.manifest import MANIFEST, STORE_NOTE
from pipeline.object_store import Store, open_store


def fetch_files(place: Path, files: Mapping[str, dict[str, Any]]) -> None:
    """Download the files of an artifact that are not here; each gets its name only when it is what the manifest says.

    Raises:
        ArtifactDamaged: naming the first object that is not.
    """
    if all((place / name).is_file() for name in files):
        return
    note = place / STORE_NOTE
    with locked(note):  # of two who read the same artifact one downloads
        store = open_store(json.loads(note.read_text(encoding="utf-8"))["url"])
        for name, facts in files.items():
            target = place / name
            if not target.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(target) as temporary:
                    _download(store, name, temporary, facts)


def _download(store: Store, name: str, target: Path, facts: dict[str, Any]) -> None:
    remedy = (
        f"restore the object from a copy, or delete everything below {store.url} and run the same command, which makes "
        "it again"
    )
    try:
        store.download(name, target)
    except StoreError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise ArtifactDamaged(f"{store.url}/{name} is gone, but its {MANIFEST} lists it: {remedy}") from error
        raise
    size = target.stat().st_size
    if size != facts["bytes"]:
        raise ArtifactDamaged(f"{store.url}/{name} has {size:,} bytes, its manifest says {facts['bytes']:,}: {remedy}")
    found = sha256_file(target)
    if found != facts["sha256"]:
        raise ArtifactDamaged(
            f"{store.url}/{name} has SHA-256 {found[:16]}..., its manifest says {facts['sha256'][:16]}...: bytes were "
            f"changed after it was written; {remedy}"
        )
