"""The limits of the sandbox: each test is a program that uses too much of something, run for real."""

import threading
from uuid import uuid4

import pytest

from stages.rewards.code.sandbox import Limits, Run, Sandbox
from tests.sandboxes import attack, processes_with, tried


def test_a_program_that_sleeps_too_long_is_killed() -> None:
    with Sandbox(Limits(seconds=0.4)) as sandbox:
        run = sandbox.run(["sh", "-c", "echo first; sleep 600"])
    assert (run.ended, run.exit_code, run.stdout) == ("timeout", None, "first\n")
    assert run.seconds == pytest.approx(0.4, abs=0.1)  # of work; waiting counts a fifth


def test_what_a_program_has_worked_counts_and_not_what_it_has_waited() -> None:
    with Sandbox(Limits(seconds=100)) as sandbox:
        run = sandbox.run(["sh", "-c", "sleep 1 & sleep 1 & wait"])
    assert run.ended == "exit"
    assert 0.0 < run.seconds < 0.9


def test_cpu_time_is_limited_per_process() -> None:
    run = attack("import resource\nprint(resource.getrlimit(resource.RLIMIT_CPU))", limits=Limits(seconds=7))
    assert run.stdout == "(15, 15)\n"


def test_a_fork_bomb_ends_with_the_run() -> None:
    marker = f"marker-{uuid4().hex}"
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    run = attack(bomb, marker, limits=Limits(seconds=1))
    assert run.ended == "timeout"
    assert processes_with(marker) == []


def test_the_number_of_processes_is_limited() -> None:
    count = """
        import os, time
        children = 0
        while True:
            try:
                if os.fork() == 0:
                    time.sleep(60)
            except BlockingIOError:
                break
            children += 1
        print(children)
    """
    # the program itself is the fifth
    assert attack(count, limits=Limits(seconds=100, processes=5)).stdout == "4\n"


def test_sandboxes_side_by_side_do_not_use_up_each_others_processes() -> None:
    forks = """
        import os, time
        for _ in range(3):
            if os.fork() == 0:
                time.sleep(2)
                os._exit(0)
        time.sleep(1)
        print("forked")
    """
    runs: list[Run] = []
    limits = Limits(seconds=100, processes=4)
    threads = [threading.Thread(target=lambda: runs.append(attack(forks, limits=limits))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [run.stdout for run in runs] == ["forked\n"] * 3


def test_endless_output_is_cut() -> None:
    endless = "import os\nwhile True:\n    os.write({}, b'x' * 65536)"
    limits = Limits(seconds=100, output_bytes=100_000)
    on_stdout, on_stderr = attack(endless.format(1), limits=limits), attack(endless.format(2), limits=limits)
    assert (on_stdout.ended, on_stdout.exit_code, len(on_stdout.stdout)) == ("output", None, 100_000)
    assert (on_stderr.ended, len(on_stderr.stderr)) == ("output", 100_000)


def test_a_little_too_much_output_at_the_end_is_cut_too() -> None:
    run = attack("print('x' * 1000)", limits=Limits(output_bytes=1000))
    assert (run.ended, len(run.stdout)) == ("output", 1000)


def test_a_memory_bomb_fails() -> None:
    run = attack("x = bytearray(1 << 30)", limits=Limits(memory_mb=256))
    assert run.exit_code == 1
    assert "MemoryError" in run.stderr


def test_memory_that_no_limit_counts_cannot_be_had() -> None:
    assert tried(
        "os.memfd_create('x')",
        "assert ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0",
        "os.truncate(os.open('/dev/shm/x', os.O_CREAT | os.O_RDWR), 1 << 30)",
    ) == ["PermissionError", "AssertionError", "OSError"]


def test_a_huge_file_cannot_be_written() -> None:
    run = attack("with open('big', 'wb') as file:\n    while True:\n        file.write(bytes(1 << 20))")
    assert "File too large" in run.stderr or "No space left" in run.stderr


def test_many_files_cannot_fill_the_memory() -> None:
    fill = """
        import os
        for i in range(100):
            with open(str(i), "wb") as file:
                file.write(bytes(1 << 20))
    """
    run = attack(fill, limits=Limits(seconds=100, disk_mb=8))
    assert "No space left on device" in run.stderr


def test_many_empty_files_cannot_fill_the_memory() -> None:
    fill = "for i in range(10000):\n    open(str(i), 'w').close()"
    assert "No space left on device" in attack(fill, limits=Limits(seconds=100, disk_mb=8)).stderr
