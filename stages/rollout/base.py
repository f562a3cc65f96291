"""What a rollout is: whoever talks with the engine about a batch of prompts, and returns their completions."""

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


def make_requests(prompts: pl.DataFrame, indices: Sequence[int], *, seed: int, iteration: int) -> list[Request]:
    """Return ``len(indices)`` consecutive requests for each prompt, in order.

    ``prompts`` has prompt_token_ids and ``position``, the prompt's position in its iteration; ``indices`` are positions
    in the group.
    """
    rows = prompts.select("position", "prompt_token_ids").iter_rows()
    return [Request(ids, request_seed(seed, iteration, position, i)) for position, ids in rows for i in indices]


def request_seed(run_seed: int, iteration: int, group: int, index: int) -> int:
    """Return the seed of one request: 63 bits that depend on nothing but these numbers."""
    text = f"{run_seed}/{iteration}/{group}/{index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def texts_of(policy: Path, generated: Sequence[Generated]) -> list[str]:
    """Return the completions as texts, special tokens left out."""
    return load_tokenizer(policy).batch_decode([g.token_ids for g in generated], skip_special_tokens=True)
