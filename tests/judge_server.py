"""A small OpenAI-compatible chat server in a thread, which can also misbehave, and remembers what it was asked."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from stages.rewards.judge import client
from stages.rewards.judge.judge import judge


@dataclass(frozen=True, slots=True)
class Reply:
    """What to do with a request."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    is_dropped: bool = False
    """The connection is closed without an answer."""
    delay_seconds: float = 0.0
    """Ends early when the server does."""


def says(text: str | None, finish_reason: str = "stop", **reply: Any) -> Reply:
    """Return a proper chat completion."""
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    found = {"id": "x", "object": "chat.completion", "model": "judge-2024", "choices": [choice], "usage": usage}
    return Reply(body=json.dumps(found).encode(), **reply)


def fails(status: int, message: str = "no", **headers: str) -> Reply:
    """Return an error in the usual form; ``Retry_After="1"`` becomes the header."""
    body = json.dumps({"error": {"message": message, "code": status}}).encode()
    return Reply(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


@dataclass(slots=True)
class JudgeServer:
    """A running server."""

    reply: Callable[[int, dict[str, Any]], Reply]
    """From the number of the request (0 = the first) and its body."""
    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.bodies]


@contextmanager
def serve(reply: Callable[[int, dict[str, Any]], Reply]) -> Iterator[JudgeServer]:
    """Yield a server that answers with ``reply`` until the block ends."""
    server = JudgeServer(reply)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet: two would wait for each other

        def do_GET(self) -> None:
            self._send(Reply(body=b'{"object": "list", "data": []}'))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                number = len(server.bodies)
                server.bodies.append(body)
                server.headers.append(dict(self.headers))
                server.num_at_once += 1
                server.most_at_once = max(server.most_at_once, server.num_at_once)
            found = server.reply(number, body)
            server.ended.wait(found.delay_seconds)
            with server.lock:
                server.num_at_once -= 1
            if found.is_dropped:
                self.close_connection = True
                return
            self._send(found)

        def _send(self, found: Reply) -> None:
            try:
                self.send_response(found.status)
                for name, value in {"Content-Type": "application/json", **found.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(found.body)))
                self.end_headers()
                self.wfile.write(found.body)
            except ConnectionError:
                self.close_connection = True  # the client has gone: it timed out, or was killed

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that was killed resets its connections

    with Quiet(("127.0.0.1", 0), Handler) as http:
        server.port = http.server_address[1]
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            http.shutdown()
            thread.join()


def be_calm(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let repetitions come soon, calls stay on this machine, and files land in ``folder``."""
    monkeypatch.setattr(client, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(folder)


def rows(*texts: str, **facts: Any) -> pl.DataFrame:
    return pl.DataFrame([{"completion": text, "prompt": "3 + 4", "metadata": "{}", **facts} for text in texts])


def ask(server: JudgeServer, completions: pl.DataFrame, **arguments: Any) -> pl.DataFrame:
    return judge(completions, **{"base_url": server.base_url, "model": "m", "max_retries": 2, **arguments})


def echo(number: int, body: dict[str, Any]) -> Reply:
    """Give as score what the completion says."""
    return says(f"Fine.\nScore: {body['messages'][-1]['content']}")


def always(reply: Reply) -> Callable[[int, dict[str, Any]], Reply]:
    return lambda number, body: reply


BARE: dict[str, Any] = {"prompt_template": "{completion}"}


def kept(cache: Path) -> pl.DataFrame:
    """Return the rows of a cache so far."""
    return pl.read_parquet(cache / "*.parquet") if list(cache.glob("*.parquet")) else pl.DataFrame()
