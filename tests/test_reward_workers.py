"""Reward functions in their processes: whatever they do, exactly their own rows are null, and say why."""

import mmap
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipeline.errors import RewardError
from stages.rewards.functions import RewardConfig, find_reward
from stages.rewards.scorer import Scorer
from stages.rewards.worker import NOTE, take_note
from tests.builders import completion_rows, prompt_rows
from tests.processes import descendants, survivors, until

WRONG = {
    "hang": "no reward within 0.5 s (time_limit)",
    "exit": "the worker process ended with exit status 3 while it scored this completion",
    "crash": "the worker process was killed by SIGSEGV while it scored this completion",
    "raise": "ValueError: no number in it (rewards.py:",
    "quit": "the function called sys.exit('enough')",
    "nan": "the function returned nan",
    "infinity": "the function returned -inf",
    "text": "the function returned a str, expected a number, None or Score",
    "none": "the function returned None",
    "memory": "MemoryError",
    "recursion": "RecursionError: maximum recursion depth exceeded",
    "detail": "the detail is not JSON",
}


def score(scorer: Scorer, function: str, texts: list[str], **config: Any) -> pl.DataFrame:
    reward = find_reward(RewardConfig(name="r", function=f"tests.rewards:{function}", **config))
    return scorer.score(completion_rows(*({"completion": text} for text in texts)), prompt_rows({}), [reward])


def test_of_ten_thousand_completions_exactly_those_that_misbehave_are_null_and_explained(scorer: Scorer) -> None:
    texts = ["x" * (i % 50) for i in range(10_000)]
    kinds = [kind for kind in WRONG if kind != "hang"]
    wrong = {i * 100 + 37: "hang" if i in (3, 70) else kinds[i % len(kinds)] for i in range(100)}
    for row, text in wrong.items():
        texts[row] = text
    rows = score(scorer, "misbehave", texts, time_limit=0.5)
    expected = [None if i in wrong else float(i % 50) for i in range(10_000)]
    assert rows["reward"].to_list() == expected
    errors = rows["error"].to_list()
    assert [i for i, error in enumerate(errors) if error is not None] == list(wrong)
    assert {i: errors[i][: len(WRONG[kind])] for i, kind in wrong.items()} == {i: WRONG[k] for i, k in wrong.items()}


def test_a_late_row_that_gives_its_result_just_before_the_end_leaves_the_next_one_blameless() -> None:
    """The worker is ended for the first row while it is at the second one, which another worker scores."""
    scorer = Scorer(num_workers=1)  # of four rows, the first two go to it together
    try:
        rows = score(scorer, "be_late", ["late", "next", "x", "xx"], time_limit=0.3)
    finally:
        scorer.close()
    assert rows["error"].to_list() == [None] * 4
    assert rows["reward"].to_list() == [4.0, 4.0, 1.0, 2.0]


def test_an_async_function_that_blocks_or_dies_costs_only_its_own_row(scorer: Scorer) -> None:
    texts = ["xx"] * 200
    wrong = {20: "hang", 60: "exit", 100: "crash", 140: "raise", 180: "wait"}
    for row, text in wrong.items():
        texts[row] = text
    rows = score(scorer, "misbehave_async", texts, time_limit=0.5)
    assert rows["reward"].to_list() == [None if i in wrong else 2.0 for i in range(200)]
    errors = rows["error"].to_list()
    assert errors[180] == WRONG["hang"]
    assert {kind: errors[i] for i, kind in wrong.items() if kind in ("hang", "exit", "crash")} == {
        kind: WRONG[kind] for kind in ("hang", "exit", "crash")
    }


def test_an_async_function_that_swallows_its_cancellation_cannot_hold_the_others(scorer: Scorer) -> None:
    rows = score(scorer, "swallow_cancellation", ["stay", "xx", "xx"], time_limit=0.5)
    assert rows["reward"].to_list() == [None, 2.0, 2.0]
    assert rows["error"][0] == WRONG["hang"]


def test_a_timeout_of_the_functions_own_is_its_own_error(scorer: Scorer) -> None:
    rows = score(scorer, "swallow_cancellation", ["own", "own"])
    assert all(error.startswith("TimeoutError: the server said nothing") for error in rows["error"])


def test_what_a_function_does_to_its_arguments_is_not_seen_by_the_next_row(scorer: Scorer) -> None:
    rows = score(scorer, "mutate", ["a"] * 80, arguments={"words": ["x"]})  # enough for chunks of several rows
    assert rows["reward"].to_list() == [3.0] * 80


def test_arguments_may_be_long(scorer: Scorer) -> None:
    words = ["x" * 100] * 5000
    assert score(scorer, "mutate", ["a"], arguments={"words": words})["reward"].to_list() == [5002.0]


def test_async_calls_wait_beside_each_other() -> None:
    with closing(Scorer(num_workers=1)) as scorer:  # of two a slow one could be left with fewer rows than have to meet
        rows = score(scorer, "meet", ["x"] * 64, time_limit=60, concurrency=32)
    assert rows["reward"].to_list() == [1.0] * 64


def test_a_text_that_no_file_can_hold_is_made_one_that_it_can(scorer: Scorer) -> None:
    assert score(scorer, "misbehave", ["surrogate"])["detail"].to_list() == ['"?"']


