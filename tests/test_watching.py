"""What a Prefect server is told of a run: keys, payloads, the table, how often; and a server that is gone or slow."""

import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.events.clients import AssertingEventsClient
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import artifacts, events
from flows.artifacts import Pace, Teller, key_of
from flows.reporter import SilentReporter
from flows.schedule.automations import FLOWS
from flows.watching import Watcher, markdown, table_row, where_to_look
from pipeline.run_dir import RunDir
from pipeline.schema import SCHEMAS
from tests.test_checks import outcome

NOWHERE = "http://127.0.0.1:9/api"


def metrics(**figures: Any) -> dict[str, Any]:
    return {**dict.fromkeys(SCHEMAS["metrics"].names), "iteration": 3, "reward_mean": 0.5, "pass_rate": 0.25, **figures}


def failed_check(**settings: Any) -> dict[str, Any]:
    return outcome({"where": "reward < 0.5", "name": "never wrong", "severity": "block", **settings})


@pytest.fixture
def emitted() -> Iterator[Callable[[], list[tuple[str, Any]]]]:
    """Return a function that returns names and iterations of the events that were sent; no server gets them."""
    AssertingEventsClient.reset()
    EventsWorker.set_client_override(AssertingEventsClient)

    def found() -> list[tuple[str, Any]]:
        EventsWorker.drain_all()
        sent = [event for client in AssertingEventsClient.all for event in client.events]
        return [(event.event, event.payload["iteration"]) for event in sent]

    with temporary_settings({PREFECT_API_URL: NOWHERE}):
        yield found
    EventsWorker.set_client_override(None)


def watcher(*recorded: int) -> Watcher:
    return Watcher(
        SilentReporter(), RunDir(Path("runs/demo")), uuid4(), Teller(lambda _: None), recorded=frozenset(recorded)
    )


def test_an_iteration_of_an_earlier_start_is_no_news(emitted: Callable[[], list[tuple[str, Any]]]) -> None:
    watching = watcher(0, 1)
    for iteration in range(3):
        watching.iteration(metrics(iteration=iteration))
    assert emitted() == [(events.ITERATION_FINISHED, 2)]


def test_a_collapse_is_told_once_whatever_says_so(emitted: Callable[[], list[tuple[str, Any]]]) -> None:
    watching = watcher()
    watching.check(3, outcome({"check": "reward_not_collapsed", "max_share": 0.4}))
    watching.iteration(metrics(zero_variance_share=1.0))
    watching.iteration(metrics(zero_variance_share=1.0, iteration=4))
    watching.check(5, failed_check())
    assert emitted() == [
        (events.CHECK_FAILED, 3),
        (events.REWARD_COLLAPSED, 3),
        (events.ITERATION_FINISHED, 3),
        (events.ITERATION_FINISHED, 4),
        (events.REWARD_COLLAPSED, 4),
        (events.CHECK_FAILED, 5),
    ]


def test_an_alert_on_flow_runs_is_of_the_flows_of_this_program() -> None:
    from flows.audit import audit
    from flows.evaluate import evaluate
    from flows.rescore import rescore
    from flows.schedule.scheduled import scheduled
    from flows.train import train

    assert {flow.name for flow in (audit, evaluate, rescore, scheduled, train)} == set(FLOWS)


@pytest.mark.parametrize(
    ("run", "key"),
    [
        ("demo", "demo-metrics"),
        ("Demo_2.1", "demo-2-1-metrics"),
        ("-a--b-", "a-b-metrics"),
        ("läuft", "l-uft-870fa7-metrics"),
    ],
)
def test_the_key_of_an_artifact_has_lowercase_letters_digits_and_dashes(run: str, key: str) -> None:
    assert key_of(run, "metrics") == key


def test_a_finished_iteration_carries_the_figures_that_are_known() -> None:
    row = metrics(num_trained=8, entropy=math.nan, eval_pass_at_1=None, rewards=[{"name": "exact"}])
    payload = events.of_iteration(row)
    assert payload == {
        "iteration": 3,
        "reward_mean": 0.5,
        "pass_rate": 0.25,
        "num_trained": 8,
        "message": "iteration 3 has finished: reward 0.500, pass rate 0.250",
    }
    assert json.loads(json.dumps(payload, allow_nan=False)) == payload


def test_a_failed_check_carries_its_condition_and_its_rows() -> None:
    assert events.of_check(3, failed_check()) == {
        "iteration": 3,
        "check": "never wrong",
        "severity": "block",
        "condition": "reward < 0.5",
        "num_rows": 2,
        "num_failed": 1,
        "failed_ids": ["c1"],
        "message": (
            "iteration 3: check 'never wrong' (block) has failed: 1 of 2 rows (50.0%); condition: reward < 0.5"
        ),
    }


