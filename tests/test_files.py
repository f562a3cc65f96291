"""Files: who holds the lock of one, and what it holds."""

from pathlib import Path

import pytest

from pipeline.files import is_locked, locked, user_path
from pipeline.runs import run_at


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
