"""Asks an OpenAI-compatible chat endpoint many things at once, and gives up only what cannot be had.

Tried again, with growing and randomly shortened waits: lost connections, timeouts, 408, 429, 5xx, and what is no chat
completion at all. A ``Retry-After`` is obeyed, by all requests, because the limit is the server's, not the request's.
A request that the server refuses (400, 413, ...) fails by itself. What would fail for every request ends all: nobody
listens, the key or the model is refused, the quota is spent, many requests in a row were lost.

The API key is read from the environment when it is needed. It goes into a header and nowhere else: should a server send
it back, it is struck out (`stages.rewards.judge.response`).
"""

import asyncio
import math
import os
import random
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any

import httpx

from pipeline.clock import is_done_within
from pipeline.errors import RewardError
from stages.rewards.judge.cache import Answer
from stages.rewards.judge.config import Endpoint
from stages.rewards.judge.response import make_strike, read_answer, read_body, read_message, shown

BACKOFF_SECONDS = 1.0
"""Longest wait before the first repetition; it doubles each time."""
BACKOFF_MOST_SECONDS = 60.0
RETRY_AFTER_MOST_SECONDS = 600.0
"""A server that asks for a longer wait is out of quota rather than busy."""
RATE_LIMITS_PER_RETRY = 10
"""Being told to wait is no fault: it may happen so many times as often as a fault before a request is given up."""
LOST_IN_A_ROW = 20
"""So many requests given up through the server's fault, with no answer between them: it is down."""
REFUSED_AT_FIRST = 100
"""So many requests refused before any was answered: they all will be."""

