"""What a judge's server sends: the key is struck out of it in every form, and its size has a limit."""

import gzip
import json
import time
from pathlib import Path
from urllib.parse import quote

import pytest

from stages.rewards.judge.response import MOST_BYTES, make_strike
from tests.judge_server import BARE, Reply, always, ask, be_calm, rows, says, serve

KEY = "sk-Live/0123456789+abcdef=="
ESCAPED = "".join(f"\\u{ord(c):04X}" for c in KEY)
FORMS = {
    "plain": KEY,
    "capitals": KEY.upper(),
    "slash escaped": KEY.replace("/", "\\/"),
    "JSON escapes": ESCAPED,
    "JSON in JSON": ESCAPED.replace("\\", "\\\\\\"),
    "URL": quote(KEY, safe=""),
    "URL twice": quote(quote(KEY, safe=""), safe=""),
    "HTML": "".join(f"&#{ord(c)};" for c in KEY),
    "HTML, hexadecimal": "".join(f"&#x{ord(c):X};" for c in KEY),
}


@pytest.fixture(autouse=True)
def _calm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    be_calm(monkeypatch, tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_the_key_is_struck_out_of_answers_and_errors_in_every_form(
    form: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    # JSON as the server writes it: the form may itself be made of JSON's escapes
    answer = b'{"choices": [{"message": {"content": "Score: 5 %s"}, "finish_reason": "%s"}], "model": "%s"}'
    replies = {
        "answer": Reply(body=answer.replace(b"%s", FORMS[form].encode())),
        "message": Reply(400, b'{"error": {"message": "no %s"}}'.replace(b"%s", FORMS[form].encode())),
        "other JSON": Reply(400, b'{"odd": "no %s"}'.replace(b"%s", FORMS[form].encode())),
        "no JSON": Reply(400, b"no " + FORMS[form].encode()),
        "no chat completion": Reply(200, b'{"odd": "no %s"}'.replace(b"%s", FORMS[form].encode())),
    }
    for name, reply in replies.items():
        with serve(always(reply)) as server:
            found = ask(
                server, rows(name), api_key_env="JUDGE_KEY", cache=str(tmp_path / "kept"), max_retries=0, **BARE
            )
        texts = [text for text in (found["error"][0], found["detail"][0]) if text]
        assert texts, name
        assert all("<API key>" in text for text in texts), (name, texts)
        assert "56789" not in "".join(texts), (name, texts)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_short_key_is_struck_out_as_it_is_written_only() -> None:
    assert make_strike("EMPTY")("EMPTY is empty") == "<API key> is empty"


def test_striking_out_takes_time_in_proportion_to_the_text() -> None:
    began = time.process_time()
    for text in ("\\" * 1_000_000, "%25" * 300_000, "s" * 1_000_000):
        assert make_strike(KEY)(text) == text
    assert time.process_time() - began < 20


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (says("x" * (MOST_BYTES + 1)), "larger than 4,194,304 bytes"),
        (Reply(body=gzip.compress(b" " * 300_000_000, 1), headers={"Content-Encoding": "gzip"}), "larger than"),
        (Reply(body=b"{}", headers={"Content-Encoding": "br"}), "Content-Encoding 'br': expected none"),
        (Reply(body=b"{}", headers={"Content-Encoding": "gzip"}), "what is not gzip"),
    ],
)
def test_a_response_that_is_too_large_or_compressed_oddly_costs_its_row_alone(reply: Reply, error: str) -> None:
    with serve(lambda number, body: reply if body["messages"][-1]["content"] == "bad" else says("Score: 10")) as server:
        found = ask(server, rows("bad", "good"), cache="", **BARE)
    assert found["reward"].to_list() == [None, 1.0]
    assert error in found["error"][0]


def test_a_compressed_answer_is_read() -> None:
    body = gzip.compress(json.dumps({"choices": [{"message": {"content": "Score: 10"}}]}).encode())
    with serve(always(Reply(body=body, headers={"Content-Encoding": "gzip"}))) as server:
        assert ask(server, rows("a"), cache="", **BARE)["reward"].to_list() == [1.0]
