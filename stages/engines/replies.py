"""What an engine's process answers, as JSON and back: the process that holds the run loads no pickle of another one."""

import base64
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isnan, nan
from typing import Any, get_args, get_type_hints

from pipeline import errors
from pipeline.errors import GrpoError
from stages.engines.base import EngineInfo, Generated

ERRORS = {
    kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GrpoError)
}
FINISH_REASONS = get_args(get_type_hints(Generated)["finish_reason"])
BYTES_BESIDE_TOKENS = 1 << 20
BYTES_PER_REQUEST = 256
BYTES_PER_TOKEN = 40
"""Three numbers of 8 bytes, in base64."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a call to generate is."""

    finished_requests: int
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The call raised: one of our own errors as it is, any other as text."""

    error: GrpoError | str


Reply = EngineInfo | list[Generated] | Progress | Failed


def most_bytes(num_requests: int, max_tokens: int) -> int:
    """Return how long the answer to so many requests can be."""
    return BYTES_BESIDE_TOKENS + num_requests * (BYTES_PER_REQUEST + max_tokens * BYTES_PER_TOKEN)


def encoded(reply: Reply) -> dict[str, Any]:
    """Return the reply in JSON's types."""
    match reply:
        case EngineInfo():
            return {"info": asdict(reply)}
        case Progress():
            return {"progress": [reply.finished_requests, reply.generated_tokens]}
        case Failed(error=GrpoError() as error):
            kind = next(base.__name__ for base in type(error).__mro__ if base.__name__ in ERRORS)
            return {"failed": str(error), "kind": kind}
        case Failed():
            return {"failed": str(reply.error), "kind": None}
    return {
        "generated": [
            [
                _packed("q", row.token_ids),
                _packed("d", [nan if value is None else value for value in row.logprobs]),
                row.finish_reason,
                row.stop_reason,
                None if row.kept_mass is None else _packed("d", row.kept_mass),
            ]
            for row in reply
        ]
    }


def decoded(message: Any) -> Reply:
    """Return the reply that a message holds.

    Raises:
        ValueError: when it holds none.
    """
    match message:
        case {"info": {"name": str(), "version": str(), "logprobs_mode": str(), "device": str(), **rest} as info} if (
            not rest
        ):
            return EngineInfo(**info)
        case {"progress": [int() as requests, int() as tokens]}:
            return Progress(requests, tokens)
        case {"failed": str() as text, "kind": None}:
            return Failed(text)
        case {"failed": str() as text, "kind": str() as kind} if kind in ERRORS:
            return Failed(ERRORS[kind](text))
        case {"generated": list() as rows}:
            return [_generated(row) for row in rows]
    raise ValueError(f"{str(message)[:80]!r}")


def _generated(row: Any) -> Generated:
    match row:
        case [
            str() as ids,
            str() as logprobs,
            str() as finish_reason,
            str() | None as stop_reason,
            str() | None as mass,
        ]:
            token_ids = _unpacked("q", ids)
            values = [None if isnan(value) else value for value in _unpacked("d", logprobs)]
            kept_mass = None if mass is None else _unpacked("d", mass)
            lengths = {len(values), len(token_ids if kept_mass is None else kept_mass)}
            if lengths == {len(token_ids)} and finish_reason in FINISH_REASONS:
                return Generated(token_ids, values, finish_reason, stop_reason, kept_mass)  # type: ignore[arg-type]
    raise ValueError(f"the completion {str(row)[:80]!r}")


def _packed(kind: str, numbers: Sequence[float]) -> str:
    return base64.b64encode(array(kind, numbers).tobytes()).decode()


def _unpacked(kind: str, text: str) -> list[Any]:
    numbers = array(kind)
    numbers.frombytes(base64.b64decode(text, validate=True))
    return numbers.tolist()
