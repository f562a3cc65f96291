"""`grpo report --live`: the page of a run on this machine's loopback, made anew while the run goes on.

Whoever asks gets the page and nothing else. A page's own Content-Security-Policy says what it may do; a name that leads
to 127.0.0.1 (DNS rebinding) opens no door, since the Host header must be ours. The run is only read, but for a note in
its logs that says where its page is.
"""

import functools
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from flows import notes
from pipeline.chain import INITIAL
from pipeline.errors import GrpoError, UsageError
from pipeline.files import identity, is_locked, locked
from pipeline.manifest import MANIFEST
from pipeline.object_store import local_path
from pipeline.run_dir import RunDir
from pipeline.runs import open_run

if TYPE_CHECKING:
    from stages.inspect.report_data import Report

HOST = "127.0.0.1"
NOTE, LOCK = "report.json", "report.lock"
"""In a run's logs: where its page is served, and what its server holds as long as it lives."""
URL = re.compile(rf"http://{re.escape(HOST)}:[0-9]{{1,5}}/")
WATCHED = ("advantages", "checks", "policy", "evaluations")
"""Datasets whose end is news."""
LOOK_SECONDS = 3.0
STORE_SECONDS = 30.0
"""The same for a run on an object store, which is asked for everything new."""
REST = 4
"""After a look it waits so many times as long as that took, so that the run keeps the processor."""
REQUEST_SECONDS = 30.0
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "frame-ancestors 'none'",  # the page itself cannot say this; it says the rest
}


class Page(NamedTuple):
    """What is served."""

    state: str
    html: bytes


class LivePage:
    """The page of a run that goes on, as of the last look."""

    def __init__(self, where: str, collect: "Callable[[RunDir], Report]", complain: Callable[[str], None]) -> None:
        self.where, self.collect, self.complain = where, collect, complain
        self.page = Page("", b"")
        self.is_ended = False
        self._told = ""

    def look(self) -> None:
        """Make the page anew if the run has something new; keep it when that fails, as it may in mid-write."""
        try:
            run = open_run(self.where)
            state, last = news(run)
            if state != self.page.state:
                text = "no iteration is finished yet" if last is None else f"as of iteration {last}"
                self.page = _page(self.collect(run), state, text)
            self._told = ""
        except (Exception, pl.exceptions.PanicException) as error:
            found = str(error) if isinstance(error, GrpoError) else f"{type(error).__name__}: {error}"
            if not self.page.html:
                self.page = _waiting(self.where, found)
            if found != self._told:
                self.complain(f"the page stays as it is until the run can be read: {found}")
            self._told = found

    def follow(self) -> None:
        """Look again and again, until `is_ended`."""
        least = STORE_SECONDS if local_path(self.where) is None else LOOK_SECONDS
        seconds = 0.0
        while not self.is_ended:
            time.sleep(max(least, REST * seconds))
            begin = time.monotonic()
            self.look()
            seconds = time.monotonic() - begin


def _page(report: "Report", state: str, text: str) -> Page:
    from flows.report.render import Following, render

    return Page(state, render(report, Following(state, text)).encode())


def _waiting(where: str, why: str) -> Page:
    """Return a page about nothing, for a run that cannot be read yet."""
    from stages.inspect.report_data import Report

    return _page(Report(where), "waiting", f"which cannot be read yet: {why}")


def news(run: RunDir) -> tuple[str, int | None]:
    """Return a word that changes when the run has something new, and the last iteration of which it has. Read-only.

    It costs a look at the names of files, not into them.
    """
    found = {
        index: stamps
        for index in (INITIAL, *run.iterations())
        if any(stamps := [_stamp(run.place(index, dataset) / MANIFEST) for dataset in WATCHED])
    }
    last = max((index for index in found if index != INITIAL), default=None)
    return identity(_stamp(run.resolved_config), _stamp(run.metrics), found), last


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    server_version, sys_version = "grpo", ""
    timeout = REQUEST_SECONDS

    def __init__(self, live: LivePage, *connection: Any) -> None:
        self.live = live
        super().__init__(*connection)

    def handle(self) -> None:
        with suppress(OSError):  # the browser has gone
            super().handle()

    def do_GET(self) -> None:
        port = self.connection.getsockname()[1]
        hosts = self.headers.get_all("Host", [])
        page = self.live.page
        if [host.lower() for host in hosts] not in ([f"{HOST}:{port}"], [f"localhost:{port}"]):
            self.send_error(HTTPStatus.FORBIDDEN, explain=f"the page is that of {HOST}:{port} and localhost:{port}")
        elif self.path == "/":
            self._answer(HTTPStatus.OK, "text/html", page.html)
        elif self.path == "/state":
            self._answer(HTTPStatus.OK, "text/plain", page.state.encode())
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    do_HEAD = do_GET

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        status = HTTPStatus(code)
        if status == HTTPStatus.NOT_IMPLEMENTED:
            status = HTTPStatus.METHOD_NOT_ALLOWED
        self._answer(status, "text/plain", (explain or status.phrase).encode(), Allow="GET, HEAD")

    def _answer(self, status: HTTPStatus, kind: str, body: bytes, **headers: str) -> None:
        self.send_response(status)
        facts = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body))}
        for name, value in {**facts, **HEADERS, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing: what a request holds is anybody's."""


@contextmanager
def serving(live: LivePage, port: int) -> Iterator[str]:
    """Yield the URL at which the page answers; port 0 takes a free one.

    Raises:
        UsageError: when the port cannot be listened on.
    """
    try:
        server = ThreadingHTTPServer((HOST, port), functools.partial(Handler, live))
    except OSError as error:
        raise UsageError(f"port {port} cannot be listened on ({error.strerror}): name another one (--port)") from error
    with server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            url = f"http://{HOST}:{server.server_port}/"
            with _noted(open_run(live.where), url):
                yield url
        finally:
            server.shutdown()


@contextmanager
def _noted(run: RunDir, url: str) -> Iterator[None]:
    """Leave a note of the page in the run's logs, where that can be: a stranger's run may be read-only.

    Where another process serves the page too, its note stays.
    """
    with ExitStack() as held:
        with suppress(OSError):
            if not run.logs.is_symlink():
                run.logs.mkdir(exist_ok=True)
                held.enter_context(locked(run.logs / LOCK, wait=False))
                (run.logs / NOTE).unlink(missing_ok=True)  # a killed server's
                notes.write(run, NOTE, {"url": url})
                held.enter_context(suppress(OSError))
                held.callback((run.logs / NOTE).unlink, missing_ok=True)
        yield


def served_at(run: RunDir) -> str | None:
    """Return the URL at which a process of this machine serves the page of a run, None where none does. Read-only."""
    try:
        if not is_locked(run.logs / LOCK):
            return None
        url = notes.read(run, NOTE).get("url")
        return url if isinstance(url, str) and URL.fullmatch(url) else None
    except OSError:  # no lock of ours
        return None
