"""Who writes a directory: a note next to its lock that names process, machine, command and time.

The note is words for the one who is refused. It decides nothing: the lock alone does, and a note without a lock is that
of a killed process.
"""

import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import OutOfSpace
from pipeline.files import write_text
from pipeline.reading import parse_json, read_limited
from pipeline.text import one_line

WRITER_NOTE = ".writer.json"
"""Next to the lock of a directory; removed before the lock is released."""
COMMAND_CHARACTERS = 200
"""Of a command in a note."""
NOTE_BYTES = 8192
"""Size of the largest note that is read."""
KEYS = {"pid": int, "host": str, "since": str, "command": str}
"""What a note has."""


def this_process() -> dict[str, Any]:
    """Return the note of this process; ``since`` is the time of this call."""
    program = Path(sys.argv[0]).name if sys.argv else "python"
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "command": one_line(shlex.join([program, *sys.argv[1:]]))[:COMMAND_CHARACTERS],
    }


@contextmanager
def noted(folder: Path) -> Iterator[None]:
    """Leave the note of this process in a folder whose lock it holds. A full device keeps nobody from the lock."""
    place = folder / WRITER_NOTE
    with suppress(OSError, OutOfSpace):
        write_text(place, json.dumps(this_process()) + "\n")
    try:
        yield
    finally:
        with suppress(OSError):
            place.unlink(missing_ok=True)


def writer_of(folder: Path) -> str:
    """Return who writes a locked folder, for a message: `` (pid 7 on here since ...)``, empty if unknown. Read-only."""
    try:
        note = parse_json(read_limited(folder / WRITER_NOTE, NOTE_BYTES))
    except (OSError, ValueError):
        return ""
    return "" if not is_note(note) or _has_ended(note) else f" ({described(note)})"


def is_note(value: Any) -> bool:
    """Return whether a value that was read is a note."""
    return isinstance(value, dict) and all(type(value.get(key)) is kind for key, kind in KEYS.items())


def described(note: dict[str, Any]) -> str:
    """Return a note in words, each of them visible."""
    text = f"pid {note['pid']} on {note['host']} since {note['since']}: {note['command']}"
    return one_line(text[: 2 * COMMAND_CHARACTERS])


def _has_ended(note: dict[str, Any]) -> bool:
    """Return whether the note's process was one of this machine and is gone: who holds the lock now is still silent."""
    if note["host"] != socket.gethostname():
        return False
    try:
        os.kill(note["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # another user's
        return False
    return False
