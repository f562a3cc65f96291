"""Object stores: the objects below a URL, and the place of their working copy on this machine.

Stages, polars and vLLM read local files. So the objects below a URL have a working copy below `work_directory()`, at
the URL's own path (s3://bucket/runs/demo -> s3/bucket/runs/demo): a relative path from one run to another is the same
in both places. fsspec is imported when a URL is first opened: local runs do not pay for it.
"""

import json
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.errors import GrpoError, StoreError, StoreUnreachable, UsageError
from pipeline.files import atomic_write, locked, sha256_text, user_path, write_text
from pipeline.functions import check_permitted
from pipeline.reading import is_plain, read_json, resolved

WORK_VARIABLE = "GRPO_WORK"
PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs",
}  # fmt: skip
"""Protocol -> the package that fsspec needs for it."""
ORIGIN = ".origin.json"
"""Next to downloaded files: the fingerprint of each when it was downloaded."""
OTHER_MACHINE = "lies on another machine"
RECORD_BYTES = 64 << 20
"""Of a manifest or a record that is downloaded."""


def local_path(where: str | Path) -> Path | None:
    """Return the local path that the user named; None for the URL of a store."""
    text = str(where)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return None if "://" in text else user_path(where)


def work_directory() -> Path:
    """Return the folder of all working copies: $GRPO_WORK, else in the user's cache directory."""
    named = os.environ.get(WORK_VARIABLE)
    if named:
        return Path(named).resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve() / "grpo"


def url_of(path: Path) -> str | None:
    """Return the URL whose working copy the path is; None for any other path."""
    with suppress(ValueError):
        protocol, *parts = resolved(path).relative_to(work_directory()).parts
        return f"{protocol}://{'/'.join(parts)}"
    return None


def working_copy_of(url: str) -> Path:
    """Return the place of a URL's working copy, whether it exists or not; sends no request.

    Raises:
        UsageError: when the URL names no place.
    """
    protocol, parts = _parts(url)
    return work_directory() / protocol / "/".join(parts)


@dataclass(frozen=True, slots=True)
class Listed:
    """What a listing says about an object."""

    size: int
    fingerprint: str
    """Hash of everything the store says (tag, time, size); if it differs, the object may have changed."""


