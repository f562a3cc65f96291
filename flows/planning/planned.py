"""What a run does about an artifact, and why."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pipeline.manifest import RecipeDifference


class Verdict(StrEnum):
    """What a run does about an artifact."""

    reuse = "it is stored and is used"
    compute = "it is made"
    refuse = "the run stops at it: another one is in its place, or what it needs cannot be used"


class Reason(StrEnum):
    """Why."""

    finished = "stored, of the recipe that is wanted"
    referred = "stored in another run, which [[offline]] names"
    kept = "stored; what it was made from is not there any more as it was"
    missing = "not stored"
    stale = "stored, but of another policy"
    inputs = "what it is made from is not stored"
    recipe = "stored, of another recipe"
    held = "stored, and a check of severity block holds the iteration"
    replaced = "stored, but nothing was trained on it, and another one takes its place"
    unusable = "it, or what it is made from, cannot be used"


@dataclass(frozen=True, slots=True)
class Planned:
    """What a run does about the artifacts of a step in an iteration."""

    step: str
    """A step of `pipeline.chain`, ``starter`` or ``policy``."""
    iteration: int | None
    """None = of no iteration; INITIAL = before the first."""
    places: Mapping[str, Path]
    """Dataset -> directory; the last is the main one."""
    verdict: Verdict
    reason: Reason
    inputs: tuple[str, ...] = ()
    """Those that are not stored as they are wanted."""
    differences: tuple[RecipeDifference, ...] = ()
    """Between the stored recipe and the wanted one."""
    error: str = ""
    """What the run would say."""
    again: range = range(0)
    """Iterations whose stored batches are trained on again first, because an optimizer state is missing."""
    inputs_are_refused: bool = False
    """The inputs are not to be made, but stand in the way."""

    @property
    def main(self) -> Path:
        return list(self.places.values())[-1]
