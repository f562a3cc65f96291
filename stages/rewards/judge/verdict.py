"""From a judge's words to a reward: where the verdict stands, and what it is worth.

A verdict that is not there, or not on the scale, is an error; it is never clamped, rounded or replaced by a default.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import RewardError

JSON_PREFIX = "json:"
SCORE_LINE = r"(?i)\bscore[\s*:]{1,6}(-?\d+(?:\.\d+)?)(?![\d,.]*\d)"
"""The default verdict: the number after the word score, a few asterisks of markup allowed, decimal commas not."""

Scale = Sequence[float] | Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Rule:
    """How answers are read."""

    verdict: str
    """A pattern with one group, or ``json:key`` or ``json:key.key``. Of several matches the last counts."""
    scale: Scale
    """``[worst, best]``: numbers between them, onto 0 to 1. A table: the reward of each word, case aside."""
    weights: Mapping[str, float] | None
    """With criteria: the weight of each; the answer then holds a JSON object with all of them."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verdict that was found."""

    found: Any
    """As the judge wrote it: text, number, or a table of them by criterion."""
    reward: float


def make_rule(
    verdict: str, scale: Scale, criteria: Mapping[str, str] | None, weights: Mapping[str, float] | None
) -> Rule:
    """Return the checked rule.

    Raises:
        RewardError: when an argument does not say one clear thing.
    """
    _check_scale(scale)
    if criteria:
        if verdict:
            raise RewardError(
                "criteria and verdict are both given, but criteria are read by their names: leave one out"
            )
        return Rule("", scale, _weights(criteria, weights))
    if weights:
        raise RewardError(f"weights are given for {sorted(weights)}, but there are no criteria: add them")
    rule = verdict or SCORE_LINE
    if rule.startswith(JSON_PREFIX):
        if not all(rule.removeprefix(JSON_PREFIX).split(".")):
            raise RewardError(f"verdict is {rule!r}: give json:key, or json:key.key for a key inside another")
        return Rule(rule, scale, None)
    try:
        groups = re.compile(rule).groups
    except re.error as error:
        raise RewardError(f"verdict is {rule!r}, which is no regular expression ({error}): correct it") from error
    if groups != 1:
        raise RewardError(
            f"verdict is {rule!r}, a pattern with {groups} groups: put the verdict, and nothing else, into one group "
            "in round brackets, write others as (?:...), or give json:key"
        )
    return Rule(rule, scale, None)


def _check_scale(scale: Scale) -> None:
    if isinstance(scale, Mapping):
        folded = {word.strip().casefold() for word in scale}
        if len(folded) < len(scale) or not scale:
            raise RewardError(f"scale is {dict(scale)}: give each word, written once, a number")
    elif len(scale) != 2 or scale[0] == scale[1]:
        raise RewardError(f"scale is {list(scale)}: give [worst, best], two different numbers, or a table of words")


def _weights(criteria: Mapping[str, str], weights: Mapping[str, float] | None) -> dict[str, float]:
    unknown = sorted(set(weights or {}) - set(criteria))
    if unknown:
        raise RewardError(f"weights names {unknown}, criteria has {list(criteria)}: correct the names")
    result = {name: (weights or {}).get(name, 1.0) for name in criteria}
    if not all(weight >= 0 for weight in result.values()) or sum(result.values()) <= 0:
        raise RewardError(f"weights are {result}: give numbers of at least 0, some of them positive")
    return result


def read_verdict(rule: Rule, answer: str) -> Verdict:
    """Return the verdict of a judge's answer.

    Raises:
        ValueError: when there is none on the scale; the message says what is missing.
    """
    if rule.weights is not None:
        found = _object_with(answer, list(rule.weights))
        total = sum(weight * _worth(rule.scale, found[name]) for name, weight in rule.weights.items())
        return Verdict(found, total / sum(rule.weights.values()))
    if rule.verdict.startswith(JSON_PREFIX):
        value = _json_value(answer, rule.verdict.removeprefix(JSON_PREFIX).split("."))
        return Verdict(value, _worth(rule.scale, value))
    words = [match[1] for match in re.finditer(rule.verdict, answer)]
    if not words or words[-1] is None:
        raise ValueError(f"nothing matches {rule.verdict!r}")
    return Verdict(words[-1].strip(), _worth(rule.scale, words[-1]))


def _worth(scale: Scale, value: Any) -> float:
    text = (value if isinstance(value, str) else json.dumps(value)).strip()
    if isinstance(scale, Mapping):
        worth = {word.strip().casefold(): reward for word, reward in scale.items()}.get(text.casefold())
        if worth is None:
            raise ValueError(f"the verdict {text[:100]!r} is none of {list(scale)}")
        return worth
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"the verdict {text[:100]!r} is no number") from None
    worst, best = scale
    if not min(worst, best) <= number <= max(worst, best):  # false for NaN, too
        raise ValueError(f"the verdict {text[:100]} is not between {worst:g} and {best:g}")
    return (number - worst) / (best - worst)


def _object_with(answer: str, names: list[str]) -> dict[str, Any]:
    """Return these members of the last JSON object of the answer that has them all."""
    for value in reversed(_json_objects(answer)):
        if all(name in value for name in names):
            return {name: value[name] for name in names}
    raise ValueError(f"there is no JSON object with {names}")


def _json_value(answer: str, keys: list[str]) -> Any:
    """Return the value at ``keys`` in the last JSON object of the answer that has one there."""
    for value in reversed(_json_objects(answer)):
        for key in keys:
            if not isinstance(value, dict) or key not in value:
                break
            value = value[key]
        else:
            return value
    raise ValueError(f"there is no JSON object with {'.'.join(keys)!r}")


def _json_objects(answer: str) -> list[Any]:
    """Return the JSON objects that stand in a text, in order, without those inside others."""
    decoder = json.JSONDecoder()
    objects: list[Any] = []
    start = answer.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(answer, start)
            objects.append(value)
        except ValueError:  # a brace that opens no object
            end = start + 1
        except RecursionError:  # nesting without end: each of its braces would be as dear as this one
            break
        start = answer.find("{", end)
    return objects