@dataclass(frozen=True, slots=True)
class Store:
    """The objects below a URL. Names are relative to it, with slashes."""

    url: str
    fs: Any
    """An fsspec file system."""
    root: str
    """The URL's path in the file system."""

    @property
    def work(self) -> Path:
        """The working copy's directory."""
        return working_copy_of(self.url)

    def listing(self) -> dict[str, Listed]:
        """Return every object by its name. Read-only."""
        with _explained(self.url, "listed"):
            found = self.fs.find(self.root, detail=True)
        return {path[len(self.root) :].lstrip("/"): _listed(info) for path, info in found.items() if path != self.root}

    def folders(self) -> list[str]:
        """Return the names of the folders directly below, in order. Read-only."""
        with _explained(self.url, "listed"):
            found = self.fs.ls(self.root, detail=True)
        return sorted(info["name"].rstrip("/").rpartition("/")[2] for info in found if info["type"] == "directory")

    def find(self, name: str = "") -> Listed | None:
        """Return what the store says about one object, None when there is none. Read-only."""
        with _explained(f"{self.url}/{name}".rstrip("/"), "read"):
            try:
                info = self.fs.info(self._path(name))
            except FileNotFoundError:
                return None
        return _listed(info) if info["type"] == "file" else None

    def read(self, names: Collection[str]) -> dict[str, bytes]:
        """Return the bytes of objects that exist, concurrently where the store supports it. Read-only."""
        if not names:
            return {}
        with _explained(self.url, "read"):
            found = self.fs.cat_ranges([self._path(name) for name in names], None, None, on_error="raise")
        return dict(zip(names, map(bytes, found), strict=True))

    def read_one(self, name: str) -> bytes | None:
        """Return the bytes of a manifest or a record, None when there is none. Read-only.

        Raises:
            StoreError: when it cannot be read, or has more than `RECORD_BYTES`.
        """
        with _explained(f"{self.url}/{name}", "read"), suppress(FileNotFoundError):
            size = self.fs.info(self._path(name))["size"] or 0  # some stores do not say
            if size > RECORD_BYTES:
                raise StoreError(too_large(f"{self.url}/{name}", size))
            return bytes(self.fs.cat_file(self._path(name)))
        return None

    def download(self, name: str, target: Path) -> None:
        """Write an object's bytes into a local file."""
        with _explained(f"{self.url}/{name}".rstrip("/"), "read"):
            self.fs.get_file(self._path(name), str(target))

    def upload(self, source: Path, name: str) -> None:
        """Write a local file's bytes into an object."""
        with _explained(f"{self.url}/{name}", "written"):
            self.fs.put_file(str(source), self._path(name))

    def write(self, name: str, data: bytes) -> None:
        """Write an object; replace one of the same name."""
        with _explained(f"{self.url}/{name}", "written"):
            self.fs.pipe_file(self._path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless it exists; return whether it was written. Atomic where the store supports it."""
        try:
            self.fs.pipe_file(self._path(name), data, mode="create")
        except FileExistsError:
            return False
        except Exception:  # no conditional writes; a store that cannot be written fails again, explained
            if self.find(name) is not None:
                return False
            self.write(name, data)
        return True

    def remove(self, names: Collection[str]) -> None:
        """Remove objects; a missing one is no error."""
        with _explained(self.url, "written"), suppress(FileNotFoundError):
            if names:
                self.fs.rm([self._path(name) for name in names])

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root


def too_large(url: str, size: int) -> str:
    """Return the message for a manifest or a record that is not downloaded."""
    return f"{url} has {size:,} bytes, expected at most {RECORD_BYTES:,}: remove it, or do not trust who wrote there"


def open_store(url: str) -> Store:
    """Return the store at a URL; sends no request yet.

    Raises:
        StoreError: when the protocol is unknown or its package is not installed.
        UsageError: when the URL names no place.
    """
    protocol, parts = _parts(url)
    clean = f"{protocol}://{'/'.join(parts)}"
    with _explained(clean, "opened"):
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        # a cached listing would hide what another machine has written
        fs, root = url_to_fs(clean, use_listings_cache=False)
    return Store(clean, fs, root.rstrip("/"))


def _parts(url: str) -> tuple[str, list[str]]:
    protocol, _, rest = url.partition("://")
    parts = [part for part in rest.split("/") if part]
    if not parts or not re.fullmatch(r"[A-Za-z0-9.+-]*[A-Za-z0-9]", protocol) or not all(map(is_plain, parts)):
        raise UsageError(f"{url} names no place on a store: expected a URL like s3://bucket/runs/demo")
    return protocol, parts


def download_file(url: str) -> Path:
    """Return the working copy of one file; a process checks it once, so that it cannot change during a run.

    Raises:
        StoreError: when it does not exist or cannot be read.
        UntrustedFunction: when only a recorded config names it.
    """
    check_permitted(url, OTHER_MACHINE)
    return _download_file(url, work_directory())


def download_folder(url: str, suffixes: Collection[str]) -> Path:
    """Return the working copy of a folder's direct files with these suffixes; a process checks it once.

    Raises:
        StoreError: when there are none, or they cannot be read.
        UntrustedFunction: when only a recorded config names it.
    """
    check_permitted(url, OTHER_MACHINE)
    return _download_folder(url, tuple(suffixes), work_directory())


@cache
def _download_file(url: str, _: Path) -> Path:
    store = open_store(url)
    found = store.find()
    if found is None:
        raise StoreError(f"{url} does not exist, or is no file: correct the URL, or write the file there")
    _bring(store, store.work.parent, {store.work.name: ("", found)})
    return store.work


@cache
def _download_folder(url: str, suffixes: tuple[str, ...], _: Path) -> Path:
    store = open_store(url)
    wanted = {
        n: (n, found) for n, found in store.listing().items() if "/" not in n and is_plain(n) and n.endswith(suffixes)
    }
    if not wanted:
        raise StoreError(f"{url} has no files that end in {', '.join(suffixes)}: correct the URL, or write them there")
    _bring(store, store.work, wanted)
    for stale in (p for p in store.work.iterdir() if p.name.endswith(suffixes) and p.name not in wanted):
        if stale.name != ORIGIN:
            stale.unlink()
    return store.work


def _bring(store: Store, folder: Path, wanted: dict[str, tuple[str, Listed]]) -> None:
    """Download the objects that a folder lacks, or has in another version than the store."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f"{ORIGIN}.lock"):
        _bring_new(store, folder, wanted)


def _bring_new(store: Store, folder: Path, wanted: dict[str, tuple[str, Listed]]) -> None:
    note = folder / ORIGIN
    known = read_json(note, "delete it") if note.is_file() else {}
    for name, (remote, found) in wanted.items():
        target = folder / name
        here = target.stat().st_size if target.is_file() else -1
        if (here, known.get(name)) == (found.size, found.fingerprint):
            continue
        with atomic_write(target) as temporary:
            store.download(remote, temporary)
            size = temporary.stat().st_size
            if size != found.size:
                raise StoreError(
                    f"{store.url}/{remote}".rstrip("/") + f" gave {size:,} bytes, the store lists {found.size:,}: it "
                    "was written meanwhile, or the connection broke; run the same command again"
                )
        known[name] = found.fingerprint
        write_text(note, json.dumps(known, indent=2) + "\n")


def _listed(info: dict[str, Any]) -> Listed:
    facts = sorted((key, str(value)) for key, value in info.items())
    return Listed(int(info["size"] or 0), sha256_text(repr(facts))[:16])


@contextmanager
def _explained(url: str, doing: str) -> Iterator[None]:
    """Turn whatever a storage client raises into one StoreError that names the URL and what to do."""
    try:
        yield
    except GrpoError:
        raise
    except Exception as error:  # storage clients raise many unrelated classes
        lines = str(error).strip().splitlines() or [type(error).__name__]
        kind, remedy = _remedy(url, error)
        raise kind(f"{url} cannot be {doing} ({lines[0]}): {remedy}") from error


def _remedy(url: str, error: Exception) -> tuple[type[StoreError], str]:
    """Return what an error of a storage client is to a user, and what to do."""
    protocol = url.partition("://")[0]
    name = type(error).__name__
    if isinstance(error, ImportError):
        package = PACKAGES.get(protocol)
        return StoreError, f"pip install {package}" if package else f"install what fsspec needs for {protocol}://"
    if isinstance(error, ValueError) and "rotocol not known" in str(error):
        return StoreError, "expected a protocol that fsspec knows, such as s3://, gs:// or abfs://"
    if isinstance(error, FileNotFoundError):
        return StoreError, "create the bucket, or correct the URL"
    if isinstance(error, PermissionError) or "Credential" in name:
        keys = "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if PACKAGES.get(protocol) == "s3fs" else ""
        return StoreError, f"set credentials that may do so{f' ({keys})' if keys else ''}"
    endpoint = ", and AWS_ENDPOINT_URL for a store that is not Amazon's" if PACKAGES.get(protocol) == "s3fs" else ""
    remedy = f"check the URL, the network{endpoint}; then run the same command again, it goes on where it stopped"
    return StoreUnreachable, remedy
