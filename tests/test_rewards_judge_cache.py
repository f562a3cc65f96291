"""The judge: what its cache keeps, shares, and survives."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import duckdb
import pytest

from pipeline.errors import RewardError, SchemaError
from stages.rewards.judge.judge import judge
from tests.judge_server import BARE, JudgeServer, Reply, always, ask, be_calm, echo, fails, kept, rows, says, serve

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _calm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    be_calm(monkeypatch, tmp_path)


def test_scoring_again_makes_no_call_and_gives_the_same_bytes(tmp_path: Path) -> None:
    frame = rows("1", "10", "hm", "5")
    with serve(echo) as server:
        first = ask(server, frame, cache=str(tmp_path / "kept"), **BARE)
    # the server is gone, the key is not set, the address is another one
    away = {"base_url": "http://127.0.0.1:9/v1", "api_key_env": "NO_SUCH_KEY", "cache": str(tmp_path / "kept")}
    again = judge(frame, model="m", **away, **BARE)
    assert again.equals(first)
    assert first["reward"].to_list() == [0.0, 1.0, None, pytest.approx(4 / 9)]


def test_equal_requests_are_sent_once() -> None:
    with serve(echo) as server:
        assert ask(server, rows("1", "10", "1", "1"), **BARE)["reward"].to_list() == [0.0, 1.0, 0.0, 0.0]
    assert sorted(server.prompts) == ["1", "10"]


@pytest.mark.parametrize(
    "change", [{"model": "other"}, {"temperature": 0.5}, {"seed": 1}, {"system": "s"}, {"extra": {"top_p": 0.5}}]
)
def test_what_decides_the_answer_is_asked_anew(change: dict[str, Any]) -> None:
    with serve(echo) as server:
        ask(server, rows("1"), **BARE)
        ask(server, rows("1"), **BARE, concurrency=1, timeout=9, scale=[0, 1])
        assert len(server.bodies) == 1
        ask(server, rows("1"), **BARE, **change)
    assert len(server.bodies) == 2


def test_failures_are_not_kept() -> None:
    with serve(lambda number, body: fails(400) if number == 0 else says("Score: 10")) as server:
        assert ask(server, rows("x"))["reward"].to_list() == [None]
        assert ask(server, rows("x"))["reward"].to_list() == [1.0]


def test_an_empty_cache_name_keeps_nothing(tmp_path: Path) -> None:
    with serve(echo) as server:
        ask(server, rows("1"), cache="", **BARE)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_a_dataset_that_duckdb_reads() -> None:
    with serve(echo) as server:
        ask(server, rows("1"), system="s", **BARE)
    found = duckdb.sql(
        "select model, messages[2].content, sampling, answer, finish_reason, served_model, num_prompt_tokens, "
        "num_completion_tokens, length(request_hash) from 'judgements/*.parquet'"
    ).fetchall()
    sampling = '{"max_tokens":1024,"seed":0,"temperature":0.0}'
    assert found == [("m", "1", sampling, "Fine.\nScore: 1", "stop", "judge-2024", 11, 3, 64)]


def test_foreign_and_damaged_files_in_the_cache_are_named(tmp_path: Path) -> None:
    with serve(echo) as server:
        (tmp_path / "judgements").mkdir()
        (tmp_path / "judgements" / "a.parquet").write_bytes(b"PAR1 half a file")
        with pytest.raises(RewardError, match=r"a\.parquet cannot be read .*delete it"):
            ask(server, rows("1"), **BARE)
        rows("1").write_parquet(tmp_path / "judgements" / "a.parquet")
        with pytest.raises(SchemaError, match=r"a\.parquet does not have the schema of judgements"):
            ask(server, rows("1"), **BARE)


def test_half_a_surrogate_pair_in_an_answer_can_be_kept() -> None:
    with serve(always(says("Score: 10 \ud83d"))) as server:
        first = ask(server, rows("x"))
        assert ask(server, rows("x")).equals(first)
    assert json.loads(first["detail"][0])["answer"] == "Score: 10 ?"


CHILD = """
import sys, polars as pl
from stages.rewards.judge import cache as judge_cache
from stages.rewards.judge.judge import judge
judge_cache.SAVE_SECONDS = 0.05
url, cache, first, last = sys.argv[1:]
frame = pl.DataFrame({"completion": [str(i) for i in range(int(first), int(last))]})
found = judge(
    frame, base_url=url, model="m", prompt_template="{completion}", scale=[0, 100], concurrency=2, cache=cache
)
print(found["reward"].sum())
"""


def start_child(server: JudgeServer, cache: Path, first: int, last: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", CHILD, server.base_url, str(cache), str(first), str(last)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_a_killed_process_leaves_the_answers_it_has_received(tmp_path: Path) -> None:
    def stuck(number: int, body: dict[str, Any]) -> Reply:
        text = body["messages"][-1]["content"]
        return says(f"Score: {text}", delay_seconds=60 if int(text) >= 10 else 0)

    with serve(stuck) as server, start_child(server, tmp_path / "kept", 0, 20) as child:
        deadline = time.monotonic() + 300
        while len(kept(tmp_path / "kept")) < 10 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(child.pid, signal.SIGKILL)
    with serve(echo) as server:
        found = ask(server, rows(*map(str, range(20))), scale=[0, 100], cache=str(tmp_path / "kept"), **BARE)
    assert found["reward"].sum() == pytest.approx(1.9)
    assert sorted(server.prompts, key=int) == [str(i) for i in range(10, 20)]


def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    def slow(number: int, body: dict[str, Any]) -> Reply:
        return says(f"Score: {body['messages'][-1]['content']}", delay_seconds=0.02)

    with serve(slow) as server:
        one = start_child(server, tmp_path / "kept", 0, 40)
        two = start_child(server, tmp_path / "kept", 20, 60)
        with one, two:
            sums = [float(child.communicate(timeout=600)[0]) for child in (one, two)]
    assert sums == [pytest.approx(7.8), pytest.approx(15.8)]
    found = kept(tmp_path / "kept")
    assert found["request_hash"].n_unique() == 60
    assert len(found) == len(server.bodies)
