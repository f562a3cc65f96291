"""What functions over a frame return: a reward, or why there is none, for each row."""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from pipeline.manifest import canonical_json
from stages.rewards.base import Score


@dataclass(frozen=True, slots=True)
class Unscored:
    """Why a row gets no reward."""

    error: str


def reward_frame(results: Sequence[Score | Unscored]) -> pl.DataFrame:
    """Return the columns reward, detail (JSON) and error, one row per result."""
    scores = [result if isinstance(result, Score) else Score(None) for result in results]
    return pl.DataFrame(
        {
            "reward": [score.reward for score in scores],
            "detail": [None if score.detail is None else canonical_json(score.detail) for score in scores],
            "error": [result.error if isinstance(result, Unscored) else None for result in results],
        },
        schema={"reward": pl.Float64, "detail": pl.String, "error": pl.String},
    )
