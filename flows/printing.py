"""Printing: rows as tables for people, as JSON lines and CSV for programs; numbers, paths and digests."""

import csv
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact


class Format(StrEnum):
    """Output format of a read-only command."""

    table = "table"
    jsonl = "jsonl"
    csv = "csv"


Row = Mapping[str, Any]

LONGEST_CELL = 120
"""Most characters of a value in a table; jsonl and csv print it whole."""
MOST_COLUMNS = 16
"""Wider rows are printed one below the other."""


def print_rows(rows: Iterable[Row], format_: Format, *, columns: Sequence[str] | None = None) -> None:
    """Print rows with the same columns. Read-only.

    A table shortens long values to the width of the terminal; jsonl and csv print every value whole, lists in csv
    as JSON.
    """
    listed = list(rows)
    names = list(columns) if columns else (list(listed[0]) if listed else [])
    if format_ is Format.jsonl:
        for row in listed:
            print(json.dumps({name: row[name] for name in names}, ensure_ascii=False, default=str))
    elif format_ is Format.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_flat(row[name]) for name in names] for row in listed)
    else:
        _print_table(listed, names)


def _print_table(rows: Sequence[Row], names: Sequence[str]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    if len(names) > MOST_COLUMNS:
        _print_records(rows, names)
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in names:
        is_number = bool(rows) and all(isinstance(row[name], int | float | None) for row in rows)
        table.add_column(name, justify="right" if is_number else "left", overflow="ellipsis", no_wrap=True)
    for row in rows:
        # Text, never markup: values come from a model
        table.add_row(*(Text(_short(row[name])) for name in names))
    screen = console()
    if not sys.stdout.isatty():  # a file or a pipe is as wide as it needs to be
        # room for cells and column separators; rich would take as long to measure as to print
        widest = [max(map(cell_len, [name, *(_short(row[name]) for row in rows)])) for name in names]
        screen.width = max(screen.width, sum(widest) + 4 * len(names))
    screen.print(table)


def _print_records(rows: Sequence[Row], names: Sequence[str]) -> None:
    """Print wide rows one below the other, a line for each value."""
    from rich.text import Text

    width = max(len(name) for name in names)
    screen = console()
    for index, row in enumerate(rows):
        screen.print(f"row {index}", style="bold")
        for name in names:
            screen.print(Text(f"  {name:<{width}}  {_short(row[name])}"), overflow="ellipsis", no_wrap=True)


def console() -> Any:
    """Return the terminal, or a wide plain one when the output goes to a file or a pipe."""
    from rich.console import Console

    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, width=160, color_system=None)


def number(value: float | None, spec: str = ".4g") -> str:
    """Return a number as text for a sentence."""
    return "unknown" if value is None else format(value, spec)


def path_below(artifact: Artifact, root: Path) -> str:
    """Return the path of an artifact relative to ``root``."""
    return Path(os.path.relpath(artifact.path.resolve(), root.resolve())).as_posix()


def digest_in(artifact: Artifact, format_: Format) -> str:
    """Return the digest of an artifact; in a table only its beginning."""
    return artifact.digest[:16] if format_ is Format.table else artifact.digest


def _short(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | dict):
        text = json.dumps(value, ensure_ascii=False, default=str)
        return text if len(text) <= 60 else text[:57] + "..."
    text = str(value).replace("\n", "\\n")
    return text if len(text) <= LONGEST_CELL else text[: LONGEST_CELL - 3] + "..."


def _flat(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else value
