"""Looks at the processes of this machine, whoever started them."""

import time
from collections.abc import Callable
from pathlib import Path


def until(condition: Callable[[], object], seconds: float = 120.0) -> bool:
    """Wait for a condition; return whether it came true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def is_alive(pid: int) -> bool:
    """Return whether a process has not ended; one that nobody has reaped yet has."""
    fields = _stat(pid)
    return fields is not None and fields[0] not in ("Z", "X")


def survivors(*pids: int, seconds: float = 120.0) -> list[int]:
    """Return those of the processes that do not end in time.

    The kernel takes some time to end a process that it was told to kill.
    """
    until(lambda: not any(map(is_alive, pids)), seconds)
    return [pid for pid in pids if is_alive(pid)]


def descendants(pid: int, spared: int | None = None) -> list[int]:
    """Return the ids of all processes below one, less ``spared`` and all below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        if (fields := _stat(int(entry.name))) is not None:
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid]
    for parent in found:
        found += [child for child in children.get(parent, []) if child != spared]
    return found[1:]


def _stat(pid: int) -> list[str] | None:
    """Return what the kernel says of a process from its state on; None when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
