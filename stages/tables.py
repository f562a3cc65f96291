"""Tables that users bring: JSON lines, Parquet, CSV."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.errors import RewardError, SourceError

FILE_SUFFIXES = (".jsonl", ".parquet", ".csv")
UNREADABLE = (pl.exceptions.PolarsError, OSError, UnicodeDecodeError)
"""What reading a file raises that is none of its kind."""


def file_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a local file, each with its place for errors. CSV cells stay text: 007 is not 7.

    Raises:
        SourceError: when the file or a row of it cannot be read.
    """
    try:
        if path.suffix == ".jsonl":
            yield from _json_lines(path)
            return
        table = _parquet_or_csv(path, may_be_empty=True)
    except UNREADABLE as error:
        raise SourceError(f"{path} cannot be read as {path.suffix} ({error}): repair or convert it") from error
    for number, record in enumerate(table.iter_rows(named=True), start=1):
        yield f"row {number} of {path}", record


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"line {number} of {path}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SourceError(f"{where} is not JSON ({error}): repair it") from error
            if not isinstance(record, dict):
                raise SourceError(f"{where} is not a JSON object: expected one row a line")
            if "\\u" in line and not _is_unicode(record):
                raise SourceError(
                    f"{where} has half of a surrogate pair, such as \\ud83d alone, which no file can hold as text: "
                    "expected whole characters; write the text again"
                )
            yield where, record


def _is_unicode(record: dict[str, Any]) -> bool:
    """Return whether every text is made of characters that UTF-8 can write."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_table(path: Path) -> pl.DataFrame:
    """Return the rows of a .jsonl, .csv or .parquet file; CSV cells stay text: an id is no number. Read-only.

    Raises:
        RewardError: when it does not exist, cannot be read, or is of another kind.
    """
    try:
        if path.suffix == ".jsonl":
            with path.open("rb") as opened:  # a path would be read as a pattern
                return pl.read_ndjson(opened, infer_schema_length=None)
        if path.suffix in FILE_SUFFIXES:
            return _parquet_or_csv(path, may_be_empty=False)
    except UNREADABLE as error:
        raise RewardError(f"{path} cannot be read as {path.suffix} ({error}): correct the path, or the file") from error
    raise RewardError(f"{path} ends in {path.suffix!r}: expected .jsonl, .csv or .parquet; convert it")


def _parquet_or_csv(path: Path, *, may_be_empty: bool) -> pl.DataFrame:
    """Return the rows of a file of one of these kinds; a path is no pattern, and CSV cells stay text: 007 is not 7."""
    if path.suffix == ".parquet":
        return pl.read_parquet(path, glob=False)
    return pl.read_csv(path, glob=False, infer_schema=False, raise_if_empty=not may_be_empty)


def require_columns(rows: pl.DataFrame, path: Path, needed: Iterable[str]) -> None:
    """Raise RewardError when the file lacks columns."""
    missing = [name for name in needed if name not in rows.columns]
    if missing:
        raise RewardError(f"{path} has the columns {rows.columns}: expected also {missing}; rename or add them")
