"""The policies that write the completions of a group."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from pipeline.artifact import Artifact
from pipeline.config import Name, Place, StrictModel
from pipeline.errors import PolicyError
from stages.checkpoints import VOCABULARY_FILES

CURRENT = "current"


class MemberConfig(StrictModel):
    """A group member: one policy that writes some completions of every group."""

    name: Name = Field(pattern=r"^\w[\w.-]*$")
    """Name of this policy in the column policy_name: letters, digits, dots, dashes."""
    policy: Place = CURRENT
    """``current``; ``initial``; ``iteration:N``, the policy after N updates (until then the current); ``age:N``, the
    one N updates ago (the initial one while there is no older); or the path of a checkpoint, such as a sibling trained
    on other data."""
    count: int = Field(ge=1)
    """Completions per group."""

    @model_validator(mode="after")
    def _known_form(self) -> Self:
        head, colon, number = self.policy.partition(":")
        if colon and head in {"iteration", "age"} and not number.isdecimal():
            raise ValueError(f"policy {self.policy!r}: expected {head}:N with a whole number N")
        return self


@dataclass(frozen=True, slots=True)
class Author:
    """The policy of a member."""

    name: str
    path: Path
    digest: str
    iteration: int | None


def member_updates(member: MemberConfig, iteration: int) -> int | None:
    """Return the number of updates behind the member's policy, None for one from outside the run."""
    if member.policy == CURRENT:
        return iteration
    if member.policy == "initial":
        return 0
    head, _, number = member.policy.partition(":")
    if head == "age":
        return max(iteration - int(number), 0)
    if head != "iteration":
        return None
    return min(int(number), iteration)


def coming_members(members: Iterable[MemberConfig], num_updates: int) -> set[int]:
    """Return which policies of the run the members are from the next iteration on, as numbers of updates behind them.

    ``num_updates`` policies exist besides the initial one; those that are still to be made are not named.
    """
    found = set()
    for member in members:
        is_of_an_age = member.policy.startswith("age:")
        first = member_updates(member, num_updates)
        if first is not None:
            found |= set(range(first, num_updates + 1)) if is_of_an_age else {first}
    return found


def check_same_tokenizer(member: Artifact, initial: Artifact, name: str) -> None:
    """Check that a policy from outside reads token ids as the run's policy does.

    Raises:
        PolicyError: when their tokenizers differ: ratios between them would mean nothing.
    """
    ours, theirs = (
        {n: a.manifest.files[n]["sha256"] for n in VOCABULARY_FILES if n in a.manifest.files} for a in (initial, member)
    )
    if ours != theirs:
        raise PolicyError(
            f"the {name} has another tokenizer than the run's policy: token ids would mean different texts, and "
            "importance ratios nothing; use one trained from the same model"
        )
