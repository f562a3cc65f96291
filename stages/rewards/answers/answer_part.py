"""What the rewards of this folder share: which part of an answer counts, and what it is compared with."""

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
