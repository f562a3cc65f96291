"""A reward for the facts that an answer must and must not hold."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from pipeline.errors import RewardError
from stages.rewards.answers.answer_part import NOTHING_WITHIN, answer_part
from stages.rewards.base import Score
from stages.rewards.words import folded, occurs

_folded_alias = lru_cache(maxsize=65536)(folded)


def required_facts(
    completion: str,
    facts: Sequence[Any] | None = None,
    forbidden: Sequence[Any] | None = None,
    within: str | None = None,
    penalty: float | None = None,
) -> Score:
    """Return the share of the required facts that the answer names; with a forbidden one 0, or less by a penalty.

    ``facts`` and ``forbidden`` are keys of the source row's metadata: lists of facts, each a text or a list of its
    aliases. An alias occurs where its words stand as whole words; case, the Unicode form (NFKC), white space and the
    shape of quotes and dashes do not count. The detail lists the aliases found and the first alias of what is missing.
    Negation and inflection are not understood: "not Paris" names Paris, "Parisian" does not.
    Without required facts the share is 1. Null when the row has neither key.

    Args:
        completion: the answer.
        facts: what must be named.
        forbidden: what must not be named.
        within: which part of the answer counts.
        penalty: what each forbidden fact takes off the share, below zero if need be; null = any one makes it 0.
    """
    if facts is None and forbidden is None:
        return Score(None, {"reason": "the metadata has neither facts nor forbidden"})
    required, banned = _aliases(facts, "facts"), _aliases(forbidden, "forbidden")
    if not required and not banned:
        return Score(None, {"reason": "facts and forbidden are empty"})
    part = answer_part(completion, within)
    if part is None:
        return Score(0.0, {"reason": NOTHING_WITHIN})
    text = folded(part)
    named = [_first_named(text, names) for names in required]
    wrong = [alias for names in banned if (alias := _first_named(text, names)) is not None]
    found = [alias for alias in named if alias is not None]
    missing = [names[0] for names, alias in zip(required, named, strict=True) if alias is None]
    detail = {"found": found, "missing": missing, "forbidden_found": wrong}
    share = len(found) / len(required) if required else 1.0
    if wrong:
        return Score(0.0 if penalty is None else share - penalty * len(wrong), detail)
    return Score(share, detail)


def _aliases(facts: Sequence[Any] | None, key: str) -> list[list[str]]:
    """Return each fact as the list of its aliases."""
    if isinstance(facts, str) or not isinstance(facts, Sequence | None):
        raise RewardError(f"the metadata key {key} holds {facts!r}, expected a list of facts: correct the source")
    names = [list(fact) if isinstance(fact, list | tuple) else [fact] for fact in facts or ()]
    for aliases in names:
        if not aliases or not all(isinstance(alias, str) and _folded_alias(alias) for alias in aliases):
            raise RewardError(
                f"the metadata key {key} has the fact {aliases!r}, expected a text or a list of texts that are not "
                "empty: correct the source"
            )
    return names


def _first_named(text: str, aliases: Sequence[str]) -> str | None:
    """Return the first alias that occurs in the folded text."""
    return next((alias for alias in aliases if occurs(text, _folded_alias(alias))), None)
