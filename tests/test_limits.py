"""Limits count work: what a pause, a busy machine, a wait or a forged message costs, and what ends for certain."""

import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pipeline import clock, wire
from stages.rewards import pool
from stages.rewards.scorer import Scorer
from tests.test_reward_workers import score

LATE = "no reward within {} s (time_limit)"


@pytest.mark.parametrize(
    ("passed", "processor", "queued", "expected"),
    [
        (0.05, 0.04, 0.0, 0.04),
        (0.05, 0.0, 0.0, 0.01),  # waiting
        (0.05, 0.0, 0.05, 0.0),  # its turn on the processor does not come
        (0.05, 0.01, 0.03, 0.01),
        (0.05, 0.0, 0.03, 0.004),
        (0.05, 0.0, 0.4, 0.0),  # eight threads
        (0.05, 0.4, 0.0, 0.05),  # eight processors
        (60.0, 0.3, 0.0, 0.3),  # stopped for a while
        (60.0, 0.0, 0.0, 0.02),
        (0.05, -3.0, -3.0, 0.01),  # a child has ended that nobody waited for
    ],
)
def test_work_is_processor_time_and_a_fifth_of_waiting(
    passed: float, processor: float, queued: float, expected: float
) -> None:
    assert clock.work_in(passed, processor, queued) == pytest.approx(expected)


def test_the_queue_for_a_busy_processor_is_no_work() -> None:
    core = min(os.sched_getaffinity(0))
    pinned = f"import os, time\nos.sched_setaffinity(0, [{core}])\n"
    ended = "print(flush=True)\ninput()\n"
    burn = pinned + "print(flush=True)\ninput()\nwhile time.process_time() < 0.4: pass\n" + ended
    others = [subprocess.Popen([sys.executable, "-c", pinned + "while True: pass"]) for _ in range(9)]
    try:
        with subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdout.readline()
            used, begin = clock.seconds_of(process.pid)[0], time.monotonic()
            meter = clock.Meter(process.pid)
            process.stdin.write(b"\n")
            process.stdin.flush()
            while not select.select([process.stdout], [], [], clock.LOOK_SECONDS)[0]:
                meter.look()
            work, passed = meter.look(), time.monotonic() - begin
            used = clock.seconds_of(process.pid)[0] - used
            process.stdin.close()
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert passed > 4 * used  # it was queued
    assert used <= work < used + (passed - used) / clock.PATIENCE / 3


def test_processor_time_counts_children_and_those_that_have_ended() -> None:
    burn = "import time\nwhile time.process_time() < 0.2: pass"
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        assert clock.seconds_of(process.pid)[0] >= 0.18
        assert clock.seconds_of(os.getpid())[0] >= clock.seconds_of(process.pid)[0]
        process.stdin.close()
    assert clock.seconds_of(process.pid) == (0.0, 0.0)


@pytest.mark.parametrize(("seconds", "expected"), [(2.0, 50.0), (0.0, None), (-86399.9, None), (1e-9, None)])
def test_a_figure_per_second_is_unknown_where_no_time_has_passed(seconds: float, expected: float | None) -> None:
    assert clock.per_second(100, seconds) == expected


PAUSED = """
import polars as pl
from stages.rewards.functions import RewardConfig, find_reward
from stages.rewards.scorer import open_scorer
from tests.builders import completion_rows, prompt_rows
from tests.test_reward_workers import score

program = "import time\\nends = float(input())\\nwhile time.process_time() < ends: pass\\nprint(1)"
metadata = '{"tests": [{"input": "0.3", "output": "1"}]}'
wanted = [
    ("tests.rewards:work_for", "0.3", {"time_limit": 0.5}),
    ("tests.rewards:wait_for", "0.3", {"time_limit": 0.5}),
    ("stages.rewards.code.code:code", program, {"arguments": {"seconds": 0.5}}),
]
with open_scorer(2) as scorer:
    for function, text, config in wanted:
        reward = find_reward(RewardConfig(name="r", function=function, **config))
        rows = completion_rows(*({"completion": text} for _ in range(4)))
        prompts = prompt_rows({"metadata": metadata})
        scorer.score(rows.head(1).with_columns(completion=pl.lit("0")), prompts, [reward])  # the processes are there
        print("ready", flush=True)
        scored = scorer.score(rows, prompts, [reward])
        print(scored["reward"].to_list(), scored["error"].to_list(), flush=True)
"""


@pytest.mark.slow
def test_a_pause_of_all_processes_longer_than_the_limit_costs_no_reward() -> None:
    process = subprocess.Popen([sys.executable, "-c", PAUSED], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == "ready\n"
            for _ in range(2):
                time.sleep(0.1)
                stopped = _signal_tree(process.pid, signal.SIGSTOP)
                time.sleep(0.6)
                for pid in reversed(stopped):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
            assert process.stdout.readline() == "[1.0, 1.0, 1.0, 1.0] [None, None, None, None]\n"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _signal_tree(pid: int, number: signal.Signals) -> list[int]:
    """Signal a process and its descendants; return those that there were."""
    found = [pid]
    for process in found:
        try:
            os.kill(process, number)
            threads = os.listdir(f"/proc/{process}/task")  # noqa: PTH208
            children = [Path(f"/proc/{process}/task/{thread}/children").read_text() for thread in threads]
        except OSError:  # it has ended
            continue
        found += [int(child) for text in children for child in text.split()]
    return found


def test_a_busy_machine_costs_no_reward(scorer: Scorer) -> None:
    score(scorer, "work_for", ["0", "0"], time_limit=1.0)  # the processes are there
    loop = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(loop) for _ in range(2 * len(os.sched_getaffinity(0)))]
    try:
        rows = score(scorer, "work_for", ["0.5"] * 2, time_limit=1.0)  # three times as long by the clock
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert rows["error"].to_list() == [None] * 2


