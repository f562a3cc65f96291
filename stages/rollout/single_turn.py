"""single_turn: one engine request for each completion."""

from collections.abc import Sequence
from pathlib import Path

from stages.engines.base import Engine, Generated, OnProgress, Request, Sampling
from stages.rollout.base import Rollout


def single_turn(
    engine: Engine,
    policy: Path,
    requests: Sequence[Request],
    sampling: Sampling,
    on_progress: OnProgress | None = None,
) -> list[Generated]:
    """Return one completion for each request; see `stages.rollout.base.Rollout`."""
    engine.load(policy)
    return engine.generate(requests, sampling, on_progress)


ROLLOUT: Rollout = single_turn
"""What `generate` and `evaluate` use."""
