"""Ways to attack a sandbox, for its tests."""

import textwrap
from pathlib import Path

import pytest

from stages.rewards.code.sandbox import Isolation, Limits, Run, Sandbox, python

NO_SUCH_FILE = "FileNotFoundError"


def attack(
    program: str,
    *arguments: object,
    limits: Limits | None = None,
    isolation: Isolation = "full",
    interpreter: str = "",
    stdin: str = "",
) -> Run:
    """Run a Python program in a sandbox of its own."""
    command = [interpreter or python(), "-s", "-P", "-B", "program.py", *map(str, arguments)]
    with Sandbox(limits or Limits(seconds=100), isolation) as sandbox:
        return sandbox.run(command, {"program.py": textwrap.dedent(program)}, stdin)


def tried(*lines: str, **values: object) -> list[str]:
    """Return, for each line of a program, "done" or the exception's name."""
    tries = "".join(
        f"try:\n    {line}\n    print('done')\nexcept Exception as error:\n    print(type(error).__name__)\n"
        for line in lines
    )
    given = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    run = attack("import ctypes, os, signal, socket, subprocess\n" + given + tries)
    assert run.exit_code == 0, run.stderr
    return run.stdout.split()


def processes_with(marker: str) -> list[int]:
    """Return the ids of the processes of this machine that have the marker in their command line."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (place / "cmdline").read_bytes():
                found.append(int(place.name))
        except OSError:  # it has ended
            continue
    return found


def reachable_python() -> str:
    """Return an interpreter that every user of this machine may run."""
    for place in (python(), "/usr/bin/python3", "/usr/local/bin/python3"):
        parents = Path(place).resolve().parents
        if Path(place).exists() and all(parent.stat().st_mode & 0o001 for parent in parents):
            return place
    pytest.skip("needs an interpreter that other users of this machine may run")
