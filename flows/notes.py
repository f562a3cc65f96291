"""Notes about a run in its logs, of whoever works on it. No result depends on them, and a reader trusts none."""

import json
from typing import Any

from pipeline.files import write_text
from pipeline.reading import parse_json, read_limited
from pipeline.run_dir import RunDir

NOTE_BYTES = 1 << 16


def read(run: RunDir, name: str) -> dict[str, Any]:
    """Return a note; empty when there is none, or none of this run: in a copy it is the original's. Read-only."""
    try:
        found = parse_json(read_limited(run.logs / name, NOTE_BYTES))
        return found if isinstance(found, dict) and found.get("run") == _place(run) else {}
    except (OSError, ValueError):
        return {}


def write(run: RunDir, name: str, fields: dict[str, Any]) -> None:
    """Write a note.

    Raises:
        OSError: when it cannot be written.
    """
    run.logs.mkdir(parents=True, exist_ok=True)
    write_text(run.logs / name, json.dumps({"run": _place(run), **fields}) + "\n")


def _place(run: RunDir) -> str:
    return str(run.root.resolve())  # one run, however its path is written
