"""`grpo report --live`: who gets the page, what it follows, and what is left when it ends."""

import base64
import hashlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from socket import create_connection
from urllib.request import urlopen

import pytest

from flows import notes
from flows.commands.report import report
from flows.report.live import LivePage, news, served_at, serving
from flows.report.render import PAGE, Following, collector, render
from pipeline.errors import ArtifactMissing, UsageError
from pipeline.files import locked
from pipeline.run_dir import RunDir
from pipeline.runs import lock, run_at
from tests.builders import check_rows, completion_rows, write_artifact
from tests.processes import until
from tests.report_runs import new_run, write_iteration
from tests.stores import new_machine


class Served:
    """The page of a run, with what its terminal was told."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.told: list[str] = []
        self.live = LivePage(str(run.root), collector(), self.told.append)
        self.port = 0

    @contextmanager
    def on(self) -> Iterator["Served"]:
        self.live.look()
        with serving(self.live, 0) as url:
            self.port = int(url.rpartition(":")[2].strip("/"))
            yield self

    def ask(self, path: str = "/", method: str = "GET", **headers: str) -> tuple[HTTPResponse, bytes]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer, answer.read()
        finally:
            connection.close()

    def body(self, path: str = "/") -> str:
        answer, body = self.ask(path)
        assert answer.status == 200
        return body.decode()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Return the page of a run that has just begun; not to be changed."""
    with Served(new_run(tmp_path_factory.mktemp("begun"))).on() as served:
        yield served


def test_the_page_is_the_report_and_a_line_that_says_what_it_follows(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    write_iteration(run, 0)
    with Served(run).on() as served:
        state = served.body("/state")
        assert (state, 0) == news(run)
        page = served.body()
        assert page == render(collector()(run), Following(state, "as of iteration 0"))
        assert f'data-state="{state}"' in page
        assert ">Following the run, as of iteration 0.</p>" in page


def test_a_head_has_no_body(served: Served) -> None:
    with create_connection(("127.0.0.1", served.port), timeout=60) as connection:
        connection.sendall(f"HEAD / HTTP/1.0\r\nHost: localhost:{served.port}\r\n\r\n".encode())
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 OK")
    assert f"Content-Length: {len(served.body().encode())}\r\n".encode() in head
    assert body == b""


def test_a_page_that_is_served_may_ask_its_server_and_a_file_nobody(served: Served) -> None:
    digest = base64.b64encode(hashlib.sha256((PAGE / "live.js").read_bytes()).digest()).decode()
    page = unescape(served.body())
    assert f"' 'sha256-{digest}'; style-src" in page
    assert "; connect-src 'self'; base-uri 'none'" in page
    written = render(collector()(served.run))
    assert [word for word in (digest, "connect-src", "fetch(", 'id="live"') if word in written] == []


def test_no_other_site_may_read_frame_or_keep_an_answer(served: Served) -> None:
    wanted = {
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Content-Security-Policy": "frame-ancestors 'none'",
    }
    for path in ("/", "/state", "/absent"):
        answer, _ = served.ask(path, Origin="http://elsewhere.example")
        assert {name: answer.headers[name] for name in wanted} == wanted
        assert [name for name in answer.headers if name.lower().startswith("access-control")] == []


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"Host": "elsewhere.example"}, 403),
        ({"Host": "elsewhere.example:{port}"}, 403),
        ({"Host": "127.0.0.1"}, 403),
        ({"Host": "localhost:{port}"}, 200),
        ({"path": "/config.toml"}, 404),
        ({"path": "/../config.toml"}, 404),
        ({"path": "//127.0.0.1/"}, 404),
        ({"path": "http://127.0.0.1:{port}/state"}, 404),
        ({"method": "POST"}, 405),
        ({"method": "DELETE", "path": "/state"}, 405),
        ({"method": "OPTIONS"}, 405),
    ],
)
def test_only_the_page_is_given_and_only_under_its_own_name(
    served: Served, request_: dict[str, str], status: int
) -> None:
    answer, body = served.ask(**{name: text.format(port=served.port) for name, text in request_.items()})
    assert answer.status == status
    assert (b"<html" in body) is (status == 200)


