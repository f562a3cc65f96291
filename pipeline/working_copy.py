"""The working copy of a run on an object store: downloads manifests and files, and publishes what was made here.

A command that looks or continues begins with `sync`, which downloads an artifact's manifest and writes a note
(`STORE_NOTE`) next to it that says where the files are. A file is downloaded when it is read, and verified by size and
SHA-256 (`fetch_files`, called by `Artifact.fetch`). An artifact made here has no note until it is published: its files
first, its manifest last. A store cannot rename a directory, so the manifest alone makes an artifact exist.

Where the two differ, the store is right. But a whole artifact that the store lacks is kept and published again.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pipeline.artifact import Artifact, open_artifact
from pipeline.errors import ArtifactDamaged, ArtifactMissing, StoreError
from pipeline.files import WRITER_LOCK, atomic_write, is_locked, locked, remove_tree, sha256_file, write_text
from pipeline.manifest import MANIFEST, STORE_NOTE, is_finished
from pipeline.object_store import RECORD_BYTES, Listed, Store, open_store, too_large, url_of
from pipeline.reading import inside, is_plain, parse_json, read_json, read_limited
from pipeline.store_lock import hold, owner_of
from pipeline.writer import remove_artifact

SYNC_LOCK = ".sync.lock"
SEEN = ".seen.json"
"""Fingerprints of downloaded objects, so that they are not downloaded again; may be deleted."""
SEEN_BYTES = 64 << 20
"""Of `SEEN`, which has that size after 80,000 iterations."""


@dataclass(slots=True)
class WorkingCopy:
    """Keeps a run on a store and its directory here in step."""

    store: Store
    is_record: Callable[[str], bool]
    """Whether an object is one of the small files next to artifacts that may change."""
    _sent: dict[str, str] = field(default_factory=dict)
    _check_lock: Callable[[], None] | None = None

    @property
    def root(self) -> Path:
        return self.store.work

    def sync(self) -> None:
        """Download manifests and records that are new on the store. Writes nothing there.

        A process of this machine that writes the run is ahead of the store; then nothing is downloaded.
        """
        listed = self.store.listing()
        if not listed and not self.root.is_dir():
            return
        self.root.mkdir(parents=True, exist_ok=True)
        with locked(self.root / SYNC_LOCK):
            if not is_locked(self.root / WRITER_LOCK):
                self._sync(listed)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the run's lock on the store, after a sync. The caller holds the local lock."""
        with hold(self.store, owner_of(self.root)) as check:
            with locked(self.root / SYNC_LOCK):  # a read-only command may be syncing
                self._sync(self.store.listing())
            self._check_lock = check
            try:
                yield
            finally:
                self._check_lock = None

    def publish(self, places: Iterable[Path], records: Iterable[Path]) -> None:
        """Upload artifacts that were made here, in their order, then records that changed."""
        assert self._check_lock is not None, "publish inside of writing()"
        for place in places:
            if is_finished(place) and not (place / STORE_NOTE).is_file():
                _publish(open_artifact(place), self._url(place), self._check_lock)
        for path in records:
            name = path.relative_to(self.root).as_posix()
            digest = sha256_file(path)
            if self._sent.get(name) != digest:
                self._check_lock()
                self.store.upload(path, name)
                self._sent[name] = digest

    def share(self, artifact: Artifact) -> Artifact:
        """Return an artifact that runs share, such as a starter, as it is on the store: the first published wins."""
        if not (artifact.path / STORE_NOTE).is_file():
            url = self._url(artifact.path)
            found = _remote_manifest(url)
            if found is not None:
                adopt(artifact.path, url, found)
            else:
                _publish(artifact, url, lambda: None)
        return open_artifact(artifact.path)

    def _url(self, place: Path) -> str:
        url = url_of(place)
        assert url is not None
        return url

    def _sync(self, listed: dict[str, Listed]) -> None:
        note = self.root / SEEN
        seen = read_json(note, "delete it", most_bytes=SEEN_BYTES) if note.is_file() else {}
        known = [n for n in listed if PurePosixPath(n).name == MANIFEST or self.is_record(n)]
        if odd := [n for n in known if not is_plain(n)]:
            raise StoreError(
                f"{self.store.url} has the object {odd[0]!r}, expected plain paths: remove it, or do not trust who "
                "wrote there"
            )
        if large := [n for n in known if listed[n].size > RECORD_BYTES]:
            raise StoreError(too_large(f"{self.store.url}/{large[0]}", listed[large[0]].size))
        new = [n for n in known if seen.get(n) != listed[n].fingerprint or not (self.root / n).is_file()]
        for name, data in self.store.read(new).items():
            path = inside(self.root, name)
            if path.name == MANIFEST:
                adopt(path.parent, self._url(path.parent), data)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(path) as temporary:
                    temporary.write_bytes(data)
        self._forget(listed, [n for n in seen if n not in listed and self.is_record(n)])
        write_text(note, json.dumps({n: listed[n].fingerprint for n in known}) + "\n")

    def _forget(self, listed: Collection[str], records: Iterable[str]) -> None:
        """Remove what is no longer on the store; an artifact that is whole here stays, to be published again."""
        for name in records:
            inside(self.root, name).unlink(missing_ok=True)
        for note in sorted(self.root.rglob(STORE_NOTE)):
            place = note.parent
            if (place / MANIFEST).relative_to(self.root).as_posix() not in listed:
                note.unlink()
                if not _is_whole(place):
                    remove_artifact(place)


