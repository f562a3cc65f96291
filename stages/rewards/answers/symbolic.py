"""A reward that compares mathematics by meaning, with math-verify."""

import logging
from collections.abc import Sequence
from functools import lru_cache, partial
from importlib.metadata import version
from typing import Any

import regex

from stages.rewards.answers.answer_part import NO_REFERENCE, NOTHING_WITHIN, accepted_answers, answer_part, shown
from stages.rewards.answers.time_limit import run_within
from stages.rewards.base import Score

DELIMITED = regex.compile(r"\$|\\\(|\\\[|\\boxed")
LAST_BOX = regex.compile(r"(?r)\\boxed\s*(?<braces>\{(?<content>(?:[^{}]|(?&braces))*)\})")
"""Searched from the end; the braces inside are balanced."""
NAMED = regex.compile(r"\\(?:begin|end|text|mathrm|mathbf|operatorname)\s*\{[^{}]*\}")
PROSE = regex.compile(
    r"(?<![\\\p{L}])(?!(?:sin|cos|tan|cot|log|ln|exp|sqrt|pi|or|and|d\p{L})\b)\p{L}{2,}|\p{Han}|\n\s*\n"
)
"""A word: whoever writes one means his text to be read, not typeset."""
BARE_FUNCTION = regex.compile(r"(?<![\\\p{L}])(?=(?:sin|cos|tan|cot|log|ln|exp|pi)\b)")
BARE_ROOT = regex.compile(r"(?<![\\\p{L}])sqrt\s*\(([^()]*)\)")
PACKAGES = ("math-verify", "latex2sympy2_extended", "sympy")


def math_match(
    completion: str,
    reference: str | None,
    references: Sequence[Any] | None = None,
    within: str | None = None,
    digits: int = 6,
    seconds: float = 3.0,
) -> Score:
    """Return 1 when the mathematics of the answer equals the reference (1/2 = 0.5 = \\frac{2}{4}), else 0.

    The last \\boxed{} counts; without one an answer that is nothing but mathematics, with or without dollars; and
    otherwise what math-verify finds in the text: LaTeX between dollars or a plain number, after "final answer is" or
    "answer" if there, else the last.

    Raises TimeoutError when the comparison needs more than ``seconds`` of the processor: the reward is then null.

    Args:
        completion: the answer.
        reference: the reference answer.
        references: further accepted answers.
        within: which part of the answer counts.
        digits: decimal places to which numbers are compared.
        seconds: of processor time for one answer, see `run_within`.
    """
    accepted = accepted_answers(reference, references)
    if not accepted:
        return Score(None, {"reason": NO_REFERENCE})
    part = answer_part(completion, within)
    if part is None:
        return Score(0.0, {"reason": NOTHING_WITHIN})
    detail: dict[str, Any] = {"reference": shown(accepted[0])}
    _load()  # before the limit begins: an import that is cut off leaves half a package behind
    if not part.strip():
        return Score(0.0, detail | {"reason": "no mathematics in the answer"})
    return run_within(seconds, partial(_compare, part, accepted, digits, detail))


def _compare(part: str, accepted: Sequence[str], digits: int, detail: dict[str, Any]) -> Score:
    expected = [(text, known) for text in accepted if (known := _parse_reference(text))]
    if not expected:
        return Score(None, detail | {"reason": "no mathematics in the reference"})
    parsed = _parse(part)
    if not parsed:
        return Score(0.0, detail | {"reason": "no mathematics in the answer"})
    detail["answer"] = shown(str(parsed[-1]))
    matched = next((text for text, known in expected if _is_equal(known, parsed, digits)), None)
    if matched is not None:
        detail["reference"] = shown(matched)
    return Score(float(matched is not None), detail)


def math_match_identity(within: str | None = None, digits: int = 6, seconds: float = 3.0) -> dict[str, Any]:
    """Return what decides the reward: the arguments, and the versions of the packages."""
    packages = {name: version(name) for name in PACKAGES}
    return {"within": within, "digits": digits, "seconds": seconds, "packages": packages}


@lru_cache(maxsize=1)
def _load() -> None:
    """Import math-verify, and keep it from warning that its own time limit is off; ours replaces it."""
    import math_verify  # noqa: F401

    logging.getLogger("math_verify").setLevel(logging.ERROR)


def _parse(text: str) -> list[Any]:
    """Return what math-verify reads: expressions and, last, the text that they were read from; empty = nothing."""
    from math_verify import parse

    try:
        parsed: list[Any] = parse(_delimited(text), parsing_timeout=None, raise_on_error=True)
    except Exception:  # the parsers raise all sorts of errors on malformed LaTeX; it is then no mathematics
        return []
    return parsed


def _delimited(text: str) -> str:
    """Return the last box of the text, or all of it if it is nothing but mathematics, between dollars."""
    box = LAST_BOX.search(text) if "\\boxed" in text else None
    if box:
        return "$" + str(box["content"]).strip() + "$"
    if DELIMITED.search(text) or PROSE.search(NAMED.sub("", text)):
        return text
    return _typeset(text)


def _typeset(text: str) -> str:
    """Return plain mathematics as LaTeX between dollars: functions and roots get their backslash."""
    roots = BARE_ROOT.sub(r"\\sqrt{\1}", text.strip().replace("**", "^"))
    return "$" + str(BARE_FUNCTION.sub(r"\\", roots)) + "$"


@lru_cache(maxsize=4096)
def _parse_reference(text: str) -> tuple[Any, ...]:
    return tuple(_parse(text if DELIMITED.search(text) else _typeset(text)) or _parse(text))


def _is_equal(expected: tuple[Any, ...], parsed: list[Any], digits: int) -> bool:
    from math_verify import verify

    if str(expected[-1]).strip() == str(parsed[-1]).strip():
        return True
    try:
        return bool(verify(list(expected), parsed, float_rounding=digits, timeout_seconds=None, raise_on_error=True))
    except Exception:  # two things that sympy cannot compare are not equal
        return False
