"""What no engine is asked: sampling settings and requests outside of their range."""

import pytest

from pipeline.errors import ConfigError, EngineError
from stages.engines.base import MAX_SEED, Request, Sampling, check_requests


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"temperature": 0.001}, {"max_tokens": 0}, {"top_p": 0.0}, {"top_k": -1}, {"min_p": 1.0}],
)
def test_sampling_outside_its_range_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is"):
        Sampling(**({"temperature": 1.0, "max_tokens": 8, "stop_token_ids": (1,)} | wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], seed=0), "prompt 0 has 0 tokens: expected 1 to 7"),
        (Request([2] * 8, seed=0), "prompt 0 has 8 tokens: expected 1 to 7"),
        (Request([2, 100], seed=0), "expected 0 to 99"),
        (Request([2, -1], seed=0), "expected 0 to 99"),
        (Request([2], seed=-1), "seed -1"),
        (Request([2], seed=MAX_SEED + 1), "seed"),
    ],
)
def test_request_that_no_engine_can_answer_is_refused(request_: Request, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        check_requests([request_], max_model_len=8, vocab_size=100)