def test_an_event_stays_small_however_much_has_failed() -> None:
    row = {**failed_check(), "failed_ids": [f"c{i}" for i in range(5000)], "condition": "x" * 5000}
    payload = events.of_check(3, row)
    assert payload["failed_ids"] == [f"c{i}" for i in range(20)]
    assert len(payload["condition"]) == len(payload["message"]) == 1000


def test_a_collapse_is_the_check_of_that_name_whatever_the_config_calls_it() -> None:
    collapse = outcome({"check": "reward_not_collapsed", "name": "collapse", "max_share": 0.4})
    other = outcome({"check": "judge_answered", "name": "reward_not_collapsed", "max_share": 0.4})
    assert (events.is_collapse(collapse), events.is_collapse(other)) == (True, False)


@pytest.mark.parametrize(("share", "is_collapsed"), [(1.0, True), (0.99, False), (0.0, False), (None, False)])
def test_a_collapse_is_an_iteration_in_which_no_group_informs(share: float | None, is_collapsed: bool) -> None:
    assert events.is_collapsed(metrics(zero_variance_share=share)) is is_collapsed


def test_the_table_has_what_the_terminal_shows() -> None:
    row = table_row(metrics(completion_tokens_mean=41.26, kl_to_sampler=0.00123, num_trained=8))
    assert row == {
        "iter": "3",
        "reward": "0.500",
        "pass": "0.250",
        "held-out": "",
        "tokens": "41.3",
        "entropy": "",
        "kl": "1.2e-03",
        "clip-": "",
        "clip+": "",
        "trained": "8",
        "tok/s": "",
    }


def test_the_page_says_where_the_report_is() -> None:
    assert "`grpo report runs/demo --live`" in where_to_look("runs/demo", None)
    assert where_to_look("runs/demo", "http://127.0.0.1:8/").endswith(": [http://127.0.0.1:8/](http://127.0.0.1:8/)")


def test_the_progress_of_a_stage_is_told_once_it_is_long_and_then_every_five_seconds() -> None:
    now = 100.0
    pace = Pace(lambda: now)
    told = []
    for tenth in range(300):
        now = 100.0 + tenth / 10
        if pace.is_due():
            told.append(now - 100.0)
    assert told == [10.0, 15.0, 20.0, 25.0]


def test_a_server_that_is_gone_costs_one_note() -> None:
    notes: list[str] = []
    with temporary_settings({PREFECT_API_URL: NOWHERE}):
        teller = Teller(notes.append, clock=count(0.0, 100.0).__next__)  # each failure is forgotten at the next request
        teller.tell(lambda client: client.read_artifacts())
        teller.tell(lambda client: client.read_artifacts())
        teller.close()
    assert notes == [
        "Prefect's server has not taken an artifact (ConnectError): its page lacks some; the training goes on"
    ]


def test_after_a_failure_a_server_is_tried_again_a_minute_later() -> None:
    tried: list[int] = []

    def fail(number: int) -> None:
        tried.append(number)
        raise ValueError

    looks = iter([0.0, 0.0, 59.0, 61.0, 61.0])  # before each request, and after each that failed
    with temporary_settings({PREFECT_API_URL: NOWHERE}):
        teller = Teller(lambda _: None, clock=looks.__next__)
        for number in range(3):
            teller.tell(partial(lambda number, _: fail(number), number))
        teller.close()
    assert tried == [0, 2]


def test_a_server_that_does_not_answer_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "FAREWELL_SECONDS", 0.1)
    monkeypatch.setattr(artifacts, "MOST_WAITING", 3)
    answers, made = threading.Event(), []
    with temporary_settings({PREFECT_API_URL: NOWHERE}):
        teller = Teller(lambda _: None)
        teller.tell(lambda _: answers.wait(60))
        for number in range(1000):
            teller.tell(partial(lambda number, _: made.append(number), number))
        teller.close()
        assert made == []
        monkeypatch.setattr(artifacts, "FAREWELL_SECONDS", 60)
        answers.set()
        teller.close()
    assert 2 <= len(made) <= 3


def test_runs_without_a_latin_letter_have_keys_of_their_own() -> None:
    assert key_of("Demo_1", "metrics") == "demo-1-metrics"
    keys = {
        key_of(name, "metrics") for name in ("\u0434\u0430\u043d\u043d\u044b\u0435", "\u30c7\u30fc\u30bf", "metrics")
    }
    assert len(keys) == 3
    assert all(re.fullmatch("[a-z0-9-]+", key) for key in keys)


def test_a_runs_name_is_text_on_the_page() -> None:
    assert "`grpo report 'my run\\x60](http://evil)' --live`" in where_to_look("my run`](http://evil)", None)
    assert markdown("a](http://evil) `b`") == "a\\](http://evil) \\`b\\`"
