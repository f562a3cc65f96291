"""Finished artifacts: a directory of Parquet parts, or a checkpoint, plus `manifest.json`, which is written last.

A directory without a manifest is debris. A finished artifact never changes: `pipeline.writer` writes it, this module
reads and verifies it.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ArtifactDamaged, ArtifactMissing
from pipeline.manifest import MANIFEST, MANIFEST_VERSION, STORE_NOTE, Manifest, parse_manifest, wrong_bytes
from pipeline.object_store import url_of
from pipeline.reading import read_json, shorten

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
        return store_url(self.path) is not None

    def fetch(self) -> Path:
        """Return the directory, after downloading and verifying the files that are only on an object store.

        Raises:
            ArtifactDamaged: naming the first object that differs from the manifest.
        """
        if url := store_url(self.path):
            from pipeline.fetch import fetch_files

            fetch_files(self.path, url, self.manifest.files)
        return self.path

    def scan(self) -> "pl.LazyFrame":
        """Return all rows, lazily, after verifying the bytes and what they decode to once in this process. Read-only.

        Raises:
            ArtifactDamaged: as `verify` and `check_parts`, or when the artifact holds no rows.
            ArtifactTooLarge: as `check_parts`.
            SchemaError: as `check_parts`.
        """
        import polars as pl

        self.fetch()
        self.verify()
        if not self.files():
            raise ArtifactDamaged(f"{self.path} holds no rows: expected Parquet parts; name another dataset")
        _check_parts(self.path, self.manifest.digest)
        return pl.scan_parquet(self.files(), glob=False)

    def read(self) -> "pl.DataFrame":
        """Return all rows; see `scan`. Read-only."""
        return self.scan().collect()

    def verify(self) -> None:
        """Compare every file that is here with the manifest, once in this process. Read-only.

        Raises:
            ArtifactDamaged: naming the first file that differs.
        """
        _verify(self.path, self.manifest.digest)

    def check_parts(self) -> None:
        """Check what the footers of the parts say before a row is decoded. Read-only.

        Raises:
            ArtifactDamaged: when a footer cannot be read, or its rows are not as many as the manifest says.
            ArtifactTooLarge: when the rows would fill the memory although the files are small.
            SchemaError: when a column has another type than the documented one.
        """
        from pipeline.parquet import check_parts
        from pipeline.schema import SCHEMAS

        facts = self.manifest.files
        parts = {path: facts[path.relative_to(self.path).as_posix()]["rows"] for path in self.files()}
        check_parts(parts, SCHEMAS.get(self.manifest.dataset))

    def check_schema(self, schemas: "Mapping[str, pa.Schema] | None" = None) -> None:
        """Compare the columns of the artifact's rows, if it has any, with the documented schema. Read-only.

        Raises:
            ArtifactDamaged: when a footer cannot be read.
            SchemaError: when they differ, for example because another version of the program wrote them.
        """
        import pyarrow.parquet as pq

        from pipeline.conformance import check_schema
        from pipeline.parquet import explained
        from pipeline.schema import SCHEMAS

        for path in self.files():
            with explained(path):
                found = pq.read_schema(path)
            check_schema(found, self.manifest.dataset, path, schemas or SCHEMAS)

    def check_sizes(self, *, is_read: bool = True) -> None:
        """Compare every file's size with the manifest: the cheap part of `verify`. Read-only.

        A file that was dropped on purpose is an error only if the artifact will be read (``is_read``).

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
                    f"{path} was dropped by `grpo prune` or [retention], and is needed now: restore it from a copy, or "
                    f"{_again(self.path)}"
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
        values = read_json(path / MANIFEST, _remedy(path))
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactMissing(
            f"{path} has no {MANIFEST}: the stage that writes it has not finished; run it (again)"
        ) from None
    version = values.get("manifest_version", MANIFEST_VERSION)
    if version != MANIFEST_VERSION:
        raise ArtifactDamaged(
            f"{path / MANIFEST} has manifest_version {shorten(version)}, this program reads {MANIFEST_VERSION}: use "
            "the version of the program that wrote it, or run its config again in a new directory"
        )
    try:
        return Artifact(path, parse_manifest(values))
    except ValueError as error:
        raise ArtifactDamaged(f"{path / MANIFEST} is not a valid manifest ({error}): {_remedy(path)}") from error


@cache
def _verify(path: Path, digest: str) -> None:
    artifact = open_artifact(path)
    artifact.check_sizes()
    for name, facts in artifact.manifest.files.items():
        if (path / name).is_file() and (wrong := wrong_bytes(path / name, facts)):  # else on a store, see check_sizes
            raise wrong.as_error(path / name, facts, _remedy(path))


@cache
def _check_parts(path: Path, _: str) -> None:
    open_artifact(path).check_parts()


def store_url(place: Path) -> str | None:
    """Return the URL on an object store where the files of an artifact are; None for a local artifact. Read-only.

    A note counts only in a working copy, and with the URL whose copy the place is: in a run that was handed over it is
    a file like any other.
    """
    note = place / STORE_NOTE
    if not note.is_file() or (url := url_of(place)) is None:
        return None
    noted = read_json(note, f"delete {place}, the working copy of {url}").get("url")
    return url if noted == url else None


def _remedy(path: Path) -> str:
    if url := store_url(path):
        return (
            f"delete {path}, the working copy of {url}, and run the same command, which brings it again; if it is "
            "damaged there too, delete everything below that URL, and it is made again"
        )
    return (
        f"restore the file from a copy, or delete the directory {path} and run the same command, which makes it again"
    )


def _again(path: Path) -> str:
    """Return what makes a dropped checkpoint again; of an iteration, its run's path is known."""
    index, run = path.parent.name, path.parent.parent.parent
    if not (index.isascii() and index.isdigit() and path.parent.parent.name == "iterations"):
        return "run the config again in a new directory, which computes it again"
    return (
        f"make it again (grpo replay {run} --iteration {int(index)} --stage update --scratch FOLDER) "
        f"and copy it from FOLDER/{index}/{path.name}"
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
        noted = read_json(artifact.path / PRUNED_NOTE, "delete it")["files"]
        return frozenset(
            name
            for name, facts in artifact.manifest.files.items()
            if name.endswith(WEIGHTS) and name in noted and noted[name] == facts["sha256"]
        )
    except (ArtifactDamaged, OSError, TypeError, KeyError):
        return frozenset()  # an unreadable note excuses nothing
