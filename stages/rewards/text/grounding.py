"""Rewards for answers that keep to what they were given: the passage, and what the user said before.

The passage is the metadata key ``context``: a text, or a list of texts. All three compare strings: they find what was
made up in other words only, not what was turned round, and they do not tell a good paraphrase from an invention. The
user's words are the messages of role user, the last question included; what the assistant said is no evidence.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import regex

from pipeline.errors import RewardError
from stages.rewards.base import Score, check_range
from stages.rewards.words import (
    MOST_LISTED,
    clipped,
    content_words,
    folded,
    ngrams,
    occurs,
    sentences,
    stop_set,
    words,
)

MOST_QUOTES = 1000
"""Distinct quotations that are looked up; each costs a pass over the context, and an answer may consist of quotes."""

MOST_OMISSIONS = 10
"""Omissions within one quotation that are understood as such, for the same reason."""

QUOTE = regex.compile(
    r'(?<!\p{Nd})"([^"\n]++)"'  # after a digit it means inches
    '|\u201e([^\u201e\u201c\u201d"]++)[\u201c\u201d"]'  # German and Polish
    "|\u201c([^\u201c\u201d]++)\u201d"
    "|\u00ab([^\u00ab\u00bb]++)\u00bb"
    "|\u2039([^\u2039\u203a]++)\u203a"
    "|\u300c([^\u300c\u300d]++)\u300d"
    "|\u300e([^\u300e\u300f]++)\u300f"
    "|\u201a([^\u201a\u2018]++)\u2018"
    "|(?<![\\w\u00bb])\u00bb([^\u00ab\u00bb]++)\u00ab"  # German books
    "|(?<!\\S)\u201d([^\u201c\u201d]++)\u201d"  # Swedish and Finnish
    # the single marks are apostrophes as well: they open after no letter and close before none
    "|(?<!\\w)\u2018((?:[^\u2018\u2019\n]|\u2019(?=\\w))++)\u2019"
    "|(?<!\\w)'([^'\\s](?:[^'\\n]|(?<=\\w)'(?=\\w))*+)'(?!\\w)"
)
OMISSION = regex.compile(r"\s*+[\[(]?(?:\.\.\.|\u2026)[\])]?\s*+")
OUTER_PUNCTUATION = " .,;:!?\u3002\u3001\uff0c"

NUMBER = regex.compile(r"(?<![\p{L}\p{N}])\p{Nd}++(?:[.,]\p{Nd}++)*+")
LIST_MARKER = regex.compile(r"^[ \t]*+\p{Nd}{1,3}[.)][ \t]++(?=\S)", regex.MULTILINE)
THOUSANDS = regex.compile(r"\d{1,3}([.,])\d{3}(?:\1\d{3})*+")
NAME = regex.compile(r"(?<![\p{L}\p{M}\p{N}])\p{Lu}[\p{L}\p{M}\p{N}]*+")
BEFORE_FIRST_WORD = regex.compile(r"[^\p{L}\p{N}]*+")
LOWER_CASE = regex.compile(r"\p{Ll}")

Context = str | list[str] | None


def overlap(
    completion: str,
    context: Context = None,
    messages: list[dict[str, Any]] | None = None,
    include_messages: bool = False,
    length: int = 2,
    stop_words: str | Sequence[str] = "en",
) -> Score:
    """Return the share of the answer's distinct content n-grams that stand in the context; null without context.

    An n-gram is ``length`` neighbouring content words, stop words left out; a shorter answer or passage is compared by
    shorter ones. With ``include_messages`` the user's messages are context, too. An answer without content words gets
    0.
    """
    check_range("length", length, 1)
    passages = _evidence(context, messages if include_messages else None)
    if not passages:
        return Score(None, {"reason": "no context"})
    answer = content_words(completion, stop_words)
    size = min(length, len(answer))
    if not size:
        return Score(0.0, {"num_ngrams": 0, "reason": "no content words in the answer"})
    known = {ngram for passage in passages for ngram in ngrams(content_words(passage, stop_words), size)}
    said = dict.fromkeys(ngrams(answer, size))
    unsupported = [ngram for ngram in said if ngram not in known]
    return Score(
        1 - len(unsupported) / len(said),
        {
            "num_ngrams": len(said),
            "num_unsupported": len(unsupported),
            "unsupported": [clipped(" ".join(ngram)) for ngram in unsupported[:MOST_LISTED]],
        },
    )


def quotes(
    completion: str,
    context: Context = None,
    messages: list[dict[str, Any]] | None = None,
    include_messages: bool = False,
    without_quotes: float = 1.0,
) -> Score:
    """Return the share of the answer's distinct quotations that stand word for word in the context.

    Quotation marks of every style count; single ones only where they cannot be apostrophes. Case, white space, width
    and the shape of quotes and dashes make no difference, nor does punctuation at the ends of the quotation; the
    parts around an omission (... or [...]) are looked up one by one, and each must stand there. A quotation must begin
    and end with whole words. With ``include_messages`` the user's messages are context, too. ``without_quotes`` is the
    reward of an answer that quotes nothing. Null without context. Only the first 1,000 distinct quotations, and 10
    omissions in each, count.
    """
    passages = [folded(passage) for passage in _evidence(context, messages if include_messages else None)]
    if not passages:
        return Score(None, {"reason": "no context"})
    spans = (next(group for group in match.groups() if group) for match in QUOTE.finditer(completion))
    distinct = {folded(span).strip(OUTER_PUNCTUATION): span for span in spans}
    distinct.pop("", None)
    found: list[str] = []
    invented: list[str] = []
    for quote, span in list(distinct.items())[:MOST_QUOTES]:
        parts = [part.strip(OUTER_PUNCTUATION) for part in OMISSION.split(quote, MOST_OMISSIONS)]
        is_found = all(any(occurs(passage, part) for passage in passages) for part in parts if part)
        (found if is_found else invented).append(clipped(span, 200))
    num_quotes = len(found) + len(invented)
    detail = {"num_quotes": num_quotes, "found": found[:MOST_LISTED], "invented": invented[:MOST_LISTED]}
    return Score(len(found) / num_quotes if num_quotes else without_quotes, detail)


def conversation(
    completion: str,
    messages: list[dict[str, Any]] | None = None,
    context: Context = None,
    stop_words: str | Sequence[str] = "en",
    without_facts: float = 1.0,
) -> Score:
    """Return the share of the answer's distinct numbers and names that the user, or the context, has mentioned.

    A number is compared by value: 1,234 equals 1234, and 3.50 equals 3,5; a list's own numbering is left out, and so
    are numbers in words. A name is a capitalised word that does not open a sentence (or one that has further
    capitals, as USA), no stop word; in German that is every noun, and scripts without capitals have none. A date or a
    result that the answer rightly adds counts as unsupported. ``without_facts`` is the reward of an answer without
    numbers and names. Null when there is neither a user's message nor a context.
    """
    passages = _evidence(context, messages)
    if not passages:
        return Score(None, {"reason": "no earlier turns and no context"})
    facts = dict.fromkeys([*_numbers(completion), *_names(completion, stop_words)])
    known = {number for passage in passages for number in _numbers(passage)}
    known |= {word for passage in passages for word in words(passage)}
    unsupported = [fact for fact in facts if fact not in known]
    detail = {
        "num_facts": len(facts),
        "supported": [clipped(fact) for fact in facts if fact in known][:MOST_LISTED],
        "unsupported": [clipped(fact) for fact in unsupported[:MOST_LISTED]],
    }
    return Score(1 - len(unsupported) / len(facts) if facts else without_facts, detail)


def _evidence(context: Context, messages: list[dict[str, Any]] | None) -> list[str]:
    passages = [context] if isinstance(context, str) else context or []
    if not isinstance(passages, list) or not all(isinstance(passage, str) for passage in passages):
        raise RewardError(
            f"context is {clipped(repr(context))}; expected a text or a list of texts: correct the metadata key context"
        )
    turns = [str(m.get("content") or "") for m in messages or [] if m.get("role") == "user"]
    return [passage for passage in [*passages, *turns] if passage.strip()]


def _numbers(text: str) -> Iterator[str]:
    for number in NUMBER.findall(unicodedata.normalize("NFKC", LIST_MARKER.sub(" ", text))):
        digits = "".join(c if c in ".," else str(unicodedata.decimal(c)) for c in number)
        if THOUSANDS.fullmatch(digits):
            digits = digits.replace(",", "").replace(".", "")
        whole, point, decimals = digits.replace(",", ".").rpartition(".")
        whole, decimals = (whole.replace(".", ""), decimals.rstrip("0")) if point else (decimals, "")
        yield (whole.lstrip("0") or "0") + (f".{decimals}" if decimals else "")


def _names(text: str, stop_words: str | Sequence[str]) -> Iterator[str]:
    left_out = stop_set(stop_words)
    for sentence in sentences(text):
        if not LOWER_CASE.search(sentence):
            continue  # all in capitals, or no capitals in this script: nothing stands out as a name
        opening = BEFORE_FIRST_WORD.match(sentence).end()
        for match in NAME.finditer(sentence):
            name = match.group()
            if match.start() == opening and not any(c.isupper() for c in name[1:]):
                continue
            is_abbreviation = len(name) > 1 and name.isupper()  # US is no pronoun
            yield from (word for word in words(name) if is_abbreviation or word not in left_out)
