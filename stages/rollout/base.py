"""The rollout protocol: it has an engine complete a batch of prompts, and returns the completions."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import polars as pl

from stages.checkpoints import load_tokenizer
from stages.engines.base import Engine, Generated, OnProgress, Request, Sampling


class Rollout(Protocol):
    """Has a policy write one completion for each request."""

    def __call__(
        self,
        engine: Engine,
        policy: Path,
        requests: Sequence[Request],
        sampling: Sampling,
        on_progress: OnProgress | None = None,
    ) -> list[Generated]:
        """Return the completions in the order of the requests; afterwards the engine holds the policy."""
        ...


def make_requests(planned: pl.DataFrame) -> list[Request]:
    """Return the request of each row, in order; rows have prompt_token_ids and the request's seed."""
    return [
        Request(ids, seed) for ids, seed in zip(planned["prompt_token_ids"].to_list(), planned["seed"], strict=True)
    ]


def request_seed(run_seed: int, iteration: int, group: int, index: int) -> int:
    """Return the seed of one request: 63 bits that depend on nothing but these numbers."""
    text = f"{run_seed}/{iteration}/{group}/{index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def texts_of(policy: Path, generated: Sequence[Generated]) -> list[str]:
    """Return the completions as texts, without special tokens."""
    return load_tokenizer(policy).batch_decode([g.token_ids for g in generated], skip_special_tokens=True)
