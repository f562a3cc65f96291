"""Whatever goes wrong, a command ends with one message and exit code 2: 1 is the answer no."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jinja2
import polars as pl
import pyarrow as pa
import pytest

from flows.crash import describe, hidden_fault, is_interrupt
from pipeline.errors import UsageError
from tests.small_run import make_small_run

ROOT = Path(__file__).parent.parent


def of_system(number: int, *names: str) -> OSError:
    return OSError(number, os.strerror(number), *names)


@pytest.mark.parametrize(
    ("error", "fragments"),
    [
        (UsageError("there is no stage x"), ["there is no stage x"]),
        (BaseExceptionGroup("", [ExceptionGroup("", [UsageError("one of a group")])]), ["one of a group"]),
        (of_system(errno.EROFS, "runs/a"), ["runs/a cannot be read or written", "read-only: name another place"]),
        (of_system(errno.EACCES, "runs/a"), ["runs/a cannot be read or written", "Permission denied"]),
        (of_system(errno.EFBIG), ["a file or device cannot be read or written", "ulimit -f"]),
        (of_system(errno.EMFILE, "x"), ["ulimit -n"]),
        (of_system(errno.EAGAIN), ["ulimit -u"]),
        (of_system(errno.ECONNRESET), ["a connection cannot be read or written"]),
        (MemoryError(), ["memory is used up"]),
        (RuntimeError("can't start new thread"), ["can't start new thread", "ulimit -u"]),
        (RecursionError("maximum recursion depth exceeded"), ["nested too deeply"]),
        (ModuleNotFoundError("No module named 'grpo.microbatches'"), ["cannot be imported", "install"]),
        (UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range"), ["PYTHONIOENCODING=utf-8"]),
        (pl.exceptions.ComputeError("parquet: File out of specification"), ["cannot be read", "grpo verify"]),
        (pl.exceptions.PanicException("entered unreachable code"), ["cannot be read", "PanicException"]),
        (pa.ArrowInvalid("not a Parquet file"), ["cannot be read", "not a Parquet file"]),
        (json.JSONDecodeError("Expecting value", "x", 0), ["cannot be read", "Expecting value"]),
        (jinja2.exceptions.SecurityError("access to attribute"), ["cannot be read", "SecurityError"]),
    ],
)
def test_what_happens_in_the_world_is_said_with_what_to_do(error: BaseException, fragments: list[str]) -> None:
    message = describe(error)
    assert [fragment for fragment in fragments if fragment not in message] == []
    assert "\n" not in message
    assert "fault of grpo-pipeline" not in message


def test_anything_else_is_a_fault_of_ours_whose_traceback_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    try:
        {}["key"]
    except KeyError as error:
        message = describe(error)
    (kept,) = tmp_path.iterdir()
    assert message.startswith("this is a fault of grpo-pipeline, or of a file that it should have refused (KeyError:")
    assert f"send {kept} to those who maintain this program" in message
    assert "line " in kept.read_text()
    assert kept.stat().st_mode & 0o077 == 0
    shutil.rmtree(tmp_path)  # as if nothing could be written
    assert "report it to those who maintain this program" in describe(KeyError("key"))


def raised(end: Callable[[], None]) -> SystemExit:
    with pytest.raises(SystemExit) as caught:
        end()
    return caught.value


def test_the_exit_code_1_that_click_makes_of_a_fault_is_told_from_an_answer() -> None:
    import typer

    def ends(error: BaseException) -> Callable[[], None]:
        app = typer.Typer(add_completion=False)

        @app.command()
        def command() -> None:
            raise error

        return lambda: app(args=[])

    before = sys.stdout, sys.stderr
    assert hidden_fault(raised(ends(typer.Exit(1)))) is None
    assert isinstance(hidden_fault(raised(ends(EOFError("pipe")))), EOFError)
    assert isinstance(hidden_fault(raised(ends(of_system(errno.EPIPE)))), BrokenPipeError)
    sys.stdout, sys.stderr = before  # click has put its own in their place


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Path:
    """Return a finished run, not to be changed."""
    return make_small_run(tmp_path_factory.mktemp("crash"), tiny_policy)


def grpo(folder: Path, *arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **settings.pop("variables", {})}  # type: ignore[dict-item]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
    command = [sys.executable, "-m", "flows.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=variables, text=True, check=False, **pipes)  # type: ignore[call-overload, no-any-return]


def expect_one_line(done: subprocess.CompletedProcess[str], *fragments: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert [fragment for fragment in fragments if fragment not in done.stderr] == []


def test_an_output_that_cannot_be_written_is_no_answer(run: Path, tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        expect_one_line(grpo(tmp_path, "schema", "completions", stdout=full), "no space left")


def test_a_file_over_the_limit_is_no_answer(run: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    done = grpo(tmp_path, "report", str(run), "-o", str(tmp_path / "page.html"), preexec_fn=limit)
    expect_one_line(done, "page.html", "too large")


def test_python_without_docstrings_is_refused(tmp_path: Path) -> None:
    done = grpo(tmp_path, "schema", variables={"PYTHONOPTIMIZE": "2"})
    expect_one_line(done, "PYTHONOPTIMIZE=2", "use -O or 1")


@pytest.mark.parametrize("error", ["ImportError", "SyntaxError", "MemoryError"])
def test_a_program_that_cannot_be_loaded_is_one_message(tmp_path: Path, error: str) -> None:
    (tmp_path / "typer.py").write_text(f"raise {error}('broken')")
    done = grpo(tmp_path.parent, "schema", variables={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    expect_one_line(done, f"{error}: broken", "install it anew")


class TerminationSignal(BaseException):
    """Like the one of Prefect."""


@pytest.mark.parametrize(
    ("first", "expected"), [(KeyboardInterrupt(), True), (TerminationSignal(), True), (OSError(), False)]
)
def test_an_error_that_takes_the_place_of_an_interrupt_is_one(first: BaseException, expected: bool) -> None:
    error = ValueError("Task run is not set")
    error.__context__ = first  # as Python has it, of an error that is raised while another one is handled
    assert is_interrupt(error) is expected
    assert is_interrupt(first) is expected


def test_an_interrupt_while_the_program_is_loaded_leaves_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    done = grpo(tmp_path.parent, "schema", variables={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert (done.returncode, done.stderr) == (130, "")


STOPPED = """
import atexit
from flows import app
class Cycle:
    def __init__(self): self.itself = self
    def __del__(self): print("collected")
