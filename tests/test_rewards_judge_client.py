"""The judge: what becomes of a server that is slow, busy, broken or not there."""

import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, RewardError
from tests.judge_server import BARE, Reply, always, ask, be_calm, echo, fails, rows, says, serve


@pytest.fixture(autouse=True)
def _calm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    be_calm(monkeypatch, tmp_path)


def test_no_more_requests_than_allowed_are_under_way() -> None:
    with serve(always(says("Score: 1", delay_seconds=0.2))) as server:
        ask(server, rows(*map(str, range(12))), concurrency=3)
    assert server.most_at_once == 3


def test_requests_keep_to_the_rate() -> None:
    times: list[float] = []

    def note(number: int, body: dict[str, Any]) -> Reply:
        times.append(time.monotonic())
        return says("Score: 1")

    with serve(note) as server:
        began = time.monotonic()
        ask(server, rows(*map(str, range(5))), requests_per_minute=600)
    assert 0.39 <= max(times) - began < 60  # four gaps of 0.1 s


def test_retry_after_stops_all_requests_for_as_long_as_it_says() -> None:
    times: list[float] = []

    def limited(number: int, body: dict[str, Any]) -> Reply:
        times.append(time.monotonic())
        return fails(429, "slow down", Retry_After="0.6") if number == 0 else says("Score: 10")

    with serve(limited) as server:
        found = ask(server, rows("a", "b", "c"), concurrency=1)
    assert found["reward"].to_list() == [1.0, 1.0, 1.0]
    assert len(times) == 4
    assert times[1] - times[0] >= 0.59


def test_being_told_to_wait_often_loses_no_request() -> None:
    with serve(lambda number, body: fails(429, Retry_After="0.01") if number < 9 else says("Score: 10")) as server:
        assert ask(server, rows("a"), max_retries=1)["reward"].to_list() == [1.0]


def test_retry_after_may_be_a_date() -> None:
    late = formatdate(time.time() + 3600, usegmt=True)
    with (
        serve(always(fails(429, "come back", Retry_After=late))) as server,
        pytest.raises(RewardError, match=r"HTTP 429: come back, and asks to wait 3[56]\d\d"),
    ):
        ask(server, rows("a"))


@pytest.mark.parametrize(
    ("trouble", "error"),
    [
        (fails(500, "out of memory"), "no answer after 3 attempts: HTTP 500: out of memory"),
        (fails(503, "loading", Retry_After="0"), "no answer after 3 attempts: HTTP 503: loading"),
        (Reply(is_dropped=True), "no answer after 3 attempts: RemoteProtocolError"),
        (says("Score: 1", delay_seconds=600), "no answer after 3 attempts: no answer within 1.5 s"),
        (Reply(body=b"<html>Welcome</html>"), "the server sent no chat completion: <html>Welcome</html>"),
        (Reply(body=b'{"choices": []}'), "the server sent no chat completion"),
        (Reply(body=b'{"choices": [{"message": {"content": [1]}}]}'), "the server sent no chat completion"),
        (Reply(body=b"\xff\x00"), "the server sent no chat completion"),
    ],
)
def test_trouble_is_repeated_and_then_null_with_its_error(trouble: Reply, error: str) -> None:
    def for_one(number: int, body: dict[str, Any]) -> Reply:
        return trouble if body["messages"][-1]["content"] == "bad" else says("Score: 10")

    with serve(for_one) as server:
        found = ask(server, rows("good", "bad"), timeout=1.5 if trouble.delay_seconds else 60, **BARE)
    assert found["reward"].to_list() == [1.0, None]
    assert error in found["error"][1]
    assert server.prompts.count("bad") == 3


@pytest.mark.parametrize("trouble", [fails(500), fails(429), Reply(is_dropped=True), Reply(body=b"?")])
def test_trouble_that_passes_leaves_no_trace(trouble: Reply) -> None:
    with serve(lambda number, body: trouble if number < 2 else says("Score: 10")) as server:
        assert ask(server, rows("x"))["reward"].to_list() == [1.0]


def test_a_refused_request_is_null_at_once() -> None:
    with serve(lambda number, body: fails(400, "too long") if number == 0 else says("Score: 10")) as server:
        found = ask(server, rows("a", "b"), concurrency=1)
    assert found["reward"].to_list() == [None, 1.0]
    assert found["error"][0] == "HTTP 400: too long"
    assert len(server.bodies) == 2


