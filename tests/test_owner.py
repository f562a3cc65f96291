"""The note next to the lock of a run: the one who is refused reads who holds it, and no dead one is named."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows.prepare import check
from pipeline.errors import UsageError
from pipeline.files import locked
from pipeline.owner import WRITER_NOTE, this_process, writer_of
from pipeline.run_dir import RunDir
from pipeline.runs import check_unlocked, lock
from stages.config import RunConfig
from tests.processes import survivors

ROOT = Path(__file__).parent.parent
HOLD = """
import sys, time
from pathlib import Path
from pipeline.run_dir import RunDir
from pipeline.runs import lock
with lock(RunDir(Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def hold(run: RunDir) -> "subprocess.Popen[str]":
    """Start a process that holds the lock of a run."""
    command = [sys.executable, "-c", HOLD, str(run.root)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_one_is_told_who_is_writing_and_the_dead_one_is_succeeded(run: RunDir) -> None:
    process = hold(run)
    pattern = rf"\(pid {process.pid} on {os.uname().nodename} since 20\d\d-.* UTC: -c .*run\): wait for it"
    with pytest.raises(UsageError, match=pattern), lock(run):
        pass
    with pytest.raises(UsageError, match=pattern):
        check_unlocked(run)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert survivors(process.pid) == []
    assert (run.root / WRITER_NOTE).is_file()
    check_unlocked(run)
    with lock(run):
        assert f"(pid {os.getpid()} on " in writer_of(run.root)
    assert not (run.root / WRITER_NOTE).exists()


def test_training_is_refused_before_a_server_is_started(run: RunDir, config: RunConfig) -> None:
    with lock(run), pytest.raises(UsageError, match=rf"\(pid {os.getpid()} on "):
        check(config, run, "")


def test_a_dead_process_is_not_named_as_the_one_who_holds_the_lock(run: RunDir) -> None:
    """Between the lock and the note of the next one lies the note of the one before."""
    process = hold(run)
    process.kill()
    process.communicate()
    with (
        locked(run.root / ".lock"),
        pytest.raises(UsageError, match=f"another process is writing {run.name}: wait for it"),
    ):
        check_unlocked(run)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"pid": "1", "host": "h", "since": "s", "command": "c"}', "x" * 9000]
)
def test_a_note_that_is_none_is_not_quoted(tmp_path: Path, text: str) -> None:
    (tmp_path / WRITER_NOTE).write_text(text)
    assert writer_of(tmp_path) == ""


def test_of_another_machine_is_quoted_visibly_what_the_note_says(tmp_path: Path) -> None:
    note = this_process() | {"host": "elsewhere\x1b[2J", "pid": 2**70, "command": "grpo run " + "x" * 999}
    (tmp_path / WRITER_NOTE).write_text(json.dumps(note))
    said = writer_of(tmp_path)
    assert said.startswith(f" (pid {2**70} on elsewhere\\x1b[2J since {note['since']}: grpo run xxx")
    assert len(said) < 500


def test_a_number_that_no_process_can_have_here_is_not_quoted(tmp_path: Path) -> None:
    (tmp_path / WRITER_NOTE).write_text(json.dumps(this_process() | {"pid": 2**70}))
    assert writer_of(tmp_path) == ""


def test_a_note_has_the_command_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/grpo", "run", "x" * 999])
    assert this_process()["command"] == "grpo run " + "x" * 191


def test_a_note_that_cannot_be_written_keeps_nobody_from_the_lock(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full device `grpo prune` makes room."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.owner.write_text", full)
    with lock(run):
        assert writer_of(run.root) == ""
