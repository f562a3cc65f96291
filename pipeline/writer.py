"""Writing an artifact: parts first, the manifest last, then one rename.

An artifact is written in a hidden directory next to its place. Every part is renamed into it when complete, so a
killed process leaves finished parts that the next one keeps. Sealing writes the manifest and renames the directory.
"""

import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import Artifact
from pipeline.files import atomic_write, explain_full_device, remove_tree, sha256_file, sync_file, write_text
from pipeline.manifest import MANIFEST, MANIFEST_VERSION, Manifest, content_hash, digest_of, is_finished
from pipeline.reading import read_limited

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa


RECIPE_NOTE = "recipe"
PARTS = "part-*.parquet"
ROW_GROUP_ROWS = 65_536
HASH_THREADS = 2
"""Files hashed and synced at once when an artifact is sealed."""


def remove_artifact(place: Path) -> None:
    """Remove an artifact; a kill in between leaves no half of it under its name. Of a link, the link goes."""
    doomed = doomed_directory(place)
    remove_tree(doomed)
    place.rename(doomed)
    remove_tree(doomed)


def doomed_directory(place: Path) -> Path:
    """Return where an artifact is moved before it is deleted; debris unless a process is deleting it."""
    return place.with_name(f".{place.name}.doomed")


@dataclass(slots=True)
class ArtifactWriter:
    """Writes one artifact; see the module's description for what survives a kill.

    A writer keeps the finished parts that an earlier process with the same recipe left.
    """

    place: Path
    dataset: str
    recipe: str
    schema: "pa.Schema | None" = None
    """Schema of its rows; None = that of `pipeline.schema`."""
    started: float = field(default_factory=time.time)
    started_clock: float = field(default_factory=time.monotonic)
    """The same by the clock that nobody sets: what took how long is read from it."""
    _counts: dict[str, tuple[int, dict[str, int]]] = field(default_factory=dict)
    """Part written by this process -> its rows, and its dropped rows by reason."""

    @property
    def directory(self) -> Path:
        """Where files are written until the artifact is sealed."""
        return self.place.with_name(f".{self.place.name}.partial")

    def open(self) -> None:
        """Make the hidden directory; keep finished parts of the same recipe, remove all other debris.

        A directory without a manifest in the artifact's place is debris too: an interrupted copy leaves one.
        """
        note = self.directory / RECIPE_NOTE
        remove_tree(doomed_directory(self.place))
        if self.place.exists() and not is_finished(self.place):
            remove_artifact(self.place)
        with explain_full_device(self.place):
            if not self._is_ours(note):
                remove_tree(self.directory)
                self.directory.mkdir(parents=True)
                note.write_text(self.recipe, encoding="utf-8")
            self.drop_unfinished()

    def _is_ours(self, note: Path) -> bool:
        """Return whether the hidden directory holds parts of this recipe, and is no link to another one."""
        if self.directory.is_symlink() or note.is_symlink() or not note.is_file():
            return False
        try:
            return read_limited(note, len(self.recipe)) == self.recipe.encode()
        except (OSError, ValueError):
            return False

    def drop_unfinished(self) -> None:
        """Remove everything that no later process can use: all but finished parts."""
        for path in self.directory.iterdir() if self.directory.is_dir() else ():
            if path.is_symlink() or (path.name != RECIPE_NOTE and not fnmatch(path.name, PARTS)):
                remove_tree(path)

    def part_path(self, index: int) -> Path:
        return self.directory / f"part-{index:05d}.parquet"

    def has_part(self, index: int) -> bool:
        """Return whether an earlier process finished this part."""
        return self.part_path(index).is_file()

    def write_part(self, index: int, frame: "pl.DataFrame") -> None:
        """Check rows against the schema and commit them as one part. The bytes depend on the rows alone."""
        import pyarrow.parquet as pq

        from pipeline.conformance import conform

        table = conform(frame, self.dataset, self.schema)
        with atomic_write(self.part_path(index)) as temporary:
            pq.write_table(
                table, temporary, compression="zstd", row_group_size=ROW_GROUP_ROWS, write_page_checksum=True
            )
        self._counts[self.part_path(index).name] = _drops(frame)

    def _finish_files(self, names: list[str]) -> dict[str, str]:
        """Sync the files and return their hashes. Parts were synced when they were committed."""
        paths = [self.directory / name for name in names]
        mode = (self.directory / RECIPE_NOTE).stat().st_mode & 0o666  # the user's umask has decided it
        with ThreadPoolExecutor(HASH_THREADS) as threads:
            for path in paths:
                path.chmod(mode)  # safetensors makes its files private
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
        chosen: dict[str, Any],
        inputs: dict[str, Artifact],
        environment: dict[str, Any],
    ) -> Artifact:
        """Write the manifest, then give the directory its name: now the artifact exists."""
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
                chosen=chosen,
                inputs={n: {"path": _relative(a.path, self.place), "digest": a.digest} for n, a in inputs.items()},
                files=files,
                rows=sum(f["rows"] for f in files.values())
                if any(f["rows"] is not None for f in files.values())
                else None,
                drops=dict(sorted(drops.items())),
                environment=environment,
                started_at=datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds"),
                seconds=round(time.monotonic() - self.started_clock, 3),
                recipe=self.recipe,
                content=content,
                digest=digest_of(self.recipe, content),
            )
            write_text(self.directory / MANIFEST, manifest.to_json())
            (self.directory / RECIPE_NOTE).unlink()
            # All bytes are on the device. A power failure may undo the rename; then the artifact is made again.
            self.directory.rename(self.place)
        return Artifact(self.place, manifest)


def _count(path: Path) -> tuple[int, dict[str, int]]:
    """Return the number of rows of a part and, where it has a drop_reason, the number dropped for each reason."""
    import polars as pl
    import pyarrow.parquet as pq

    columns = [name for name in pq.read_schema(path).names if name == "drop_reason"]
    if not columns:
        return pq.read_metadata(path).num_rows, {}
    return _drops(pl.read_parquet(path, columns=columns, glob=False))


def _drops(frame: "pl.DataFrame") -> tuple[int, dict[str, int]]:
    if "drop_reason" not in frame.columns:
        return len(frame), {}
    return len(frame), Counter(frame["drop_reason"].drop_nulls().to_list())


def _relative(target: Path, start: Path) -> str:
    return Path(os.path.relpath(target.resolve(), start.resolve())).as_posix()
