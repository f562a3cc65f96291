"""The child's side of `stages.engines.process`: runs one engine, answers its parent, and dies with it.

What the parent sends is pickled: it chooses what this process runs anyway. The answers are not, see
`stages.engines.replies`: models of strangers, and the libraries that read them, run here.
"""

import os
import shutil
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from pipeline import wire
from pipeline.errors import GrpoError
from pipeline.functions import import_function
from pipeline.processes import kill_group, when_parent_ends
from stages.engines.base import Engine, EngineSettings, Request, Sampling
from stages.engines.replies import Failed, Progress, Reply, encoded

PROGRESS_SECONDS = 0.1
"""Shortest time between two progress messages."""


@dataclass(frozen=True, slots=True)
class Load:
    """Asks for ``engine.load``; answered by the engine's info."""

    policy: Path


@dataclass(frozen=True, slots=True)
class Generate:
    """Asks for ``engine.generate``; answered by Progress messages, then by its rows."""

    requests: Sequence[Request]
    sampling: Sampling


def build_engine(settings: EngineSettings) -> Engine:
    """Return the engine that the settings name. Imports torch or vllm: for the child only."""
    if settings.engine == "vllm":
        from stages.engines.vllm_engine import VllmEngine

        return VllmEngine(settings)
    if settings.engine == "transformers":
        from stages.engines.transformers_engine import TransformersEngine

        return TransformersEngine(settings)
    engine: Engine = import_function(settings.engine)[0](settings)
    return engine


def main(socket: int, parent: int, scratch: str) -> None:
    """Answer the parent until it closes the connection or dies, then end this process and all that it started.

    ``scratch`` is the directory of our temporary files, removed at the end.
    """
    when_parent_ends(parent, partial(_end_group, scratch))  # the thread that started us may end
    os.set_inheritable(socket, False)
    connection = Connection(socket)
    try:
        factory, settings = connection.recv()
        engine: Engine | None = None
        while True:
            call = connection.recv()
            try:
                if engine is None:
                    engine = factory(settings)
                reply = encoded(_answer(engine, call, socket))
            except GrpoError as error:
                reply = encoded(Failed(error))
            except Exception as error:
                traceback.print_exc()
                reply = encoded(Failed(f"{type(error).__name__}: {error}"))
            wire.write(socket, reply)
    except (EOFError, ConnectionError):
        _end_group(scratch)


def _answer(engine: Engine, call: Load | Generate, socket: int) -> Reply:
    if isinstance(call, Load):
        engine.load(call.policy)
        return engine.info
    last_sent = 0.0

    def tell(finished_requests: int, generated_tokens: int) -> None:
        nonlocal last_sent
        is_last = finished_requests == len(call.requests)
        if is_last or time.monotonic() - last_sent >= PROGRESS_SECONDS:
            last_sent = time.monotonic()
            wire.write(socket, encoded(Progress(finished_requests, generated_tokens)))

    return engine.generate(call.requests, call.sampling, tell)


def _end_group(scratch: str) -> None:
    """Kill this process and all that it started: no other process is in its session's group."""
    shutil.rmtree(scratch, ignore_errors=True)
    kill_group(os.getpgrp())
