"""Downloads the files of an artifact from an object store and verifies each."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import ArtifactDamaged, StoreError
from pipeline.files import atomic_write, locked
from pipeline.manifest import MANIFEST, STORE_NOTE, wrong_bytes
from pipeline.object_store import Store, open_store
from pipeline.reading import inside


def fetch_files(place: Path, url: str, files: Mapping[str, dict[str, Any]]) -> None:
    """Download an artifact's missing files; each gets its name only after it was verified against the manifest.

    Raises:
        ArtifactDamaged: naming the first object that differs from the manifest, or a link on the way to its place.
    """
    if all((place / name).is_file() for name in files):
        return
    with locked(place / STORE_NOTE):  # of two readers of the same artifact, one downloads
        store = open_store(url)
        for name, facts in files.items():
            target = inside(place, name)
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
    if wrong := wrong_bytes(target, facts):
        raise wrong.as_error(f"{store.url}/{name}", facts, remedy)
