"""Retention: which policies and optimizer states of a run stay on disk. `pipeline.prune` drops the others."""

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from pipeline.config import StrictModel


class RetentionConfig(StrictModel):
    """Which policies stay, besides the initial one and those that coming iterations need. Decides no result."""

    keep_last: int = Field(2, ge=1)
    """The last so many policies."""
    keep_every: int = Field(0, ge=0)
    """The policies after so many updates, twice as many, and so on; 0 = none."""
    keep_best: int = Field(0, ge=0)
    """So many of the evaluated policies, the best by ``best_by``; of equal ones the earlier. 0 = none."""
    best_by: Literal["eval_pass_at_1", "eval_pass_rate", "eval_pass_at_k"] = "eval_pass_at_1"
    """Column of `metrics.parquet`; the default is the share of prompts whose greedy completion is correct."""
    states: Literal["kept", "last"] = "kept"
    """Which optimizer states stay. kept: that of every policy that stays, so that a run can fork from it with the
    optimizer's moments. last: those of the policies of ``keep_last`` alone, which takes a third of the space."""


def kept_policies(existing: Sequence[int], rules: RetentionConfig, scores: Mapping[int, float]) -> set[int]:
    """Return which policies stay by the rules alone, as numbers of updates. Read-only.

    Args:
        existing: numbers of updates behind the policies that exist, ascending.
        rules: what stays.
        scores: number of updates -> the figure ``best_by`` of that policy's evaluation.
    """
    evaluated = [n for n in existing if n in scores]
    best = sorted(evaluated, key=lambda n: (-scores[n], n))[: rules.keep_best]
    regular = [n for n in existing if rules.keep_every and n and n % rules.keep_every == 0]
    return {*existing[-rules.keep_last :], *regular, *best}
