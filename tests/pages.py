"""The commands that a page of the documentation shows."""

import re
import shlex
from pathlib import Path
from typing import Any

import typer

from flows.app import COMMANDS, build_app

DOCS = Path(__file__).parent.parent / "docs"


def commands_of(page: str) -> list[str]:
    """Return what a page says after ``$ grpo``, line by line."""
    return re.findall(r"^    \$ grpo (.*)$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)


def parse(line: str) -> None:
    """Parse a command line without running it; an unknown command, option or value raises."""
    words = shlex.split(line)
    command: Any = typer.main.get_command(build_app(COMMANDS))
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context(line, words)
