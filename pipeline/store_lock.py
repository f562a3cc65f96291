"""The lock of a run on an object store: an object that names its holder, which renews it while it runs.

The lock is a lease, because a machine that died cannot release it. Taking it is atomic where the store can create an
object only if it does not exist (S3 and Google can). Elsewhere it is written and read back, and two processes that
start in the same second may both get it. A holder checks its lock before it publishes. The clocks of two machines must
differ by less than the lease.
"""

import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import StoreError, UsageError
from pipeline.files import write_text
from pipeline.object_store import Store
from pipeline.owner import described, is_note, this_process
from pipeline.reading import parse_json

STORE_LOCK = "lock.json"
LEASE_SECONDS = 120.0
"""After this time without renewal the holder counts as dead."""
RENEW_SECONDS = 20.0
"""Six renewals may fail before the lease ends."""


@contextmanager
def hold(store: Store, owner: str) -> Iterator[Callable[[], None]]:
    """Hold the lock; yield a check to call before anything is published.

    ``owner`` names this working copy: a lock that its own killed process left is taken over at once.

    Raises:
        UsageError: when another working copy holds the lock.
    """
    process = this_process()
    _take(store, owner, process)
    stop = threading.Event()
    thread = threading.Thread(target=_renew, args=(store, owner, process, stop), name="store lock", daemon=True)
    thread.start()
    try:
        yield lambda: _check(store, owner)
    finally:
        stop.set()
        thread.join()
        with suppress(StoreError):  # the lease ends by itself
            if (_read(store) or {}).get("owner") == owner:
                store.remove([STORE_LOCK])


def owner_of(work: Path) -> str:
    """Return the name of a working copy on this machine; it never changes."""
    note = work / ".owner"
    if not note.is_file():
        write_text(note, uuid.uuid4().hex)
    return f"{socket.gethostname()}/{note.read_text(encoding='utf-8')}"


def _take(store: Store, owner: str, process: dict[str, Any]) -> None:
    found = _read(store)
    if found is None:
        store.create(STORE_LOCK, _note(owner, process))  # `_check` sees a process that came first
    elif found["owner"] == owner or time.time() - found["renewed_at"] >= LEASE_SECONDS:
        store.write(STORE_LOCK, _note(owner, process))
    _check(store, owner)


def _check(store: Store, owner: str) -> None:
    found = _read(store)
    if found is None or found["owner"] != owner:
        holder = described(found["process"]) if found else "nobody"
        age = time.time() - found["renewed_at"] if found else 0.0
        raise UsageError(
            f"another process is writing {store.url} ({holder}; seen {age:.0f} seconds ago): wait for it, or give "
            f"this run another place; if it is dead, its lock ends {LEASE_SECONDS:.0f} seconds after it was last seen, "
            f"or when you delete {store.url}/{STORE_LOCK}"
        )


def _renew(store: Store, owner: str, process: dict[str, Any], stop: threading.Event) -> None:
    while not stop.wait(RENEW_SECONDS):
        with suppress(StoreError):  # the network may come back before the lease ends
            if (_read(store) or {}).get("owner") != owner:
                return
            store.write(STORE_LOCK, _note(owner, process))


def _note(owner: str, process: dict[str, Any]) -> bytes:
    return json.dumps({"owner": owner, "process": process, "renewed_at": time.time()}).encode()


def _read(store: Store) -> dict[str, Any] | None:
    data = store.read_one(STORE_LOCK)
    if data is None:
        return None
    try:
        found: dict[str, Any] = parse_json(data)
        is_whole = isinstance(found["owner"], str) and isinstance(found["renewed_at"], int | float)
        if not (is_whole and is_note(found["process"])):
            raise ValueError("it names no owner, process and time")
    except (ValueError, LookupError, TypeError) as error:
        raise StoreError(
            f"{store.url}/{STORE_LOCK} cannot be read ({error}), expected the lock of a writer: delete it if nobody "
            "writes there"
        ) from error
    return found