def test_a_new_iteration_makes_a_new_page_and_nothing_new_makes_none(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with Served(run).on() as served:
        before, state = served.body(), served.body("/state")
        assert "Following the run, no iteration is finished yet." in before
        assert "No iteration has rewards or answers yet." in before
        page = served.live.page
        served.live.look()
        assert served.live.page is page
        write_iteration(run, 0)
        assert (served.body(), served.body("/state")) == (before, state)
        served.live.look()
        assert "as of iteration 0." in served.body()
        assert served.body("/state") != state
        assert served.told == []


def test_finished_checks_evaluations_and_updates_are_news_and_answers_are_none(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    seen = [news(run)]
    write_artifact(run.place(3, "completions"), "completions", completion_rows({}))
    assert news(run) == seen[0]
    for place in (run.place(-1, "evaluations"), run.place(3, "checks"), run.place(3, "policy")):
        write_artifact(place, "checks", check_rows())
        seen.append(news(run))
    run.metrics.touch()
    seen.append(news(run))
    assert len(set(seen)) == 5
    assert [last for _, last in seen] == [None, None, 3, 3, 3]


def test_a_run_that_cannot_be_read_for_a_moment_keeps_its_page(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with Served(run).on() as served:
        before = served.body()
        write_artifact(run.place(0, "checks"), "checks", check_rows())
        part = run.place(0, "checks") / "part-00000.parquet"
        whole = part.read_bytes()
        part.write_bytes(b"")
        served.live.look()
        served.live.look()
        assert served.body() == before
        [told] = served.told
        assert "has 0 bytes, its manifest says" in told
        part.write_bytes(whole)
        served.live.look()
        assert "as of iteration 0." in served.body()


def test_a_run_that_cannot_be_read_from_the_start_has_a_page_that_waits(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.metrics.write_bytes(b"PAR1 <img src=x>")
    run.iteration(0).mkdir(parents=True)
    with Served(run).on() as served:
        assert "Following the run, which cannot be read yet: " in served.body()
        assert "<img" not in served.body()
        run.metrics.unlink()
        served.live.look()
        assert "Following the run, no iteration is finished yet." in served.body()


def test_a_run_on_an_object_store_is_followed_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"memory://bucket/{tmp_path.parent.name}/{tmp_path.name}"

    def write(iteration: int) -> None:
        new_machine(tmp_path / "writer", monkeypatch)
        with lock(run := run_at(url)):
            run.record_config("", {})
            write_artifact(run.place(iteration, "checks"), "checks", check_rows())
        new_machine(tmp_path / "reader", monkeypatch)

    write(0)
    live = LivePage(url, collector(), pytest.fail)
    for iteration in (0, 1):
        live.look()
        assert f"as of iteration {iteration}.".encode() in live.page.html
        write(iteration + 1)


def test_others_find_the_page_as_long_as_it_is_served(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    assert served_at(run) is None
    with Served(run).on() as served:
        assert served_at(run) == f"http://127.0.0.1:{served.port}/"
        with Served(run).on() as second:
            assert second.body() == served.body()
        assert served_at(run) == f"http://127.0.0.1:{served.port}/"
    assert served_at(run) is None
    assert not (run.logs / "report.json").exists()


@pytest.mark.parametrize("note", [b"", b"\xff", b"[]", b"{}", b'{"url": "http://127.0.0.1:80/"}', b" " * 100_000])
def test_a_note_that_is_none_of_this_run_leads_nowhere(tmp_path: Path, note: bytes) -> None:
    run = new_run(tmp_path)
    run.logs.mkdir()
    (run.logs / "report.json").write_bytes(note)
    with locked(run.logs / "report.lock"):
        assert served_at(run) is None


@pytest.mark.parametrize(
    ("url", "is_ours"),
    [
        ("http://127.0.0.1:80/", True),
        ("http://elsewhere.example/", False),
        ("http://127.0.0.1:80/\n", False),
        ("http://127.0.0.1:80@elsewhere.example/", False),
        (1, False),
    ],
)
def test_a_note_leads_to_this_machine_alone(tmp_path: Path, url: object, is_ours: bool) -> None:
    run = new_run(tmp_path)
    notes.write(run, "report.json", {"url": url})
    with locked(run.logs / "report.lock"):
        assert served_at(run) == (url if is_ours else None)


def test_the_note_of_a_killed_server_leads_nowhere(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.logs.mkdir()
    (run.logs / "report.lock").touch()
    notes.write(run, "report.json", {"url": "http://127.0.0.1:80/"})
    assert served_at(run) is None


def test_a_run_without_room_for_a_note_is_served_all_the_same(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.logs.write_text("no folder")
    with Served(run).on() as served:
        assert "Following the run" in served.body()
        assert served_at(run) is None


def test_a_note_that_cannot_be_written_or_removed_costs_nothing(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    (run.logs / "report.json").mkdir(parents=True)
    with Served(run).on() as served:
        assert "Following the run" in served.body()
    with Served(run).on() as served:
        pass
    (run.logs / "report.json").rmdir()
    with Served(run).on() as served:
        (run.logs / "report.json").unlink()
        (run.logs / "report.json").mkdir()
    assert served_at(run) is None


def test_no_note_is_written_through_a_link(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    run.logs.symlink_to(tmp_path / "elsewhere")
    with Served(run).on() as served:
        assert "Following the run" in served.body()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_mistaken_arguments_of_a_served_report_are_told(tmp_path: Path) -> None:
    run = str(new_run(tmp_path).root)
    with pytest.raises(ArtifactMissing, match="not a run directory"):
        report(str(tmp_path), live=True)
    with pytest.raises(UsageError, match="--live writes none"):
        report(run, output=tmp_path / "page.html", live=True)
    with pytest.raises(UsageError, match="without --live"):
        report(run, port=8000)
    with pytest.raises(UsageError, match="at least one group"):
        report(run, groups=0, live=True)
    with Served(RunDir(Path(run))).on() as served, pytest.raises(UsageError, match="another one"):
        report(run, live=True, port=served.port)


@pytest.mark.slow
def test_the_command_answers_follows_and_ends_in_order(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    command = [sys.executable, "-m", "flows.cli", "report", str(run.root), "--live"]
    with subprocess.Popen(command, cwd=PAGE.parents[2], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[0]
            assert served_at(run) == url

            def body(path: str = "") -> str:
                with urlopen(f"{url}{path}", timeout=60) as answer:
                    return str(answer.read().decode())

            state = body("state")
            assert "no iteration is finished yet" in body()
            write_iteration(run, 0)
            assert until(lambda: body("state") != state)
            assert until(lambda: "as of iteration 0." in body())
            process.send_signal(signal.SIGTERM)
            assert process.stdout.read() == "the page is no longer served\n"
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert served_at(run) is None
    assert not (run.logs / "report.json").exists()
