"""Files: atomic writes, locks, hashes, and the one message for a full device.

Nothing here writes through a link or into what stood under a name before: a run can be a stranger's.
"""

import errno
import fcntl
import glob
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import OutOfSpace
from pipeline.reading import open_regular

WRITER_LOCK = ".lock"
"""Lock file of a directory that one process at a time may write."""


def user_path(text: str | Path) -> Path:
    """Return the path that a user wrote in a config or on the command line; ``~`` is the home directory."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 (Path's own raises for a user that does not exist)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open_regular(path) as file:
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
    """Yield a temporary path next to ``path``; on success sync it and rename it, on failure remove it.

    The temporary file is new, under a name that nobody can foresee; those of killed processes are removed.
    """
    with explain_full_device(path), _new_file(path) as temporary:
        try:
            yield temporary
            sync_file(temporary)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """Yield a new, empty file next to ``path``, locked as long as its process lives."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError), locked(left, wait=False):  # no process holds it
            left.unlink()
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if temporary.exists():  # else another process took it, before it was locked, for one left behind
                yield temporary
                return
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a file; the system releases it when the process ends, even when it is killed.

    The file is created if it does not exist; its contents do not change. A link is not followed.

    Raises:
        BlockingIOError: when another process holds it and ``wait`` is false.
        OSError: when it is no regular file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"it is no regular file: {path}")
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock of a file. Read-only."""
    if path.is_symlink() or not path.is_file():
        return False
    with open_regular(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def remove_tree(path: Path) -> None:
    """Remove a file or a directory; of a link the link goes. A missing one is no error."""
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


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
