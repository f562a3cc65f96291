"""Whether the data that a schedule waits for has changed since its last run that worked. Content decides, not time."""

import glob
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from flows.schedule.spec import Job, When
from pipeline.errors import SourceError
from pipeline.files import sha256_file

Contents = Mapping[str, str]
"""Name of a file -> SHA-256 of its bytes."""
Data = Mapping[str, Contents]
"""Condition and pattern, such as ``changed rewards/close.py`` -> what it matches."""
NAMES_SHOWN = 3


def look(when: When, folder: Path) -> dict[str, dict[str, str]]:
    """Return what the patterns of a condition match now. Read-only, but for copies of files on stores.

    Raises:
        SourceError: when a pattern of ``changed`` matches no file.
        StoreError: when a store cannot be read.
    """
    changed = {pattern: _contents(pattern, folder) for pattern in when.changed}
    empty = next((pattern for pattern, found in changed.items() if not found), None)
    if empty is not None:
        raise SourceError(
            f"when.changed names {empty}, and {folder} has no such file: write it there, or correct the path of the "
            "schedule"
        )
    return {
        **{f"changed {pattern}": found for pattern, found in changed.items()},
        **{f"new_rows {pattern}": _contents(pattern, folder, with_rows=True) for pattern in when.new_rows},
    }


def reason(job: Job, now: Data, before: Data | None) -> tuple[bool, str]:
    """Return whether a schedule runs, and why or why not; ``before`` is what its last run that worked has seen."""
    if job.when is None:
        return True, "each firing runs"
    if before is None:
        return True, "first run: no earlier one has worked"
    causes = [cause for condition in now if (cause := _cause(condition, now[condition], before.get(condition)))]
    if causes:
        return True, "; ".join(causes)
    return False, f"nothing changed since the last run that worked: {', '.join(now)}"


def _cause(condition: str, now: Contents, before: Contents | None) -> str | None:
    """Return what changed, None when nothing did."""
    if before is None:
        return f"new condition: {condition}"
    if condition.startswith("new_rows "):
        known = set(before.values())
        new = [name for name, digest in now.items() if digest not in known]
        return f"new rows in {_some(new)}" if new else None
    changed = sorted(name for name in {*now, *before} if now.get(name) != before.get(name))
    return f"{_some(changed)} changed" if changed else None


def _some(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _contents(pattern: str, folder: Path, *, with_rows: bool = False) -> dict[str, str]:
    """Return the files that a pattern matches; ``with_rows``: less those without a row."""
    files = _on_store(pattern) if "://" in pattern else _on_disk(pattern, folder)
    return {name: sha256_file(path) for name, path in files.items() if not with_rows or _has_rows(path)}


def _on_disk(pattern: str, folder: Path) -> dict[str, Path]:
    # relative to a folder, and with links followed: Path.glob has neither for an absolute pattern
    names = sorted(glob.glob(str(Path(pattern).expanduser()), root_dir=folder, recursive=True))  # noqa: PTH207
    return {name: folder / name for name in names if (folder / name).is_file()}


def _on_store(pattern: str) -> dict[str, Path]:
    """Return the working copies of the objects; one that is as it was is not downloaded again."""
    from pipeline.object_store import download_file, open_store

    place, _, wanted = pattern.rpartition("/")
    if glob.has_magic(place):
        raise SourceError(f"{pattern} has a wildcard in a folder's name: expected one in the last part of a URL alone")
    names = sorted(name for name in open_store(place).listing() if "/" not in name and fnmatchcase(name, wanted))
    return {f"{place}/{name}": download_file(f"{place}/{name}") for name in names}


def _has_rows(path: Path) -> bool:
    if path.suffix != ".parquet":
        return path.stat().st_size > 0
    from pyarrow.parquet import read_metadata

    from pipeline.parquet import explained

    with explained(path, "a schedule waits for its rows; write it anew"):
        return bool(read_metadata(path).num_rows)
