"""How a command ends: one that failed with one message and exit code 2, whatever was raised.

Exit code 1 is an answer, so no failure may have it. GRPO_TRACEBACK=1 shows the traceback too.
"""

import errno
import os
import sys
import threading
from contextlib import suppress
from typing import NoReturn

from flows.printing import complain
from pipeline.errors import GrpoError

FAILED = 2
INTERRUPTED = 130
"""Exit code of Ctrl-C and SIGTERM."""
TRACEBACK = "GRPO_TRACEBACK"
"""Environment variable."""

ADVICE = {
    errno.EROFS: "the file system is read-only: name another place (--run, --output), or make it writable",
    errno.EACCES: "this user may not: change its permissions, or become a user who may",
    errno.EPERM: "this user may not: change its permissions, or become a user who may",
    errno.EFBIG: "the file would be larger than allowed: raise the limit (ulimit -f), and run the same command again",
    errno.ENOSPC: "no space left: make room, and run the same command again",
    errno.EDQUOT: "the quota is used up: make room, and run the same command again",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine: close some",
    errno.ENOMEM: "no memory is left: free some, or raise the limit (ulimit -v)",
    errno.EAGAIN: "no more processes or threads are allowed: raise the limit (ulimit -u)",
    errno.EPIPE: "whatever reads it has ended; what was written to files is kept",
}
UNREADABLE = ("polars", "pyarrow", "duckdb", "pyo3_runtime", "safetensors_rust", "json", "jinja2", "zipfile")
"""Libraries whose errors say that data, or a template, cannot be read; the first parts of their modules' names."""

server_is_lost = threading.Event()
"""Prefect still has something to tell a server that does not answer: its exit handlers would wait for hours."""


is_interrupted = threading.Event()
"""The program is to end soon: somebody waits for its memory, and kills it if that takes too long."""


def leave(code: int) -> None:
    """Exit with this code, without Prefect's exit handlers when its server is lost."""
    if server_is_lost.is_set():
        _leave_at_once(code)
    if code == INTERRUPTED:
        is_interrupted.set()
    sys.exit(code)


def spare_collection() -> None:
    """End an interrupted program without Python's last collection, which visits every object of torch: two seconds of
    a core, and a multiple of that on a busy machine.

    An exit handler, to be registered first: it comes last, when those of Prefect and of child processes have run.
    """
    if is_interrupted.is_set():
        _leave_at_once(INTERRUPTED)


def _leave_at_once(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def fail(error: BaseException) -> NoReturn:
    """Print what went wrong, and exit."""
    if os.environ.get(TRACEBACK):
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    with suppress(OSError, ValueError):  # nobody may be there to read it
        complain(f"error: {describe(error)}")
    _drop_output()
    leave(FAILED)
    raise AssertionError("unreachable")


def is_interrupt(error: BaseException | None) -> bool:
    """Return whether an error is an interrupt, or was raised while one was handled.

    Prefect cannot end a task that is just being started: it raises a ValueError in the place of the signal.
    """
    while error is not None:
        if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "TerminationSignal":  # Prefect's
            return True
        error = error.__cause__ or error.__context__
    return False


def hidden_fault(end: SystemExit) -> BaseException | None:
    """Return what really ended the program, when click has made exit code 1 of it; None for an answer."""
    if end.code != 1:
        return None
    from typer import Exit

    found = end.__context__
    return None if found is None or isinstance(found, Exit) else found.__cause__ or found


def flush() -> None:
    """Make sure that all output has gone out; a command whose output has not has failed."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        fail(error)


def describe(error: BaseException) -> str:
    """Return the one message for the user."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, GrpoError):
        return str(error)
    words = _words(error)
    if isinstance(error, UnicodeEncodeError):
        return (
            f"the output's encoding {error.encoding} lacks a character ({words}): set PYTHONIOENCODING=utf-8, or write "
            "with --format jsonl"
        )
    if isinstance(error, OSError):
        return _of_system(error, words)
    if isinstance(error, MemoryError):
        return f"memory is used up ({words}): free some, raise its limit, or look at less at a time"
    if isinstance(error, RecursionError):
        return f"something cannot be read, because it is nested too deeply ({words}): remove levels of it"
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return f"{words}: no more threads are allowed: raise the limits (ulimit -u, ulimit -v)"
    if isinstance(error, ImportError):
        return (
            f"a package cannot be imported ({words}): install this program anew (README.md), and let no file of yours "
            "on PYTHONPATH have a package's name"
        )
    libraries = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if not libraries.isdisjoint(UNREADABLE):
        return (
            f"a file of the run, or a value, cannot be read ({words}): `grpo verify` names damaged files; restore them "
            "from a copy, or correct the value"
        )
    return (
        f"this is a fault of grpo-pipeline, or of a file that it should have refused ({words}): {_kept(error)}; the "
        "same command with GRPO_TRACEBACK=1 shows it"
    )


def _of_system(error: OSError, words: str) -> str:
    named = [str(name) for name in (error.filename, error.filename2) if name is not None]
    what = " -> ".join(named) or ("a connection" if isinstance(error, ConnectionError) else "a file or device")
    advice = ADVICE.get(error.errno or 0, "see whether it is there, and what it is")
    return f"{what} cannot be read or written ({words}): {advice}"


def _words(error: BaseException) -> str:
    """Return kind and text of an error in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = " ".join(text.split())
    return f"{type(error).__name__}: {line[:300]}" if line else type(error).__name__


def _kept(error: BaseException) -> str:
    """Return where the traceback was written."""
    import tempfile
    import traceback

    try:
        descriptor, path = tempfile.mkstemp(prefix="grpo-traceback-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return "report it to those who maintain this program"
    return f"send {path} to those who maintain this program"


def _drop_output() -> None:
    """Let Python not fail again at its end, over output that cannot be written."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
