"""Files: who holds the lock of one, and what it holds; nothing is written through a link."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.files import atomic_write, is_locked, locked, remove_tree, user_path, write_text
from pipeline.processes import start_python
from pipeline.runs import run_at
from tests.builders import reward_rows, write_artifact


def test_a_lock_is_refused_to_a_second_one_who_does_not_wait(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path):
        assert is_locked(path)
        with pytest.raises(BlockingIOError), locked(path, wait=False):
            pass
    with locked(path, wait=False):
        pass
    assert not is_locked(path)


def test_locking_keeps_what_the_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "note"
    path.write_text("a note")
    with locked(path):
        assert path.read_text() == "a note"
    assert path.read_text() == "a note"


def test_asking_for_a_lock_makes_no_file(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / "lock")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("written", "expected"), [("~/runs/x", "{}/runs/x"), ("runs/~x", "runs/~x"), ("~", "{}")])
def test_a_tilde_is_the_home_directory(
    written: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(user_path(written)) == str(run_at(written).root) == expected.format(tmp_path)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """Return a file that lies elsewhere and must stay as it is."""
    path = tmp_path / "elsewhere" / "victim"
    path.parent.mkdir()
    path.write_text("dear")
    return path


def lock_it(path: Path) -> None:
    with locked(path):
        pass


def log_to(path: Path) -> None:
    start_python(["-c", "print(1)"], pass_fds=(), environment=dict(os.environ), log=path).wait()


@pytest.mark.parametrize("write", [lock_it, log_to])
def test_a_lock_or_a_log_that_is_a_link_is_refused(tmp_path: Path, victim: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "link").symlink_to(victim)
    (tmp_path / "new").symlink_to(victim.with_name("new"))
    for name in ("link", "new"):
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            write(tmp_path / name)
    assert not is_locked(tmp_path / "link")
    assert [path.read_text() for path in victim.parent.iterdir()] == ["dear"]


def test_a_lock_that_is_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"), locked(tmp_path / "pipe"):
        pass


def test_planted_temporaries_and_links_are_not_written_through(tmp_path: Path, victim: Path) -> None:
    for name in ("report.html", ".report.html.tmp", ".report.html.0123456789abcdef.tmp"):
        (tmp_path / name).symlink_to(victim)
    write_text(tmp_path / "report.html", "page")
    assert victim.read_text() == "dear"
    assert (tmp_path / "report.html").read_text() == "page"
    assert not (tmp_path / "report.html").is_symlink()


def test_what_a_killed_writer_left_is_removed_by_the_next_and_a_living_ones_is_not(tmp_path: Path) -> None:
    (tmp_path / ".x.0123456789abcdef.tmp").write_text("left")
    with atomic_write(tmp_path / "x") as first:
        write_text(tmp_path / "x", "second")
        first.write_text("first")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "first")]


def test_many_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from pipeline.files import write_text\n"
    program += "for number in range(10): write_text(Path(sys.argv[1]), f'{sys.argv[2]}{number}' * 1000)"
    writers = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "x"), writer]) for writer in "abcd"]
    assert [writer.wait(timeout=600) for writer in writers] == [0, 0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    text = (tmp_path / "x").read_text()
    assert text == text[:2] * 1000


def test_of_a_link_the_link_is_removed(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "link").symlink_to(victim.parent)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(victim.parent)
    for name in ("link", "folder", "missing"):
        remove_tree(tmp_path / name)
    assert victim.read_text() == "dear"
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644)])
def test_rows_and_manifest_have_the_mode_that_the_umask_leaves(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        artifact = write_artifact(tmp_path / "rewards", "rewards", reward_rows(a=[1.0]))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in artifact.path.iterdir()} == {mode}