def command():
    global kept
    kept = Cycle()
    atexit.register(print, "handled")
    raise KeyboardInterrupt
app._run_command = command
app.run()
"""


def test_a_stopped_command_runs_exit_handlers_but_does_not_wait_for_a_last_collection() -> None:
    """With torch and Prefect it takes seconds, of the ten in which all processes are to be gone."""
    command = [sys.executable, "-c", STOPPED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "handled\n", "")


READ_ONLY = """
mount --bind "$RUN" "$RUN"
mount -o remount,ro,bind "$RUN"
for command in "report $RUN" "rescore $RUN $OTHER --run $RUN/new" "prune $RUN --keep-last 1"; do
    "$PYTHON" -m flows.cli $command >> "$SAID" 2>&1; echo "exit $?" >> "$SAID"
done
"""


def test_a_run_on_a_read_only_file_system_is_one_message(run: Path, tmp_path: Path) -> None:
    namespace = ["unshare", "--map-root-user", "--user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*namespace, "true"], check=False).returncode:
        pytest.skip("this system lets nobody make a mount namespace")
    (tmp_path / "other.toml").write_text("[normalize]\neps = 0.5\n")
    said = tmp_path / "said"
    variables = {
        **os.environ,
        "RUN": str(run),
        "OTHER": str(tmp_path / "other.toml"),
        "SAID": str(said),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
    }
    subprocess.run([*namespace, "bash", "-c", READ_ONLY], env=variables, cwd=tmp_path, check=False)
    lines = said.read_text().splitlines()
    assert [line for line in lines if line.startswith("exit")] == ["exit 2"] * 3, lines
    assert [line[:6] for line in lines] == ["error:", "exit 2"] * 3, lines
    assert "--output" in lines[0]
    assert "ead-only" in lines[2]
