"""A reward that compares mathematics by meaning, with math-verify."""

import logging
from collections.abc import Sequence
from functools import lru_cache, partial
from importlib.metadata import version
from typing import Any

from stages.rewards.answers.answer_part import NO_REFERENCE, NOTHING_WITHIN, accepted_answers, answer_part, shown
from stages.rewards.answers.equality import is_same
from stages.rewards.answers.extraction import is_prose, mathematics_of, words_of
from stages.rewards.answers.latex import Unreadable
from stages.rewards.answers.reading import Reading, is_same_text, read, read_answer
from stages.rewards.answers.time_limit import run_within
from stages.rewards.base import Score

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
    otherwise the mathematics after "####", "final answer is" or "answer is", else the last of the text. All of it must
    be readable. Units behind a number do not count, words are compared as words.

    Null when not all of the answer or of the reference could be read, and when the two cannot be told apart. Raises
    TimeoutError when the comparison needs more than ``seconds`` of the processor: the reward is then null too.

    Args:
        completion: the answer.
        reference: the reference answer.
        references: further accepted answers.
        within: which part of the answer counts.
        digits: decimal places to which numbers are compared; significant digits for numbers below 1.
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
    return run_within(seconds, partial(_compared, part, accepted, digits, detail))


def math_match_identity(within: str | None = None, digits: int = 6, seconds: float = 3.0) -> dict[str, Any]:
    """Return what decides the reward: the arguments, and the versions of the packages."""
    packages = {name: version(name) for name in PACKAGES}
    return {"within": within, "digits": digits, "seconds": seconds, "packages": packages}


@lru_cache(maxsize=1)
def _load() -> None:
    """Import math-verify, and keep it from warning that its own time limit is off; ours replaces it."""
    import math_verify  # noqa: F401

    logging.getLogger("math_verify").setLevel(logging.ERROR)


def _compared(part: str, accepted: list[str], digits: int, detail: dict[str, Any]) -> Score:
    """Return 1 if an accepted answer is the same, else null if one may be, else 0; the detail gets what was read."""
    known = [(text, _read_reference(text)) for text in accepted]
    if not any(reading or text.strip() for text, reading in known):
        return Score(None, detail | {"reason": "no mathematics in the reference"})
    answer = mathematics_of(part)
    if answer is None and any(reading and reading.is_in_words for _, reading in known):
        answer = words_of(part)
        same = next((text for text, reading in known if reading and reading.says(answer)), None)
        return Score(
            float(same is not None), detail | {"answer": shown(answer), "reference": shown(same or accepted[0])}
        )
    if answer is None:
        return Score(0.0, detail | {"reason": "no mathematics in the answer"})
    detail["answer"] = shown(answer)
    same = next((text for text in accepted if is_same_text(text, answer)), None)
    if same is not None:
        return Score(1.0, detail | {"reference": shown(same)})
    if all(reading is None for _, reading in known):
        return Score(None, detail | {"reason": "not all of the reference could be read"})
    try:
        found = read_answer(answer)
    except Unreadable:
        return Score(None, detail | {"reason": "not all of the answer could be read"})
    undecided = "" if all(reading for _, reading in known) else "not all of the reference could be read"
    for text, reading in known:
        is_equal = reading and is_same(reading, found, digits)
        if is_equal:
            return Score(1.0, detail | {"reference": shown(text)})
        if is_equal is None and reading:
            undecided = "answer and reference cannot be told apart or compared"
    return Score(None, detail | {"reason": undecided}) if undecided else Score(0.0, detail)


@lru_cache(maxsize=4096)
def _read_reference(text: str) -> Reading | None:
    """Return what a reference says, None when not all of it could be read; a worked solution says its answer."""
    whole = [] if "\\boxed" in text else [text]
    found = mathematics_of(text) if not whole or is_prose(text) else None
    for candidate in [*whole, *([found] if found else [])]:
        try:
            return read(candidate)
        except Unreadable:
            continue
    return None