Body = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request was given up."""

    error: str
    is_servers_fault: bool


@dataclass(frozen=True, slots=True)
class Trouble:
    """A failed attempt that may be repeated."""

    error: str
    is_rate_limit: bool = False
    wait_seconds: float | None = None
    """What the server asks for."""


async def ask_all(
    endpoint: Endpoint, bodies: Mapping[str, Body], keep: Callable[[str, Answer], None]
) -> dict[str, str]:
    """Return the errors of the requests that were given up, by key; each answer goes to ``keep`` when it comes.

    Raises:
        ExceptionGroup: of one RewardError, when there is no point in going on.
    """
    headers = {"Accept-Encoding": "identity"}  # a compressed response could be of any size
    if key := api_key(endpoint.api_key_env):
        headers["Authorization"] = f"Bearer {key}"
    limits = httpx.Limits(max_connections=endpoint.concurrency, max_keepalive_connections=endpoint.concurrency)
    errors: dict[str, str] = {}
    async with httpx.AsyncClient(headers=headers, limits=limits, timeout=None, verify=_tls()) as http:
        asker = _Asker(endpoint, http, key)
        await asker.check_presence()
        waiting = iter(bodies.items())
        async with asyncio.TaskGroup() as group:
            for _ in range(min(endpoint.concurrency, len(bodies))):
                group.create_task(asker.work(waiting, keep, errors))
    return errors


def api_key(variable: str) -> str:
    """Return the key in an environment variable; "" when no variable is named.

    Raises:
        RewardError: when the variable is not set, or holds what no key can.
    """
    key = os.environ.get(variable, "").strip() if variable else ""
    if variable and not key:
        raise RewardError(f"api_key_env names {variable}, which is not set: export it, or leave it out")
    if not key.isascii() or not key.isprintable() or " " in key:  # refused here, where no message shows it
        raise RewardError(f"{variable} holds what no API key can: more than one line, or special characters")
    return key


@cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()  # reading the certificates takes 0.1 s: once is enough


class _Pace:
    """Lets requests go one after the other, no faster than the limit, and none while the server wants peace."""

    def __init__(self, requests_per_minute: float) -> None:
        self.gap = 60 / requests_per_minute if requests_per_minute else 0.0
        self.next_start = 0.0
        self.silent_until = 0.0
        self.lock = asyncio.Lock()

    async def turn(self) -> None:
        async with self.lock:
            while (wait := max(self.next_start, self.silent_until) - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            self.next_start = time.monotonic() + self.gap

    def hold(self, seconds: float) -> None:
        self.silent_until = max(self.silent_until, time.monotonic() + seconds)


class _Asker:
    """One batch of requests to one endpoint, and what is known about the server's health."""

    def __init__(self, endpoint: Endpoint, http: httpx.AsyncClient, key: str) -> None:
        self.endpoint = endpoint
        self.http = http
        self.strike = make_strike(key)
        self.pace = _Pace(endpoint.requests_per_minute)
        self.url = f"{endpoint.base_url.rstrip('/')}/chat/completions"
        self.has_answered = False
        self.lost_in_a_row = 0
        self.refused = 0

    async def check_presence(self) -> None:
        """Raise RewardError when nobody listens; any HTTP answer, an error too, shows that somebody does."""
        for attempt in range(min(self.endpoint.max_retries, 2) + 1):
            if attempt:
                await asyncio.sleep(_backoff(attempt - 1))
            try:
                async with asyncio.timeout(min(self.endpoint.timeout, 10)):
                    async with self.http.stream("GET", f"{self.endpoint.base_url.rstrip('/')}/models"):
                        return
            except (httpx.ConnectError, httpx.UnsupportedProtocol) as error:
                reason = self._shown(error)
            except (httpx.TransportError, TimeoutError):
                return  # somebody is there, if slow or odd: the requests will tell
        raise RewardError(
            f"no server answers at {self.endpoint.base_url} ({reason}): start it (see docs/judge.md), or correct "
            "base_url"
        )

    async def work(
        self, waiting: Iterator[tuple[str, Body]], keep: Callable[[str, Answer], None], errors: dict[str, str]
    ) -> None:
        """Ask one thing after the other until there is nothing left."""
        for key, body in waiting:
            outcome = await self._ask(body)
            if isinstance(outcome, Answer):
                self.has_answered = True
                self.lost_in_a_row = 0
                keep(key, outcome)
            else:
                errors[key] = outcome.error
                self._note_failure(outcome)

    def _note_failure(self, failure: Failure) -> None:
        if failure.is_servers_fault:
            self.lost_in_a_row += 1
        else:
            self.refused += 1
        if self.lost_in_a_row >= LOST_IN_A_ROW:
            found = f"{LOST_IN_A_ROW} requests in a row were lost"
        elif self.refused >= REFUSED_AT_FIRST and not self.has_answered:
            found = f"the first {REFUSED_AT_FIRST} requests were refused"
        else:
            return
        raise RewardError(
            f"{self.url}: {found}; the last one: {failure.error}. Mend the server or the arguments and score again; "
            "answers received are in the cache"
        )

    async def _ask(self, body: Body) -> Answer | Failure:
        faults = rate_limits = 0
        most = self.endpoint.max_retries
        while True:
            await self.pace.turn()
            outcome = await self._attempt(body)
            if not isinstance(outcome, Trouble):
                return outcome
            if outcome.is_rate_limit:
                rate_limits += 1
            else:
                faults += 1
            if faults > most or rate_limits > most * RATE_LIMITS_PER_RETRY:
                hint = "; set requests_per_minute" if outcome.is_rate_limit else ""
                return Failure(f"no answer after {faults + rate_limits} attempts: {outcome.error}{hint}", True)
            if outcome.wait_seconds is not None:
                self.pace.hold(outcome.wait_seconds)
            else:
                await asyncio.sleep(_backoff(faults + rate_limits - 1))

    async def _exchange(self, body: Body) -> tuple[httpx.Response, str]:
        async with self.http.stream("POST", self.url, json=dict(body)) as response:
            return response, await read_body(response)

    async def _attempt(self, body: Body) -> Answer | Failure | Trouble:
        asked = asyncio.ensure_future(self._exchange(body))
        try:
            if not await is_done_within(asked, self.endpoint.timeout):
                return Trouble(f"no answer within {self.endpoint.timeout:g} s")
            response, text = asked.result()
        except ValueError as error:
            return Failure(self._shown(error), False)
        except httpx.TransportError as error:
            return Trouble(self._shown(error))
        finally:
            asked.cancel()
            await asyncio.wait({asked})
        if response.status_code == 200:
            no_answer = Trouble(f"the server sent no chat completion: {shown(text, self.strike)}")
            return read_answer(text, self.strike) or no_answer
        said = f"HTTP {response.status_code}: {read_message(text, self.strike)}"
        wait = _retry_after(response.headers.get("Retry-After", ""))
        is_out_of_quota = "insufficient_quota" in text or (wait or 0) > RETRY_AFTER_MOST_SECONDS
        if response.status_code in (401, 402, 404, 405) or (response.status_code == 429 and is_out_of_quota):
            asks = f", and asks to wait {wait:g} s" if wait else ""
            raise RewardError(
                f"{self.url} says {said}{asks}: check base_url, model, api_key_env and the account behind it, then "
                "score again; answers received are in the cache"
            )
        if response.status_code in (408, 429) or response.status_code >= 500:
            # an outage may announce any time; ours is bounded
            bounded = None if wait is None else min(wait, RETRY_AFTER_MOST_SECONDS)
            return Trouble(said, response.status_code == 429, bounded)
        return Failure(said, False)

    def _shown(self, error: Exception) -> str:
        return shown(f"{type(error).__name__}: {error}".removesuffix(": "), self.strike)


def _retry_after(header: str) -> float | None:
    """Return the seconds that a Retry-After header asks for, a number or a date; None when there is none to be read."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _backoff(attempt: int) -> float:
    longest = min(BACKOFF_SECONDS * 2.0**attempt, BACKOFF_MOST_SECONDS)
    return longest * random.uniform(0.5, 1.0)
