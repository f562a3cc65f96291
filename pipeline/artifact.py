"""Artifacts: a directory of Parquet parts, or a checkpoint, plus `manifest.json`, which is written last.

An artifact is written in a hidden directory beside its place. Every part is renamed into it when it is whole, so a
killed process leaves finished parts that the next one keeps. Sealing writes the manifest and renames the directory:
a directory without a manifest is debris, and a finished artifact never changes.

Three hashes: ``recipe`` says what should be computed, ``content`` what came out (names and bytes), ``digest`` both. A
recipe holds the digests of the inputs, so digests form a Merkle chain: the digest of the last policy vouches for every
row before it.
"""

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ArtifactDamaged, ArtifactMissing
from pipeline.storage import atomic_write, explain_full_device, sha256_file, sha256_text, sync_file, write_text

if TYPE_CHECKING:
    import polars as pl

MANIFEST_VERSION = 1
MANIFEST = "manifest.json"
RECIPE_NOTE = "recipe"
STORE_NOTE = ".store.json"
"""In an artifact of a working copy: its URL on the object store, where the files are that are not here."""
PARTS = "part-*.parquet"
ROW_GROUP_ROWS = 65_536
HASH_THREADS = 2
"""Files hashed and synced at once when an artifact is sealed."""


def canonical_json(value: object) -> str:
    """Return JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `manifest.json` holds."""

    manifest_version: int
    stage: str
    stage_version: int
    dataset: str
    """Name of the schema; ``policy`` or ``optimizer`` for a checkpoint."""
    config: dict[str, Any]
    """The stage's resolved configuration and parameters (seed, iteration, hashes of user code)."""
    inputs: dict[str, dict[str, str]]
    """Name -> path relative to this artifact, and digest."""
    files: dict[str, dict[str, Any]]
    """Name -> rows (null for files that hold no rows), bytes, sha256."""
    rows: int | None
    drops: dict[str, int]
    """Rows that stand in the data with a drop_reason, counted by reason."""
    environment: dict[str, Any]
    started_at: str
    seconds: float
    recipe: str
    content: str
    digest: str

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


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
        """Whether it lies on an object store too; then files may be missing here until they are read."""
        return (self.path / STORE_NOTE).is_file()

    def fetch(self) -> Path:
        """Return the directory with every file in it; those that are on an object store only are brought and verified.

        Raises:
            ArtifactDamaged: naming the first object that is not what the manifest says.
        """
        if self.is_on_store:
            from pipeline.working_copy import fetch_files

            fetch_files(self)
        return self.path

    def scan(self) -> "pl.LazyFrame":
        """Return all rows, lazily, after verifying the bytes once in this process. Read-only."""
        import polars as pl

        self.fetch()
        self.verify()
        return pl.scan_parquet(self.files())

    def read(self) -> "pl.DataFrame":
        """Return all rows after verifying the bytes once in this process. Read-only."""
        return self.scan().collect()

    def verify(self) -> None:
        """Compare every file that is here with the manifest, once in this process. Read-only.

        Raises:
            ArtifactDamaged: naming the first file that differs.
        """
        _verify(self.path, self.manifest.digest)

    def check_schema(self) -> None:
        """Compare the columns of the rows, if it holds rows, with the documented schema. Read-only.

        Raises:
            SchemaError: when another version of the program has written them.
        """
        import pyarrow.parquet as pq

        from pipeline.conformance import check_schema

        for path in self.files():
            check_schema(pq.read_schema(path), self.manifest.dataset, path)

    def check_sizes(self, *, is_read: bool = True) -> None:
        """Compare every file's size with the manifest: the cheap part of `verify`. Read-only.

        A file that `grpo prune` dropped is missed only where the artifact is going to be read.

        Raises:
            ArtifactMissing: when a file that is needed was pruned.
            ArtifactDamaged: naming the first file that differs.
        """
        from pipeline.retention import pruned_files

        for name, facts in self.manifest.files.items():
            path = self.path / name
            if not path.is_file() and self.is_on_store:
                continue  # verified when it comes
            if not path.is_file() and name in pruned_files(self):
                if not is_read:
                    continue
                raise ArtifactMissing(
                    f"{path} was dropped by `grpo prune`, and is needed now: restore it from a copy, or run the config "
                    "again in a new directory, which computes it again"
                )
            if not path.is_file():
                raise ArtifactDamaged(f"{path} is gone, but {self.path / MANIFEST} lists it: {_remedy(self.path)}")
            if path.stat().st_size != facts["bytes"]:
                raise ArtifactDamaged(
                    f"{path} has {path.stat().st_size:,} bytes, its manifest says {facts['bytes']:,}: "
                    f"{_remedy(self.path)}"
                )


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
        manifest = Manifest(**json.loads(data))
        if manifest.manifest_version != MANIFEST_VERSION:
            raise ValueError(f"manifest_version is {manifest.manifest_version}, this program reads {MANIFEST_VERSION}")
        content = content_hash(manifest.dataset, manifest.files)
        if (content, digest_of(manifest.recipe, content)) != (manifest.content, manifest.digest):
            raise ValueError("its file hashes do not add up to its digest")
        inputs = {name: found["digest"] for name, found in manifest.inputs.items()}
        if recipe_hash(manifest.stage, manifest.stage_version, manifest.config, inputs) != manifest.recipe:
            raise ValueError("its config and inputs do not add up to its recipe")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactDamaged(f"{path / MANIFEST} is not a valid manifest ({error}): {_remedy(path)}") from error
    return Artifact(path, manifest)


