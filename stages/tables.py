"""Tables that users bring: JSON lines, Parquet, CSV."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.errors import RewardError, SourceError

FILE_SUFFIXES = (".jsonl", ".parquet", ".csv")


def file_records(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a local file. CSV cells stay text: 007 is not 7."""
    try:
        if path.suffix == ".parquet":
            return pl.read_parquet(path, glob=False).to_dicts()
        if path.suffix == ".csv":
            return pl.read_csv(path, glob=False, infer_schema=False, raise_if_empty=False).to_dicts()
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read as {path.suffix} ({error}): repair or convert it") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise SourceError(f"line {number} of {path} is not JSON ({error}): repair it") from error
        if record is not None and not isinstance(record, dict):
            raise SourceError(f"line {number} of {path} is not a JSON object: expected one row a line")
        records += [record] if record else []
    return records


def read_table(path: Path) -> pl.DataFrame:
    """Return the rows of a .jsonl, .csv or .parquet file; CSV cells stay text: an id is no number. Read-only.

    Raises:
        RewardError: when it does not exist, cannot be read, or is of another kind.
    """
    try:
        if path.suffix == ".jsonl":
            with path.open("rb") as opened:  # a path would be read as a pattern
                return pl.read_ndjson(opened, infer_schema_length=None)
        if path.suffix == ".csv":
            return pl.read_csv(path, glob=False, infer_schema=False)
        if path.suffix == ".parquet":
            return pl.read_parquet(path, glob=False)
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        raise RewardError(f"{path} cannot be read as {path.suffix} ({error}): correct the path, or the file") from error
    raise RewardError(f"{path} ends in {path.suffix!r}: expected .jsonl, .csv or .parquet; convert it")


def require_columns(rows: pl.DataFrame, path: Path, needed: Iterable[str]) -> None:
    """Raise RewardError when the file lacks columns."""
    missing = [name for name in needed if name not in rows.columns]
    if missing:
        raise RewardError(f"{path} has the columns {rows.columns}: expected also {missing}; rename or add them")
