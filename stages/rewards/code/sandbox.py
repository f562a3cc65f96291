"""Run an untrusted command: without a network, the machine's files, other processes, or more than it is granted.

`Sandbox` is used in the process that wants the result; the work is done by `sandbox_init`, a small server process that
lives as long as the `Sandbox` and gives every run a fresh cell. docs/sandbox.md says what it holds and what it does
not. Linux only.

    with Sandbox(Limits(seconds=2.0)) as sandbox:
        run = sandbox.run(["python3", "program.py"], files={"program.py": text}, stdin="3 4\\n")
"""

import json
import math
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from pipeline.clock import LOOK_SECONDS, PATIENCE
from pipeline.errors import RewardError

Isolation = Literal["full", "process"]
PROJECT = Path(__file__).resolve().parents[3]
PACKAGES = ("pipeline", "grpo", "stages", "flows", "tests")
SYSTEM_PATHS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/alternatives", "/etc/ld.so.cache")
"""Programs and libraries of the system: what every sandbox shows."""
BUSY = 4
"""The queue for a busy processor, which a run's limit does not count, may take so many times as long as the rest."""
GRACE_SECONDS = 10.0
"""Beyond the run's own limit, while this process is awake; after it the whole sandbox is killed."""
PREPARE_SECONDS = 300.0
"""For what a prepared module imports."""
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    # sets of texts in the same order every time: a reward must not depend on chance
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    # numeric libraries start a thread per core, which would count as processes
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a run is granted."""

    seconds: float = 5.0
    """Of work in a run, see `pipeline.clock`; beyond twice as much the kernel ends a process."""
    memory_mb: int = 512
    """Address space of each process."""
    processes: int = 16
    """Processes and threads at one time."""
    disk_mb: int = 16
    """The private directory as a whole (isolation "full"), and each file."""
    open_files: int = 64
    """Of each process."""
    output_bytes: int = 1 << 20
    """Of each of the two streams; a program that writes more is ended."""


@dataclass(frozen=True, slots=True)
class Run:
    """How a run ended, and what it wrote."""

    ended: Literal["exit", "timeout", "output"]
    """exit = by itself or by a signal; timeout, output = it was killed at that limit."""
    exit_code: int | None
    """As of subprocess: negative = killed by that signal; null = it was killed at a limit."""
    stdout: str
    """Bytes that are not UTF-8 are replaced."""
    stderr: str
    seconds: float
    """Of work, as far as it counts against the limit."""


@dataclass(slots=True)
class Sandbox:
    """Runs commands one after the other; for one thread. Nothing that it started is left when it is closed.

    Raises:
        RewardError: at the start, when this machine does not allow the wanted isolation.
    """

    limits: Limits = field(default_factory=Limits)
    isolation: Isolation = "full"
    readable: Sequence[str] = ()
    """Further absolute paths that the program may read; the rest of the machine it does not see (isolation "full")."""
    prepared: str = ""
    """A module of this project that needs nothing but the standard library to be imported. The server calls its
    ``prepare()`` once, with the installed packages in sight, and every run calls its ``run()``, in a copy of that
    process that has become the program, in place of a command: what takes long to import is imported once."""
    _server: subprocess.Popen[str] | None = None
    _scratch: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "Sandbox":
        if self.isolation not in ("full", "process"):
            raise RewardError(f'isolation is {self.isolation!r}: give "full" or "process"')
        if sys.platform != "linux":
            raise _refusal(f"this is {sys.platform}, the sandbox is made of Linux's namespaces", "")
        if self.isolation == "process":
            self._scratch = tempfile.TemporaryDirectory(prefix="sandbox-")
            Path(self._scratch.name).chmod(0o711)  # the program's user may be another
        start = (
            f"import sys; sys.path.append({str(PROJECT)!r}); from stages.rewards.code.sandbox_init import main; main()"
        )
        self._server = subprocess.Popen(
            # isolated, without site: half the time to start
            [python(), "-I", "-S", "-B", "-c", start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,
            encoding="utf-8",
        )
        try:
            answer = self._ask(self._setup(), PREPARE_SECONDS if self.prepared else GRACE_SECONDS)
        except BaseException:
            self.close()
            raise
        if "refused" in answer:
            self.close()
            raise _refusal(answer["refused"], self.isolation)
        if "error" in answer:
            self.close()
            raise RewardError(
                f"the sandbox could not prepare {self.prepared} ({answer['error']}): expected its packages in "
                f"{', '.join(installed_folders()) or 'a folder of installed packages'}; install them there"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(
        self,
        command: Sequence[str],
        files: Mapping[str, str] | None = None,
        stdin: str = "",
        seconds: float | None = None,
    ) -> Run:
        """Return how the command ended; it starts in an empty private directory with these files.

        Args:
            command: program and arguments; a program without slash is looked for in PATH. Empty for what is prepared.
            files: name to text.
            stdin: what the command can read.
            seconds: less or more work than the limits grant.

        Raises:
            RewardError: when the command cannot be started, or the sandbox itself failed.
        """
        seconds = self.limits.seconds if seconds is None else seconds
        request = {
            "command": list(command),
            "files": dict(files or {}),
            "stdin": stdin.encode("utf-8", "replace").decode(),
            "seconds": seconds,
            "output_bytes": self.limits.output_bytes,
        }
        answer = self._ask(request, seconds * PATIENCE * BUSY + GRACE_SECONDS)
        if "error" in answer:
            what = self.prepared or repr(command[0])
            raise RewardError(
                f"the sandbox could not run {what}: {answer['error']}. Expected a program that exists inside "
                "the sandbox and that any user may run: correct `command`, or name its folder in `readable`"
            )
        return Run(answer["ended"], answer["status"], answer["stdout"], answer["stderr"], answer["seconds"])

    def close(self) -> None:
        """End the server, with which everything ends that it started."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            for stream in (self._server.stdin, self._server.stdout):
                if stream is not None:
                    stream.close()
            self._server = None
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def _setup(self) -> dict[str, Any]:
        limits = self.limits
        packages = installed_folders() if self.prepared else []
        shown = [str(Path(sys.base_prefix).resolve()), *self.readable, *packages]
        return {
            "parent": os.getpid(),
            "user": None,
            "isolation": self.isolation,
            "readable": [*SYSTEM_PATHS, *shown],
            "hidden": _hidden(shown),
            "scratch": self._scratch.name if self._scratch else None,
            "environment": ENVIRONMENT,
            "prepared": self.prepared,
            "packages": packages,
            "memory_mb": limits.memory_mb,
            "processes": limits.processes,
            "disk_mb": limits.disk_mb,
            "open_files": limits.open_files,
        }

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        server = self._server
        if server is None or server.stdin is None or server.stdout is None:
            raise RewardError("the sandbox is not open: use it in a `with` block")
        try:
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            answers = select.poll()
            answers.register(server.stdout, select.POLLIN)
            # many short waits: a pause of this process, however long, ends one of them
            is_there = any(answers.poll(LOOK_SECONDS * 1000) for _ in range(math.ceil(seconds / LOOK_SECONDS)))
            line = server.stdout.readline() if is_there else ""
        except BrokenPipeError:
            line = ""
        if not line:
            code = server.poll()
            self.close()
            state = "does not answer" if code is None else f"ended with exit status {code}"
            raise RewardError(f"the sandbox's server {state}: look for a machine that is out of memory or processes")
        answer: dict[str, Any] = json.loads(line)
        return answer


