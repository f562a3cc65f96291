"""The tables of [[checks]]: what is looked at, and what follows when it fails."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from pipeline.config import Name, StrictModel, load_toml
from pipeline.errors import ConfigError
from stages.checks.conditions import Checkable, condition

Severity = Literal["warn", "block", "quarantine"]
"""warn = a line in the run's output; block = the iteration does not train, the run stops; quarantine = the rows that
failed do not train."""
Share = Annotated[float, Field(ge=0, le=1)]
CONDITION, AUDIT = "condition", "audit"
"""Tags of checks without one of the names that ship."""


class Condition(StrictModel):
    """A check by a condition of the user's own."""

    name: Name
    severity: Severity = "warn"
    where: str
    """SQL condition over the columns of ``dataset``; the rows for which it is true fail."""
    dataset: Checkable = "completions"
    """Its rows are looked at; those of completions have num_tokens, and the columns of advantages and prompts too."""
    max_share: Share = 0.0
    """The check fails when more than this share of the rows does."""

    @model_validator(mode="after")
    def _is_a_condition(self) -> Self:
        condition(self.where, self.dataset)
        return self


class _Shipped(StrictModel):
    """What all checks that ship have."""

    severity: Severity = "warn"
    """What follows when it fails."""


class JudgeAnswered(_Shipped):
    """The reward functions have given rewards: a judge that is down, a function that fails, give nulls."""

    check: Literal["judge_answered"]
    name: Name = "judge_answered"
    reward: Name | None = None
    """Name of the reward; null = each of them."""
    max_share: Share = 0.1
    """Share of the rewards of one function that may be null."""


class GroupsInform(_Shipped):
    """Groups tell their members apart."""

    check: Literal["groups_inform"]
    name: Name = "groups_inform"
    max_share: Share = 0.9
    """Share of the groups that may tell nothing: all rewards equal, or fewer than two."""


class NoRepetition(_Shipped):
    """Completions do not say the same again and again."""

    check: Literal["no_repetition"]
    name: Name = "no_repetition"
    repeated: float = Field(0.5, gt=0, lt=1)
    """Share of a completion's word 3-grams (of its character pairs, when it is short) that it has said before."""
    min_words: int = Field(8, ge=4)
    """Words from which word 3-grams are counted."""
    min_characters: int = Field(4, ge=3)
    """Characters from which a shorter completion is looked at."""
    characters: int = Field(8000, ge=100)
    """Characters of a completion that are read, from its beginning."""
    max_share: Share = 0.1
    """Share of the completions that may be repetitive."""


class NoLeakedReference(_Shipped):
    """Prompts do not contain their own reference answer."""

    check: Literal["no_leaked_reference"]
    name: Name = "no_leaked_reference"
    min_characters: int = Field(2, ge=1)
    """Shorter references (A, B, 7) are found everywhere by chance."""
    max_share: Share = 0.05
    """Share of the completions whose prompt may contain the reference."""


class RewardNotCollapsed(_Shipped):
    """Completions do not all get one and the same reward."""

    check: Literal["reward_not_collapsed"]
    name: Name = "reward_not_collapsed"
    max_share: Share = 0.98
    """Share of the scored completions that may have the most common reward."""


class OffPolicy(_Shipped):
    """The rows' policy is not too far from the one that trains."""

    check: Literal["off_policy"]
    name: Name = "off_policy"
    max_age: int | None = Field(None, ge=0)
    """Updates between the policy that wrote a row and the one that trains; a policy from outside the run has no age,
    and fails. null = not looked at. Does not apply to offline iterations, whose rows have no age here."""
    max_kl: float | None = Field(None, gt=0)
    """kl_to_sampler of the update before, nats per token: over it all rows fail. null = not looked at."""
    max_share: Share = 0.0
    """Share of the rows that may be older than max_age."""

    @model_validator(mode="after")
    def _looks_at_something(self) -> Self:
        if self.max_age is None and self.max_kl is None:
            raise ValueError("off_policy has neither max_age nor max_kl: set one of them, for example max_age = 4")
        return self


class AuditCheck(StrictModel):
    """A check of `grpo audit` over the rows of the iteration; it fails when it has a warning."""

    check: str
    name: Name
    severity: Literal["warn", "block"] = "warn"
    thresholds: dict[str, Any] = Field(default_factory=dict)
    """Tables as in configs/audit.toml."""


SHIPPED = (
    "judge_answered",
    "groups_inform",
    "no_repetition",
    "no_leaked_reference",
    "reward_not_collapsed",
    "off_policy",
)


def _tag(value: Any) -> str | None:
    """Return the tag of a table's class."""
    given = value if isinstance(value, dict) else {n: getattr(value, n, None) for n in ("where", "check")}
    if given.get("where") is not None:
        return CONDITION
    check = given.get("check")
    return None if not isinstance(check, str) else check if check in SHIPPED else AUDIT


CheckConfig = Annotated[
    Annotated[Condition, Tag(CONDITION)]
    | Annotated[JudgeAnswered, Tag("judge_answered")]
    | Annotated[GroupsInform, Tag("groups_inform")]
    | Annotated[NoRepetition, Tag("no_repetition")]
    | Annotated[NoLeakedReference, Tag("no_leaked_reference")]
    | Annotated[RewardNotCollapsed, Tag("reward_not_collapsed")]
    | Annotated[OffPolicy, Tag("off_policy")]
    | Annotated[AuditCheck, Tag(AUDIT)],
    Discriminator(
        _tag,
        custom_error_type="no_check",
        custom_error_message="a check has a condition (where = ...), or the name of one (check = ...)",
    ),
]


class CheckStageConfig(StrictModel):
    """Config of the check stage."""

    checks: list[CheckConfig] = Field(default_factory=list)
    """In the order of the dataset's rows."""

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        names = [check.name for check in self.checks]
        if len(set(names)) != len(names):
            raise ValueError(f"checks have the names {names}: give each its own")
        return self


def expanded(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's tables with those of the file that ``checks`` names in its place. Read-only.

    Raises:
        ConfigError: when the file is no TOML, or has anything but [[checks]].
    """
    file = tables.get("checks")
    if not isinstance(file, str):
        return dict(tables)
    shared = load_toml(Path(file))
    if set(shared) != {"checks"}:
        raise ConfigError(f"{file} has {sorted(shared)}, expected [[checks]] alone: move the rest into the config")
    return {**tables, "checks": shared["checks"]}
