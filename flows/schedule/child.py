"""The command of a firing, in a process of its own.

Not a call in the flow's process: a signal there waits for whatever torch is computing, and Prefect kills the process
alone, 30 seconds later, which leaves the engine and the rest of the group behind. The parent of this child is free to
act: it ends the child's group in about `END_SECONDS` and has the device's memory back, and follows the log meanwhile.
"""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

from flows.crash import fail
from flows.environment import DEFAULTS
from flows.printing import print_anything, say
from flows.schedule.spec import Job
from pipeline.processes import end, has_exited, kill_group, start_python, wait_for_exit, when_parent_ends

PROGRAM = "from flows.schedule.child import main; main()"
NOTHING_NEW = 3
"""Exit code: the action found nothing to do."""
POLL_SECONDS = 0.2
END_SECONDS = 6.0
"""For unwinding after SIGTERM: the run's own flow run gets its state. Then the group is killed."""
COMMAND = "$ grpo "
"""Beginning of the line of the log that names the command."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended."""

    exit_code: int
    """Negative: the signal that ended it."""
    command: str
    """What was run, as a user would type it."""
    last_line: str
    """Of its output."""
    is_too_long: bool = False
    """It was ended for its time limit."""


def perform(
    job: Job, due: datetime, log: Path, environment: Mapping[str, str], tell: Callable[[str], None], seconds: float
) -> Outcome:
    """Run a job's command to its end, or for at most so many ``seconds``; tell each line that it prints.

    However this call ends, no process of the command goes on.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    offset = log.stat().st_size if log.exists() else 0
    deadline = time.monotonic() + seconds
    process = start_python(
        ["-P", "-c", PROGRAM, str(os.getpid()), job.model_dump_json(), due.isoformat()],
        pass_fds=(),
        environment=environment,
        log=log,
    )
    lines = _Lines(log, offset)
    command, last, is_too_long = "", "", False
    try:
        while True:
            has_ended = has_exited(process)
            for line in lines.new(is_last=has_ended):
                command = command or (line.removeprefix("$ ") if line.startswith(COMMAND) else "")
                last = line
                tell(line)
            is_too_long = not has_ended and time.monotonic() > deadline
            if has_ended or is_too_long:
                break
            time.sleep(POLL_SECONDS)
    finally:
        kill_group(process.pid, signal.SIGTERM)
        wait_for_exit(process, END_SECONDS)
        exit_code = end(process)
    return Outcome(exit_code, command, last, is_too_long)


class _Lines:
    """The lines that a growing file gets."""

    def __init__(self, path: Path, offset: int) -> None:
        self._path, self._offset = path, offset

    def new(self, *, is_last: bool) -> Iterator[str]:
        """Yield the whole lines that came since the last call; ``is_last``: an unfinished one too."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        if not is_last:
            data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        yield from (line for line in data.decode(errors="replace").splitlines() if line.strip())


def environment(server: str) -> dict[str, str]:
    """Return the variables of the child: no part of the flow run here, whose signals it would leave to Prefect."""
    foreign = [name for name in os.environ if name.startswith("PREFECT__") or re.match("PREFECT_.*LOGGING", name)]
    own = {name: value for name, value in os.environ.items() if name not in foreign}
    quiet = {name: value for name, value in DEFAULTS.items() if "LOGGING" in name}
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**own, **quiet, "PREFECT_API_URL": server, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def main() -> None:
    """Be the child: find out which command it is, and run it. Its arguments are parent, job and time."""
    parent, text, due = sys.argv[1:]
    when_parent_ends(int(parent), partial(kill_group, os.getpgrp()))
    print_anything()
    sys.argv = ["grpo", *_arguments(text, due)]
    from flows.app import run

    run()


def _arguments(text: str, due: str) -> list[str]:
    from shlex import join

    from flows.schedule.actions import command

    try:
        job = Job.model_validate(json.loads(text))
        os.chdir(job.folder)
        found = command(job, datetime.fromisoformat(due))
        if found is not None:
            say(f"{COMMAND}{join(found)}")
            return found
    except BaseException as error:
        fail(error)
    say(f"nothing is new: {job.run} has no completions that today's rewards have not scored")
    sys.exit(NOTHING_NEW)
