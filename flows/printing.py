"""Printing: lines and texts; rows as tables for people, as JSON lines and CSV for programs; numbers, paths, digests.

The only module of the commands that writes to the terminal, so that no text of a run, a model or a file reaches it
but through `pipeline.text`.
"""

import csv
import io
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact
from pipeline.text import escaped, json_text, one_line, visible


class Format(StrEnum):
    """Output format of a read-only command."""

    table = "table"
    jsonl = "jsonl"
    csv = "csv"


Row = Mapping[str, Any]

LONGEST_CELL = 120
"""Most characters of a value in a table; jsonl and csv print it whole."""
LONGEST_LIST = 60
"""Most characters of a list in a table."""
MOST_COLUMNS = 16
"""Wider rows are printed one below the other."""


def say(text: object = "", style: str | None = None) -> None:
    """Print one line; what would break it or steer the terminal stands in it as an escape."""
    if style is None or not sys.stdout.isatty():
        print(one_line(text))
        return
    from rich.text import Text

    _console().print(Text(one_line(text), style=style), soft_wrap=True)


def say_text(text: object, indent: int, style: str = "") -> None:
    """Print a whole text with its own lines, each of them indented, so that none looks like a line of ours."""
    if not sys.stdout.isatty():
        print("\n".join(" " * indent + line for line in visible(text).split("\n")))
        return
    from rich.padding import Padding
    from rich.text import Text

    _console().print(Padding(Text(visible(text), style=style), (0, 0, 0, indent)))


def complain(text: object) -> None:
    """Print a message, which may have several lines, on standard error."""
    print(visible(text), file=sys.stderr)


def show_progress(text: str) -> None:
    """Put a line in the place of the last one on standard error."""
    print(f"\r\x1b[K{one_line(text)}", end="", file=sys.stderr, flush=True)


def print_anything() -> None:
    """Let the standard streams print what their encoding lacks, as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_rows(rows: Iterable[Row], format_: Format, *, columns: Sequence[str] | None = None) -> None:
    """Print rows with the same columns. Read-only.

    A table shortens long values to the width of the terminal; jsonl and csv print every value whole, lists in csv
    as JSON. What steers a terminal is an escape in all of them: in jsonl one of JSON's, so that the value is exact; in
    csv one that `pipeline.text.restored` turns back.
    """
    listed = list(rows)
    names = list(columns) if columns else (list(listed[0]) if listed else [])
    if format_ is Format.jsonl:
        for row in listed:
            print_json({name: row[name] for name in names})
    elif format_ is Format.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow([escaped(name) for name in names])
        writer.writerows([_flat(row[name]) for name in names] for row in listed)
    else:
        is_number = [bool(listed) and all(isinstance(r[n], int | float | None) for r in listed) for n in names]
        _print_table([one_line(n) for n in names], [[_short(row[n]) for n in names] for row in listed], is_number)


def print_json(value: Any) -> None:
    """Print JSON-like values as one line of JSON; what steers a terminal is an escape of JSON's."""
    is_ascii = not (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    print(json_text(value, ensure_ascii=is_ascii))


def _print_table(names: Sequence[str], cells: Sequence[Sequence[str]], is_number: Sequence[bool]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    if len(names) > MOST_COLUMNS:
        _print_records(names, cells)
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name, is_right in zip(names, is_number, strict=True):
        table.add_column(Text(name), justify="right" if is_right else "left", overflow="ellipsis", no_wrap=True)
    for row in cells:
        table.add_row(*map(Text, row))
    screen = _console()
    if not sys.stdout.isatty():  # a file or a pipe is as wide as it needs to be
        # room for cells and column separators; rich would take as long to measure as to print
        widest = [max(map(cell_len, column)) for column in zip(names, *cells, strict=True)]
        screen.width = max(screen.width, sum(widest) + 4 * len(names))
    screen.print(table)


def _print_records(names: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """Print wide rows one below the other, a line for each value."""
    from rich.text import Text

    width = max(map(len, names))
    screen = _console()
    for index, row in enumerate(cells):
        screen.print(Text(f"row {index}", style="bold"))
        for name, cell in zip(names, row, strict=True):
            screen.print(Text(f"  {name:<{width}}  {cell}"), overflow="ellipsis", no_wrap=True)


def _console() -> Any:
    """Return the terminal, or a wide plain one when the output goes to a file or a pipe; it reads no markup."""
    from rich.console import Console

    plain: dict[str, Any] = {} if sys.stdout.isatty() else {"width": 160, "color_system": None}
    return Console(highlight=False, markup=False, emoji=False, **plain)


def number(value: float | None, spec: str = ".4g") -> str:
    """Return a number as text for a sentence."""
    return "unknown" if value is None else format(value, spec)


def spans(numbers: Iterable[int]) -> str:
    """Return numbers as text, those in a row as one span: ``1-4, 7``."""
    parts: list[list[int]] = []
    for value in sorted(numbers):
        if parts and parts[-1][-1] == value - 1:
            parts[-1][1:] = [value]
        else:
            parts.append([value])
    return ", ".join("-".join(map(str, part)) for part in parts)


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
        text, most = json_text(value), LONGEST_LIST
    else:
        text, most = one_line(str(value)[: LONGEST_CELL + 1]), LONGEST_CELL
    return text if len(text) <= most else text[: most - 3] + "..."


def _flat(value: Any) -> Any:
    if isinstance(value, list | dict):
        return json_text(value)
    return value if value is None or isinstance(value, int | float) else escaped(str(value))