def bring(url: str) -> Path:
    """Return the working copy of one artifact on a store; its files are downloaded when they are read.

    Raises:
        ArtifactMissing: when there is none.
    """
    store = open_store(url)
    found = _remote_manifest(url)
    if found is None:
        raise ArtifactMissing(f"{url} has no {MANIFEST}: correct the URL, or run what makes it (again)")
    adopt(store.work, store.url, found)
    return store.work


def adopt(place: Path, url: str, manifest: bytes) -> None:
    """Replace the artifact here by the one whose manifest is on the store; an equal one keeps its files."""
    ours = _digest(read_limited(place / MANIFEST, RECORD_BYTES)) if is_finished(place) else None
    theirs = _digest(manifest)
    if ours is not None and theirs is None:
        return  # whole here and damaged there
    note = json.dumps({"url": url}) + "\n"
    if ours is not None and ours == theirs:
        if not (place / STORE_NOTE).is_file():
            write_text(place / STORE_NOTE, note)
        return
    if place.exists():
        remove_artifact(place)
    remove_tree(place.with_name(f".{place.name}.partial"))
    hidden = place.with_name(f".{place.name}.coming")
    remove_tree(hidden)
    hidden.mkdir(parents=True)
    write_text(hidden / STORE_NOTE, note)
    with atomic_write(hidden / MANIFEST) as temporary:
        temporary.write_bytes(manifest)
    hidden.rename(place)


def _publish(artifact: Artifact, url: str, check_lock: Callable[[], None]) -> None:
    """Upload an artifact, its manifest last; the manifest of another one in its place is removed first."""
    store, files = open_store(url), artifact.manifest.files
    check_lock()
    there = _remote_manifest(url)
    if there is None or _digest(there) != artifact.digest:
        if there is not None:
            store.remove([MANIFEST])
        for name in files:
            store.upload(artifact.path / name, name)
        found = store.listing()
        store.remove([name for name in found if name not in files])  # left by an interrupted upload
        wrong = [name for name, facts in files.items() if name not in found or found[name].size != facts["bytes"]]
        if wrong:
            raise StoreError(
                f"{url}/{wrong[0]} is not on the store as it was sent, with {files[wrong[0]]['bytes']:,} bytes: check "
                "the store, then run the same command again, which sends it again"
            )
        check_lock()
        store.upload(artifact.path / MANIFEST, MANIFEST)
    write_text(artifact.path / STORE_NOTE, json.dumps({"url": url}) + "\n")


def _remote_manifest(url: str) -> bytes | None:
    return open_store(url).read_one(MANIFEST)


def _is_whole(place: Path) -> bool:
    """Return whether every file that the manifest lists is here. Read-only."""
    try:
        return all((place / name).is_file() for name in open_artifact(place).manifest.files)
    except ArtifactDamaged:
        return False


def _digest(manifest: bytes) -> str | None:
    """Return the digest that a manifest states, None when it cannot be read."""
    try:
        return str(parse_json(manifest)["digest"])
    except (ValueError, KeyError, TypeError):
        return None