def test_a_server_that_is_not_there_is_one_clear_message_and_soon() -> None:
    with serve(echo) as server:
        pass
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"no server answers at http://127.* \(ConnectError.*start it"):
        ask(server, rows(*map(str, range(5000))), max_retries=9)
    assert time.monotonic() - start < 30  # asking for each row would take minutes


@pytest.mark.parametrize("status", [401, 404])
def test_a_refused_key_or_model_ends_all_at_once(status: int) -> None:
    with (
        serve(always(fails(status, "there is no model m"))) as server,
        pytest.raises(RewardError, match=rf"HTTP {status}: there is no model m: check base_url, model"),
    ):
        ask(server, rows(*map(str, range(200))), concurrency=2)
    assert len(server.bodies) <= 4


def test_a_server_that_has_died_is_not_asked_to_the_end() -> None:
    with (
        serve(lambda number, body: says("Score: 1") if number < 5 else fails(500, "dead")) as server,
        pytest.raises(RewardError, match=r"20 requests in a row were lost; the last one: .*HTTP 500: dead"),
    ):
        ask(server, rows(*map(str, range(500))), concurrency=4, max_retries=1)
    assert len(server.bodies) <= 5 + 2 * 24


def test_many_losses_among_answers_end_nothing() -> None:
    with serve(lambda number, body: fails(500) if number % 2 else says("Score: 10")) as server:
        found = ask(server, rows(*map(str, range(50))), concurrency=1, max_retries=0)
    assert found["reward"].to_list() == [1.0, None] * 25


def test_when_every_request_is_refused_the_rest_is_not_sent() -> None:
    with (
        serve(always(fails(400, "unknown field seed"))) as server,
        pytest.raises(RewardError, match=r"the first 100 requests were refused; .*unknown field seed"),
    ):
        ask(server, rows(*map(str, range(500))), concurrency=4)
    assert len(server.bodies) <= 108


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_url": "localhost:8000"}, "give one such as http://localhost:8000/v1"),
        ({"base_url": "http://me:pw@host/v1"}, "base_url holds a user or password"),
        ({"base_url": "http://host:port/v1"}, "Port could not be cast"),
        ({"concurrency": 0}, "concurrency: Input should be greater than or equal to 1, found 0"),
        ({"timeout": float("inf")}, "timeout: Input should be a finite number"),
        ({"leave_out": "seed"}, "leave_out: 'str' instances are not allowed"),
        ({"concurrency": 0, "temprature": 1}, "(?s)concurrency: .* did you mean temperature?"),
        ({"prompt_template": "nonsense"}, r"which has no \{completion\}"),
        ({"verdict": "score"}, "a pattern with 0 groups"),
        ({"verdict": "(("}, "no regular expression"),
        ({"verdict": "json:"}, "give json:key"),
        ({"scale": [3, 3]}, r"give \[worst, best\]"),
        ({"scale": {"yes": 1, "YES": 0}}, "each word, written once"),
        ({"criteria": {"a": "?"}, "weights": {"b": 1}}, r"weights names \['b'\]"),
        ({"criteria": {"a": "?"}, "verdict": "(x)"}, "leave one out"),
        ({"criteria": {"a": "?"}, "prompt_template": "{completion}"}, "belong together"),
        ({"extra": {"stream": True}}, r"extra holds \['stream'\]"),
        ({"extra": {"top_p": float("nan")}}, "cannot be sent as JSON"),
        ({"ask_again": 1, "leave_out": ["seed"]}, "another seed"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1, found 0"),
        ({"scale": [True, 3]}, "scale"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(arguments: dict[str, Any], message: str) -> None:
    with serve(echo) as server, pytest.raises(ConfigError, match=message):
        ask(server, rows("x"), **arguments)
    assert server.bodies == []


def test_a_key_that_is_not_there_is_named() -> None:
    with serve(echo) as server, pytest.raises(RewardError, match="NO_SUCH_KEY, which is not set"):
        ask(server, rows("x"), api_key_env="NO_SUCH_KEY")
    assert server.bodies == []