def python() -> str:
    """Return the interpreter that this process runs on, outside of any virtual environment."""
    base: str = getattr(sys, "_base_executable", sys.executable)
    return str(Path(base).resolve())


def installed_folders() -> list[str]:
    """Return the folders on the search path that packages are installed in."""
    folders = [Path(folder).resolve() for folder in sys.path if folder and Path(folder).is_dir()]
    own_names = ("site-packages", "dist-packages")
    return [str(folder) for folder in folders if folder.name in own_names or any(folder.glob("*.dist-info"))]


def _hidden(shown: Sequence[str]) -> list[str]:
    """Return what must not be seen even where it lies within a folder that is shown, as an installed package does."""
    places = [PROJECT / name for name in PACKAGES] + [Path.cwd()]
    needed = [Path(path) for path in (*shown, *SYSTEM_PATHS)]
    return [str(place) for place in places if not any(path.is_relative_to(place) for path in needed)]


def _refusal(found: str, isolation: str) -> RewardError:
    less = (
        'or accept less protection with isolation = "process" (no namespaces: the program sees files and processes '
        "as an ordinary user does)"
        if isolation != "process"
        else "there is no weaker isolation"
    )
    return RewardError(
        f"this machine does not allow the sandbox ({found}). Expected Linux 5.14 or newer on x86_64 or aarch64, and "
        "either root with CAP_SYS_ADMIN or unprivileged user namespaces: allow them (docs/sandbox.md says how), "
        f"{less}"
    )