def test_workers_go_on_to_the_next_rows_after_a_death(scorer: Scorer) -> None:
    score(scorer, "misbehave", ["exit"] * 5)
    assert score(scorer, "misbehave", ["abc"])["reward"].to_list() == [3.0]


def test_a_process_that_a_function_left_behind_ends_with_its_worker(scorer: Scorer, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    score(scorer, "leave_a_process", [str(note)])
    assert survivors(int(note.read_text())) == []


def test_closing_ends_all_processes(tmp_path: Path) -> None:
    scorer = Scorer(num_workers=2)
    score(scorer, "misbehave", ["a", "b"])
    pids = [slot.supervisor.pid for pool in scorer._pools.values() for slot in pool.slots]
    assert len(pids) == 2
    children: list[int] = []

    def all_work() -> bool:  # the second worker may still be starting
        children[:] = [pid for supervisor in pids for pid in descendants(supervisor)]
        return len(children) == 2

    assert until(all_work)
    scorer.close()
    assert survivors(*pids, *children) == []


def test_workers_end_when_the_process_of_their_pool_is_killed() -> None:
    code = (
        "import time\nfrom stages.rewards.functions import *\nfrom stages.rewards.pool import *\n"
        "from stages.rewards.scorer import *\nfrom tests.builders import *\n"
        "import threading, os\n"
        "scorer = Scorer(2)\n"
        "reward = find_reward(RewardConfig(name='r', function='tests.rewards:misbehave'))\n"
        "def watch():\n"
        "    while True:\n"
        "        pools = [s for p in scorer._pools.values() for s in p.slots]\n"
        "        if len(pools) == 2 and all(s.worker and s.worker.chunk for s in pools):\n"
        "            print(*(s.supervisor.pid for s in pools), flush=True)\n"
        "            return\n"
        "        time.sleep(0.05)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "scorer.score(completion_rows({'completion': 'hang'}, {'completion': 'hang'}), prompt_rows({}), [reward])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    supervisors = [int(pid) for pid in process.stdout.readline().split()]  # printed once both score
    workers = [pid for supervisor in supervisors for pid in descendants(supervisor)]
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert survivors(*supervisors, *workers) == []


def test_a_note_is_never_seen_half_written() -> None:
    """A worker writes it for every row while the pool reads it: zeros in between would look like an old time."""
    shared = os.memfd_create("note")
    os.ftruncate(shared, NOTE.size)
    note = mmap.mmap(shared, NOTE.size)
    take_note(note, 1, 1.0)
    writer = os.fork()
    if writer == 0:
        number = 1
        while os.getppid() > 1:
            number += 1
            take_note(note, number, float(number))
    try:
        seen = set()
        ends = time.monotonic() + 120
        while len(seen) < 1000 and time.monotonic() < ends:
            seen.update(NOTE.unpack_from(note, 0) for _ in range(1000))
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    assert len(seen) > 20
    assert [pair for pair in seen if min(pair) < 1] == []


def test_a_frame_function_scores_all_rows_at_once(scorer: Scorer) -> None:
    rows = score(scorer, "length_in_frame", ["a", "bb"], arguments={"scale": 0.5})
    assert rows["reward"].to_list() == [0.5, 1.0]


def test_a_frame_function_may_give_details_and_errors(scorer: Scorer) -> None:
    rows = score(scorer, "frame_with_details", ["7", ""])
    assert rows["reward"].to_list() == [1.0, None]
    assert rows["error"].to_list() == [None, "nothing was said"]
    assert rows["detail"][0] == '{"prompt":"3 + 4","reference":null,"tokens":2}'


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("frame_too_short", "ValueError: the function returned 1 rewards for 2 completions"),
        ("frame_that_dies", "the worker process ended with exit status 4 while it scored this completion"),
        ("frame_that_hangs", WRONG["hang"]),
    ],
)
def test_a_frame_function_that_fails_leaves_every_row_null(scorer: Scorer, function: str, error: str) -> None:
    rows = score(scorer, function, ["a", "bb"], time_limit=0.5)
    assert rows["reward"].to_list() == [None, None]
    assert all(found.startswith(error) for found in rows["error"])


def test_an_expression_needs_no_process(scorer: Scorer) -> None:
    assert score(scorer, "has_seven", ["7", "8", "17"])["reward"].to_list() == [1.0, 0.0, 1.0]
    assert scorer._pools == {}


def test_an_expression_may_give_a_detail(scorer: Scorer) -> None:
    rows = score(scorer, "seven_with_detail", ["7 or 7"], arguments={"word": "7"})
    assert rows["reward"].to_list() == [2.0]
    assert rows["detail"].to_list() == ['{"completion":"7 or 7","task":"t"}']


def test_an_expression_that_fails_leaves_every_row_null(scorer: Scorer) -> None:
    rows = score(scorer, "no_such_column", ["7"])
    assert rows["reward"].to_list() == [None]
    assert "absent" in rows["error"][0]


def test_a_worker_without_memory_for_its_module_is_one_clear_error(scorer: Scorer) -> None:
    with pytest.raises(RewardError, match="is its memory_limit_gib enough"):
        score(scorer, "length_in_frame", ["a"], memory_limit_gib=0.02)
