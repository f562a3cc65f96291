"""Reading what a stranger may have written: plain names, regular files only, JSON within limits.

A run that was handed over is data. Its names lead nowhere but below the folder that they belong to, and looking at it
neither waits for a pipe nor fills the memory.
"""

import gc
import json
import math
import os
import re
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from pipeline.errors import ArtifactDamaged

JSON_BYTES = 8 << 20
"""Size of the largest JSON file that is read: the manifest of an artifact of 40,000 files."""
JSON_DEPTH = 64
"""Deepest nesting that is read; json, repr and comparisons recurse, and Python gives up at about 1,000."""
NAME_BYTES = 255
"""Longest part of a path that file systems take."""
DRIVE = re.compile(r"[A-Za-z]:($|[/\\])")


def is_plain(name: object) -> bool:
    """Return whether a name is a plain path below a folder: relative, with slashes, and nothing that leads out."""
    if not isinstance(name, str) or not name.isprintable() or "\\" in name or DRIVE.match(name):
        return False
    return all(0 < len(part.encode()) <= NAME_BYTES and part not in (".", "..") for part in name.split("/"))


def inside(folder: Path, name: str) -> Path:
    """Return the place of a name below a folder, to be written or deleted: no link may stand on the way. Read-only.

    Raises:
        ArtifactDamaged: when the name or a link leads elsewhere.
    """
    place = folder / name
    if not is_plain(name) or resolved(place) != resolved(folder) / name:
        raise ArtifactDamaged(
            f"{name!r} leads out of {folder}, or over a link: expected a plain path below it; nothing was written or "
            "deleted there: remove the link, or do not trust who made this"
        )
    return place


def resolved(path: Path) -> Path:
    """Return where a path leads; unlike `Path.resolve` it does not raise on a circle of links."""
    return Path(os.path.realpath(path))


def open_regular(path: Path) -> BufferedReader:
    """Return a regular file, opened for reading; it neither waits for a pipe nor reads a device.

    Raises:
        OSError: when it does not exist, cannot be opened, or is of another kind.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"it is no regular file: {path}")
    return os.fdopen(descriptor, "rb")


def read_limited(path: Path, most_bytes: int = JSON_BYTES) -> bytes:
    """Return the bytes of a regular file. Read-only.

    Raises:
        OSError: as `open_regular`.
        ValueError: when it is larger.
    """
    with open_regular(path) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"it has more than {most_bytes:,} bytes")
    return data


def parse_json(data: bytes) -> Any:
    """Return what JSON holds: at most `JSON_DEPTH` deep, with texts that UTF-8 can hold and numbers that are finite.

    Raises:
        ValueError: when it is anything else.
    """
    found = loads(data, is_strict=True)
    level, depth = [found], 0
    while level:
        if depth > JSON_DEPTH:
            raise ValueError(f"it is nested deeper than {JSON_DEPTH} levels")
        for value in level:
            for text in value if isinstance(value, dict) else (value,) if isinstance(value, str) else ():
                text.encode()  # a lone surrogate cannot be hashed or printed
        level = [
            item
            for value in level
            if isinstance(value, list | dict)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        depth += 1
    return found


def loads(data: bytes, *, is_strict: bool = False) -> Any:
    """Return what JSON holds, whatever its depth; ``is_strict`` refuses NaN, Infinity and what rounds to it.

    Raises:
        ValueError: when it is none, or Python cannot hold it.
    """
    was_enabled = gc.isenabled()
    gc.disable()  # it would go through millions of new lists again and again
    try:
        number = _finite if is_strict else None
        return json.loads(data, parse_constant=number, parse_float=number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    finally:
        if was_enabled:
            gc.enable()


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"it holds {text:.20}, expected a finite number")
    return number


def read_json(path: Path, remedy: str, *, kind: type = dict, most_bytes: int = JSON_BYTES) -> Any:
    """Return what a JSON file holds, which is a ``kind``. Read-only.

    Raises:
        FileNotFoundError, NotADirectoryError: when there is no such file.
        ArtifactDamaged: when it cannot be read; the message ends with the remedy.
    """
    try:
        found = parse_json(read_limited(path, most_bytes))
        if not isinstance(found, kind):
            raise ValueError(f"it holds a {type(found).__name__}, expected a {kind.__name__}")
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError) as error:
        raise ArtifactDamaged(f"{path} cannot be read ({error}): {remedy}") from error
    return found


def shorten(value: object) -> str:
    """Return a value as text of at most 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
