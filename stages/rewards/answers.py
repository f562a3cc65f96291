"""What the rewards of this folder share: which part of an answer counts, and what it is compared with."""

import unicodedata
from collections import deque
from collections.abc import Sequence
from functools import lru_cache

import regex

from pipeline.errors import RewardError

SECONDS_PER_SEARCH = 2.0
"""Guards against a user's pattern that takes exponential time on some answer; its reward is then null."""
LONGEST_SHOWN = 200
"""Characters of an answer that a detail repeats; the answer itself lies in the completions."""
NO_REFERENCE = "no reference answer"
NOTHING_WITHIN = "the pattern of 'within' does not occur"

UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x30FF),  # Japanese syllables
    (0x31F0, 0x9FFF),  # Chinese characters
    (0xAC00, 0xD7AF),  # Korean, which has blanks but writes particles onto the words
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
"""Code points of the scripts in which a word may begin and end without a blank."""


def answer_part(completion: str, within: str | None) -> str | None:
    """Return the part of the answer that counts, or None when there is none.

    ``within`` is a regular expression, in which a dot also matches a line break; its last match counts: the group
    ``answer`` if it has one, else its first group, else all of it. Null = the whole answer counts.
    """
    if within is None:
        return completion
    pattern = compiled(within)
    last = deque(pattern.finditer(completion, timeout=SECONDS_PER_SEARCH), maxlen=1)
    if not last:
        return None
    part: str | None = last[0]["answer" if "answer" in pattern.groupindex else min(pattern.groups, 1)]
    return part


@lru_cache(maxsize=256)
def compiled(pattern: str) -> "regex.Pattern[str]":
    """Return the pattern compiled by the package ``regex``, whose letters and words know every script.

    Raises:
        RewardError: when it is no regular expression.
    """
    try:
        return regex.compile(pattern, regex.DOTALL)
    except regex.error as error:
        raise RewardError(f"{pattern!r} is no regular expression ({error}): correct the reward's arguments") from error


def accepted_answers(reference: str | None, references: Sequence[object] | None) -> list[str]:
    """Return the reference answer and the further ones of the metadata key ``references``; empty = none is known."""
    if isinstance(references, str) or not isinstance(references, Sequence | None):
        raise RewardError(
            f"the metadata key references holds {references!r}, expected a list of texts: correct the source"
        )
    first = [] if reference is None else [reference]
    return first + [str(text) for text in references or () if text is not None and str(text) != reference]


def shown(text: str) -> str:
    """Return the text as a detail repeats it: its first characters."""
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "..."


def occurs(text: str, phrase: str) -> bool:
    """Return whether the phrase stands in the text as whole words or whole numbers."""
    start = text.find(phrase)
    while start >= 0:
        end = start + len(phrase)
        if _is_border(text, start) and _is_border(text, end):
            return True
        start = text.find(phrase, start + 1)
    return False


def _is_border(text: str, position: int) -> bool:
    """Return whether a word or number can begin or end at this position."""
    if position in (0, len(text)):
        return True
    before, after = text[position - 1], text[position]
    if _is_in_word(before) and _is_in_word(after):
        # a mark belongs to the letter before it even where words have no blanks between them
        return (_is_unspaced(before) or _is_unspaced(after)) and not unicodedata.category(after).startswith("M")
    if before in ".," and after.isdecimal():  # 5 does not occur in 2.5
        return not (position > 1 and text[position - 2].isdecimal())
    if after in ".," and before.isdecimal():  # nor in 5.2
        return not text[position + 1 : position + 2].isdecimal()
    return True


def _is_in_word(character: str) -> bool:
    return character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")


def _is_unspaced(character: str) -> bool:
    code = ord(character)
    return code >= UNSPACED[0][0] and any(low <= code <= high for low, high in UNSPACED)
