"""Files: atomic writes, hashes, and the one message for a full device."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import OutOfSpace

WRITER_LOCK = ".lock"
"""Lock file of a directory that one process at a time may write."""


def user_path(text: str | Path) -> Path:
    """Return the path that a user wrote in a config or on the command line; ``~`` is the home directory."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 (Path's own raises for a user that does not exist)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Return the SHA-256 of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def explain_full_device(path: Path) -> Iterator[None]:
    """Turn "no space left", from any library, into OutOfSpace."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfSpace) or not _is_full_device(error):
            raise
        where = next(p for p in [path, *path.parents] if p.exists())
        free = shutil.disk_usage(where).free
        raise OutOfSpace(
            f"no space left on the device that holds {where} ({free:,} bytes are free): nothing half-written was kept; "
            "make room and run the same command again, it goes on where it stopped"
        ) from error


def _is_full_device(error: BaseException | None) -> bool:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # a chain of causes can be a circle
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # safetensors (Rust) and Arrow (C++) give the system's message but not always its errno
        if "No space left on device" in str(error) or f"[Errno {errno.ENOSPC}]" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; on success sync it and rename it, on failure remove it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with explain_full_device(path):
        try:
            yield temporary
            sync_file(temporary)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a file; the system releases it when the process ends, even when it is killed.

    The file is created if it does not exist; its contents do not change.

    Raises:
        BlockingIOError: when another process holds it and ``wait`` is false.
    """
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock of a file. Read-only."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def sync_file(path: Path) -> None:
    """Wait until the bytes of a file, or the entries of a directory, are on the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def identity(*parts: object) -> str:
    """Return a short opaque id of the parts: 16 hexadecimal digits."""
    return sha256_text("\x1f".join(str(part) for part in parts))[:16]