@pytest.mark.parametrize(
    ("function", "text", "least"),
    [
        ("work_for", "3600", 0.3),
        ("let_others_work", "work", 0.3),
        ("misbehave", "sleep", 1.5),
        ("wait_for", "3600", 0.3),
    ],
)
def test_what_does_not_end_is_ended_by_its_own_or_its_childrens_work_or_by_patience(
    scorer: Scorer, function: str, text: str, least: float
) -> None:
    score(scorer, function, ["0", "0"], time_limit=0.3)  # the processes are there
    before = time.monotonic()
    rows = score(scorer, function, [text], time_limit=0.3)
    assert rows["error"].to_list() == [LATE.format(0.3)]
    assert time.monotonic() - before >= least


@pytest.mark.parametrize("function", ["fork", "fork_async"])
def test_a_child_that_returns_ends_and_the_parents_value_counts(scorer: Scorer, function: str) -> None:
    rows = score(scorer, function, ["", "raise", "quit", ""])
    assert rows["reward"].to_list() == [1.0] * 4


def test_a_child_that_returns_a_frame_ends_and_the_parents_value_counts(scorer: Scorer) -> None:
    assert score(scorer, "fork_in_frame", ["", ""])["reward"].to_list() == [1.0, 1.0]


class _Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


NONSENSE = "the worker process sent "
FORGED = {
    "no JSON": (b"}\n", f"{NONSENSE}what is no JSON (JSONDecodeError) while it scored"),
    "deep JSON": (b"[" * 1900 + b"\n", f"{NONSENSE}what is no JSON (RecursionError) while it scored"),
    "no UTF-8": (b'"\xff"\n', f"{NONSENSE}what is no JSON (UnicodeDecodeError) while it scored"),
    "no list": (b'{"0": 1}\n', NONSENSE),
    "no rows": (b"[1, 2]\n", NONSENSE),
    "the row of another": (b"[[7, [1.0, null, null]]]\n", f"{NONSENSE}a result of row 7, which it was not to score"),
    "a row twice": (b"[[0, [1.0, null, null]], [0, [2.0, null, null]]]\n", f"{NONSENSE}a result of row 0"),
    "no number": (b'[[0, ["1", null, null]]]\n', f"{NONSENSE}the result"),
    "true": (b"[[0, [true, null, null]]]\n", f"{NONSENSE}the result"),
    "not a number": (b"[[0, [NaN, null, null]]]\n", f"{NONSENSE}the result [nan, None, None]"),
    "infinity": (b"[[0, [1e999, null, null]]]\n", f"{NONSENSE}the result [inf, None, None]"),
    "reward and error": (b'[[0, [1.0, "no", null]]]\n', f"{NONSENSE}the result"),
    "neither": (b"[[0, [null, null, null]]]\n", f"{NONSENSE}the result"),
    "half a pair": (b'[[0, [null, "\\ud800", null]]]\n', f"{NONSENSE}the result"),
    "too long": (b"x" * 4000, f"{NONSENSE}a message of more than 2,000 bytes"),
    "a long line": (b"[" + b" " * 4000 + b"]\n", f"{NONSENSE}a message of more than 2,000 bytes"),
    "half a message": (b"[[0, [1.0", LATE.format(0.5)),
}


@pytest.mark.parametrize(("sent", "error"), FORGED.values(), ids=FORGED.keys())
def test_a_forged_message_ends_the_worker_and_costs_its_own_row(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch, sent: bytes, error: str
) -> None:
    monkeypatch.setattr(pool, "MAX_MESSAGE_BYTES", 2000)
    rows = score(scorer, "forge", [sent.decode("latin-1"), "honest"], time_limit=0.5)
    assert rows["reward"].to_list() == [None, 1.0]
    assert rows["error"][0].startswith(error)


def test_a_pickle_of_a_worker_is_not_loaded(scorer: Scorer, tmp_path: Path) -> None:
    message = pickle.dumps(_Payload(tmp_path / "made"))
    sent = struct.pack("!i", len(message)) + message  # as multiprocessing frames it
    rows = score(scorer, "forge", [sent.decode("latin-1")], time_limit=0.5)
    assert rows["reward"].to_list() == [None]
    assert not (tmp_path / "made").exists()


def test_a_message_comes_as_it_was_sent_however_it_is_cut() -> None:
    ours, theirs = os.pipe()
    inbox = wire.Inbox(ours, 10_000)
    message = [1.5, 1e-320, -0.0, 0.1 + 0.2, None, "\u20ac\n\x00", {"a": [2**63]}]
    wire.write(theirs, message)
    wire.write(theirs, "\ud800")
    data = os.read(ours, 10_000)
    found = []
    for i in range(len(data)):
        os.write(theirs, data[i : i + 1])
        found += inbox.read()
    assert repr(found) == repr([message, "?"])
    os.close(theirs)
    with pytest.raises(EOFError):
        inbox.read()
    os.close(ours)


def test_a_detail_too_long_for_a_message_is_an_error(scorer: Scorer) -> None:
    rows = score(scorer, "long_detail", [str(1 << 20), str((1 << 20) - 2)])
    assert rows["reward"].to_list() == [None, 1.0]
    assert rows["error"][0] == "the detail has 1,048,578 characters, expected at most 1,048,576"
    rows = score(scorer, "long_detail_in_frame", [str((1 << 20) + 1), str(1 << 20)])
    assert rows["reward"].to_list() == [None, 1.0]
    assert rows["error"][0] == "the detail has more than 1,048,576 characters"
