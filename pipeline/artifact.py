"""Finished artifacts: a directory of Parquet parts, or a checkpoint, plus `manifest.json`, which is written last.

A directory without a manifest is debris. A finished artifact never changes: `pipeline.writer` writes it, this module
reads and verifies it.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ArtifactDamaged, ArtifactMissing
from pipeline.manifest import (
    MANIFEST,
    MANIFEST_VERSION,
    STORE_NOTE,
    Manifest,
    content_hash,
    digest_of,
    is_part_of,
    recipe_hash,
    wrong_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import polars as pl
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished artifact on disk."""

    path: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        return self.manifest.digest

    def files(self) -> list[Path]:
        """Return the Parquet parts in order."""
        return [self.path / name for name in sorted(self.manifest.files) if name.endswith(".parquet")]

    @property
    def is_on_store(self) -> bool:
        """Whether the artifact is also on an object store; its files may then be missing here until they are read."""
        return (self.path / STORE_NOTE).is_file()

    def fetch(self) -> Path:
        """Return the directory, after downloading and verifying the files that are only on an object store.

        Raises:
            ArtifactDamaged: naming the first object that differs from the manifest.
        """
        if self.is_on_store:
            from pipeline.fetch import fetch_files

            fetch_files(self.path, self.manifest.files)
        return self.path

    def scan(self) -> "pl.LazyFrame":
        """Return all rows, lazily, after verifying the bytes once in this process. Read-only."""
        import polars as pl

        self.fetch()
        self.verify()
        return pl.scan_parquet(self.files(), glob=False)

    def read(self) -> "pl.DataFrame":
        """Return all rows after verifying the bytes once in this process. Read-only."""
        return self.scan().collect()

    def verify(self) -> None:
        """Compare every file that is here with the manifest, once in this process. Read-only.

        Raises:
            ArtifactDamaged: naming the first file that differs.
        """
        _verify(self.path, self.manifest.digest)

    def check_schema(self, schemas: "Mapping[str, pa.Schema] | None" = None) -> None:
        """Compare the columns of the artifact's rows, if it has any, with the documented schema. Read-only.

        Raises:
            SchemaError: when they differ, for example because another version of the program wrote them.
        """
        import pyarrow.parquet as pq

        from pipeline.conformance import check_schema
        from pipeline.schema import SCHEMAS

        for path in self.files():
            check_schema(pq.read_schema(path), self.manifest.dataset, path, schemas or SCHEMAS)

    def check_sizes(self, *, is_read: bool = True) -> None:
        """Compare every file's size with the manifest: the cheap part of `verify`. Read-only.

        A file that `grpo prune` dropped is an error only if the artifact will be read (``is_read``).

        Raises:
            ArtifactMissing: when a file that is needed was pruned.
            ArtifactDamaged: naming the first file that differs.
        """
        for name, facts in self.manifest.files.items():
            path = self.path / name
            if not path.is_file() and self.is_on_store:
                continue  # verified when it is downloaded
            if not path.is_file() and name in pruned_files(self):
                if not is_read:
                    continue
                raise ArtifactMissing(
                    f"{path} was dropped by `grpo prune`, and is needed now: restore it from a copy, or run the config "
                    "again in a new directory, which computes it again"
                )
            if not path.is_file():
                raise ArtifactDamaged(f"{path} is gone, but {self.path / MANIFEST} lists it: {_remedy(self.path)}")
            if wrong := wrong_bytes(path, facts, hashed=False):
                raise wrong.as_error(path, facts, _remedy(self.path))


def open_artifact(path: Path) -> Artifact:
    """Return the finished artifact at ``path``. Read-only.

    Raises:
        ArtifactMissing: when there is none.
        ArtifactDamaged: when its manifest cannot be read or does not match its own digest.
    """
    try:
        data = (path / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactMissing(
            f"{path} has no {MANIFEST}: the stage that writes it has not finished; run it (again)"
        ) from None
    try:
        fields = json.loads(data)
        version = fields.get("manifest_version", MANIFEST_VERSION)
        if version != MANIFEST_VERSION:
            raise ArtifactDamaged(
                f"{path / MANIFEST} has manifest_version {version}, this program reads {MANIFEST_VERSION}: use the "
                "version of the program that wrote it, or run its config again in a new directory"
            )
        manifest = Manifest(**fields)
        content = content_hash(manifest.dataset, manifest.files)
        if (content, digest_of(manifest.recipe, content)) != (manifest.content, manifest.digest):
            raise ValueError("its file hashes do not add up to its digest")
        if recipe_hash(manifest.recipe_parts()) != manifest.recipe:
            raise ValueError("its config and inputs do not add up to its recipe")
        if not is_part_of(manifest.chosen, manifest.config):
            raise ValueError("its config is not the one of its recipe")
    except ArtifactDamaged:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactDamaged(f"{path / MANIFEST} is not a valid manifest ({error}): {_remedy(path)}") from error
    return Artifact(path, manifest)


@cache
def _verify(path: Path, digest: str) -> None:
    artifact = open_artifact(path)
    artifact.check_sizes()
    for name, facts in artifact.manifest.files.items():
        if (path / name).is_file() and (wrong := wrong_bytes(path / name, facts)):  # else on a store, see check_sizes
            raise wrong.as_error(path / name, facts, _remedy(path))


def _remedy(path: Path) -> str:
    if (path / STORE_NOTE).is_file():
        url = json.loads((path / STORE_NOTE).read_text(encoding="utf-8"))["url"]
        return (
            f"delete {path}, the working copy of {url}, and run the same command, which brings it again; if it is "
            "damaged there too, delete everything below that URL, and it is made again"
        )
    return (
        f"restore the file from a copy, or delete the directory {path} and run the same command, which makes it again"
    )


PRUNED_NOTE = "pruned.json"
"""Next to the manifest: names and SHA-256 of the files that were dropped on purpose."""
WEIGHTS = ".safetensors"
"""Suffix of what is dropped: weights and optimizer states. Configuration and tokenizer stay, to read rows."""


def pruned_files(artifact: Artifact) -> frozenset[str]:
    """Return the names of the files that were dropped on purpose. Read-only.

    A note counts only if it has the manifest's hash of the file: a note from elsewhere hides no damage.
    """
    try:
        noted = json.loads((artifact.path / PRUNED_NOTE).read_text(encoding="utf-8"))["files"]
        return frozenset(
            name
            for name, facts in artifact.manifest.files.items()
            if name.endswith(WEIGHTS) and name in noted and noted[name] == facts["sha256"]
        )
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError, TypeError, KeyError):
        return frozenset()  # an unreadable note excuses nothing
