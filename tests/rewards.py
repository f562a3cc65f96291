"""Reward functions for tests: good ones, and ones that do everything a reward function must not do."""

import asyncio
import ctypes
import math
import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

import polars as pl

from stages.rewards.base import Score

arrived: list[str] = []
"""Those that this process has let in to `meet`."""


def share_of_digits(completion: str) -> float:
    """Return the share of characters that are digits: a random policy gets some of it."""
    return sum(c.isdigit() for c in completion) / max(len(completion), 1)


def letters(completion: str) -> float:
    """Return the number of letters."""
    return float(sum(c.isalpha() for c in completion))


def eighths(completion: str) -> float:
    """Pay for every character."""
    return len(completion) / 8


def opposite(completion: str, reference: str) -> float:
    """Pay for every answer but the right one."""
    return float(completion != reference)


def length_told(num_tokens: int | None) -> Score:
    """Say in the detail how long the answer is."""
    return Score(1.0, num_tokens)


def misbehave(completion: str) -> Any:
    """Do what the completion says; the length of any other text is its reward."""
    match completion:
        case "hang":
            while True:
                pass
        case "sleep":
            time.sleep(3600)
        case "exit":
            os._exit(3)
        case "crash":
            ctypes.string_at(0)
        case "raise":
            raise ValueError("no number in it")
        case "quit":
            sys.exit("enough")
        case "nan":
            return math.nan
        case "infinity":
            return -math.inf
        case "text":
            return "high"
        case "none":
            return None
        case "memory":
            return float(len(bytearray(1 << 40)))
        case "recursion":
            return misbehave(completion)
        case "detail":
            return Score(1.0, object())
        case "surrogate":
            return Score(1.0, "\ud800")
    return float(len(completion))


async def misbehave_async(completion: str) -> Any:
    """The same with others waiting in the same process; ``wait`` waits without blocking them."""
    if completion == "wait":
        await asyncio.sleep(3600)
    await asyncio.sleep(0.001)
    return misbehave(completion)


async def meet(completion: str) -> float:
    """Wait until eight have come."""
    arrived.append(completion)
    while len(arrived) < 8:
        await asyncio.sleep(0.01)
    return 1.0


async def swallow_cancellation(completion: str) -> float:
    """Stay for ever where the completion says so, or give up by an own time limit."""
    if completion == "own":
        raise TimeoutError("the server said nothing")
    while completion == "stay":
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            continue
    return float(len(completion))


def mutate(completion: str, messages: list[dict[str, str]], words: list[str]) -> float:
    """Change what was given; the reward counts it."""
    messages.append({"role": "user", "content": completion})
    words.append(completion)
    return float(len(messages) + len(words) - 1)


def burn(seconds: float) -> None:
    """Work for so many seconds of the processor."""
    ends = time.process_time() + seconds
    while time.process_time() < ends:
        pass


def work_for(completion: str) -> float:
    """Work for as many seconds of the processor as the completion says."""
    burn(float(completion))
    return 1.0


async def wait_for(completion: str) -> float:
    """Wait for as many seconds as the completion says, beside others."""
    await asyncio.sleep(float(completion))
    return 1.0


def let_others_work(completion: str) -> float:
    """Wait for a process that works without end, where the completion says so."""
    subprocess.run([sys.executable, "-c", f"while {completion == 'work'}: pass"], check=True)
    return 1.0


def fork(completion: str) -> float:
    """Return 1, and 0 in a child that goes on instead of leaving, or as the completion says."""
    child = os.fork()
    if child == 0:
        if completion == "raise":
            raise ValueError("the child")
        if completion == "quit":
            sys.exit(1)
        return 0.0
    return 1.0 if os.waitpid(child, 0)[1] == 0 else 0.5


async def fork_async(completion: str) -> float:
    """The same beside others."""
    await asyncio.sleep(0.001)
    return fork(completion)


def fork_in_frame(completions: pl.DataFrame) -> pl.Series:
    """The same for a frame."""
    return pl.Series([fork("")] * len(completions))


def forge(completion: str) -> float:
    """Write the completion to every socket of this process, as a worker that is not to be trusted would."""
    if completion != "honest":
        for descriptor in range(3, 64):
            with suppress(OSError):
                if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                    os.write(descriptor, completion.encode("latin-1"))
        time.sleep(3600)
    return 1.0


def leave_a_process(completion: str) -> float:
    """Start a process that would outlive everything, write its id to the file that the completion names, and die."""
    child = subprocess.Popen(["sleep", "3600"])
    with open(completion, "w") as file:  # noqa: PTH123
        file.write(str(child.pid))
    os._exit(1)


def be_late(completion: str) -> float:
    """Stop the supervisor while the first text is late; the second one lets it go on, and do what it was told."""
    if completion == "late":
        os.kill(os.getppid(), signal.SIGSTOP)
        burn(1.0)
        time.sleep(1.0)  # the pool has looked
    elif completion == "next":
        os.kill(os.getppid(), signal.SIGCONT)
        time.sleep(0.2)
    return float(len(completion))


def long_detail(completion: str) -> Score:
    """Return a text of so many characters, and two quotes around, as the detail."""
    return Score(1.0, "x" * int(completion))


def long_detail_in_frame(completions: pl.DataFrame) -> pl.DataFrame:
    return pl.DataFrame({"reward": 1.0, "detail": ["x" * int(text) for text in completions["completion"]]})


def length_in_frame(completions: pl.DataFrame, scale: float = 1.0) -> pl.Series:
    return completions["completion"].str.len_chars() * scale


def frame_with_details(completions: pl.DataFrame) -> pl.DataFrame:
    is_known = completions["completion"] != ""
    return completions.select(
        reward=pl.when(is_known).then(1.0),
        detail=pl.struct("prompt", "reference", "city_of_metadata")
        if "city_of_metadata" in completions.columns
        else pl.struct("prompt", "reference", tokens="num_tokens"),
        error=pl.when(~is_known).then(pl.lit("nothing was said")),
    )


def frame_too_short(completions: pl.DataFrame) -> pl.Series:
    return pl.Series([1.0])


def frame_that_dies(completions: pl.DataFrame) -> pl.Series:
    os._exit(4)


def frame_that_hangs(completions: pl.DataFrame) -> pl.Series:
    burn(3600)
    return pl.Series([1.0])


def has_seven() -> pl.Expr:
    return pl.col("completion").str.contains("7").cast(pl.Float64)


def seven_with_detail(word: str) -> pl.Expr:
    return pl.struct(
        reward=pl.col("completion").str.count_matches(word, literal=True), detail=pl.struct("completion", "task")
    )


def broken_expression() -> pl.Expr:
    raise ValueError("no such word")


def no_such_column() -> pl.Expr:
    return pl.col("absent") * 1.0


def only_threes(completion: str) -> float | None:
    """Leave every answer but 3 without a reward, as a judge does that is down half of the time."""
    return float(completion == "3") if completion == "3" else None
