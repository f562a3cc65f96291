"""Rewards of the runs of benchmarks/digests.py: each of the shapes that a user's may have."""

import importlib
from typing import Any

import polars as pl

PLACES = ("stages.rewards.base", "stages.rewards.contract")
"""Modules that may hold Score. Looked up by name, so that its move does not change the identity of these rewards."""


def score(reward: float | None, detail: Any) -> Any:
    for place in PLACES:
        try:
            return importlib.import_module(place).Score(reward, detail)
        except ImportError:
            continue
    raise ImportError(f"Score is in none of {PLACES}: add its new place")


def digits_right(completion: str, reference: str, tens: int = 0) -> Any:
    """Return the share of right digits; null for an empty answer, an error for a long one."""
    if not completion:
        return score(None, {"reason": "empty"})
    if len(completion) > 3:
        raise ValueError("more than three signs")
    right = sum(a == b for a, b in zip(reversed(completion), reversed(reference), strict=False))
    return score(right / max(len(completion), len(reference)), {"answer": completion, "tens": tens})


def is_short(most: int) -> pl.Expr:
    return (pl.col("num_tokens") <= most).cast(pl.Float64)


async def waited(completion: str, policy_name: str) -> float | None:
    return None if completion.endswith("0") else len(completion) / 8 + (policy_name == "older")


def framed(completions: pl.DataFrame, bonus: float = 0.0) -> pl.DataFrame:
    number = pl.col("completion").cast(pl.Int64, strict=False)
    return completions.select(
        reward=pl.when(number.is_not_null()).then((number % 7) / 7 + bonus * (pl.col("finish_reason") == "stop")),
        detail=pl.struct(number=number),
        error=pl.when(number.is_null()).then(pl.lit("no number")),
    )
