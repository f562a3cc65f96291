"""EngineProcess: runs any engine in a process of its own that lives for the whole run.

The child has its own session: Ctrl-C reaches it only through its parent, and it ends with all that it started. It talks
over a socket pair; its output goes to a log file. Neither torch nor vllm is imported here.
"""

import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from pipeline.errors import EngineDied, EngineError, GrpoError
from stages.checkpoints import read_layout, vocabulary_size
from stages.engines.base import Engine, EngineInfo, EngineSettings, Generated, OnProgress, Request, Sampling, not_loaded
from stages.engines.child import Child
from stages.engines.replies import Failed, Progress, Reply
from stages.engines.worker import Generate, Load, build_engine

MOST_TOKENS = 2**31
"""Of a vocabulary whose size its configuration does not say: what the datasets can hold."""
Factory = Callable[[EngineSettings], Engine]


class EngineProcess:
    """An Engine whose work is done by a child process.

    Any failure of a call, Ctrl-C included, ends the child and all that it started; a later load starts another.
    Only a refused call to generate leaves it running.

    Args:
        settings: the engine's.
        log_path: file to which the child's output is appended.
        factory: makes the engine, in the child: an importable function.
    """

    def __init__(self, settings: EngineSettings, log_path: Path, factory: Factory = build_engine) -> None:
        self.settings = settings
        self.log_path = log_path
        self._factory = factory
        self._child: Child | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def info(self) -> EngineInfo:
        """Which engine answers; waits for a start that is under way."""
        child = self._loaded()
        assert child.info is not None
        return child.info

    @property
    def pid(self) -> int | None:
        """Process id of the child and of its process group; None without a child."""
        return self._child.process.pid if self._child else None

    def start(self, policy: Path) -> None:
        """Start the child with this policy and return at once; the next call raises its errors.

        A running child is ended first.

        Raises:
            EngineError: when there are fewer cores than threads.
            PolicyError: when the directory is no checkpoint.
        """
        self.close()
        policy = policy.absolute()
        child = Child(self.settings, self.log_path, read_layout(policy))
        self._child = child
        self._send(child, (self._factory, self.settings))
        self._begin_load(child, policy)

    def load(self, policy: Path) -> None:
        """Start with this policy, or replace the weights; a policy of another shape gets a new child.

        A directory that is already loaded is not read again: checkpoints do not change.
        """
        policy = policy.absolute()
        child = self._child
        if child is None:
            self.start(policy)
        elif child.policy != policy:
            self._loaded()
            if read_layout(policy) != child.layout:
                self.start(policy)
            else:
                self._begin_load(child, policy)
        self._loaded()

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_progress: OnProgress | None
    ) -> list[Generated]:
        """Return one completion for each request, in the order of requests."""
        child = self._loaded()
        child.expect(len(requests), sampling.max_tokens)
        self._send(child, Generate(requests, sampling))
        generated = self._receive(child, "generate", on_progress)
        if not isinstance(generated, list) or len(generated) != len(requests):
            raise self._nonsense(child, "other than a completion for each request")
        size = MOST_TOKENS if child.vocabulary_size is None else child.vocabulary_size
        odd = next((i for row in generated for i in row.token_ids if not 0 <= i < size), None)
        if odd is not None:
            raise self._nonsense(child, f"the token id {odd}, where the policy knows 0 to {size - 1}")
        return generated

    def close(self) -> None:
        """End the child and all that it started, and wait until it is gone."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def _loaded(self) -> Child:
        """Return the child once the load that is under way, if any, has succeeded."""
        child = self._child
        if child is None:
            raise not_loaded(self.settings.engine)
        if child.is_loading:
            info = self._receive(child, "load a policy", None)
            if not isinstance(info, EngineInfo):
                raise self._nonsense(child, "other than which engine it is")
            child.info, child.is_loading = info, False
        return child

    def _begin_load(self, child: Child, policy: Path) -> None:
        child.policy, child.is_loading, child.vocabulary_size = policy, True, vocabulary_size(policy)
        self._send(child, Load(policy))

    def _send(self, child: Child, message: object) -> None:
        try:
            # the next receive reports a dead child, with the end of its log
            with suppress(ConnectionError):
                child.connection.send(message)
        except BaseException:
            self.close()
            raise

    def _receive(self, child: Child, doing: str, on_progress: OnProgress | None) -> Reply:
        try:
            while True:
                reply = self._reply(child)
                if reply is None:
                    raise self._death(child, doing)
                if isinstance(reply, Failed):
                    break
                if not isinstance(reply, Progress):
                    return reply
                if on_progress is not None:
                    on_progress(reply.finished_requests, reply.generated_tokens)
        except BaseException:
            self.close()
            raise
        if isinstance(reply.error, GrpoError):
            if child.is_loading:
                self.close()
            raise reply.error
        self.close()
        raise EngineError(
            f"the {self.settings.engine} engine failed to {doing}: {reply.error}\nexpected no error; the traceback is "
            f"in {self.log_path}: remove the cause and run the same command again"
        )

    def _reply(self, child: Child) -> Reply | None:
        try:
            return child.receive()
        except ValueError as error:
            raise self._nonsense(child, str(error)) from error

    def _nonsense(self, child: Child, sent: str) -> EngineError:
        tail = child.log_tail()
        self.close()
        return EngineError(
            f"the {self.settings.engine} engine's process sent {sent}, expected an answer to its call: it was ended; "
            f"nothing in it may write to its parent. The last lines of {self.log_path}:\n{tail}"
        )

    def _death(self, child: Child, doing: str) -> EngineDied:
        status = child.reap()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        cause = "often memory ran out: lower generate.max_num_seqs or resources.kv_cache_gib"
        hint = f"{cause if status == -signal.SIGKILL else 'remove the cause'}, then run the same command again"
        return EngineDied(
            f"the {self.settings.engine} engine's process {how} while it should {doing}: expected it to live for the "
            f"whole run; {hint}. The last lines of {self.log_path}:\n{child.log_tail()}"
        )
