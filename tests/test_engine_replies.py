"""What an engine's process answers: rows as they were, and nothing else."""

import json
import os
import pickle
import stat
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.errors import EngineError, PolicyError
from stages.engines.base import Engine, EngineInfo, EngineSettings, Generated, Request
from stages.engines.process import EngineProcess
from stages.engines.replies import Failed, Progress, decoded, encoded
from stages.engines.scripted import ScriptedEngine
from tests.test_engine_process import SAMPLING, SETTINGS, make_policy


def forging_engine(settings: EngineSettings) -> Engine:
    """Writes what a file holds to every socket of its process, as one that is not to be trusted would."""
    return ScriptedEngine(forge)


def forge(request: Request) -> Sequence[int]:
    for descriptor in range(3, 64):
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.write(descriptor, Path(os.environ["SAYS"]).read_bytes())
    return [1]


class _Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)


FORGED = {
    "a pickle": (None, "what is no JSON"),
    "no JSON": (b"]\n", r"what is no JSON \(JSONDecodeError\)"),
    "no reply": (b'{"generated": 1}\n', "generated"),
    "an error of nobody's": (b'{"failed": "x", "kind": "SystemExit"}\n', "failed"),
    "too few completions": (b'{"generated": []}\n', "other than a completion for each request"),
    "no completion": (b'{"generated": [["", "", "stop", null]]}\n', "the completion"),
    "lengths that differ": (b'{"generated": [["AAAAAAAAAAA=", "", "stop", null, null]]}\n', "the completion"),
    "another reason": (b'{"generated": [["", "", "tired", null, null]]}\n', "the completion"),
    "no base64": (b'{"generated": [["!", "", "stop", null, null]]}\n', "base64"),
    "too much": (b"x" * 1_100_000, "a message of more than 1,049,152 bytes"),
}


@pytest.mark.parametrize(("vocab_size", "known"), [(100, 99), (None, 2**31 - 1)])
@pytest.mark.parametrize("below", [False, True])
def test_a_token_that_the_policy_does_not_know_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocab_size: int | None, known: int, below: bool
) -> None:
    policy = make_policy(tmp_path / "policy")
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps({**config, "vocab_size": vocab_size}))
    odd = -1 if below else known + 1
    rows = [Generated([known, odd], [-1.0, -1.0], "length", None, None)]
    (tmp_path / "said").write_bytes(json.dumps(encoded(rows)).encode() + b"\n")
    monkeypatch.setenv("SAYS", str(tmp_path / "said"))
    with EngineProcess(SETTINGS, tmp_path / "engine.log", forging_engine) as engine:
        engine.load(policy)
        with pytest.raises(EngineError, match=f"sent the token id {odd}, where the policy knows 0 to {known}"):
            engine.generate([Request([5], seed=0)], SAMPLING, None)


@pytest.mark.parametrize(("sent", "found"), FORGED.values(), ids=FORGED.keys())
def test_what_is_no_answer_ends_the_child_with_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes | None, found: str
) -> None:
    if sent is None:
        message = pickle.dumps(_Payload(tmp_path / "made"))
        sent = struct.pack("!i", len(message)) + message + b"\n"  # as multiprocessing frames it
    (tmp_path / "said").write_bytes(sent)
    monkeypatch.setenv("SAYS", str(tmp_path / "said"))
    with EngineProcess(SETTINGS, tmp_path / "engine.log", forging_engine) as engine:
        engine.load(make_policy(tmp_path / "policy"))
        with pytest.raises(EngineError, match=f"the vllm engine's process sent .*{found}.*, expected an answer"):
            engine.generate([Request([5], seed=0)], SAMPLING, None)
        assert engine.pid is None
    assert not (tmp_path / "made").exists()


def test_a_reply_comes_as_it_was_sent() -> None:
    rows = [
        Generated([2**40, 0], [-1e-320, None], "length", None, [0.1 + 0.2, 1.0]),
        Generated([], [], "abort", "\u20ac", None),
    ]
    for reply in (rows, [], Progress(1, 2), EngineInfo("a", "b", "c", "d")):
        assert decoded(json.loads(json.dumps(encoded(reply)))) == reply
    for error in ("KeyError: 1", PolicyError("no weights"), EngineError("refused")):
        found = decoded(json.loads(json.dumps(encoded(Failed(error)))))
        assert isinstance(found, Failed)
        assert (type(found.error), str(found.error)) == (type(error), str(error))