def remove_artifact(place: Path) -> None:
    """Remove an artifact such that a kill in between leaves no half one under its name."""
    doomed = doomed_directory(place)
    shutil.rmtree(doomed, ignore_errors=True)
    place.rename(doomed)
    shutil.rmtree(doomed)


def doomed_directory(place: Path) -> Path:
    """Return where an artifact goes that is being removed; debris unless a process is at it."""
    return place.with_name(f".{place.name}.doomed")


def is_finished(path: Path) -> bool:
    """Return whether a finished artifact stands at ``path``. Read-only."""
    return (path / MANIFEST).is_file()


def recipe_hash(stage: str, version: int, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Return the hash of what should be computed; ``inputs`` are names and digests."""
    parts = {"stage": stage, "version": version, "config": dict(config), "inputs": dict(inputs)}
    return sha256_text(canonical_json(parts))


def content_hash(dataset: str, files: dict[str, dict[str, Any]]) -> str:
    """Return the hash of what came out: the kind of data and every file's name and bytes."""
    return sha256_text(canonical_json([dataset, {name: facts["sha256"] for name, facts in files.items()}]))


def digest_of(recipe: str, content: str) -> str:
    """Return the hash that vouches for an artifact and for everything it was made from."""
    return sha256_text(canonical_json([recipe, content]))


@cache
def _verify(path: Path, digest: str) -> None:
    artifact = open_artifact(path)
    artifact.check_sizes()
    for name, facts in artifact.manifest.files.items():
        if not (path / name).is_file():
            continue  # on an object store, see check_sizes
        found = sha256_file(path / name)
        if found != facts["sha256"]:
            raise ArtifactDamaged(
                f"{path / name} has SHA-256 {found[:16]}..., its manifest says {facts['sha256'][:16]}...: "
                f"bytes were changed after it was written; {_remedy(path)}"
            )


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


@dataclass(slots=True)
class ArtifactWriter:
    """Writes one artifact; see the module's description for what survives a kill.

    A writer whose place holds unfinished parts of the same recipe takes them over.
    """

    place: Path
    dataset: str
    recipe: str
    started: float = field(default_factory=time.time)
    _counts: dict[str, tuple[int, dict[str, int]]] = field(default_factory=dict)
    """Of the parts that this process has written: rows, and rows dropped for each reason."""

    @property
    def directory(self) -> Path:
        """Where files are written until the artifact is sealed."""
        return self.place.with_name(f".{self.place.name}.partial")

    def open(self) -> None:
        """Make the hidden directory; keep finished parts of the same recipe, remove all other debris.

        A directory without manifest in the artifact's place is debris too, such as an interrupted copy leaves.
        """
        note = self.directory / RECIPE_NOTE
        shutil.rmtree(doomed_directory(self.place), ignore_errors=True)
        if self.place.exists() and not is_finished(self.place):
            remove_artifact(self.place)
        with explain_full_device(self.place):
            if not note.is_file() or note.read_text(encoding="utf-8") != self.recipe:
                shutil.rmtree(self.directory, ignore_errors=True)
                self.directory.mkdir(parents=True)
                note.write_text(self.recipe, encoding="utf-8")
            self.drop_unfinished()

    def drop_unfinished(self) -> None:
        """Remove what no later process could go on with: all but finished parts."""
        for path in self.directory.iterdir() if self.directory.is_dir() else ():
            if path.name != RECIPE_NOTE and not fnmatch(path.name, PARTS):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def part_path(self, index: int) -> Path:
        return self.directory / f"part-{index:05d}.parquet"

    def has_part(self, index: int) -> bool:
        """Return whether an earlier process finished this part."""
        return self.part_path(index).is_file()

    def write_part(self, index: int, frame: "pl.DataFrame") -> None:
        """Check rows against the schema and commit them as one part. The bytes depend on the rows alone."""
        import pyarrow.parquet as pq

        from pipeline.conformance import conform

        table = conform(frame, self.dataset)
        with atomic_write(self.part_path(index)) as temporary:
            pq.write_table(
                table, temporary, compression="zstd", row_group_size=ROW_GROUP_ROWS, write_page_checksum=True
            )
        self._counts[self.part_path(index).name] = _drops(frame)

    def _finish_files(self, names: list[str]) -> dict[str, str]:
        """Return the files' hashes, their bytes safe on the device. Parts were synced when they were committed."""
        paths = [self.directory / name for name in names]
        with ThreadPoolExecutor(HASH_THREADS) as threads:
            for path in paths:
                path.chmod(0o644)  # safetensors makes its files private
            synced = [threads.submit(sync_file, path) for path in paths if path.suffix != ".parquet"]
            hashes = dict(zip(names, threads.map(sha256_file, paths), strict=True))
            for future in synced:
                future.result()
        return hashes

    def seal(
        self,
        *,
        stage: str,
        stage_version: int,
        config: dict[str, Any],
        inputs: dict[str, Artifact],
        environment: dict[str, Any],
    ) -> Artifact:
        """Write the manifest, then give the directory its name: from here on the artifact exists."""
        found = (path for path in self.directory.rglob("*") if path.is_file() and path.name != RECIPE_NOTE)
        names = sorted(path.relative_to(self.directory).as_posix() for path in found)
        drops: Counter[str] = Counter()
        files: dict[str, dict[str, Any]] = {}
        with explain_full_device(self.place):
            hashes = self._finish_files(names)
            for name in names:
                path = self.directory / name
                rows = None
                if name.endswith(".parquet"):
                    rows, reasons = self._counts.get(name) or _count(path)
                    drops.update(reasons)
                files[name] = {"rows": rows, "bytes": path.stat().st_size, "sha256": hashes[name]}
            content = content_hash(self.dataset, files)
            manifest = Manifest(
                manifest_version=MANIFEST_VERSION,
                stage=stage,
                stage_version=stage_version,
                dataset=self.dataset,
                config=config,
                inputs={n: {"path": _relative(a.path, self.place), "digest": a.digest} for n, a in inputs.items()},
                files=files,
                rows=sum(f["rows"] for f in files.values())
                if any(f["rows"] is not None for f in files.values())
                else None,
                drops=dict(sorted(drops.items())),
                environment=environment,
                started_at=datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds"),
                seconds=round(time.time() - self.started, 3),
                recipe=self.recipe,
                content=content,
                digest=digest_of(self.recipe, content),
            )
            write_text(self.directory / MANIFEST, manifest.to_json())
            (self.directory / RECIPE_NOTE).unlink()
            # All bytes are on the device. The rename itself may go with the power; then the artifact is made again.
            self.directory.rename(self.place)
        return Artifact(self.place, manifest)


def _count(path: Path) -> tuple[int, dict[str, int]]:
    """Return the number of rows of a part and, where it has a drop_reason, the number dropped for each reason."""
    import polars as pl
    import pyarrow.parquet as pq

    columns = [name for name in pq.read_schema(path).names if name == "drop_reason"]
    if not columns:
        return pq.read_metadata(path).num_rows, {}
    return _drops(pl.read_parquet(path, columns=columns))


def _drops(frame: "pl.DataFrame") -> tuple[int, dict[str, int]]:
    if "drop_reason" not in frame.columns:
        return len(frame), {}
    return len(frame), Counter(frame["drop_reason"].drop_nulls().to_list())


def _relative(target: Path, start: Path) -> str:
    return Path(os.path.relpath(target.resolve(), start.resolve())).as_posix()
